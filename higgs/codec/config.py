"""The shape of a codec: what `config.json` of the public checkpoints says, under the same names.

Only the fields that decide what is computed are kept. Others that the public format carries (dropout rates of the
teacher, sizes of a quantizer that DAC has and this codec has not) are skipped on reading and left to their defaults
on writing.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from higgs.errors import UserError
from higgs.folders import ConfigFile

MODEL_TYPE = "higgs_audio_v2_tokenizer"


class _Config:
    """Reading and writing of plain dicts; sequences become tuples, so that configs compare by value."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class AcousticConfig(_Config):
    """The acoustic encoder and decoder (DAC). Widths are channels; ratios are strides, first layer first."""

    encoder_hidden_size: int = 64
    downsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    decoder_hidden_size: int = 1024
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    hidden_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        down, up = math.prod(self.downsampling_ratios), math.prod(self.upsampling_ratios)
        _check(
            down == up,
            f"downsampling_ratios {self.downsampling_ratios} make {down} samples a frame but upsampling_ratios "
            f"{self.upsampling_ratios} make {up}; give both with the same product",
        )
        halvings = 2 ** len(self.upsampling_ratios)
        _check(
            self.decoder_hidden_size % halvings == 0,
            f"decoder_hidden_size {self.decoder_hidden_size} is halved {len(self.upsampling_ratios)} times; "
            f"make it a multiple of {halvings}",
        )


@dataclass(frozen=True)
class SemanticConfig(_Config):
    """The frozen teacher (HuBERT). `conv_*` have one entry per layer of its waveform front end."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    feat_proj_layer_norm: bool = True
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_pos_batch_norm: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    layer_norm_eps: float = 1e-5
    mask_time_prob: float = 0.0  # with the next: whether the checkpoint holds a mask embedding
    mask_feature_prob: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_act", "feat_extract_activation"):
            known = ("gelu", "gelu_new", "relu", "selu")
            _check(getattr(self, name) in known, f"{name} {getattr(self, name)!r} is not known; use one of {known}")
        _check(
            self.feat_extract_norm in ("group", "layer"),
            f"feat_extract_norm {self.feat_extract_norm!r} is not known; use 'group' or 'layer'",
        )
        counts = len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride)
        _check(len(set(counts)) == 1, f"conv_dim, conv_kernel and conv_stride differ in length: {counts}")
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            _check(
                self.hidden_size % getattr(self, name) == 0,
                f"hidden_size {self.hidden_size} must be a multiple of {name} {getattr(self, name)}",
            )

    @property
    def has_mask_embedding(self) -> bool:
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0


@dataclass(frozen=True)
class HiggsAudioV2TokenizerConfig(_Config, ConfigFile):
    """The whole codec.

    `target_bandwidths` are in kbit/s, ascending; the last one sets the number of codebooks. `downsample_factor` is the
    teacher's hop in samples at `semantic_sample_rate` Hz. `codebook_dim` None means the full feature width. The nested
    configs may be given as dicts; what a dict leaves out has the defaults above.
    """

    target_bandwidths: tuple[float, ...] = (0.5, 1, 1.5, 2, 4)
    sample_rate: int = 24000
    kernel_size: int = 3
    channel_ratios: tuple[float, ...] = (1, 1)
    strides: tuple[int, ...] = (1, 1)
    block_dilations: tuple[int, ...] = (1, 1)
    unit_kernel_size: int = 3
    codebook_size: int = 1024
    codebook_dim: int | None = 64
    initializer_range: float = 0.02
    acoustic_model_config: AcousticConfig = field(default_factory=AcousticConfig)
    # Where no teacher is described at all, the public format means one with a mask embedding.
    semantic_model_config: SemanticConfig = field(default_factory=lambda: SemanticConfig(mask_time_prob=0.05))
    semantic_sample_rate: int = 16000
    downsample_factor: int = 320

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind, model_type in (
            ("acoustic_model_config", AcousticConfig, "dac"),
            ("semantic_model_config", SemanticConfig, "hubert"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                # Constructed, not `from_dict`: here a misspelt key must fail.
                values = {key: item for key, item in dict(value).items() if key != "model_type"}
                _check(dict(value).get("model_type", model_type) == model_type, f"{name} must be of type {model_type}")
                object.__setattr__(self, name, kind(**values))
        if self.codebook_dim is None:
            object.__setattr__(self, "codebook_dim", self.hidden_size)
        _check(
            len(self.strides) == len(self.channel_ratios),
            f"strides {self.strides} and channel_ratios {self.channel_ratios} differ in length",
        )
        _check(len(self.target_bandwidths) > 0, "target_bandwidths is empty; give at least one, in kbit/s")
        _check(
            self.num_quantizers >= 1,
            f"target_bandwidths end at {self.target_bandwidths[-1]} kbit/s, less than one codebook "
            f"({self.frame_rate * self.codebook_nbits / 1000} kbit/s) takes",
        )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.acoustic_model_config.downsampling_ratios)

    @property
    def frame_rate(self) -> int:
        """Frames per second, rounded up."""
        return math.ceil(self.sample_rate / self.hop_length)

    @property
    def semantic_hidden_size(self) -> int:
        return self.semantic_model_config.hidden_size

    @property
    def hidden_size(self) -> int:
        """Width of the joint features that are quantized."""
        return self.acoustic_model_config.hidden_size + self.semantic_hidden_size

    @property
    def codebook_nbits(self) -> int:
        return math.ceil(math.log2(self.codebook_size))

    @property
    def num_quantizers(self) -> int:
        """Number of codebooks K."""
        return int(1000 * self.target_bandwidths[-1] // (self.frame_rate * self.codebook_nbits))

    @property
    def semantic_downsample_factor(self) -> int:
        """Which of the teacher's frames are used: every so-many-th (1 or less: all)."""
        return int(self.hop_length / (self.sample_rate / self.semantic_sample_rate) / self.downsample_factor)

    def num_codebooks_at(self, bandwidth: float | None) -> int:
        """Codebooks that a bandwidth in kbit/s pays for (None: the highest one).

        Raises:
            UserError: where the codec was not trained for that bandwidth.
        """
        if bandwidth is None:
            bandwidth = self.target_bandwidths[-1]
        if bandwidth not in self.target_bandwidths:
            raise UserError(f"bandwidth {bandwidth} is not one of {self.target_bandwidths} kbit/s; choose one of them.")
        per_codebook = math.log2(self.codebook_size) * self.frame_rate / 1000
        return min(self.num_quantizers, max(1, math.floor(bandwidth / per_codebook)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read the dict of a `config.json`. Missing keys mean the defaults; keys that this codec has no use for are
        skipped.

        Raises:
            UserError: where it describes something else than this codec.
        """
        _check(
            values.get("model_type", MODEL_TYPE) == MODEL_TYPE,
            f"model_type is {values.get('model_type')!r}, not {MODEL_TYPE!r}; is this the codec's folder?",
        )
        values = dict(values)
        for name, kind, model_type in (
            ("acoustic_model_config", AcousticConfig, "dac"),
            ("semantic_model_config", SemanticConfig, "hubert"),
        ):
            nested = values.pop(name, None)
            if nested is not None:
                found = nested.get("model_type", model_type)
                _check(found == model_type, f"{name} is of type {found!r}; only {model_type!r} is supported")
                _check(nested.get("adapter_attn_dim") is None, f"{name} has adapters, which are not supported")
                values[name] = kind.from_dict(nested)
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The dict of a `config.json` that the public classes read too."""
        values = {"model_type": MODEL_TYPE, "architectures": ["HiggsAudioV2TokenizerModel"], **asdict(self)}
        values["acoustic_model_config"]["model_type"] = "dac"
        values["semantic_model_config"]["model_type"] = "hubert"
        return values


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"The codec's config cannot be used: {message}.")
