"""Causal self-attention with grouped key-value heads, shared by text and audio tokens.

Shapes: B batch, T new positions, S all positions (cached and new), C channels, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from higgs.model.cache import StaticKVCache
from higgs.model.config import HiggsAudioV2Config
from higgs.model.layers import rotate


class Attention(nn.Module):
    """Multi-head attention; `num_key_value_heads` keys serve `num_attention_heads` queries (Ainslie et al., 2023)."""

    def __init__(self, config: HiggsAudioV2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: StaticKVCache | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C].

        `mask` [B, 1, T, S] is added to the scores; None means plain causal attention over the T positions.
        """
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", d=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        grouped = self.grouped
        if grouped and mask is not None and x.is_cuda and x.shape[1] > 1:
            # No fast kernel of a GPU takes both a mask and grouped heads; the fallback would hold all scores at once.
            k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=grouped,
        )
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


def right_padded(attention_mask: Tensor) -> bool:
    """Whether padding [B, T], 0, only follows a row's real tokens, 1.

    Such padding is the future already, so plain causal attention says the same to every real token, and faster: half of
    the scores are never computed, and a GPU has its fastest kernel for it.
    """
    real = attention_mask.bool()
    return not bool((real[:, 1:] & ~real[:, :-1]).any())


def causal_mask(attention_mask: Tensor) -> Tensor:
    """Causal attention without a cache over rows with padding: [B, T], 1 at real tokens -> [B, 1, T, T], True = may look.

    Padding before a row's first token looks at nothing; scaled_dot_product_attention then gives zeros, as in the
    reference, whose compatibility labels train the first token from what stands before it.
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return attention_mask[:, None, None, :].bool() & (columns <= columns[:, None])


def packed_mask(position_ids: Tensor) -> Tensor:
    """Causal attention inside each piece of rows that hold several: positions [B, T] -> [B, 1, T, T], True = may look.

    A piece starts wherever the position is not its neighbour's successor, so pieces that each count from 0 never see
    one another (as in the reference).
    """
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    piece = starts.cumsum(dim=1)
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    return (piece[:, None, None, :] == piece[:, None, :, None]) & (columns <= columns[:, None])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to attention scores, made once for all layers: 0 where True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
