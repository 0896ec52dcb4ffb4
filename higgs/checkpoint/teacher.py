"""The semantic teacher of a codec that is to be trained: a HuBERT from public files.

Two formats: a folder of Hugging Face (`config.json` with `model.safetensors` or `pytorch_model.bin`), and a file with
the state dict of torchaudio's HuBERT, which has no config: its sizes are read off the tensors.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from higgs.checkpoint.files import open_safetensors, stored_tensors
from higgs.codec import Codec, HiggsAudioV2TokenizerConfig, SemanticConfig
from higgs.codec.hubert import Hubert
from higgs.errors import UserError
from higgs.folders import CONFIG, read_json

# Public prefix or ending -> ours. The first prefix that fits is replaced; a HuBERT may sit inside a larger network.
PREFIXES = {
    "wav2vec2.": "",
    "hubert.": "",
}
TORCHAUDIO_PREFIXES = {
    "encoder.feature_projection.": "feature_projection.",
    "encoder.transformer.": "encoder.",
}
ENDINGS = {
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
# Heads of networks that were trained on a HuBERT, and what its own training needed.
UNUSED = re.compile(r"(aux|lm_head|projector|classifier|mask_generator|logit_generator)\..*|masked_spec_embed")

# The frame rates that every public HuBERT has; its tensors do not tell them.
CONV_STRIDE = (5, 2, 2, 2, 2, 2, 2)
HEAD_SIZES = {1280: 80}  # width -> channels of an attention head, where they are not 64


@dataclass(frozen=True)
class Teacher:
    """A HuBERT's sizes and its tensors under this project's names."""

    config: SemanticConfig
    tensors: dict[str, Tensor]


def load_teacher(path: str | Path) -> Teacher:
    """Read a teacher from a Hugging Face folder or a torchaudio file.

    Raises:
        UserError: where there is no such file, it is no HuBERT, or naming missing, unexpected and wrongly shaped tensors.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        config, tensors = _read_folder(path)
    elif path.is_file():
        tensors = from_public(_read_tensors(path))
        config = sizes_of(tensors, path)
    else:
        raise UserError(
            f"There is no semantic teacher at {path}. Give a HuBERT's folder or file, or null for a random one."
        )
    _check(tensors, config, path)
    return Teacher(config, tensors)


def config_with_teacher(config: HiggsAudioV2TokenizerConfig, teacher: SemanticConfig) -> HiggsAudioV2TokenizerConfig:
    """The codec's config with a teacher of other sizes; its frames must come at a multiple of the codec's rate.

    Raises:
        UserError: where they do not.
    """
    hop = prod(teacher.conv_stride)
    ours = config.hop_length * config.semantic_sample_rate
    if ours % (hop * config.sample_rate):
        raise UserError(
            f"The teacher makes {config.semantic_sample_rate / hop:g} frames a second, which is no multiple of the codec's "
            f"{config.sample_rate / config.hop_length:g}. Change the codec's downsampling_ratios."
        )
    return replace(config, semantic_model_config=teacher, downsample_factor=hop)


def give_teacher(codec: Codec, teacher: Teacher) -> None:
    """Fill the codec's teacher, which has the sizes of `config_with_teacher`."""
    codec.semantic_model.load_state_dict(teacher.tensors, strict=True)


def from_public(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a public HuBERT, of either format; what no teacher computes with is left out."""
    converted = {}
    for name, tensor in tensors.items():
        for prefixes in (PREFIXES, TORCHAUDIO_PREFIXES):
            name = next((ours + name[len(old) :] for old, ours in prefixes.items() if name.startswith(old)), name)
        for old, ours in ENDINGS.items():
            name = name.removesuffix(old) + ours if name.endswith(old) else name
        if not UNUSED.fullmatch(name):
            converted[name] = tensor
    return converted


def to_torchaudio(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `from_public`, to the names of torchaudio."""
    converted = {}
    for name, tensor in tensors.items():
        name = next(
            (old + name[len(ours) :] for old, ours in TORCHAUDIO_PREFIXES.items() if name.startswith(ours)), name
        )
        converted[name] = tensor
    return converted


def sizes_of(tensors: Mapping[str, Tensor], source: Path) -> SemanticConfig:
    """The config of a HuBERT whose tensors are all that is known; strides are those of every public one."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{source} is no HuBERT of torchaudio: it lacks the tensor {name}.")
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    convs = [shape(f"feature_extractor.conv_layers.{i}.conv.weight") for i in range(len(CONV_STRIDE))]
    layer_norm = "feature_extractor.conv_layers.1.layer_norm.weight" in tensors
    hidden, group_width, positions = shape("encoder.pos_conv_embed.conv.parametrizations.weight.original1")
    head = HEAD_SIZES.get(hidden, 64)
    return SemanticConfig(
        hidden_size=hidden,
        num_hidden_layers=count(r"encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, hidden // head),
        intermediate_size=shape("encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
        feat_extract_norm="layer" if layer_norm else "group",
        do_stable_layer_norm=layer_norm,
        feat_proj_layer_norm="feature_projection.layer_norm.weight" in tensors,
        conv_dim=tuple(conv[0] for conv in convs),
        conv_kernel=tuple(conv[2] for conv in convs),
        conv_stride=CONV_STRIDE,
        conv_bias="feature_extractor.conv_layers.0.conv.bias" in tensors,
        num_conv_pos_embeddings=positions,
        num_conv_pos_embedding_groups=hidden // group_width,
    )


def _read_folder(folder: Path) -> tuple[SemanticConfig, dict[str, Tensor]]:
    values = read_json(folder / CONFIG)
    if values.get("model_type") != "hubert":
        raise UserError(
            f"{folder / CONFIG} is of model_type {values.get('model_type')!r}; the teacher must be a 'hubert'."
        )
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file() and not any(folder.glob("*.safetensors")):
        tensors = _read_tensors(pickled)
    else:
        tensors = {}
        for file in sorted({stored.file for stored in stored_tensors(folder).values()}):
            tensors |= load_file(file)
    # Nothing here computes with a mask embedding, so the codec's checkpoint need not carry one.
    config = replace(SemanticConfig.from_dict(values), mask_time_prob=0.0, mask_feature_prob=0.0)
    return config, from_public(tensors)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with open_safetensors(file) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as plain tensors ({error}). Save the network's state_dict()."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no state dict (names and tensors). Save the network's state_dict().")
    return dict(state)


def _check(tensors: Mapping[str, Tensor], config: SemanticConfig, source: Path) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Hubert(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        shapes = [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
        raise UserError(
            f"{source} does not fit a HuBERT; missing: {_listed(wanted.keys() - found.keys())}; unexpected: "
            f"{_listed(found.keys() - wanted.keys())}; wrong shape: {_listed(shapes)}."
        )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
