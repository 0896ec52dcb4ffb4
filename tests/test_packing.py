"""Padded and packed batches before the real decoder: who sees whom, and what is learnt.

Shapes: B rows, T tokens, F delayed frames, K codebooks, C channels.
"""

from pathlib import Path

import pytest
import torch
from coded_cases import CODES, K, make_builder, trained_clips, write_folder
from decoder_cases import SMALL, randomize
from torch import Tensor

from higgs import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from higgs.batch import BatchFeature
from higgs.chat import ChatBuilder
from higgs.data.draws import Draw, read_sources
from higgs.data.stream import DataConfig, Stream
from higgs.data.tokenized import TokenizedDataset
from higgs.delay import revert_delay_pattern, split_clips
from higgs.labels import IGNORE
from higgs.model import LossSums, decoder_loss

CLIPS = [[7], [3, 5], [2, 6, 4], [3, 3], [], [11], [1, 2], [4, 4], [9, 1, 1], [5]]
BOS, EOS = CODES, CODES + 1


@pytest.fixture(scope="module")
def dataset(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    folder = write_folder(tmp_path_factory.mktemp("codes") / "out", CLIPS)
    return TokenizedDataset(read_sources(str(folder)), ChatBuilder(), make_builder(tokenizer_folder))


@pytest.fixture(scope="module")
def model(dataset: TokenizedDataset) -> HiggsAudioV2ForConditionalGeneration:
    tokenizer, tokens = dataset.builder.tokenizer, dataset.builder.tokens
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.token_to_id(tokens.bos),
        "eos_token_id": tokenizer.token_to_id(tokens.end_of_turn),
        "audio_bos_token_id": tokenizer.token_to_id(tokens.audio_bos),
        "audio_token_id": tokenizer.token_to_id(tokens.audio),
        "audio_delay_token_id": tokenizer.token_to_id(tokens.delay),
        "num_codebooks": K,
        "codebook_size": CODES + 2,
        "audio_stream_bos_id": BOS,
        "audio_stream_eos_id": EOS,
        "max_position_embeddings": 1024,
    }
    built = HiggsAudioV2ForConditionalGeneration(HiggsAudioV2Config(**{**SMALL, **ids}), use_text_head=True)
    return randomize(built).eval()


@pytest.fixture
def exact(model: HiggsAudioV2ForConditionalGeneration):
    yield model.double()
    model.float()


def batch_of(dataset: TokenizedDataset, rows: list[list[int]], row_length: int | None) -> BatchFeature:
    return dataset.collate([[Draw(sample, sample) for sample in row] for row in rows], None, row_length).batch


ROWS = [[0, 2, 4], [1, 3], [8, 6]]
PACKED_LENGTH = 400


def owners(dataset: TokenizedDataset, rows: list[list[int]], width: int) -> Tensor:
    """Which sample a token belongs to [B, T]; -1 is padding."""
    table = torch.full((len(rows), width), -1)
    for place, row in enumerate(rows):
        start = 0
        for sample in row:
            table[place, start : start + dataset.length(sample)] = sample
            start += dataset.length(sample)
    return table


def hidden_of(model, batch: BatchFeature) -> Tensor:
    return model.model(
        input_ids=batch["input_ids"],
        audio_input_ids=batch["audio_input_ids"],
        audio_input_ids_mask=batch["audio_input_ids_mask"],
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
    ).last_hidden_state


def loss_of(model, batch: BatchFeature) -> LossSums:
    placeholders = model.model.audio_placeholders(batch["input_ids"])
    return decoder_loss(
        model, hidden_of(model, batch), placeholders, batch["labels"], batch["audio_labels"],
        batch["audio_input_ids_mask"],
    )  # fmt: skip


class InputGradients:
    """The gradient of anything that a forward pass gave, with respect to the embedding of every token [B, T, C]."""

    def __init__(self, model, batch: BatchFeature) -> None:
        self.placeholders = model.model.audio_placeholders(batch["input_ids"])
        found: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
            for name, module in (("text", model.model.embed_tokens), ("audio", model.model.embed_audio_tokens))
        ]
        self.hidden = hidden_of(model, batch)
        for hook in hooks:
            hook.remove()
        self.inputs = [found["text"], found["audio"]]

    def of(self, value: Tensor) -> Tensor:
        text, audio = torch.autograd.grad(value, self.inputs, retain_graph=True)
        assert not text[self.placeholders].any(), "an audio frame takes the whole place of its token"
        total = text.clone()
        total[self.placeholders] = audio
        return total.abs().sum(dim=-1)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_no_position_sees_another_sample_or_the_future(exact, dataset: TokenizedDataset, layout: str) -> None:
    rows = ROWS if layout == "packed" else [[sample] for sample in (0, 2, 8, 4)]
    batch = batch_of(dataset, rows, PACKED_LENGTH if layout == "packed" else None)
    owner = owners(dataset, rows, batch["input_ids"].shape[1])
    gradients = InputGradients(exact, batch)
    direction = torch.randn(gradients.hidden.shape[-1], dtype=torch.double)
    column = torch.arange(owner.shape[1])
    for row in range(len(rows)):
        edges = (owner[row].diff() != 0).nonzero()[:, 0].tolist()  # the last token of each sample, and the next's first
        for place in {*column.tolist()[::9], *edges, *(edge + 1 for edge in edges)}:
            if owner[row, place] < 0:
                continue
            seen = gradients.of(gradients.hidden[row, place] @ direction)
            allowed = torch.zeros_like(owner, dtype=torch.bool)
            allowed[row] = (owner[row] == owner[row, place]) & (column <= place)
            assert not seen[~allowed].any(), f"row {row}, position {place} sees what it must not"
            assert (seen[allowed] > 0).all(), "and everything before it in its own sample"


def test_the_loss_of_a_sample_depends_on_its_own_tokens_alone(exact, dataset: TokenizedDataset) -> None:
    batch = batch_of(dataset, ROWS, PACKED_LENGTH)
    owner = owners(dataset, ROWS, PACKED_LENGTH)
    placeholders = exact.model.audio_placeholders(batch["input_ids"])
    gradients = InputGradients(exact, batch)
    for sample in (2, 3, 8):
        own = owner == sample
        labels = batch["labels"].masked_fill(~own, IGNORE)
        of_frames = torch.full_like(batch["audio_input_ids_mask"], False)
        of_frames[batch["audio_input_ids_mask"]] = own[placeholders]
        audio_labels = batch["audio_labels"].masked_fill(~of_frames[..., None], IGNORE)
        sums = decoder_loss(exact, gradients.hidden, placeholders, labels, audio_labels, batch["audio_input_ids_mask"])
        seen = gradients.of(sums.loss())
        assert not seen[~own].any()
        assert seen[own].any()


def flat(sums: LossSums) -> tuple[Tensor, Tensor]:
    values = torch.cat([sums.codebook_sum, sums.text_sum[None]])
    return values.double(), torch.cat([sums.codebook_count, sums.text_count[None]])


def test_packed_padded_and_single_samples_have_the_same_loss(model, dataset: TokenizedDataset) -> None:
    samples = [sample for row in ROWS for sample in row]
    with torch.no_grad():
        packed = flat(loss_of(model, batch_of(dataset, ROWS, PACKED_LENGTH)))
        padded = flat(loss_of(model, batch_of(dataset, [[sample] for sample in samples], None)))
        single = [flat(loss_of(model, batch_of(dataset, [[sample]], None))) for sample in samples]
    alone = sum(values for values, _ in single)
    for values, counts in (packed, padded):
        assert torch.equal(counts, sum(count for _, count in single))
        assert (counts > 0).all()
        torch.testing.assert_close(values, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["bucket", "pack"])
def test_what_a_stream_teaches(dataset: TokenizedDataset, layout: str) -> None:
    """No clip predicts the next, no sample the next; exactly K end codes for each trained clip; frames in order."""
    config = DataConfig("unused", batch_size=4, layout=layout, row_length=300, bucket_batches=2)
    stream = Stream(dataset, config, seed=0, accumulate=2)
    tokenizer = dataset.builder.tokenizer
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    trained_texts = 0
    for _ in range(6):
        step = next(stream)
        names = iter(step.ids)
        for batch in step.micro:
            ids, labels, mask = batch["input_ids"], batch["labels"], batch["audio_input_ids_mask"]
            if layout == "pack":
                assert ids.shape[1] == 300 and "attention_mask" not in batch
                real = ids != tokenizer.pad_token_id
                assert torch.equal(batch["position_ids"][real] == 0, ids[real] == bos)
                opens = real[:, :-1] & ~real[:, 1:]
                assert not batch["position_ids"][:, 1:][opens].any(), "padding is a piece of its own"
                steps = batch["position_ids"].diff(dim=1)
                assert ((steps == 1) | (batch["position_ids"][:, 1:] == 0)).all()
            else:
                assert torch.equal(batch["attention_mask"] == 1, ids != tokenizer.pad_token_id)
            assert (labels[ids == bos] == IGNORE).all(), "no sample predicts the first token of the next"
            assert (labels[ids == tokenizer.pad_token_id] == IGNORE).all()
            assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])
            trained_texts += int((labels != IGNORE).sum())
            for row in range(len(ids)):
                frames, targets = batch["audio_input_ids"][row][mask[row]], batch["audio_labels"][row][mask[row]]
                assert (batch["audio_labels"][row][~mask[row]] == IGNORE).all()
                samples = [next(names) for _ in range(int((ids[row] == bos).sum()))]
                check_row(dataset, [int(name[1:]) for name in samples], frames, targets)
    assert trained_texts > 0


def check_row(dataset: TokenizedDataset, samples: list[int], frames: Tensor, targets: Tensor) -> None:
    """The frames and labels [F, K] of a row that holds these samples."""
    folder = dataset.folders[0]
    clips, learnt = split_clips(frames, BOS), []
    for sample in samples:
        entry = folder.sample(sample)
        chat = dataset.renderer.build(entry.messages)
        for slot in chat.audio:
            codes, found = folder.codes(sample, slot.item["span"]), clips.pop(0)
            assert torch.equal(revert_delay_pattern(found)[1:-1].T, codes)
            label, targets = targets[: len(found)], targets[len(found) :]
            assert (label[0] == IGNORE).all(), "nothing before a clip predicts its first frame"
            assert not (label == BOS).any()
            trained = entry.messages[slot.message]["role"] == "assistant" and slot.message >= entry.start_index
            learnt.append(trained)
            if trained:
                assert ((label == EOS).sum(dim=0) == 1).all(), "each codebook learns to stop once"
                assert torch.equal(label[label != IGNORE], found[label != IGNORE])
                assert int((label != IGNORE).sum()) == K * (codes.shape[1] + 1)
            else:
                assert (label == IGNORE).all()
    assert not clips and not len(targets)
    assert sum(learnt) == sum(trained_clips(folder.sample(sample)) for sample in samples)


def test_batches_without_audio_work(model, dataset: TokenizedDataset) -> None:
    silent = CLIPS.index([])
    for rows, width in (([[silent]], None), ([[silent, silent]], 200)):
        batch = batch_of(dataset, rows, width)
        assert batch["audio_input_ids"].shape == batch["audio_labels"].shape == (1, 0, K)
        assert batch["audio_input_ids_mask"].shape == (1, 0)
        sums = loss_of(model, batch)
        assert int(sums.text_count) > 0
        assert not sums.codebook_count.any()
        assert sums.loss().isfinite()


def test_lengths_are_known_before_anything_is_built(dataset: TokenizedDataset) -> None:
    for sample in range(len(dataset)):
        row = dataset.row(sample)
        assert dataset.length(sample) == len(row.ids) == len(row.labels)
        assert dataset.id(sample) == f"c{sample}"
        assert len(row.frames) == len(row.frame_labels) == sum(frames + 2 + K - 1 for frames in CLIPS[sample])


def test_loader_processes_give_the_same_tensors(dataset: TokenizedDataset) -> None:
    for layout in ("bucket", "pack"):
        plain, forked = (
            Stream(dataset, DataConfig("unused", batch_size=2, layout=layout, row_length=300, workers=workers), seed=1)
            for workers in (0, 2)
        )
        for _ in range(4):
            ours, theirs = next(plain), next(forked)
            assert ours.ids == theirs.ids
            for one, other in zip(ours.micro, theirs.micro, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one)
