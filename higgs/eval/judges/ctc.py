"""wav2vec2 (arXiv 2006.11477) or HuBERT (arXiv 2106.07447) with a CTC head as a recogniser, through transformers.

Shapes: L samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from higgs.eval.judges.base import Recognizer, Transcript, Word
from higgs.eval.judges.pretrained import LEAST, from_pretrained, identity, network


@dataclass
class CTC(Recognizer):
    """Greedy decoding. Clips are heard one by one: many of these models were trained without a mask, and padding would
    change what they hear.

    Attributes:
        path: folder or hub id of a wav2vec2 or HuBERT with a CTC head.
    """

    path: str = "facebook/hubert-large-ls960-ft"
    _model: Any = field(default=None, init=False, repr=False, compare=False)
    _processor: Any = field(default=None, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._model is not None:
            return
        self._processor = from_pretrained("Wav2Vec2Processor", self.path)
        self._model = network("AutoModelForCTC", self.path, device)

    def describe(self) -> dict[str, Any]:
        return identity("ctc", self.path)

    @torch.no_grad()
    def transcribe(self, clips: Sequence[Tensor]) -> list[Transcript]:
        self.load()
        return [self._hear(clip) for clip in clips]

    def _hear(self, clip: Tensor) -> Transcript:
        if len(clip) < LEAST:
            return Transcript("")
        inputs = self._processor(clip.numpy(), sampling_rate=self.sample_rate, return_tensors="pt")
        ids = self._model(inputs.input_values.to(self._model.device)).logits[0].argmax(-1).cpu()
        heard = self._processor.tokenizer.decode(ids, output_word_offsets=True)
        frame = self._model.config.inputs_to_logits_ratio / self.sample_rate
        words = [
            Word(word["word"], float(word["start_offset"] * frame), float(word["end_offset"] * frame))
            for word in heard.word_offsets
        ]
        return Transcript(heard.text.strip(), words)
