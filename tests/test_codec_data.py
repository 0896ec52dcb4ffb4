"""Crops for codec training: where they lie, how loud they are, and what happens to clips that cannot be read.

Shapes: B crops, L samples.
"""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from higgs.audio import load_audio, load_part, sound_info
from higgs.data.crops import CropDataset
from higgs.data.draws import read_sources
from higgs.data.manifest import SoundClip
from higgs.data.stream import DataConfig, StepBatch, Stream, once
from higgs.errors import UserError

RATE = 24000


def ramp(path: Path, seconds: float, rate: int = RATE) -> str:
    """A file whose sample at second t is t / 100: a crop tells where it was taken."""
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, (time / 100).astype(np.float32), rate, subtype="FLOAT")
    return path.name


def write_manifest(path: Path, *clips: dict) -> Path:
    path.write_text("\n".join(json.dumps(clip) for clip in clips), encoding="utf-8")
    return path


def dataset_of(*manifests: Path, seconds: float = 0.5, gain_db: float = 0.0) -> CropDataset:
    sources = read_sources([str(path) for path in manifests])
    return CropDataset(sources, sample_rate=RATE, seconds=seconds, gain_db=gain_db)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    long, short = ramp(folder / "long.wav", 6.0), ramp(folder / "short.wav", 0.2)
    return write_manifest(
        folder / "clips.jsonl",
        {"audio": long, "kind": "speech"},
        {"audio": long, "start": 2.0, "duration": 1.0, "kind": "music"},
        {"audio": long, "start": 5.8, "duration": 7},
        {"audio": short, "id": "short"},
    )


def config(**changes) -> DataConfig:
    return DataConfig(**{"train": "unused", "batch_size": 4, **changes})


def test_crops_lie_inside_their_clip_everywhere(manifest: Path) -> None:
    dataset = dataset_of(manifest)
    found: dict[str, list[float]] = {name: [] for name in ("long.wav", "long.wav@2")}
    for batch in islice(Stream(dataset, config(), seed=0), 100):
        (micro,) = batch.micro
        assert micro["waveform"].shape == (4, 1, RATE // 2)
        assert micro["waveform"].dtype == torch.float32
        assert sorted(batch.ids) == ["long.wav", "long.wav@2", "long.wav@5.8", "short"], "each once an epoch"
        for name, wave in zip(batch.ids, micro["waveform"][:, 0], strict=True):
            sounding = {"long.wav@5.8": 0.2, "short": 0.2}.get(name, 0.5)
            length = round(sounding * RATE)
            assert not wave[length:].any(), "silence follows a clip that is too short"
            start = 100 * float(wave[0])
            torch.testing.assert_close(wave[:length], (start + torch.arange(length) / RATE) / 100)
            if name in found:
                found[name].append(start)
            else:
                assert start == pytest.approx(5.8 if name == "long.wav@5.8" else 0.0, abs=1e-3)
    for name, low, high in (("long.wav", 0.0, 5.5), ("long.wav@2", 2.0, 2.5)):
        starts = np.array(found[name])
        assert low - 1e-3 <= starts.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < starts.max() <= high + 1e-3
        assert abs(starts.mean() - (low + high) / 2) < 0.1 * (high - low)


@given(peak=st.floats(1e-4, 2.0), loudness=st.floats(0, 1), gain_db=st.sampled_from([0.0, 6.0, 40.0]))
def test_loudness_changes_but_never_into_clipping(peak: float, loudness: float, gain_db: float) -> None:
    dataset = CropDataset.__new__(CropDataset)
    dataset.gain_db = gain_db
    wave = torch.tensor([0.0, -peak, peak / 2])
    louder = dataset.jitter(wave, loudness)
    decibels = 20 * np.log10(float(louder.abs().max()) / peak)
    assert abs(decibels) <= gain_db + 1e-3
    assert float(louder.abs().max()) <= max(1.0, peak) + 1e-6
    if float(wave.abs().max()) * 10 ** (gain_db * (2 * loudness - 1) / 20) <= 1.0:
        assert decibels == pytest.approx(gain_db * (2 * loudness - 1), abs=1e-3)
    assert not dataset.jitter(torch.zeros(3), loudness).any()


def test_gains_are_spread_evenly(manifest: Path) -> None:
    plain, jittered = dataset_of(manifest), dataset_of(manifest, gain_db=6.0)
    gains = []
    for one, other in zip(
        islice(Stream(plain, config(), seed=0), 60), islice(Stream(jittered, config(), seed=0), 60), strict=True
    ):
        quiet, loud = one.micro[0]["waveform"], other.micro[0]["waveform"]
        gains += (20 * torch.log10(loud.abs().amax(dim=(1, 2)) / quiet.abs().amax(dim=(1, 2)))).tolist()
    counts, _ = np.histogram(gains, bins=4, range=(-6, 6))
    assert counts.sum() == 240
    assert counts.min() > 40, "the same crops, a quarter of them in each quarter of the range"


def waves(batch: StepBatch) -> torch.Tensor:
    return torch.cat([micro["waveform"] for micro in batch.micro])


def test_crops_do_not_depend_on_ranks_workers_or_resuming(manifest: Path) -> None:
    dataset = dataset_of(manifest, manifest, gain_db=6.0)
    alone = list(islice(Stream(dataset, config(), seed=7), 6))
    ranks = [Stream(dataset, config(workers=rank), seed=7, rank=rank, size=2, accumulate=2) for rank in range(2)]
    for step, whole in enumerate(alone):
        if step == 3:
            state = json.loads(json.dumps(ranks[0].state_dict()))
            ranks = [Stream(dataset, config(workers=1 - rank), seed=7, rank=rank, size=2) for rank in range(2)]
            for stream in ranks:
                stream.load_state_dict(state)
        parts = [next(stream) for stream in ranks]
        together = {name: wave for part in parts for name, wave in zip(part.ids, waves(part), strict=True)}
        assert sorted(name for part in parts for name in part.ids) == sorted(whole.ids)
        assert torch.equal(
            torch.stack(sorted(torch.cat([waves(part) for part in parts]), key=lambda wave: float(wave.sum()))),
            torch.stack(sorted(waves(whole), key=lambda wave: float(wave.sum()))),
        )
        assert set(together) == set(whole.ids)
    other = next(Stream(dataset, config(), seed=8))
    assert not torch.equal(waves(other), waves(alone[0]))


@pytest.fixture
def half_broken(manifest: Path, tmp_path: Path) -> Path:
    (tmp_path / "broken.wav").write_text("this is no sound")
    soundfile.write(tmp_path / "nan.wav", np.full(48000, np.nan, dtype=np.float32), RATE, subtype="FLOAT")
    good = [{"audio": str(manifest.parent / "long.wav"), "id": f"good{number}"} for number in range(17)]
    bad = [{"audio": name} for name in ("broken.wav", "nan.wav", "gone.wav")]
    late = {"audio": str(manifest.parent / "short.wav"), "start": 3.0, "id": "late"}
    return write_manifest(tmp_path / "half.jsonl", *good, *bad, late)


def test_unreadable_clips_are_reported_and_replaced(half_broken: Path) -> None:
    dataset = dataset_of(half_broken)
    settings = config(batch_size=7, max_unreadable=0.5)
    stream, again = (Stream(dataset, settings, seed=0) for _ in range(2))
    reasons = {"broken.wav": "as sound", "nan.wav": "NaN", "gone.wav": "does not exist", "late": "begins at 3.00 s"}
    for _ in range(2):  # epochs
        reported = []
        for _ in range(3):
            batch, same = next(stream), next(again)
            assert len(waves(batch)) == 7 == batch.samples
            assert all(name.startswith("good") for name in batch.ids)
            assert torch.equal(waves(batch), waves(same)) and batch.ids == same.ids
            reported += batch.unreadable
        assert {one.id for one in reported} == set(reasons)
        for one in reported:
            assert reasons[one.id] in one.reason
    with pytest.raises(UserError, match=r"of \d+ samples could not be used, more than data\.max_unreadable=0\.1"):
        list(islice(Stream(dataset, config(batch_size=7, max_unreadable=0.1), seed=0), 4))


def test_nothing_readable_at_all(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "gone.jsonl", {"audio": "gone.wav"}, {"audio": "lost.wav"})
    with pytest.raises(UserError, match="20 clips in a row cannot be read"):
        next(Stream(dataset_of(manifest), config(), seed=0))
    (batch,) = once(dataset_of(manifest), config())
    assert batch.micro == [] and batch.ids == [] and len(batch.unreadable) == 2


def test_validation_crops_are_fixed_and_as_loud_as_they_are(manifest: Path, half_broken: Path) -> None:
    dataset = dataset_of(manifest, half_broken, gain_db=6.0)
    first, second = (list(once(dataset, config(workers=workers))) for workers in (0, 1))
    assert [batch.ids for batch in first] == [batch.ids for batch in second]
    assert all(torch.equal(waves(one), waves(other)) for one, other in zip(first, second, strict=True) if one.ids)
    names = [name for batch in first for name in batch.ids]
    assert len(names) == len(set(names)) == 4 + 17
    assert {one.id for batch in first for one in batch.unreadable} == {"broken.wav", "nan.wav", "gone.wav", "late"}
    ranks = [list(once(dataset, config(), rank=rank, size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(name for run in ranks for batch in run for name in batch.ids) == sorted(names)
    step = torch.cat([waves(batch) for batch in first if batch.ids]).diff(dim=-1)[..., 0]
    torch.testing.assert_close(step, torch.full_like(step, 1 / RATE / 100), rtol=1e-2, atol=0)


def test_parts_of_real_files_are_read_and_resampled(shared_data: Path) -> None:
    for name in ("ljspeech/LJ001-0001.flac", "speech/jfk.flac"):
        path = shared_data / name
        info = sound_info(path)
        whole = load_audio(str(path), RATE)
        assert len(whole) == pytest.approx(info.seconds * RATE, abs=2)
        part = load_part(path, RATE, 1.0, 0.5)
        assert len(part) == RATE // 2
        # The resampler sees silence beyond the part's ends.
        torch.testing.assert_close(part[100:-100], whole[RATE : RATE + RATE // 2][100:-100], rtol=0, atol=2e-3)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_every_crop_has_the_same_length_whatever_the_rate(tmp_path: Path, rate: int) -> None:
    ramp(tmp_path / "a.wav", 1.37, rate)
    dataset = dataset_of(write_manifest(tmp_path / "m.jsonl", {"audio": "a.wav"}), seconds=0.333)
    clip = SoundClip("a", str(tmp_path / "a.wav"), 0.1)
    for place in (0.0, 0.37, 1.0):
        wave = dataset.crop(clip, place)
        assert len(wave) == round(0.333 * RATE)
        assert 100 * float(wave[200:-200].mean()) == pytest.approx(0.1 + place * (1.27 - 0.333) + 0.1665, abs=2e-3)
        assert (wave[-40:-20] > 0).all()
