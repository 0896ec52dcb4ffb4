"""Audio on its way into the processor: the front end's settings, and the audio item of a message.

L samples, K codebooks, T codec frames.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higgs.audio import load_audio
from higgs.errors import UserError

# Where the audio of an item may stand; exactly one of them.
SOURCES = ("url", "path", "audio", "array", "base64", "codes")


@dataclass(frozen=True)
class AudioFeatureExtractor:
    """The `feature_extractor` entry of `processor_config.json`: mono audio at `sampling_rate` Hz.

    Clips are coded at their own lengths, so nothing is padded here; the padding fields are carried for the programs
    that read the file.
    """

    feature_size: int = 1
    sampling_rate: int = 24000
    hop_length: int = 1
    padding_value: float = 0.0
    padding_side: str = "right"
    return_attention_mask: bool = True

    def __post_init__(self) -> None:
        if self.feature_size != 1:
            raise UserError(f"The feature extractor has feature_size={self.feature_size}; the codec is mono, set 1.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AudioFeatureExtractor":
        """Read the entry; keys that other programs put there are left out."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        return {"feature_extractor_type": "DacFeatureExtractor", **asdict(self)}


def read_audio_item(item: Mapping[str, Any], sample_rate: int, where: str) -> Tensor:
    """The waveform of an audio item, mono float32 [L] at `sample_rate`, or its codes [K, T] (int64) if it has them.

    An item holds one of: `url` (http(s) or a path), `path`, `audio` (either, or an array), `array` (its rate in
    `sampling_rate`, else taken to be at `sample_rate`), `base64` (an encoded sound file), `codes` [K, T] from the
    codec. UserError, beginning with `where`, if it holds none or several.
    """
    given = [name for name in SOURCES if item.get(name) is not None]
    if len(given) != 1:
        what = f"several ({', '.join(given)})" if given else "none"
        raise UserError(f"{where} must hold one of {', '.join(SOURCES)}; it holds {what}.")
    source = item[given[0]]
    rate = item.get("sampling_rate")
    if rate is not None and (not isinstance(rate, int) or rate < 1):
        raise UserError(f"{where}: sampling_rate is {rate!r}; it must be a whole number of Hz.")
    if given[0] in ("url", "path") and not isinstance(source, str | Path):
        raise UserError(f"{where}: {given[0]} must be text, not {type(source).__name__}.")
    if given[0] == "codes" or isinstance(source, list):
        try:
            source = torch.as_tensor(source, dtype=torch.long if given[0] == "codes" else torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{where}: {given[0]} is no regular array of numbers ({error}).") from error
    if given[0] == "codes":
        return source
    if given[0] == "base64":
        if not isinstance(source, str):
            raise UserError(f"{where}: base64 must be text, not {type(source).__name__}; decode the bytes to a string.")
        if not source.startswith("data:"):  # a short one could else pass for a path
            source = f"data:audio;base64,{source}"
    try:
        return load_audio(source, sample_rate, sampling_rate_of_array=rate)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
