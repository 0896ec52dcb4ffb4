"""Starting a decoder from a text language model of the Llama family, as the released one was started from Llama 3.2.

The text path takes the weights as they are. Where audio has a feed-forward and norms of its own, they start as copies of
the text's, so that at first an audio token is treated as a text token would be; audio's embedding, head and (as an
ablation) attention stay as they were.

Shapes: V vocabulary, C hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from higgs.checkpoint.decoder import EMBEDDING, TEXT_HEAD
from higgs.checkpoint.files import StoredTensor, open_safetensors, stored_tensors
from higgs.errors import UserError
from higgs.folders import CONFIG, read_json, resolve_folder
from higgs.model.config import HiggsAudioV2Config
from higgs.model.decoder import DualFFNDecoder

LLAMA_HEAD = "lm_head.weight"

COPIED_TO_AUDIO = {
    "audio_mlp.": "mlp.",
    "audio_input_layernorm.": "input_layernorm.",
    "audio_post_attention_layernorm.": "post_attention_layernorm.",
}
"""Part of this project's names -> part of the name that it is copied from, within a layer."""

COMPUTED_ALIKE = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters",
)  # fmt: skip
"""What decides how the weights are used, and no tensor's shape would tell."""


def is_text_model(config: Mapping) -> bool:
    """Whether a `config.json` describes a text model that `start_from_text_model` reads."""
    return config.get("model_type") == "llama"


def source_of(name: str) -> str | None:
    """The text model's tensor that a decoder's parameter starts from; None for what is audio's alone."""
    if name == TEXT_HEAD:
        return LLAMA_HEAD
    for ours, theirs in COPIED_TO_AUDIO.items():
        if f".{ours}" in name:
            return name.replace(f".{ours}", f".{theirs}")
    return None if "audio" in name else name


@torch.no_grad()
def start_from_text_model(decoder: DualFFNDecoder, path: str | Path) -> list[str]:
    """Copies a text model's weights from a folder or hub id into `decoder`; returns the names that stay as they were.

    Embedding and text head may have more rows than the text model's: the new ones, say of audio's control tokens, stay.
    Raises UserError naming a setting that differs, or a tensor that is missing, of another shape or has no place; the
    decoder is then unchanged.
    """
    folder = resolve_folder(path)
    values = read_json(folder / CONFIG)
    if not is_text_model(values):
        raise UserError(f"{folder / CONFIG} describes no model of type llama, so it cannot start the text path.")
    fields = {*COMPUTED_ALIKE, "rope_theta", "rope_scaling", "hidden_size", "num_hidden_layers"}
    theirs = HiggsAudioV2Config.from_dict({"head_dim": None, **{k: v for k, v in values.items() if k in fields}})
    for field in COMPUTED_ALIKE:
        given, wanted = getattr(theirs, field), getattr(decoder.config, field)
        if given != wanted:
            raise UserError(
                f"{field} is {given} in {folder / CONFIG}, but {wanted} in the decoder; make them the same."
            )
    tensors = stored_tensors(folder)
    if LLAMA_HEAD not in tensors and EMBEDDING in tensors:
        tensors[LLAMA_HEAD] = tensors[EMBEDDING]  # tied
    parameters = dict(decoder.named_parameters())
    sources = {name: source_of(name) for name in parameters}
    for name, source in sources.items():
        if source is not None:
            _check(name, parameters[name], source, tensors, folder)
    extra = sorted(t for t in tensors if t not in sources.values() and not t.endswith(("inv_freq", LLAMA_HEAD)))
    if extra:
        raise UserError(
            f"The tensor {extra[0]} of {folder} has no place in the decoder. Give it the text model's layers."
        )
    for name, source in sources.items():
        if source is not None:
            stored = tensors[source]
            with open_safetensors(stored.file) as file:
                parameters[name][: stored.shape[0]].copy_(file.get_tensor(stored.name))
    return [name for name, source in sources.items() if source is None]


def _check(name: str, ours: Tensor, source: str, tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    if source not in tensors:
        raise UserError(f"The tensor {source}, from which {name} starts, is missing from {folder}.")
    theirs = tensors[source].shape
    grows = name in (EMBEDDING, TEXT_HEAD) and theirs[0] <= ours.shape[0]
    if theirs[1:] != tuple(ours.shape[1:]) or not (grows or theirs[0] == ours.shape[0]):
        raise UserError(
            f"The tensor {source} has shape {list(theirs)} in {folder}, but {name} is {list(ours.shape)}. Give the "
            "decoder the text model's sizes."
        )
