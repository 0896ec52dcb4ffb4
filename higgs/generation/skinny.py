"""Decoding a few rows on a CPU, where a step is one pass over the weights and the layout of each product decides.

PyTorch's `linear` multiplies a few rows `x` [B, in] by `W` [out, in] through a kernel made for many rows. Measured on a
two-core x86 machine (EXPERIMENTS.md): for one row `x @ W.T` with `W.T` contiguous runs 2 to 3 times faster; for 2 to 16
rows oneDNN with weights packed beforehand does. So the weights that audio uses are copied once per call of `generate`,
in the better layout, with queries, keys and values joined and gate and up joined. The arithmetic is that of
`higgs.model.dual_ffn` for audio rows, and the tests hold the two equal.

Shapes: B batch, C hidden size, H heads, G key-value heads, D head dim, W cache window, K codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from higgs.generation.state import DecodeState
from higgs.model.ablations import DenseLayer
from higgs.model.attention import additive
from higgs.model.cache import StaticKVCache
from higgs.model.decoder import DualFFNDecoder
from higgs.model.dual_ffn import DualFFNLayer
from higgs.model.layers import FeedForward, RMSNorm

MAX_ROWS = 16
# The copy doubles the memory of the audio path; past this size memory is worth more than speed.
MAX_COPY_BYTES = 2 * 2**30


class SkinnyLinear:
    """Several linear layers of one input as one product for `rows` rows: [rows, in] -> [rows, sum of outs]."""

    def __init__(self, *layers: nn.Linear, rows: int) -> None:
        weight = torch.cat([layer.weight for layer in layers])
        self.packed = pack(weight, rows) if rows > 1 else None
        self.transposed = weight.t().contiguous() if self.packed is None else None
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return x @ self.transposed if self.bias is None else torch.addmm(self.bias, x, self.transposed)


def skinny_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm of a few rows: the sum of squares as one operation, and in-place work on what is one number a row."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = length.mul_(length).mul_(1 / x.shape[-1]).add_(norm.eps)
    return (x * mean_square.rsqrt_()).mul_(norm.weight)


def pack(weight: Tensor, rows: int) -> Tensor | None:
    """A weight [out, in] in oneDNN's layout for products with `rows` rows; None where PyTorch has no oneDNN.

    The operator is the one that PyTorch's own compiler emits for frozen weights; it has no public name.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


@dataclass(frozen=True)
class AudioPath:
    """What an audio token passes in one layer, besides the attention."""

    norm: RMSNorm
    norm2: RMSNorm
    mlp: FeedForward

    @classmethod
    def of(cls, layer: DualFFNLayer | DenseLayer) -> AudioPath:
        if isinstance(layer, DualFFNLayer):
            return cls(layer.audio_input_layernorm, layer.audio_post_attention_layernorm, layer.audio_mlp)
        return cls(layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)


class _SkinnyLayer:
    """The audio path of one layer."""

    def __init__(self, layer: DualFFNLayer | DenseLayer, rows: int) -> None:
        attention, path = layer.self_attn, AudioPath.of(layer)
        mlp, self.norm, self.norm2 = path.mlp, path.norm, path.norm2
        self.qkv = SkinnyLinear(attention.q_proj, attention.k_proj, attention.v_proj, rows=rows)
        self.out = SkinnyLinear(attention.o_proj, rows=rows)
        self.gate_up = SkinnyLinear(mlp.gate_proj, mlp.up_proj, rows=rows)
        self.down = SkinnyLinear(mlp.down_proj, rows=rows)
        self.activation = mlp.activation
        self.index, self.head_dim = attention.layer, attention.head_dim

    def __call__(self, x: Tensor, step: _Step, cache: StaticKVCache) -> Tensor:
        """[B, C] -> [B, C]."""
        batch, groups, dim = x.shape[0], cache.keys.shape[2], self.head_dim
        heads = self.qkv(skinny_norm(x, self.norm)).view(batch, -1, dim)  # [B, H+2G, D]
        turned = torch.addcmul(heads * step.cos, heads.roll(dim // 2, dims=-1), step.signed_sin)
        keys, values = cache.write(self.index, turned[:, -2 * groups : -groups, None], heads[:, -groups:, None])
        # The queries of each key, [B*G, H/G, D].
        query = turned[:, : -2 * groups].reshape(batch * groups, -1, dim)
        scores = torch.baddbmm(step.mask, query, keys.flatten(0, 1).transpose(1, 2), alpha=dim**-0.5)
        mixed = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).view(batch, -1)
        x = x + self.out(mixed)
        gate, up = self.gate_up(skinny_norm(x, self.norm2)).chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * up)


@dataclass
class _Step:
    """What all layers of one step share: rotary factors [B, 1, D], the sine negated for the half that moves down, and
    the additive mask [B*G, 1, W]."""

    cos: Tensor
    signed_sin: Tensor
    mask: Tensor


class SkinnyDecoder:
    """`decode_one_frame` and the audio head for a batch of a few audio rows in float32 on a CPU."""

    def __init__(self, model: DualFFNDecoder, batch: int) -> None:
        self.model = model.model
        self.config = model.config
        self.layers = [_SkinnyLayer(layer, batch) for layer in self.model.layers]
        self.head = SkinnyLinear(model.audio_lm_head, rows=batch)
        half = torch.ones(self.config.head_dim // 2)
        self.sign = torch.cat((-half, half))

    @staticmethod
    def serves(model: DualFFNDecoder, batch: int) -> bool:
        """Whether this path applies: CPU, float32, few rows, one attention a layer, and a copy that is not too large."""
        if (
            model.config.splits_keys
            or model.device.type != "cpu"
            or model.dtype != torch.float32
            or batch > MAX_ROWS
            or model.training
        ):
            return False
        layer = model.model.layers[0]
        weights = (*layer.self_attn.parameters(), *AudioPath.of(layer).mlp.parameters())
        size = 4 * (len(model.model.layers) * sum(p.numel() for p in weights) + model.audio_lm_head.weight.numel())
        return size <= MAX_COPY_BYTES

    def decode_one_frame(self, cache: StaticKVCache, state: DecodeState) -> Tensor:
        """Feeds each row's last frame and returns its hidden state [B, C]."""
        x = self.model.embed_audio_tokens(state.frame)
        cos, sin = (factor[:, 0] for factor in self.model.rotary_emb(state.position[:, None], like=x))
        mask = additive(cache.begin(1), x.dtype)[:, 0].repeat_interleave(self.config.num_key_value_heads, dim=0)
        step = _Step(cos, sin * self.sign, mask)
        for layer in self.layers:
            x = layer(x, step, cache)
        cache.end()
        return skinny_norm(x, self.model.norm)

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[B, C] -> [B, K, V]."""
        return self.head(hidden).unflatten(-1, (self.config.num_codebooks, self.config.codebook_size))
