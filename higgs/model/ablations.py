"""Layers other than the released one, to find out what each part of DualFFN is worth (SPEC section 8).

    dense            x + attention(norm(x)),  then x + mlp(norm'(x)), for text and audio alike
    fast-forward     the same for text, among text alone; audio tokens pass unchanged
    audio attention  audio rows first x + audio_attention(norm''(x)), among audio alone; then as DualFFN

`HiggsAudioV2Config.audio_ffn_layers` and its neighbours choose; by default every layer is a `DualFFNLayer`.

Shapes: B batch, T new positions, S all positions (cached and new), C channels, N = B*T rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from higgs.model.attention import Attention, additive
from higgs.model.cache import StaticKVCache
from higgs.model.config import HiggsAudioV2Config
from higgs.model.dual_ffn import DualFFNLayer, Routing
from higgs.model.layers import FeedForward, RMSNorm


def make_layer(config: HiggsAudioV2Config, layer: int) -> nn.Module:
    """Layer number `layer` of the decoder that `config` describes."""
    if layer in config.dual_layers:
        return AudioAttentionLayer(config, layer) if config.audio_attention else DualFFNLayer(config, layer)
    return FastForwardLayer(config, layer) if config.audio_fast_forward else DenseLayer(config, layer)


class DenseLayer(nn.Module):
    """A layer of a plain Llama: text and audio share everything. All layers of this kind are the dense baseline."""

    def __init__(self, config: HiggsAudioV2Config, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: StaticKVCache | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C], as `DualFFNLayer`."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class FastForwardLayer(DenseLayer):
    """A layer of text alone: audio tokens skip it, and no text token sees them in it."""

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: StaticKVCache | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C], rows of audio unchanged."""
        if routing.audio_mask is None:
            return x  # the cache's columns stay zero, and nothing ever looks at them
        after = super().forward(x, routing, rotary, routing.text_to_text, cache)
        return torch.where(routing.audio_mask[..., None], x, after)


class AudioAttentionLayer(DualFFNLayer):
    """DualFFN in which audio tokens first attend to one another, with weights and a norm of their own."""

    def __init__(self, config: HiggsAudioV2Config, layer: int) -> None:
        super().__init__(config, layer)
        slot = config.num_hidden_layers + config.dual_layers.index(layer)  # in the cache, behind the shared attentions
        self.audio_self_attn = Attention(config, slot)
        self.audio_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: StaticKVCache | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        among_audio = self.audio_self_attn(self.audio_self_attn_layernorm(x), rotary, routing.audio_to_audio, cache)
        if routing.audio_mask is not None:
            among_audio = among_audio.masked_fill(~routing.audio_mask[..., None], 0.0)
        return super().forward(x + among_audio, routing, rotary, mask, cache)


def split_keys(routing: Routing, x: Tensor, mask: Tensor | None, cache: StaticKVCache | None) -> Routing:
    """Adds to the routing the masks by which text sees text only and audio sees audio only.

    `mask` [B, 1, T, S] is True = may look, None plain causal. Rows of the other kind keep their view: what they compute
    is not used, and a row that sees nothing at all would be a division by zero.
    """
    batch, new = x.shape[:2]
    if mask is None:
        mask = torch.ones(new, new, dtype=torch.bool, device=x.device).tril()[None, None]
    query = routing.audio_mask
    if query is None:
        query = torch.ones(batch, new, dtype=torch.bool, device=x.device)
    key = query if cache is None else cache.mark_audio(routing.audio_mask)
    query, key = query[:, None, :, None], key[:, None, None, :]
    return replace(
        routing,
        text_to_text=additive(mask & (query | ~key), x.dtype),
        audio_to_audio=additive(mask & (~query | key), x.dtype),
    )
