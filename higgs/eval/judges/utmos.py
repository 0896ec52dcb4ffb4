"""UTMOS22 (arXiv 2204.02152), the strong learner: wav2vec2, the embeddings of one listener and one data set, a BLSTM.

Its weights are published as a plain state dict, `utmos22_strong_step7459_v1.pt`, at github.com/tarepan/SpeechMOS.

Shapes: B clips, L samples, T frames, C channels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from higgs.checkpoint.io import pick_device
from higgs.checkpoint.teacher import sizes_of
from higgs.checksums import digest_of
from higgs.codec import SemanticConfig
from higgs.codec.hubert import Hubert
from higgs.codec.ragged import Ragged
from higgs.errors import UserError
from higgs.eval.judges.base import QualityJudge
from higgs.eval.judges.pretrained import LEAST

# Names of fairseq's wav2vec2 -> ours (those of Hugging Face), in this order.
NAMES = (
    (r"^feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"^feature_extractor\.conv_layers\.0\.2\.", "feature_extractor.conv_layers.0.layer_norm."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^encoder\.pos_conv\.0\.weight_g$", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"^encoder\.pos_conv\.0\.weight_v$", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.self_attn\.", ".attention."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
)
SSL = "wav2vec2."
UNUSED = "wav2vec2.mask_emb"


class StrongLearner(nn.Module):
    """Opinion scores [B], 1 to 5, of waveforms [B, 1, L] at 16 kHz; wav2vec2 has the architecture of HuBERT."""

    def __init__(self, ssl: SemanticConfig, domain: int, judge: int, hidden: int, projected: int) -> None:
        super().__init__()
        self.wav2vec2 = Hubert(ssl)
        self.domain_emb = nn.Parameter(torch.empty(1, domain))
        self.judge_emb = nn.Parameter(torch.empty(1, judge))
        self.blstm = nn.LSTM(ssl.hidden_size + domain + judge, hidden, batch_first=True, bidirectional=True)
        self.projection = nn.Sequential(nn.Linear(2 * hidden, projected), nn.ReLU(), nn.Linear(projected, 1))

    def forward(self, waveform: Ragged) -> Tensor:
        features = self.wav2vec2.features(waveform)
        frames = self.wav2vec2.encoder.hidden_states(features)[-1]
        told = torch.cat([self.domain_emb, self.judge_emb], dim=1)[:, None].expand(*frames.shape[:2], -1)
        lengths = torch.tensor(features.row_lengths)
        packed = pack_padded_sequence(torch.cat([frames, told], dim=2), lengths, batch_first=True, enforce_sorted=False)
        scores = self.projection(pad_packed_sequence(self.blstm(packed)[0], batch_first=True)[0])[..., 0]
        inside = torch.arange(scores.shape[1]) < lengths[:, None]
        return (scores * inside.to(scores)).sum(1) / lengths.to(scores) * 2 + 3


@dataclass
class UTMOS(QualityJudge):
    """Naturalness as listeners of the VoiceMOS challenge would have scored it.

    Attributes:
        path: the state dict, a .pt or .pth file.
    """

    path: str
    batch_size: int = 8
    _model: StrongLearner | None = field(default=None, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._model is None:
            self._model = read_strong_learner(Path(self.path)).to(pick_device(device))

    def describe(self) -> dict[str, Any]:
        file = Path(self.path)
        return {"name": "UTMOS22 strong", "file": file.name, "sha256": digest_of(file) if file.is_file() else None}

    @torch.no_grad()
    def score(self, clips: Sequence[Tensor]) -> list[dict[str, float]]:
        self.load()
        if any(len(clip) < LEAST for clip in clips):
            raise UserError(f"A clip of less than {1000 * LEAST // self.sample_rate} ms has no naturalness to predict.")
        device = self._model.domain_emb.device
        found: list[float] = []
        for start in range(0, len(clips), self.batch_size):
            batch = clips[start : start + self.batch_size]
            padded = pad_sequence(list(batch), batch_first=True)[:, None].to(device)
            lengths = torch.tensor([len(clip) for clip in batch], device=device)
            found += self._model(Ragged.from_batch(padded, lengths)).tolist()
        return [{"utmos": score} for score in found]


def read_strong_learner(file: Path) -> StrongLearner:
    """The network of a state dict; its sizes are read off the tensors.

    Raises:
        UserError: where there is no such file, or naming the tensors that are missing, unexpected or of a wrong shape.
    """
    if not file.is_file():
        raise UserError(
            f"There is no file {file}. Download utmos22_strong_step7459_v1.pt from github.com/tarepan/SpeechMOS (releases) "
            "and give its path: quality.utmos.path=…"
        )
    try:
        tensors = from_public(torch.load(file, map_location="cpu", weights_only=True))
        ssl = sizes_of({name.removeprefix(SSL): value for name, value in tensors.items() if name.startswith(SSL)}, file)
        with torch.device("meta"):
            model = StrongLearner(
                ssl, tensors["domain_emb"].shape[1], tensors["judge_emb"].shape[1],
                tensors["blstm.weight_hh_l0"].shape[1], tensors["projection.0.weight"].shape[0],
            )  # fmt: skip
        model.load_state_dict(tensors, assign=True)
    except KeyError as error:
        raise UserError(f"{file} is no strong learner of UTMOS22: it lacks the tensor {error.args[0]}.") from error
    except RuntimeError as error:
        raise UserError(f"{file} is no strong learner of UTMOS22: {' '.join(str(error).split())}") from error
    return model.requires_grad_(False).eval()


def from_public(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names; the mask embedding, which only training needs, is left out."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(SSL):
            inner = name.removeprefix(SSL)
            for old, new in NAMES:
                inner = re.sub(old, new, inner)
            name = SSL + inner
        if name != UNUSED:
            found[name] = tensor
    return found
