"""Decoder checkpoints: the names of the Hugging Face and the original (Boson) release, and their configs.

This project's own tensor names are those of the Hugging Face format; the tables below are all that differs.
"""

from collections.abc import Callable, Mapping

from higgs.errors import UserError

KeyMap = Callable[[str], "tuple[str, int] | None"]
"""Checkpoint name -> (name in this project, part number along rows), or None for a tensor to leave aside."""

IGNORED_ENDINGS = ("audio_codebook_weights", "rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
"""Tensors of the original release that are derived from the config, or not read by any forward pass."""

SPLIT_PARTS = {
    ".embedding_frozen.weight": 0,
    ".embedding_trainable.weight": 1,
    ".linear_frozen.weight": 0,
    ".linear_trainable.weight": 1,
}
"""The original release may cut an embedding or a head in two along its rows: the frozen rows come first."""

BOSON_PREFIXES = {
    "audio_decoder_proj.": "",
    "audio_codebook_embeddings.": "model.embed_audio_tokens.embed_audio_tokens.",
    "audio_out_embed_projector.": "model.embed_audio_tokens.projector.",
    "embed_tokens.": "model.embed_tokens.",
    "layers.": "model.layers.",
    "norm.": "model.norm.",
}

TEXT_HEAD, EMBEDDING = "text_lm_head.weight", "model.embed_tokens.weight"

BOSON_AUDIO_FIELDS = {
    "audio_num_codebooks": "num_codebooks",
    "audio_out_token_idx": "audio_token_id",
    "audio_out_bos_token_id": "audio_bos_token_id",
    "audio_stream_bos_id": "audio_stream_bos_id",
    "audio_stream_eos_id": "audio_stream_eos_id",
    "pad_token_id": "pad_token_id",
}
BOSON_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "head_dim",
    "attention_bias", "attention_dropout", "mlp_bias", "rope_theta", "rope_scaling",
)  # fmt: skip


def from_boson(name: str) -> tuple[str, int] | None:
    """Name in an original checkpoint -> (name in this project, part along rows); None for a tensor not used.

    Names of the Hugging Face format pass unchanged, so that one map reads both formats and their mixtures.
    """
    if name.endswith(IGNORED_ENDINGS):
        return None
    part = 0
    for ending, number in SPLIT_PARTS.items():
        if name.endswith(ending):
            name, part = name.removesuffix(ending) + ".weight", number
    for prefix, replacement in BOSON_PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix), part
    return name, part


def to_boson(name: str) -> str:
    """Name in this project -> name in an original checkpoint (unsplit)."""
    if name.endswith("_lm_head.weight"):
        return "audio_decoder_proj." + name
    for prefix, replacement in BOSON_PREFIXES.items():
        if replacement and name.startswith(replacement):
            return prefix + name.removeprefix(replacement)
    return name


def key_map(use_text_head: bool, strip_to_backbone: bool = False) -> KeyMap:
    """The map for loading. A text head that was not asked for is left aside.

    With `strip_to_backbone` the target is the bare transformer: heads are left aside and the `model.` prefix goes.
    """

    def target(name: str) -> tuple[str, int] | None:
        mapped = from_boson(name)
        if mapped is None or (mapped[0] == TEXT_HEAD and not use_text_head):
            return None
        if strip_to_backbone:
            if mapped[0].endswith("_lm_head.weight"):
                return None
            return mapped[0].removeprefix("model."), mapped[1]
        return mapped

    return target


def is_boson_config(config: Mapping) -> bool:
    return "text_config" in config and "audio_num_codebooks" in config


def config_from_boson(config: Mapping, token_to_id: Callable[[str], int] | None = None) -> dict:
    """The fields of an original `config.json` under this project's names.

    The original counts codes without the two stream tokens. It names no id for the end of a turn nor for the delayed
    tail: those are `<|eot_id|>` and `<|reserved_special_token_6|>` of its tokenizer (`token_to_id`), or the released
    model's ids where no tokenizer is at hand.
    """
    text = config["text_config"]
    absent = [name for name in ("hidden_size", "num_attention_heads") if name not in text]
    absent += [name for name in ("audio_codebook_size",) if name not in config]
    if absent:
        raise UserError(f"The original release's config.json lacks {', '.join(absent)}. Copy the file again.")
    fields = {name: text[name] for name in BOSON_TEXT_FIELDS if name in text}
    fields.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    fields |= {ours: config[theirs] for theirs, ours in BOSON_AUDIO_FIELDS.items() if theirs in config}
    fields["codebook_size"] = config["audio_codebook_size"] + 2
    fields |= _ablations_from_boson(config)
    if token_to_id is not None:
        fields["audio_delay_token_id"] = token_to_id("<|reserved_special_token_6|>")
        fields["eos_token_id"] = token_to_id("<|eot_id|>")
    return fields


def _ablations_from_boson(config: Mapping) -> dict:
    """The original's switches; without them a config means the release, which has DualFFN in every layer."""
    layers = config["text_config"].get("num_hidden_layers")
    adapter = config.get("audio_adapter_type")
    dual = config.get("audio_dual_ffn_layers")
    if config.get("use_audio_out_self_attention"):
        raise UserError(
            "use_audio_out_self_attention is on in this config.json. No released checkpoint has it, and the original "
            "format is not read with it."
        )
    if adapter == "stack":
        dual = []
    partly = dual is not None and layers is not None and 0 < len(set(dual)) < layers
    return {
        "audio_ffn_layers": dual,
        "audio_fast_forward": adapter == "dual_ffn_fast_forward" and partly,
        "audio_embed_mean": bool(config.get("audio_embed_avg")),
        "audio_embed_projector": bool(config.get("use_audio_out_embed_projector")),
    }
