"""PocketSphinx: a small recogniser of English whose model lies in its wheel, so nothing is downloaded.

It is a meter of intelligibility, not a good recogniser: its own error on clean speech is measured in every run and
printed beside what it measures.

Shapes: L samples.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pocketsphinx
from torch import Tensor

from higgs.eval.judges.base import Recognizer, Transcript, Word

FRAMES_PER_SECOND = 100
FILLER = re.compile(r"<.*>|\[.*\]|\+\+.*\+\+")


@dataclass
class Pocketsphinx(Recognizer):
    """The recogniser with the US English model of its package."""

    light: ClassVar[bool] = True
    _decoder: pocketsphinx.Decoder | None = field(default=None, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._decoder is None:
            self._decoder = pocketsphinx.Decoder(samprate=float(self.sample_rate), loglevel="FATAL")

    def describe(self) -> dict[str, Any]:
        return {"name": "pocketsphinx", "version": importlib.metadata.version("pocketsphinx"), "model": "en-us"}

    def transcribe(self, clips: Sequence[Tensor]) -> list[Transcript]:
        self.load()
        return [self._hear(clip) for clip in clips]

    def _hear(self, clip: Tensor) -> Transcript:
        samples = (clip.clamp(-1, 1) * 32767).short()
        if not samples.any():  # it would hear a word in digital silence
            return Transcript("")
        decoder = self._decoder
        # The front end carries its noise estimate from one clip to the next; every clip starts afresh. (Means are taken
        # over each clip: the model's own feat.params say `-cmn batch`, which a keyword of Decoder does not override.)
        decoder.reinit_feat()
        decoder.start_utt()
        decoder.process_raw(samples.numpy().tobytes(), full_utt=True)
        decoder.end_utt()
        if decoder.hyp() is None:
            return Transcript("")
        words = [
            Word(
                re.sub(r"\(\d+\)$", "", segment.word),
                segment.start_frame / FRAMES_PER_SECOND,
                (segment.end_frame + 1) / FRAMES_PER_SECOND,
            )
            for segment in decoder.seg()
            if not FILLER.fullmatch(segment.word)
        ]
        return Transcript(" ".join(word.text for word in words), words)
