"""The pieces that every Llama-style block is made of.

Shapes: B batch, T sequence, C channels (hidden size), H heads, D head dim.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.errors import UserError
from higgs.model.config import HiggsAudioV2Config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), the statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.weight * rms_normalize(x, self.eps)


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, computed in float32 and returned in the dtype of `x`."""
    if x.is_cuda:  # one kernel, which keeps nothing in float32 for the backward pass
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    wide = x.float()
    # Written out: on a CPU `F.rms_norm` is a chain of twice as many operations.
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


class FeedForward(nn.Module):
    """Gated feed-forward (SwiGLU for `silu`; Shazeer, 2020)."""

    def __init__(self, config: HiggsAudioV2Config) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act '{config.hidden_act}' is unknown; choose one of {', '.join(ACTIVATIONS)}.")
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., 2021), with the frequency scaling of Llama 3.1 where the config asks."""

    inv_freq: Tensor

    def __init__(self, config: HiggsAudioV2Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def reset_buffers(self, device: torch.device) -> None:
        self.inv_freq = inverse_frequencies(self.config).to(device)

    def forward(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] -> cosine and sine [B, 1, T, D] in the dtype of `like`; angles are computed in float32."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def inverse_frequencies(config: HiggsAudioV2Config) -> Tensor:
    """Angular frequencies [D/2] in radians per position.

    Llama 3.1 stretches the context by dividing frequencies whose wavelength exceeds the original context (over
    `low_freq_factor`) by `factor`, keeping those well below it, and blending in between.
    """
    rope = config.rope_parameters
    # On the CPU also where modules are built on the meta device: every device then gets the same numbers.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "default":
        return frequencies
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    blend = (context / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / factor, blended)
    return torch.where(wavelengths < context / high, frequencies, stretched)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns queries or keys [B, H, T, D] by their positions; the two halves of D are the two axes of each plane."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
