"""The audio items of conversations, and the sound behind them.

Shapes: L samples.
"""

from collections.abc import Sequence

from torch import Tensor

from higgs.data.manifest import Sample
from higgs.inputs import read_audio_item


def audio_items(samples: Sequence[Sample]) -> list[tuple[Sample, dict]]:
    """Every audio item with its sample, in order."""
    return [
        (sample, item)
        for sample in samples
        for message in sample.messages
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == "audio"
    ]


def load_clips(samples: Sequence[Sample], sample_rate: int) -> list[Tensor]:
    """The waveforms [L] of all audio items that hold sound, in order; a bad one is a UserError naming its sample."""
    read = [read_audio_item(item, sample_rate, f"Sample {sample.id}") for sample, item in audio_items(samples)]
    return [clip for clip in read if clip.is_floating_point()]
