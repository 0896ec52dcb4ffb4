"""Whisper (arXiv 2212.04356) as a recogniser, through transformers: the meter of the Seed-TTS tables for English.

Shapes: L samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from higgs.eval.judges.base import Recognizer, Transcript, Word
from higgs.eval.judges.pretrained import from_pretrained, identity

WINDOW = 30.0  # seconds that Whisper hears at once


@dataclass
class Whisper(Recognizer):
    """Greedy transcription. Clips are padded to windows of 30 s, so a batch changes nothing.

    Attributes:
        path: folder or hub id.
        language: in English words, such as "english"; None lets the model tell.
        words: also ask for the times of words, which dialogues need; the model must know its alignment heads.
    """

    path: str = "openai/whisper-large-v3"
    language: str | None = "english"
    words: bool = True
    batch_size: int = 8
    _pipeline: Any = field(default=None, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._pipeline is not None:
            return
        from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration, pipeline

        from higgs.checkpoint.io import pick_device

        model = from_pretrained(WhisperForConditionalGeneration, self.path).eval()
        self._pipeline = pipeline(
            "automatic-speech-recognition", model=model, tokenizer=from_pretrained(AutoTokenizer, self.path),
            feature_extractor=from_pretrained(AutoFeatureExtractor, self.path), device=pick_device(device),
        )  # fmt: skip
        # The pipeline would search with five beams.
        self._pipeline.generation_config.update(num_beams=1, do_sample=False)

    def describe(self) -> dict[str, Any]:
        return identity("whisper", self.path) | {"language": self.language}

    @torch.no_grad()
    def transcribe(self, clips: Sequence[Tensor]) -> list[Transcript]:
        self.load()
        generation = self._pipeline.model.generation_config
        options: dict[str, Any] = {}
        if getattr(generation, "is_multilingual", True):
            options |= {"task": "transcribe"} | ({"language": self.language} if self.language else {})
        timed = self.words and getattr(generation, "alignment_heads", None) is not None
        inputs = [{"raw": clip.numpy(), "sampling_rate": self.sample_rate} for clip in clips]
        longer = any(len(clip) > WINDOW * self.sample_rate for clip in clips)
        found = self._pipeline(
            inputs, batch_size=self.batch_size, generate_kwargs=options,
            return_timestamps="word" if timed else True if longer else None,
        )  # fmt: skip
        return [
            Transcript(one["text"].strip(), words_of(one.get("chunks", [])) if timed else []) for one in found
        ]  # fmt: skip


def words_of(chunks: Sequence[dict[str, Any]]) -> list[Word]:
    """Words whose both times are known; the last one may lack its end."""
    return [
        Word(chunk["text"].strip(), float(chunk["timestamp"][0]), float(chunk["timestamp"][1] or chunk["timestamp"][0]))
        for chunk in chunks
        if chunk["timestamp"][0] is not None
    ]
