"""What the networks return.

Shapes: B batch, T sequence, C hidden size, K codebooks, V rows per codebook.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from higgs.model.cache import StaticKVCache


class _Output:
    """Fields by attribute, by name and, those that are set, by position."""

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for value in vars(self).values() if value is not None)


@dataclass
class TransformerOutput(_Output):
    """last_hidden_state [B, T, C] after the final norm; hidden_states, where asked for, the input of every layer too."""

    last_hidden_state: Tensor
    past_key_values: StaticKVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class DecoderOutput(_Output):
    """logits [B, T', K*V] of the audio head at the kept positions; losses are scalars, codebook_loss is [K]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: StaticKVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    text_logits: Tensor | None = None
    text_loss: Tensor | None = None
    codebook_loss: Tensor | None = None
