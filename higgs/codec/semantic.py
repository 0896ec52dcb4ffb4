"""The semantic branch's own convolutions, on both sides of the quantizer, around a frozen speech model.

The encoder shapes the teacher's features before they are quantized; the decoder, used in training alone, must give
the teacher's features back (the semantic loss of X-Codec, arXiv 2408.17175).

Shapes: B batch, C channels, T frames.
"""

import torch.nn.functional as F
from torch import nn

from higgs.codec.config import HiggsAudioV2TokenizerConfig
from higgs.codec.ragged import Ragged


class ResidualUnit(nn.Module):
    """ELU, dilated convolution, ELU, convolution over 1, added to the input; no biases."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv1 = nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding=padding, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)

    def forward(self, x: Ragged) -> Ragged:
        return x + x.map(F.elu).conv(self.conv1).map(F.elu).conv(self.conv2)


def _residual_units(config: HiggsAudioV2TokenizerConfig, channels: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualUnit(channels, config.unit_kernel_size, d) for d in config.block_dilations)


class EncoderStage(nn.Module):
    def __init__(self, config: HiggsAudioV2TokenizerConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        kernel_size = 3 if stride == 1 else 2 * stride
        self.res_units = _residual_units(config, inputs)
        self.conv = nn.Conv1d(inputs, outputs, kernel_size, stride=stride, padding=(kernel_size - 1) // 2)

    def forward(self, x: Ragged) -> Ragged:
        for unit in self.res_units:
            x = unit(x)
        return x.conv(self.conv)


class DecoderStage(nn.Module):
    def __init__(self, config: HiggsAudioV2TokenizerConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        if stride == 1:
            self.conv = nn.Conv1d(inputs, outputs, 3, padding=1)
        else:
            self.conv = nn.ConvTranspose1d(
                inputs, outputs, 2 * stride, stride, (stride + 1) // 2, output_padding=stride % 2, bias=False
            )
        self.res_units = _residual_units(config, outputs)

    def forward(self, x: Ragged) -> Ragged:
        x = x.conv(self.conv)
        for unit in self.res_units:
            x = unit(x)
        return x


class SemanticEncoder(nn.Module):
    """Teacher features [B, C, T] -> the semantic half of what is quantized [B, C', T']."""

    def __init__(self, config: HiggsAudioV2TokenizerConfig) -> None:
        super().__init__()
        size = config.semantic_hidden_size
        widths = [size] + [int(size * ratio) for ratio in config.channel_ratios]
        self.conv = nn.Conv1d(size, size, config.kernel_size, padding=config.kernel_size // 2, bias=False)
        self.conv_blocks = nn.ModuleList(
            EncoderStage(config, *shape) for shape in zip(widths, widths[1:], config.strides, strict=False)
        )

    def forward(self, x: Ragged) -> Ragged:
        x = x.conv(self.conv)
        for stage in self.conv_blocks:
            x = stage(x)
        return x


class SemanticDecoder(nn.Module):
    """Quantized features [B, C, T] -> an estimate of the teacher's features [B, C, T']."""

    def __init__(self, config: HiggsAudioV2TokenizerConfig) -> None:
        super().__init__()
        size = config.semantic_hidden_size
        padding = config.kernel_size // 2
        widths = [int(size * ratio) for ratio in config.channel_ratios] + [size]
        self.conv1 = nn.Conv1d(size, widths[0], config.kernel_size, padding=padding, bias=False)
        self.conv_blocks = nn.ModuleList(
            DecoderStage(config, *shape) for shape in zip(widths, widths[1:], config.strides, strict=False)
        )
        self.conv2 = nn.Conv1d(size, size, config.kernel_size, padding=padding, bias=False)

    def forward(self, x: Ragged) -> Ragged:
        x = x.conv(self.conv1)
        for stage in self.conv_blocks:
            x = stage(x)
        return x.conv(self.conv2)
