"""DualFFN: one transformer in which audio tokens have their own norms and feed-forward, and share the attention.

    text  row: x + attention(norm(x))        then  x + mlp(norm'(x))
    audio row: x + attention(audio_norm(x))  then  x + audio_mlp(audio_norm'(x))

Attention sees text and audio as one sequence. Each token passes one feed-forward, so an audio token costs what a text
token costs, and the text path stays that of the language model that it was started from.

Shapes: B batch, T sequence, C channels, N = B*T rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from higgs.model.attention import Attention
from higgs.model.cache import StaticKVCache
from higgs.model.config import HiggsAudioV2Config
from higgs.model.layers import FeedForward, RMSNorm, rms_normalize


@dataclass(frozen=True)
class Routing:
    """Which rows are audio, worked out once per batch and used by every layer.

    With row indices each feed-forward runs on its own rows only, and on padding none does. Without them (`everywhere`)
    both run on all rows and the mask selects: more arithmetic, but no data-dependent shape and so no wait for the
    device, which is what a decoding step over a batch of mixed rows wants. No mask at all means that every row is audio.

    The last two fields belong to ablations: attention masks by which a token sees its own kind only.
    """

    audio_mask: Tensor | None = None  # [B, T] bool
    text_rows: Tensor | None = None  # [number of text rows], into the flattened [B*T]
    audio_rows: Tensor | None = None  # [number of audio rows]
    rows: Tensor | None = None  # the two, one after the other
    text_to_text: Tensor | None = None  # [B, 1, T, S], added to scores
    audio_to_audio: Tensor | None = None  # [B, 1, T, S]

    @classmethod
    def by_rows(cls, audio_mask: Tensor, real: Tensor | None = None) -> Routing:
        """`real` [B, T] is True (or 1) at tokens that are no padding; None: all are."""
        text_mask = ~audio_mask if real is None else ~audio_mask & real.bool()
        text_rows, audio_rows = text_mask.flatten().nonzero()[:, 0], audio_mask.flatten().nonzero()[:, 0]
        return cls(audio_mask, text_rows, audio_rows, torch.cat((text_rows, audio_rows)))

    @classmethod
    def everywhere(cls, audio_mask: Tensor) -> Routing:
        return cls(audio_mask)

    @classmethod
    def all_audio(cls) -> Routing:
        return cls()


class DualFFNLayer(nn.Module):
    """One decoder layer: shared attention between norms and feed-forwards chosen by modality."""

    def __init__(self, config: HiggsAudioV2Config, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.audio_mlp = FeedForward(config)
        self.audio_input_layernorm = RMSNorm(size, eps)
        self.audio_post_attention_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: StaticKVCache | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]; `rotary`, `mask` and `cache` as in `Attention`."""
        normed = dual_norm(x, self.input_layernorm, self.audio_input_layernorm, routing)
        x = x + self.self_attn(normed, rotary, mask, cache)
        return self.feed_forward(x, routing)

    def feed_forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[B, T, C] -> [B, T, C]: to each row is added what its modality's norm and feed-forward make of it."""
        if routing.audio_mask is None:
            return x + self.audio_mlp(self.audio_post_attention_layernorm(x))
        if routing.rows is None:
            text = self.mlp(self.post_attention_layernorm(x))
            audio = self.audio_mlp(self.audio_post_attention_layernorm(x))
            return x + torch.where(routing.audio_mask[..., None], audio, text)
        rows = x.flatten(0, 1)
        text, audio = rows.index_select(0, routing.rows).split((len(routing.text_rows), len(routing.audio_rows)))
        text = self.mlp(self.post_attention_layernorm(text))
        audio = self.audio_mlp(self.audio_post_attention_layernorm(audio))
        return rows.index_add(0, routing.rows, torch.cat((text, audio)).to(x.dtype)).view_as(x)


def dual_norm(x: Tensor, text: RMSNorm, audio: RMSNorm, routing: Routing) -> Tensor:
    """Text rows by `text`, audio rows by `audio`: the two differ only in their weight, so rows are normalised once."""
    if routing.audio_mask is None:
        return audio(x)
    weight = torch.where(routing.audio_mask[..., None], audio.weight, text.weight)
    return weight * rms_normalize(x, text.eps)
