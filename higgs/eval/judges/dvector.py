"""A speaker embedding that needs no download: the GE2E encoder (arXiv 1710.10467) whose weights lie in the wheel of the
package Resemblyzer (Apache-2.0). The package itself is not imported; only its weights are read.

Shapes: B clips, L samples, P parts of 1.6 s, T frames, M mel bands, D = 256.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import librosa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.checksums import mark_of
from higgs.errors import UserError
from higgs.eval.judges.base import SpeakerEmbedder

BANDS, WINDOW, HOP = 40, 400, 160  # mel bands; 25 and 10 ms
PART = 160  # frames of a part that is embedded
STEP = 77  # frames from one part to the next: 1.3 a second, as the package has it
LEAST_COVERED = 0.75  # share of the last part that must be sound, if there are others
LOUDNESS_DB = -30.0  # to which quiet clips are raised
IGNORED = {"similarity_weight", "similarity_bias"}  # of the loss


class Encoder(nn.Module):
    """Unit embeddings [P, D] of mel spectrograms [P, T, M]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)


@dataclass
class DVector(SpeakerEmbedder):
    """Embeds a voice as the mean over parts of 1.6 s. Silence is not cut out, so clips should be mostly speech.

    Attributes:
        path: weights of the package's format; None: those in the package.
    """

    path: str | None = None
    light: ClassVar[bool] = True
    _encoder: Encoder | None = field(default=None, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._encoder is not None:
            return
        file = self.weights()
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"{file.name} cannot be read as plain tensors ({error}). Check speaker.path, or copy the file again."
            ) from error
        if not isinstance(state, Mapping):
            raise UserError(f"{file.name} does not hold the weights of a GE2E encoder by name. Check speaker.path.")
        state = state.get("model_state", state)
        encoder = Encoder().eval()
        try:
            encoder.load_state_dict({name: value for name, value in state.items() if name not in IGNORED})
        except RuntimeError as error:
            raise UserError(f"{file.name} does not hold the weights of a GE2E encoder: {error}") from error
        self._encoder = encoder  # only now: a second call after a failure fails again

    def weights(self) -> Path:
        if self.path is not None:
            file = Path(self.path)
        else:
            package = importlib.util.find_spec("resemblyzer")
            if package is None:
                raise UserError("The speaker embedding needs the package resemblyzer: pip install -e '.[eval]'.")
            file = Path(next(iter(package.submodule_search_locations))) / "pretrained.pt"
        if not file.is_file():
            raise UserError(f"There are no weights of a speaker encoder at {file}. Check speaker.path.")
        return file

    def describe(self) -> dict[str, Any]:
        return {"name": "dvector (GE2E, Resemblyzer)", "sha256": mark_of(self.weights())["sha256"]}

    @torch.no_grad()
    def embed(self, clips: Sequence[Tensor]) -> Tensor:
        self.load()
        return torch.stack([self._embed(clip) for clip in clips]) if clips else torch.zeros(0, 256)

    def _embed(self, clip: Tensor) -> Tensor:
        if not clip.any():  # the network would answer all the same
            raise UserError("A silent clip has no voice that could be compared.")
        frames = len(clip) // HOP + 1
        starts = list(range(0, max(frames - PART + STEP + 1, 1), STEP))
        if len(starts) > 1 and (len(clip) - starts[-1] * HOP) / (PART * HOP) < LEAST_COVERED:
            starts.pop()
        clip = F.pad(louder(clip), (0, max(0, (starts[-1] + PART) * HOP - len(clip))))
        mel = spectrogram(clip)
        return F.normalize(self._encoder(torch.stack([mel[start : start + PART] for start in starts])).mean(0), dim=0)


def louder(clip: Tensor) -> Tensor:
    """A clip [L] raised to -30 dB of full scale if it is quieter."""
    level = 10 * clip.square().mean().clamp_min(1e-12).log10()
    return clip * 10 ** ((LOUDNESS_DB - level).clamp_min(0) / 20)


def spectrogram(clip: Tensor) -> Tensor:
    """Mel powers [T, M] of a clip [L] at 16 kHz."""
    mel = librosa.feature.melspectrogram(y=clip.numpy(), sr=16000, n_fft=WINDOW, hop_length=HOP, n_mels=BANDS)
    return torch.from_numpy(mel.T.copy())
