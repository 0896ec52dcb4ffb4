"""What of the decoder stays as it was while the rest learns.

Whole tensors stop by `requires_grad=False`, before anything is wrapped. The first rows of a table cannot: their gradients
are set to zero between backward and clipping, and the table is kept out of weight decay. AdamW then leaves these rows
alone to the last bit, because its moments of them stay zero.

Shapes: V vocabulary, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from higgs.errors import UserError
from higgs.model.decoder import DualFFNDecoder


@dataclass
class FreezeConfig:
    """`backbone`: everything stays but the audio parts (feed-forwards, norms, attention, embedding and head of audio's
    own). `text_rows`: the text embedding and the text head stay. `embedding_rows`: their first so many rows stay."""

    backbone: bool = False
    text_rows: bool = False
    embedding_rows: int = 0


@dataclass(frozen=True)
class Frozen:
    """A frozen decoder: `mask_gradients` belongs between backward and clipping, `partly` out of weight decay."""

    decoder: DualFFNDecoder
    rows: int

    @property
    def partly(self) -> list[nn.Parameter]:
        """The tables [V, C] whose first rows stay. Looked up anew: FSDP puts new parameters in the place of the old."""
        return [table for table in text_tables(self.decoder) if table.requires_grad] if self.rows else []

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeroes the gradients of the rows that stay."""
        for table in self.partly:
            if table.grad is not None:
                local, first = local_rows(table.grad)
                local[: max(0, self.rows - first)] = 0


def apply_freeze(decoder: DualFFNDecoder, config: FreezeConfig) -> Frozen:
    """Stops whole tensors from learning; call it before the decoder is wrapped and its optimiser made.

    Raises UserError where `embedding_rows` does not leave a row of the vocabulary to learn.
    """
    vocabulary = decoder.config.vocab_size
    if not 0 <= config.embedding_rows < vocabulary:
        raise UserError(
            f"freeze.embedding_rows={config.embedding_rows} must lie between 0 and {vocabulary - 1}: the vocabulary has "
            f"{vocabulary} rows. To keep all of them, set freeze.text_rows=true."
        )
    if config.backbone:
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(is_audio_part(name))
    if config.text_rows:
        for table in text_tables(decoder):
            table.requires_grad_(False)
    return Frozen(decoder, config.embedding_rows)


def is_audio_part(name: str) -> bool:
    """Whether a parameter of the decoder serves audio alone: `audio_mlp`, `audio_lm_head`, `embed_audio_tokens`, …"""
    return any(part.startswith("audio_") or part == "embed_audio_tokens" for part in name.split("."))


def text_tables(decoder: DualFFNDecoder) -> list[nn.Parameter]:
    """The text embedding and the text head [V, C]; one of them where the two are tied or there is no head."""
    tables = [decoder.model.embed_tokens.weight]
    if decoder.text_lm_head is not None and decoder.text_lm_head.weight is not tables[0]:
        tables.append(decoder.text_lm_head.weight)
    return tables


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that lie on this rank, as a view, and the number of the first of them."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    first, rows = 0, tensor.shape[0]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            # As torch.chunk divides: pieces of equal size, the last ones shorter or empty.
            size = -(-rows // tensor.device_mesh.size(axis))
            offset = min(rows, size * tensor.device_mesh.get_local_rank(axis))
            first, rows = first + offset, min(size, rows - offset)
        else:
            assert placement.is_replicate(), f"{placement} is no way that FSDP lays out a gradient"
    local = tensor.to_local()
    assert local.shape[0] == rows, f"{local.shape[0]} rows lie here, {rows} were expected"
    return local, first
