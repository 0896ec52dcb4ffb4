"""A key-value cache of fixed size, passed explicitly.

Shapes: B batch, T new positions, H key-value heads, S capacity, W window, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from higgs.errors import UserError
from higgs.model.config import HiggsAudioV2Config

WINDOW_STEP = 64


class StaticKVCache:
    """Keys and values of all layers in buffers that never move, with the position as a tensor on the device.

    All rows of a batch share their columns (prompts are padded on the left). A forward pass calls `begin` once, each
    layer then writes its keys, and `end` moves the position. Attention reads the first `window` columns: the filled
    ones rounded up to `WINDOW_STEP`, so that shapes change seldom, or all of them with `full_window=True`, so that they
    never do (for CUDA graphs).
    """

    def __init__(
        self,
        config: HiggsAudioV2Config,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        full_window: bool = False,
    ) -> None:
        shape = (config.num_attentions, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: a masked column is still multiplied by a weight of zero, and zero times NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.real = torch.zeros(batch_size, capacity, dtype=torch.bool, device=device)
        # Which columns are audio, kept only where some attention asks.
        self.audio = torch.zeros_like(self.real) if config.splits_keys else None
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.columns = torch.arange(capacity, device=device)
        self.full_window = full_window
        self.length = 0  # the position's mirror on the host
        self.new = self.columns[:0]
        self.window = capacity if full_window else 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def get_seq_length(self) -> int:
        """Number of columns filled so far."""
        return self.length

    def begin(self, new: int, attention_mask: Tensor | None = None) -> Tensor:
        """Opens `new` columns and returns the mask [B, 1, T, W], True where a new position may look.

        `attention_mask` [B, filled + new] is 1 at real tokens; without it the new ones are real. Padding before a row's
        first token looks at nothing (see `causal_mask`). Raises UserError when the cache is too small.
        """
        needed = self.length + new
        if needed > self.capacity:
            raise UserError(f"The cache holds {self.capacity} positions, but {needed} are needed; make a larger one.")
        self.new = self.position + self.columns[:new]
        if attention_mask is None:
            self.real.index_fill_(1, self.new, True)
        else:
            self.real[:, :needed] = attention_mask.bool()
        if not self.full_window:
            self.window = min(self.capacity, -(-needed // WINDOW_STEP) * WINDOW_STEP)
        seen = self.columns[: self.window]
        return self.real[:, None, None, : self.window] & (seen <= self.new[:, None])

    def mark_audio(self, audio_mask: Tensor | None) -> Tensor:
        """Notes which of the new columns are audio, [B, T] (None: all); returns it for all that is read, [B, W]."""
        if audio_mask is None:
            self.audio.index_fill_(1, self.new, True)
        else:
            self.audio.index_copy_(1, self.new, audio_mask)
        return self.audio[:, : self.window]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new columns [B, H, T, D] of one attention and returns what attention reads, each [B, H, W, D]."""
        self.keys[layer].index_copy_(2, self.new, keys)
        self.values[layer].index_copy_(2, self.new, values)
        return self.keys[layer, :, :, : self.window], self.values[layer, :, :, : self.window]

    def end(self) -> None:
        """Makes the columns opened by `begin` part of the past."""
        self.position += self.new.numel()
        self.length += self.new.numel()
