"""HuBERT (arXiv 2106.07447) as a frozen teacher: waveform in, the mean of all its hidden states out.

There is no dropout, layer drop or masking here, since the teacher is never trained. Parameter names are those of the
public checkpoints.

Shapes: B batch, L samples, C channels, T frames.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from higgs.codec.config import SemanticConfig
from higgs.codec.ragged import Ragged, conv_length

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "selu": F.selu,
}


def layer_norm_over_channels(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm(x.transpose(1, 2)).transpose(1, 2)


def instance_norm(x: Ragged, norm: nn.GroupNorm) -> Ragged:
    """A group norm with one group per channel; its statistics count only what lies inside each row's length."""
    valid = x.valid()
    if valid is None:
        return x.map(norm)
    count = valid.sum(-1, dtype=x.values.dtype)[:, None, None]
    mean = x.masked().sum(-1, keepdim=True) / count
    centred = x.map(lambda values: values - mean)
    variance = centred.masked().square().sum(-1, keepdim=True) / count
    scale = norm.weight[:, None] * (variance + norm.eps).rsqrt()
    return centred.map(lambda values: torch.addcmul(norm.bias[:, None], values, scale))


class ConvLayer(nn.Module):
    """Convolution without padding, a norm of the given kind, activation."""

    def __init__(self, config: SemanticConfig, index: int, norm: str | None) -> None:
        super().__init__()
        inputs = 1 if index == 0 else config.conv_dim[index - 1]
        outputs = config.conv_dim[index]
        self.conv = nn.Conv1d(
            inputs, outputs, config.conv_kernel[index], stride=config.conv_stride[index], bias=config.conv_bias
        )
        if norm == "group":
            self.layer_norm = nn.GroupNorm(outputs, outputs)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(outputs)
        self.norm = norm
        self.activation = ACTIVATIONS[config.feat_extract_activation]

    def forward(self, x: Ragged) -> Ragged:
        x = x.conv(self.conv)
        if self.norm == "group":
            x = instance_norm(x, self.layer_norm)
        elif self.norm == "layer":
            x = x.map(partial(layer_norm_over_channels, norm=self.layer_norm))
        return x.map(self.activation)


class FeatureExtractor(nn.Module):
    """Waveform [B, 1, L] -> features [B, C, T]; a group norm sits in the first layer only, a layer norm in each."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        kinds = ["layer" if config.feat_extract_norm == "layer" else None] * len(config.conv_dim)
        if config.feat_extract_norm == "group":
            kinds[0] = "group"
        self.conv_layers = nn.ModuleList(ConvLayer(config, index, norm) for index, norm in enumerate(kinds))

    def forward(self, x: Ragged) -> Ragged:
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeatureProjection(nn.Module):
    """Features [B, T, C] -> [B, T, hidden_size]."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        if config.feat_proj_layer_norm:
            self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.layer_norm(x) if hasattr(self, "layer_norm") else x)


class PositionalConv(nn.Module):
    """Relative positions by one wide grouped convolution over [B, C, T]."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        kernel_size = config.num_conv_pos_embeddings
        conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel_size,
            padding=kernel_size // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        if config.conv_pos_batch_norm:
            self.batch_norm = nn.BatchNorm1d(config.hidden_size)
        self.conv = conv if config.conv_pos_batch_norm else weight_norm(conv, dim=2)
        self.activation = ACTIVATIONS[config.feat_extract_activation]

    def forward(self, x: Ragged) -> Tensor:
        if hasattr(self, "batch_norm"):
            x = x.map(self.batch_norm)
        # An even kernel gives one frame too many, at the end.
        return self.activation(self.conv(x.masked())[..., : x.values.shape[-1]])


class Attention(nn.Module):
    """Full self-attention over [B, T, C]; `mask` [B, 1, 1, T] is true where a frame may be looked at."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            rearrange(proj(x), "b t (h d) -> b h t d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(rearrange(out, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(self.activation(self.intermediate_dense(x)))


class EncoderLayer(nn.Module):
    """A transformer layer; `norm_first` is HuBERT's "stable layer norm"."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm_first = config.do_stable_layer_norm

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.layer_norm(x), mask)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.attention(x, mask))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Features [B, C, T] -> the mean of the first layer's input and every layer's output, [B, C, T]."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm_first = config.do_stable_layer_norm

    def forward(self, features: Ragged) -> Ragged:
        states = torch.stack(self.hidden_states(features))
        return Ragged(states.mean(0).transpose(1, 2), features.lengths)

    def hidden_states(self, features: Ragged) -> list[Tensor]:
        """The first layer's input and every layer's output, each [B, T, C], of features [B, C, T]."""
        valid = features.valid()
        mask = None if valid is None else valid[:, None, None]
        x = (features.values + self.pos_conv_embed(features)).transpose(1, 2)
        states = [x if self.norm_first else self.layer_norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        if self.norm_first:
            states[-1] = self.layer_norm(states[-1])
        return states


class Hubert(nn.Module):
    """The frozen teacher. It stays in evaluation mode, without gradient, whatever the codec around it does."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        if config.has_mask_embedding:  # unused here; held so that a checkpoint keeps every tensor it came with
            self.masked_spec_embed = nn.Parameter(torch.zeros(config.hidden_size))
        self.encoder = Encoder(config)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Hubert":
        return super().train(False)

    @torch.no_grad()
    def forward(self, waveform: Ragged) -> Ragged:
        """Mean hidden state [B, hidden_size, T] of a waveform [B, 1, L] at the teacher's sample rate."""
        return self.encoder(self.features(waveform))

    def features(self, waveform: Ragged) -> Ragged:
        """What the encoder takes, [B, hidden_size, T], of a waveform [B, 1, L]."""
        features = self.feature_extractor(waveform)
        return features.map(lambda x: self.feature_projection(x.transpose(1, 2)).transpose(1, 2))

    def output_length(self, length: int) -> int:
        """Frames made of `length` samples; 0 where there are too few."""
        for layer in self.feature_extractor.conv_layers:
            length = conv_length(layer.conv, length)
        return length
