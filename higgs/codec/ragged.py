"""Batches of sequences of unequal length, so that a clip never feels its neighbours or its padding.

`Ragged` carries values [B, C, T] and each row's valid length through a stack of layers. What lies past a row's
length means nothing; whatever would look at it (a kernel wider than one, statistics over time, attention) sees
zeros there, which is exactly what the zero padding of the clip alone would show. A batch without lengths takes the
plain path: no mask is ever built.

Shapes: B batch, C channels, T time at whatever rate the layer runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.errors import UserError


@dataclass(frozen=True)
class Ragged:
    """Values [B, C, T] and the valid length of each row (None: every row fills T).

    The values belong to it: without gradient, what lies past a row's length is overwritten in place.
    """

    values: Tensor
    lengths: tuple[int, ...] | None = None

    @classmethod
    def from_batch(cls, values: Tensor, lengths: Tensor | Sequence[int] | None) -> "Ragged":
        """Check `lengths` [B] against `values` [B, C, T]; equal lengths become the plain, unmasked case.

        Raises:
            UserError: where a length is below 1, beyond T, or their number is not B.
        """
        if lengths is None:
            return cls(values)
        rows = tuple(int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths))
        size, time = values.shape[0], values.shape[-1]
        if len(rows) != size or min(rows) < 1 or max(rows) > time:
            raise UserError(f"`lengths` must be {size} numbers from 1 to {time}, one per row of the batch; got {rows}.")
        values = values[..., : max(rows)]
        return cls(values.clone(), rows) if min(rows) < max(rows) else cls(values)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        return self.lengths or (self.values.shape[-1],) * self.values.shape[0]

    def valid(self) -> Tensor | None:
        """Mask [B, T], true inside each row's length; None where every row fills T."""
        if self.lengths is None:
            return None
        ends = torch.tensor(self.lengths, device=self.values.device)
        return torch.arange(self.values.shape[-1], device=self.values.device) < ends[:, None]

    def masked(self, fill: float = 0.0) -> Tensor:
        """The values [B, C, T] with `fill` past each row's length."""
        if self.lengths is None:
            return self.values
        if torch.is_grad_enabled():
            return self.values.masked_fill(~self.valid()[:, None], fill)
        return self.values.masked_fill_(~self.valid()[:, None], fill)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Ragged":
        """Apply what works on every time step by itself."""
        return Ragged(function(self.values), self.lengths)

    def conv(self, layer: nn.Conv1d | nn.ConvTranspose1d) -> "Ragged":
        """Apply a convolution."""
        pointwise = layer.kernel_size == (1,) and layer.stride == (1,) and layer.padding == (0,)
        values = layer(self.values if pointwise else self.masked())
        return Ragged(values, self.lengths and tuple(conv_length(layer, n) for n in self.lengths))

    def every(self, step: int) -> "Ragged":
        """Keep every `step`-th time step."""
        return Ragged(self.values[..., ::step], self.lengths and tuple(-(-n // step) for n in self.lengths))

    def cut(self, lengths: Sequence[int]) -> "Ragged":
        """Shorten each row to `lengths` where it is longer."""
        rows = tuple(min(have, want) for have, want in zip(self.row_lengths, lengths, strict=True))
        return Ragged(self.values[..., : max(rows)], rows if min(rows) < max(rows) else None)

    def pad(self, left: Sequence[int], right: Sequence[int]) -> "Ragged":
        """Put `left[b]` and `right[b]` zeros before and after row b."""
        rows = tuple(a + n + b for a, n, b in zip(left, self.row_lengths, right, strict=True))
        if len(set(left)) == 1:
            values = F.pad(self.masked(), (left[0], max(0, max(rows) - left[0] - self.values.shape[-1])))
            values = values[..., : max(rows)]
        else:
            values = self.values.new_zeros(*self.values.shape[:-1], max(rows))
            for row, (start, n) in enumerate(zip(left, self.row_lengths, strict=True)):
                values[row, :, start : start + n] = self.values[row, :, :n]
        return Ragged(values, rows if min(rows) < max(rows) else None)

    def select(self, rows: Sequence[int]) -> "Ragged":
        """The given rows as a batch of their own, no longer than the longest of them."""
        return Ragged.from_batch(self.values[list(rows)], [self.row_lengths[row] for row in rows])

    def in_groups(self, function: Callable[["Ragged"], "Ragged"], limit: int) -> "Ragged":
        """Apply `function` to groups of rows of similar length, each of at most `limit` time steps (or one row).

        On a CPU a batch pays only while it is small: beyond that it leaves the caches, and its padding costs time.
        """
        groups: list[list[int]] = []
        for row in sorted(range(len(self.row_lengths)), key=lambda row: -self.row_lengths[row]):
            if groups and (len(groups[-1]) + 1) * self.row_lengths[groups[-1][0]] <= limit:
                groups[-1].append(row)
            else:
                groups.append([row])
        if len(groups) == 1:
            return function(self)
        parts = [function(self.select(group)) for group in groups]
        lengths = dict(zip(chain(*groups), (n for part in parts for n in part.row_lengths), strict=True))
        rows = tuple(lengths[row] for row in range(len(lengths)))
        values = parts[0].values.new_zeros(len(rows), parts[0].values.shape[1], max(rows))
        for group, part in zip(groups, parts, strict=True):
            values[group, :, : part.values.shape[-1]] = part.values
        return Ragged(values, rows if min(rows) < max(rows) else None)

    def __add__(self, other: "Ragged") -> "Ragged":
        assert self.lengths == other.lengths
        return Ragged(self.values + other.values, self.lengths)


def conv_length(layer: nn.Conv1d | nn.ConvTranspose1d, length: int) -> int:
    """Output length of a convolution, by the formulas of torch's documentation."""
    (kernel,), (stride,), (dilation,), (padding,) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    if isinstance(layer, nn.ConvTranspose1d):
        return (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + layer.output_padding[0] + 1
    return max(0, (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
