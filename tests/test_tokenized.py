"""Folders of codes as training samples: several of them, and what does not go together."""

import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from coded_cases import CODEC, K, make_builder, write_folder

from higgs.chat import ChatBuilder
from higgs.data.draws import Source
from higgs.data.shards import CodeSource, write_index, write_shard
from higgs.data.stream import DataConfig, Stream, Unreadable, once
from higgs.data.tokenized import TokenizedDataset
from higgs.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("folders")
    first = write_folder(folder / "a", [[5], [3, 4], [2]], shard_samples=2)
    return [first, write_folder(folder / "b", [[40], [6], [1], [2, 2], [7, 1]], seed=1)]


@pytest.fixture
def open_folders(tokenizer_folder: Path):
    def make(*paths: Path, weights: list[float] | None = None) -> TokenizedDataset:
        sources = [Source(str(path), weights[place] if weights else None) for place, path in enumerate(paths)]
        return TokenizedDataset(sources, ChatBuilder(), make_builder(tokenizer_folder))

    return make


def test_folders_follow_one_another(folders, open_folders) -> None:
    both, alone = open_folders(*folders), [open_folders(folder) for folder in folders]
    assert both.sizes == [3, 5] and len(both) == 8
    place = 0
    for dataset in alone:
        for number in range(len(dataset)):
            ours, theirs = both.row(place), dataset.row(number)
            assert both.id(place) == dataset.id(number)
            assert both.length(place) == dataset.length(number) == len(ours.ids)
            for name in ("ids", "frames", "labels", "frame_labels"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
            place += 1
    assert both.digest != alone[0].digest


def test_weights_decide_the_mix(folders, open_folders) -> None:
    dataset = open_folders(*folders, weights=[3.0, 1.0])
    config = DataConfig("unused", batch_size=8, bucket_batches=1)
    names = [name for batch in islice(Stream(dataset, config, seed=0), 10) for name in batch.ids]
    # Both folders name their samples c0, c1, …; of the second one's, drawn four times each, two have names of their own.
    assert len(names) == 80
    assert names.count("c3") == names.count("c4") == 4
    assert [names.count(f"c{number}") for number in range(3)] == [24, 24, 24]


def test_a_dataset_goes_to_a_process_that_is_spawned(folders, open_folders) -> None:
    dataset = open_folders(*folders)
    before = dataset.row(4)  # opens a shard
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.row(4).frames, before.frames)


def test_too_long_conversations_are_reported(folders, open_folders) -> None:
    dataset = open_folders(*folders)
    longest = max(dataset.length(sample) for sample in range(8))
    for layout in ("bucket", "pack"):
        config = DataConfig("unused", batch_size=2, layout=layout, row_length=longest - 1, max_unreadable=0.5)
        reported = [one for batch in islice(Stream(dataset, config, seed=0), 8) for one in batch.unreadable]
        assert reported
        assert set(reported) == {Unreadable("c0", f"{longest} tokens, over data.row_length={longest - 1}")}
        once_reported = [one for batch in once(dataset, config) for one in batch.unreadable]
        assert len(once_reported) == 1


def write_other(folder: Path, samples: list, unreadable: list, **codec) -> Path:
    folder.mkdir()
    made_by = replace(CODEC, **codec)
    record = write_shard(folder, 0, [], samples, unreadable, made_by)
    write_index(folder, CodeSource("digest", 1, 1, 60.0, made_by), [record])
    return folder


def test_what_does_not_go_together_is_named(folders, open_folders, tmp_path: Path) -> None:
    sample = open_folders(folders[0]).folders[0].sample(0)
    silent = replace(sample, messages=sample.messages[:2])
    fault = {"id": "gone", "reason": "does not exist"}
    with pytest.raises(UserError, match="different codecs"):
        open_folders(folders[0], write_other(tmp_path / "other", [silent], [], weights="others"))
    with pytest.raises(UserError, match=f"2 codebooks of 16 codes, but the model reads {K} of at most 16"):
        open_folders(write_other(tmp_path / "two", [silent], [], num_codebooks=2))
    with pytest.raises(UserError, match="codebooks of 32 codes"):
        open_folders(write_other(tmp_path / "many", [silent], [], codebook_size=32))
    with pytest.raises(UserError, match="holds no sample that could be read"):
        open_folders(write_other(tmp_path / "empty", [], [fault]))
    dataset = open_folders(folders[0], write_other(tmp_path / "some", [silent], [fault]))
    assert dataset.unreadable == [Unreadable("gone", "does not exist")]
    assert len(dataset) == 4
