"""Labelled samples -> one batch for the decoder, padded on the right or packed.

Shapes: B rows, T tokens, F delayed frames, K codebooks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from higgs.batch import BatchFeature, Row
from higgs.labels import IGNORE


def pad_rows(samples: Sequence[Row], pad: int, stream_eos: int) -> BatchFeature:
    """One labelled sample a row, padded on the right: `input_ids`, `labels`, `attention_mask` [B, T],
    `audio_input_ids`, `audio_labels` [B, F, K], `audio_input_ids_mask` [B, F]."""
    batch = BatchFeature(
        input_ids=_pad([sample.ids for sample in samples], pad),
        attention_mask=_pad([torch.ones_like(sample.ids) for sample in samples], 0),
        labels=_pad([sample.labels for sample in samples], IGNORE),
    )
    return _with_audio(batch, [[sample] for sample in samples], stream_eos)


def pack_rows(rows: Sequence[Sequence[Row]], row_length: int, pad: int, stream_eos: int) -> BatchFeature:
    """Several labelled samples a row of `row_length` tokens: as `pad_rows`, with `position_ids` [B, T] in place of
    `attention_mask`. Positions restart with every sample and where the row's padding begins, which is what confines
    attention; a sample's first token is nobody's target."""
    columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        room = row_length - sum(len(sample.ids) for sample in row)
        assert row and room >= 0, "the planner counts tokens as the tokenizer does"
        filler = [torch.full((room,), pad)] if room else []
        columns["input_ids"].append(torch.cat([*(sample.ids for sample in row), *filler]))
        labels = [torch.cat([torch.tensor([IGNORE]), sample.labels[1:]]) for sample in row]
        columns["labels"].append(torch.cat([*labels, *(torch.full_like(one, IGNORE) for one in filler)]))
        positions = [torch.arange(len(sample.ids)) for sample in row]
        columns["position_ids"].append(torch.cat([*positions, *(torch.arange(len(one)) for one in filler)]))
    batch = BatchFeature({name: torch.stack(values) for name, values in columns.items()})
    return _with_audio(batch, rows, stream_eos)


def _with_audio(batch: BatchFeature, rows: Sequence[Sequence[Row]], stream_eos: int) -> BatchFeature:
    """Adds the frames of every row in the order of its placeholders."""
    frames = [torch.cat([sample.frames for sample in row]) for row in rows]
    batch["audio_input_ids"] = _pad(frames, stream_eos)
    batch["audio_labels"] = _pad([torch.cat([sample.frame_labels for sample in row]) for row in rows], IGNORE)
    counts = torch.tensor([len(one) for one in frames])
    batch["audio_input_ids_mask"] = torch.arange(int(counts.max()))[None] < counts[:, None]
    return batch


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
