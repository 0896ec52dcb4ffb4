"""The interface of what listens: recognisers, speaker embedders, quality judges.

A judge is a dataclass whose fields are its config (so Hydra builds it and it travels to another process); weights are
loaded by `load`. Clips are mono float32 [L] at `sample_rate` Hz, of any lengths; a clip's result does not depend on what
else is in the batch.

Shapes: B clips, L samples, D embedding size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Word:
    """A word that was heard, from `start` to `end` in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """What a recogniser heard; `words` have their times where the recogniser tells them, else the list is empty."""

    text: str
    words: list[Word] = field(default_factory=list)


class Judge(ABC):
    """What all judges share."""

    sample_rate: ClassVar[int] = 16000
    # Light judges run on one CPU core, in each of the processes that compute metrics; others in the main process, on the
    # device, in batches.
    light: ClassVar[bool] = False

    @abstractmethod
    def load(self, device: str = "cpu") -> None:
        """Reads the weights; a second call does nothing. UserError with what to install or download where that fails."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What makes its figures comparable: `name`, `version`, and where weights came from. No paths of a machine."""


class Recognizer(Judge):
    @abstractmethod
    def transcribe(self, clips: Sequence[Tensor]) -> list[Transcript]:
        """What is said in each of the clips; an empty text where nothing is heard."""


class SpeakerEmbedder(Judge):
    @abstractmethod
    def embed(self, clips: Sequence[Tensor]) -> Tensor:
        """Embeddings [B, D] of unit length; their dot product is the similarity of two voices."""


class QualityJudge(Judge):
    @abstractmethod
    def score(self, clips: Sequence[Tensor]) -> list[dict[str, float]]:
        """Predicted opinion scores of each clip, by the names of `higgs.eval.catalog`."""
