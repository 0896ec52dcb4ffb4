"""WavLM (arXiv 2110.13900) with an x-vector head as a speaker embedder, through transformers.

Its similarities are not those of the Seed-TTS tables, which come from another head (ECAPA-TDNN on WavLM large).

Shapes: L samples, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs.errors import UserError
from higgs.eval.judges.base import SpeakerEmbedder
from higgs.eval.judges.pretrained import LEAST, from_pretrained, identity, network


@dataclass
class WavLM(SpeakerEmbedder):
    """Clips are heard one by one, so padding changes nothing.

    Attributes:
        path: folder or hub id of a model with an x-vector head.
    """

    path: str = "microsoft/wavlm-base-plus-sv"
    _model: Any = field(default=None, init=False, repr=False, compare=False)
    _extractor: Any = field(default=None, init=False, repr=False, compare=False)
    _least: int = field(default=0, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._model is not None:
            return
        self._extractor = from_pretrained("AutoFeatureExtractor", self.path)
        self._model = network("AutoModelForAudioXVector", self.path, device)
        # Samples under the frames that one output of the x-vector head looks at.
        config = self._model.config
        frames = 1 + sum(
            (kernel - 1) * gap for kernel, gap in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
        )
        # Its statistics need two outputs.
        self._least = LEAST + frames * config.inputs_to_logits_ratio

    def describe(self) -> dict[str, Any]:
        return identity("wavlm x-vector", self.path)

    @torch.no_grad()
    def embed(self, clips: Sequence[Tensor]) -> Tensor:
        self.load()
        return torch.stack([self._embed(clip) for clip in clips])

    def _embed(self, clip: Tensor) -> Tensor:
        if len(clip) < self._least:
            raise UserError(f"A voice needs {self._least / self.sample_rate:.2f} s of sound, and the clip is shorter.")
        inputs = self._extractor(clip.numpy(), sampling_rate=self.sample_rate, return_tensors="pt")
        return F.normalize(self._model(inputs.input_values.to(self._model.device)).embeddings[0].float().cpu(), dim=0)
