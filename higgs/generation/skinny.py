"""Decoding a few rows on a CPU, where a step is one pass over the weights and the layout of each product decides.

PyTorch's `linear` multiplies a few rows `x` [B, in] by `W` [out, in] through a kernel made for many rows. Measured on a
two-core x86 machine (bench/decode.py): for one row, `x @ W.T` with `W.T` contiguous runs 2 to 3 times faster; for 2 to
16 rows, `(W @ x.T).T` does. So for one row the weights that audio uses are copied once per call of `generate`, queries,
keys and values joined, gate and up joined; for a few rows they are used in place. The arithmetic is that of
`higgs.model.dual_ffn` for audio rows, and the tests hold the two equal.

Shapes: B batch, C hidden size, H heads, G key-value heads, D head dim, W cache window, K codebooks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from higgs.generation.state import DecodeState
from higgs.model.attention import additive
from higgs.model.cache import StaticKVCache
from higgs.model.decoder import DualFFNDecoder
from higgs.model.dual_ffn import DualFFNLayer
from higgs.model.layers import rotate

MAX_ROWS = 16
# A copy for one row doubles the memory of the audio path; past this size memory is worth more than speed.
MAX_COPY_BYTES = 2 * 2**30


class SkinnyLinear:
    """Several linear layers of one input as one product for few rows: [B, in] -> [B, sum of outs]."""

    def __init__(self, *layers: nn.Linear, copy: bool) -> None:
        self.layers = layers
        self.transposed = torch.cat([layer.weight for layer in layers]).t().contiguous() if copy else None
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        if self.transposed is not None:
            out = x @ self.transposed
        else:
            columns = [layer.weight @ x.t() for layer in self.layers]
            out = (columns[0] if len(columns) == 1 else torch.cat(columns)).t()
        return out if self.bias is None else out + self.bias


class _SkinnyLayer:
    """The audio path of one `DualFFNLayer`."""

    def __init__(self, layer: DualFFNLayer, copy: bool) -> None:
        attention, mlp = layer.self_attn, layer.audio_mlp
        self.norm, self.norm2 = layer.audio_input_layernorm, layer.audio_post_attention_layernorm
        self.qkv = SkinnyLinear(attention.q_proj, attention.k_proj, attention.v_proj, copy=copy)
        self.out = SkinnyLinear(attention.o_proj, copy=copy)
        self.gate_up = SkinnyLinear(mlp.gate_proj, mlp.up_proj, copy=copy)
        self.down = SkinnyLinear(mlp.down_proj, copy=copy)
        self.activation = mlp.activation
        self.index, self.head_dim = attention.layer, attention.head_dim

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: StaticKVCache) -> Tensor:
        """[B, C] -> [B, C]."""
        groups = cache.keys.shape[2]
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_dim))[:, :, None]  # [B, H+2G, 1, D]
        values = heads[:, -groups:]
        turned = rotate(heads[:, :-groups], *rotary)
        query, key = turned[:, :-groups], turned[:, -groups:]
        keys, values = cache.write(self.index, key, values)
        query = query.reshape(x.shape[0], groups, -1, self.head_dim)  # the queries of each key, [B, G, H/G, D]
        scores = (query * self.head_dim**-0.5) @ keys.transpose(-1, -2) + mask
        mixed = (scores.softmax(dim=-1) @ values).reshape(x.shape[0], -1)
        x = x + self.out(mixed)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * up)


class SkinnyDecoder:
    """`decode_one_frame` and the audio head for a batch of a few audio rows in float32 on a CPU."""

    def __init__(self, model: DualFFNDecoder, batch: int) -> None:
        self.model = model.model
        self.config = model.config
        copy = batch == 1
        self.layers = [_SkinnyLayer(layer, copy) for layer in self.model.layers]
        self.head = SkinnyLinear(model.audio_lm_head, copy=copy)

    @staticmethod
    def serves(model: DualFFNDecoder, batch: int) -> bool:
        """Whether this path applies: CPU, float32, few rows, and a copy that is not too large."""
        if model.device.type != "cpu" or model.dtype != torch.float32 or batch > MAX_ROWS or model.training:
            return False
        layer = model.model.layers[0]
        weights = (*layer.self_attn.parameters(), *layer.audio_mlp.parameters())
        size = 4 * (len(model.model.layers) * sum(p.numel() for p in weights) + model.audio_lm_head.weight.numel())
        return batch > 1 or size <= MAX_COPY_BYTES

    def decode_one_frame(self, cache: StaticKVCache, state: DecodeState) -> Tensor:
        """Feeds each row's last frame and returns its hidden state [B, C]."""
        x = self.model.embed_audio_tokens(state.frame)
        rotary = self.model.rotary_emb(state.position[:, None], like=x)
        mask = additive(cache.begin(1), x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask, cache)
        cache.end()
        return self.model.norm(x)

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[B, C] -> [B, K, V]."""
        return self.head(hidden).unflatten(-1, (self.config.num_codebooks, self.config.codebook_size))
