"""The decoder's architecture as data."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from higgs.errors import UserError
from higgs.folders import ConfigFile

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 1024,
}

# What Hugging Face's base class writes into every config.json; none of it describes this architecture.
FOREIGN_KEYS = frozenset(
    [
        "architectures",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "auto_map",
        "_attn_implementation_autoset",
        "use_text_head",
        "layer_types",
    ]
)


ABLATIONS = ("audio_ffn_layers", "audio_fast_forward", "audio_attention", "audio_embed_mean", "audio_embed_projector")
LAYER_CHOICES = ("all", "none", "first_half", "last_half")


@dataclass
class HiggsAudioV2Config(ConfigFile):
    """The sizes and token ids of a DualFFN decoder; the defaults are those of the released 3B model.

    Names and meanings are the documented ones. `codebook_size` counts the rows of each codebook's embedding; a real
    checkpoint has 1026 (1024 codes and the two stream tokens) although the documented default says 1024.
    `num_key_value_heads` and `head_dim` may be None: then all heads have their own keys, and the width is divided
    evenly. `eos_token_id` may be a list. Raises UserError for sizes that do not fit together.

    The last five fields are ablations (higgs.model.ablations); at their defaults the model is the released one, and
    `config.json` does not mention them. `audio_ffn_layers` may be None, a list or one of `LAYER_CHOICES`, and is kept
    as None (every layer) or a sorted list.
    """

    vocab_size: int = 128256
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 28
    num_attention_heads: int = 24
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 128001
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 128009
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    head_dim: int | None = 128
    num_codebooks: int = 8
    codebook_size: int = 1024
    audio_token_id: int = 128016
    audio_bos_token_id: int = 128013
    audio_delay_token_id: int = 128014
    audio_stream_bos_id: int = 1024
    audio_stream_eos_id: int = 1025
    audio_ffn_layers: list[int] | str | None = (
        None  # the layers with a feed-forward of audio's own; []: a dense decoder
    )
    audio_fast_forward: bool = False  # audio tokens skip the layers outside that list
    audio_attention: bool = False  # in the layers of that list, audio attends to audio before the shared attention
    audio_embed_mean: bool = False  # a frame's embedding is the mean over its codebooks instead of the sum
    audio_embed_projector: bool = False  # and passes a linear layer

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not isinstance(self.rope_parameters, Mapping | None):
            raise UserError(
                f"rope_parameters is {self.rope_parameters!r}; it must be a mapping with rope_type and so on."
            )
        self.rope_parameters = dict(LLAMA3_ROPE if self.rope_parameters is None else self.rope_parameters)
        unknown = sorted(self.rope_parameters.keys() - LLAMA3_ROPE.keys())
        if unknown:
            raise UserError(f"rope_parameters has unknown keys: {', '.join(unknown)}. Known: {', '.join(LLAMA3_ROPE)}.")
        self.rope_parameters.setdefault("rope_type", "default")
        self.rope_parameters.setdefault("rope_theta", 500000.0)
        if self.eos_token_id is not None and not isinstance(self.eos_token_id, int):
            self.eos_token_id = [int(token) for token in self.eos_token_id]
        self._check()
        self._choose_layers()

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "num_codebooks", "codebook_size", "head_dim")  # fmt: skip
        for name in sizes:
            size = getattr(self, name)
            if size is None and name in ("num_key_value_heads", "head_dim"):
                continue
            if not isinstance(size, int) or size < 1:
                raise UserError(f"{name} is {size!r}; it must be a whole number of at least 1.")

    def _check(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), so that every group of heads shares one key."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary embeddings need an even number.")
        if self.pretraining_tp not in (None, 1):
            raise UserError("pretraining_tp above 1 reproduces a split that no released checkpoint used; set it to 1.")
        if self.rope_parameters["rope_type"] not in ("default", "llama3"):
            raise UserError(
                f"rope_type '{self.rope_parameters['rope_type']}' is not built here; use 'default' or 'llama3'."
            )
        absent = LLAMA3_ROPE.keys() - self.rope_parameters.keys()
        if self.rope_parameters["rope_type"] == "llama3" and absent:
            raise UserError(f"rope_parameters of type llama3 lack {', '.join(sorted(absent))}; add them.")

    def _choose_layers(self) -> None:
        """Brings `audio_ffn_layers` to None or a sorted list, and refuses combinations that mean nothing."""
        count, chosen = self.num_hidden_layers, self.audio_ffn_layers
        named = {
            "all": range(count),
            "none": range(0),
            "first_half": range(count // 2),
            "last_half": range(count // 2, count),
        }
        if chosen is None:
            chosen = named["all"]
        elif isinstance(chosen, str) and chosen in named:
            chosen = named[chosen]
        elif isinstance(chosen, str) or not all(isinstance(i, int) and 0 <= i < count for i in chosen):
            raise UserError(
                f"audio_ffn_layers is {chosen!r}; give a list of layers from 0 to {count - 1}, or one of "
                f"{', '.join(LAYER_CHOICES)}."
            )
        layers = sorted(set(chosen))
        self.audio_ffn_layers = None if len(layers) == count else layers
        if self.audio_fast_forward and len(layers) in (0, count):
            raise UserError(
                "audio_fast_forward skips the layers outside audio_ffn_layers; list some layers there, but not all."
            )
        if self.audio_attention and not layers:
            raise UserError(
                "audio_attention belongs to the layers of audio_ffn_layers, which lists none; list some, or leave one out."
            )

    @property
    def dual_layers(self) -> list[int]:
        """The layers in which audio has norms and a feed-forward of its own."""
        return list(range(self.num_hidden_layers)) if self.audio_ffn_layers is None else self.audio_ffn_layers

    @property
    def num_attentions(self) -> int:
        """How many attentions write keys: one a layer, and audio's own."""
        return self.num_hidden_layers + (len(self.dual_layers) if self.audio_attention else 0)

    @property
    def splits_keys(self) -> bool:
        """Whether some attention sees the keys of one kind of token only."""
        return self.audio_fast_forward or self.audio_attention

    @property
    def is_released_architecture(self) -> bool:
        """Whether this is the architecture of the released model, which transformers loads: no ablation is on."""
        return not any(getattr(self, name) not in (None, False) for name in ABLATIONS)

    @property
    def eos_token_ids(self) -> list[int]:
        """All ids that end a turn, as a list."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HiggsAudioV2Config":
        """Reads the contents of a Hugging Face `config.json`, also the older `rope_theta`/`rope_scaling` spelling."""
        values = dict(values)
        if "text_config" in values or "acoustic_model_config" in values:
            raise UserError(
                "This config.json describes no decoder of the Hugging Face format. The original release's is read by "
                "HiggsAudioV2ForConditionalGeneration.from_pretrained, a codec's by HiggsAudioV2TokenizerConfig."
            )
        theta, scaling = values.pop("rope_theta", None), values.pop("rope_scaling", None)
        if values.get("rope_parameters") is None and (theta is not None or scaling is not None):
            rope = dict(scaling or {})
            rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
            values["rope_parameters"] = {"rope_theta": 500000.0 if theta is None else theta, **rope}
        known = {field.name for field in fields(cls)}
        unread = sorted(set(values) - known - FOREIGN_KEYS)
        rope = values.get("rope_parameters")
        if isinstance(rope, Mapping):
            unread += [f"rope_parameters.{key}" for key in rope if key not in LLAMA3_ROPE]
            values["rope_parameters"] = {key: value for key, value in rope.items() if key in LLAMA3_ROPE}
        if unread:
            warnings.warn(
                f"config.json holds keys that no part of this model reads: {', '.join(unread)}.", stacklevel=2
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json`; without ablations one that Hugging Face's class reads as well."""
        off = {name for name in ABLATIONS if getattr(self, name) in (None, False)}
        return {"model_type": "higgs_audio_v2", **{k: v for k, v in asdict(self).items() if k not in off}}
