"""How to generate, as data."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from higgs.errors import UserError

# Options of Hugging Face's `generate` that this model cannot honour, with the values at which they are switched off.
REFUSED: dict[str, tuple] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "penalty_alpha": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "custom_generate": (None,),
    "guidance_scale": (None, 1.0),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "typical_p": (None, 1.0),
    "min_p": (None,),
    "bad_words_ids": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "synced_gpus": (None, False),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "renormalize_logits": (None, False),
    "stop_strings": (None,),
    "max_time": (None,),
    "cache_implementation": (None, "static"),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
}
# Keys of a generation_config.json that say nothing about how this model generates.
FOREIGN_KEYS = frozenset(
    [
        "_from_model_config",
        "transformers_version",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "use_text_head",
        "cache_implementation",
        "use_cache",
        "max_length",
        "early_stopping",
        "length_penalty",
        "generation_kwargs",
    ]
)


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling and stopping.

    `max_new_tokens` counts frames (and text tokens) per row, delay tail included; None means as many as positions are
    left. Without `do_sample` the most likely code is taken and temperature, top_k and top_p have no effect. `ras_*`:
    a code that occurs `ras_win_max_num_repeat` times or more among its codebook's last `ras_win_len` frames is drawn
    again from the unprocessed logits (repetition-aware sampling); both None switch it off. `seed` makes draws
    reproducible: row i of a batch draws with seed + i, so a batch equals its rows alone with those seeds; None takes a
    seed from torch's global generator. `eos_token_id`: text tokens that end a row; None takes the model's.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    seed: int | None = None
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int | None = None
    eos_token_id: int | list[int] | None = None
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False

    def __post_init__(self) -> None:
        for name, kind in (
            ("temperature", int | float),
            ("top_p", int | float),
            ("top_k", int),
            ("max_new_tokens", int),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"{name} is {value!r}; it must be a number.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.do_sample and self.temperature is not None and self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature}; it must be above 0. For greedy decoding set do_sample=False."
            )
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or above.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1], where 1 is off.")
        if (self.ras_win_len is None) != (self.ras_win_max_num_repeat is None):
            raise UserError("ras_win_len and ras_win_max_num_repeat work together; set both or neither.")
        if self.ras_win_len is not None and (self.ras_win_len < 1 or self.ras_win_max_num_repeat < 1):
            raise UserError(
                "ras_win_len and ras_win_max_num_repeat must be at least 1, or both null to switch RAS off."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationConfig":
        """Reads the contents of a Hugging Face `generation_config.json`."""
        values = {name: value for name, value in values.items() if name not in FOREIGN_KEYS}
        refuse_unsupported(values)
        known = {field.name for field in fields(cls)}
        unread = sorted(set(values) - known - set(REFUSED))
        if unread:
            warnings.warn(
                f"generation_config.json holds options that are not used here: {', '.join(unread)}.", stacklevel=2
            )
        # Hugging Face writes null for what its own defaults decide.
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    @property
    def eos_token_ids(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["seed"]
        values["top_k"] = values["top_k"] or 0  # None would be read as the default
        return {name: value for name, value in values.items() if value is not None}

    def updated(self, **changes: Any) -> "GenerationConfig":
        """A copy with changes; what cannot be honoured is a UserError, an unknown name a TypeError."""
        refuse_unsupported(changes)
        changes = {name: value for name, value in changes.items() if name not in REFUSED}
        unknown = sorted(set(changes) - {field.name for field in fields(self)})
        if unknown:
            raise TypeError(f"generate() got unknown arguments: {', '.join(unknown)}.")
        return replace(self, **changes)


def refuse_unsupported(values: Mapping[str, Any]) -> None:
    for name, off in REFUSED.items():
        if name in values and not any(values[name] is value or values[name] == value for value in off):
            value = values[name] if isinstance(values[name], int | float | str | list | dict) else "…"
            raise UserError(
                f"{name}={value!r} is not possible for audio codes, which are drawn per codebook under the delay "
                "pattern. Leave it out; greedy decoding and sampling (do_sample, temperature, top_k, top_p, ras_*) work."
            )
