"""The original release's codec (`config.json` + `model.pth`) to and from this project's names.

The release numbers the layers of nested `Sequential`s and stores the acoustic convolutions as weight norm, magnitude
`weight_g` and direction `weight_v`: weight = weight_v · weight_g / ‖weight_v‖, the norm over all but the first dim.
Its config says nothing of the widths of its parts; they are read off the tensors.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from higgs.checkpoint.meta import on_meta
from higgs.codec import AcousticConfig, Codec, HiggsAudioV2TokenizerConfig, SemanticConfig
from higgs.errors import UserError

# Tensors of the release that nothing computes with: a mask for the teacher's own training, and a head left over.
UNUSED = re.compile(r"semantic_model\.masked_spec_embed|fc1\..*")
# The release's config keys that change what is computed in a way this codec has no counterpart for -> what it supports.
SUPPORTED = {"downsample_mode": "step_down", "merge_mode": "concat", "vq_scale": 1}
WEIGHT_G, WEIGHT_V, WEIGHT = ".weight_g", ".weight_v", ".weight"


def key_map(config: HiggsAudioV2TokenizerConfig) -> dict[str, str]:
    """Release's prefix of every module that holds tensors -> ours. Everything below a prefix keeps its name."""
    return dict(_key_pairs(config))


def _key_pairs(config: HiggsAudioV2TokenizerConfig) -> Iterator[tuple[str, str]]:
    unit = ("snake1", "conv1", "snake2", "conv2")
    stages = len(config.acoustic_model_config.downsampling_ratios)
    # Inside a stage: encoder = three units, Snake, strided convolution; decoder = Snake, transposed one, three units.
    for theirs, ours, units, tail in (
        ("encoder.block", "acoustic_encoder", (0, 1, 2), {3: "snake1", 4: "conv1"}),
        ("decoder_2.model", "acoustic_decoder", (2, 3, 4), {0: "snake1", 1: "conv_t1"}),
    ):
        yield f"{theirs}.0", f"{ours}.conv1"
        for stage in range(stages):
            for number, index in enumerate(units, start=1):
                for inner, name in enumerate(unit):
                    yield (
                        f"{theirs}.{stage + 1}.block.{index}.block.{inner}",
                        f"{ours}.block.{stage}.res_unit{number}.{name}",
                    )
            for index, name in tail.items():
                yield f"{theirs}.{stage + 1}.block.{index}", f"{ours}.block.{stage}.{name}"
        yield f"{theirs}.{stages + 1}", f"{ours}.snake1"
        yield f"{theirs}.{stages + 2}", f"{ours}.conv2"

    # Convolutions of the semantic branch are wrapped once more, all but those over 1.
    yield "encoder_semantic.conv.conv", "encoder_semantic.conv"
    yield "decoder_semantic.conv1.conv", "decoder_semantic.conv1"
    yield "decoder_semantic.conv2.conv", "decoder_semantic.conv2"
    for branch in ("encoder_semantic", "decoder_semantic"):
        for block in range(len(config.strides)):
            prefix = f"{branch}.conv_blocks.{block}"
            yield f"{prefix}.conv.conv", f"{prefix}.conv"
            for index in range(len(config.block_dilations)):
                yield f"{prefix}.res_units.{index}.conv1.conv", f"{prefix}.res_units.{index}.conv1"
                yield f"{prefix}.res_units.{index}.conv2", f"{prefix}.res_units.{index}.conv2"

    for stage in range(config.num_quantizers):
        theirs, ours = f"quantizer.vq.layers.{stage}", f"quantizer.quantizers.{stage}"
        yield f"{theirs}._codebook", f"{ours}.codebook"
        yield f"{theirs}.project_in", f"{ours}.project_in"
        yield f"{theirs}.project_out", f"{ours}.project_out"
    yield "fc_prior", "fc"
    yield "fc_post1", "fc1"
    yield "fc_post2", "fc2"
    yield "semantic_model", "semantic_model"


def from_boson(state_dict: dict[str, Tensor], config: HiggsAudioV2TokenizerConfig) -> dict[str, Tensor]:
    """Rename the release's tensors and multiply out the weight norm of its acoustic convolutions.

    Raises:
        UserError: naming the tensors, where some have no counterpart or only one half of a weight norm is there.
    """
    prefixes = key_map(config)
    converted, unexpected = {}, []
    for key, tensor in state_dict.items():
        if UNUSED.fullmatch(key):
            continue
        name = _rename(key, prefixes)
        if name is None:
            unexpected.append(key)
        elif name.endswith(WEIGHT_G):
            pair = key.removesuffix(WEIGHT_G) + WEIGHT_V
            if pair not in state_dict:
                raise UserError(f"The codec's model.pth has {key} but not {pair}; the file is damaged, get it again.")
            converted[name.removesuffix(WEIGHT_G) + WEIGHT] = _multiply_out(tensor, state_dict[pair])
        elif not name.endswith(WEIGHT_V):
            converted[name] = tensor
    if unexpected:
        raise UserError(f"The codec's model.pth holds tensors that this codec has no place for: {_listed(unexpected)}.")
    return converted


def to_boson(state_dict: dict[str, Tensor], config: HiggsAudioV2TokenizerConfig) -> dict[str, Tensor]:
    """The opposite of `from_boson`: the release's names, acoustic weights as weight norm."""
    prefixes = {ours: theirs for theirs, ours in key_map(config).items()}
    converted = {}
    for key, tensor in state_dict.items():
        name = _rename(key, prefixes)
        assert name is not None, key
        if key.startswith("acoustic_") and key.endswith(WEIGHT):
            converted[name.removesuffix(WEIGHT) + WEIGHT_G] = _magnitude(tensor)
            converted[name.removesuffix(WEIGHT) + WEIGHT_V] = tensor.clone()
        else:
            converted[name] = tensor
    return converted


def boson_codec_to_hf(
    state_dict: dict[str, Tensor], boson_config: dict[str, Any], semantic_config: SemanticConfig | None = None
) -> tuple[HiggsAudioV2TokenizerConfig, dict[str, Tensor]]:
    """Convert the original release's codec to this project's config and state dict.

    Args:
        state_dict: its `model.pth`, loaded with `weights_only=True`.
        boson_config: its `config.json`.
        semantic_config: the teacher; None means a HuBERT of the sizes of the tensors, with heads of 64 channels.

    Raises:
        UserError: where the config asks for what is not supported, or naming missing, unexpected or wrongly shaped
            tensors.
    """
    for name, supported in SUPPORTED.items():
        if boson_config.get(name, supported) != supported:
            raise UserError(f"The codec's config has {name}={boson_config[name]!r}; only {supported!r} is supported.")
    config = _config_from_boson(state_dict, boson_config, semantic_config)
    converted = from_boson(state_dict, config)
    with on_meta():
        expected = Codec(config).state_dict()
    missing = expected.keys() - converted.keys()
    unexpected = converted.keys() - expected.keys()
    if missing or unexpected:
        raise UserError(
            f"The codec's model.pth does not fit its config.json; missing: {_listed(missing)}; "
            f"unexpected: {_listed(unexpected)}. Check that both files are of the same release."
        )
    for name, tensor in converted.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"Tensor {name} of the codec's model.pth has shape {tuple(tensor.shape)} but its config.json asks for "
                f"{tuple(expected[name].shape)}. Check that both files are of the same release."
            )
    return config, converted


def _config_from_boson(
    state_dict: dict[str, Tensor], boson_config: dict[str, Any], semantic_config: SemanticConfig | None
) -> HiggsAudioV2TokenizerConfig:
    """The release's config under this project's names; what it leaves out is the release's own default."""

    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            raise UserError(f"The codec's model.pth lacks tensor {key}; the file is damaged or of another model.")
        return state_dict[key].shape

    ratios = tuple(boson_config.get("ratios", (8, 5, 4, 2)))
    num_codebooks = boson_config.get("n_q", 8)
    codebook_size = boson_config.get("bins", 1024)
    if not isinstance(codebook_size, int):
        raise UserError("The codec's config has a list of bins (finite scalar quantization), which is not supported.")
    acoustic = AcousticConfig(
        encoder_hidden_size=shape("encoder.block.0.weight_v")[0],
        downsampling_ratios=ratios,
        decoder_hidden_size=shape("decoder_2.model.0.weight_v")[0],
        upsampling_ratios=ratios,
        hidden_size=boson_config.get("D", 128),
    )
    config = HiggsAudioV2TokenizerConfig(
        sample_rate=boson_config.get("sample_rate", 16000),
        semantic_sample_rate=boson_config.get("semantic_sample_rate") or 16000,
        codebook_size=codebook_size,
        codebook_dim=boson_config.get("codebook_dim"),
        acoustic_model_config=acoustic,
        semantic_model_config=semantic_config or _semantic_config(shape, state_dict),
        target_bandwidths=(1e6,),
    )
    # The release's list may go beyond what its codebooks carry; here the last bandwidth means all of them.
    full = num_codebooks * config.frame_rate * config.codebook_nbits / 1000
    bandwidths = [b for b in boson_config.get("target_bandwidths", (1, 1.5, 2, 4, 6)) if b < full]
    return HiggsAudioV2TokenizerConfig(
        **{**vars(config), "target_bandwidths": (*bandwidths, int(full) if full == int(full) else full)}
    )


def _semantic_config(shape: Any, state_dict: dict[str, Tensor]) -> SemanticConfig:
    def count(pattern: str) -> int:
        return len({match[1] for key in state_dict if (match := re.match(pattern, key))})

    model = "semantic_model"
    convs = count(rf"{model}\.feature_extractor\.conv_layers\.(\d+)\.")
    kernels = [shape(f"{model}.feature_extractor.conv_layers.{i}.conv.weight") for i in range(convs)]
    layer_norm = f"{model}.feature_extractor.conv_layers.1.layer_norm.weight" in state_dict
    hidden, width, positions = shape(f"{model}.encoder.pos_conv_embed.conv.parametrizations.weight.original1")
    return SemanticConfig(
        hidden_size=hidden,
        num_hidden_layers=count(rf"{model}\.encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=shape(f"{model}.encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
        feat_extract_norm="layer" if layer_norm else "group",
        do_stable_layer_norm=layer_norm,
        conv_dim=tuple(kernel[0] for kernel in kernels),
        conv_kernel=tuple(kernel[2] for kernel in kernels),
        conv_bias=f"{model}.feature_extractor.conv_layers.0.conv.bias" in state_dict,
        num_conv_pos_embeddings=positions,
        num_conv_pos_embedding_groups=hidden // width,
    )


def _rename(key: str, prefixes: dict[str, str]) -> str | None:
    """`key` with its longest known prefix replaced; None where there is none."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (prefix := ".".join(parts[:end])) in prefixes:
            return ".".join([prefixes[prefix], *parts[end:]])
    return None


def _magnitude(direction: Tensor) -> Tensor:
    return direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.ndim - 1))


def _multiply_out(magnitude: Tensor, direction: Tensor) -> Tensor:
    norm = _magnitude(direction)
    # The quotient first: it is exactly 1 where `to_boson` wrote the pair, so that the round trip is exact.
    return direction * torch.where(norm > 0, magnitude / norm, 0.0)


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
