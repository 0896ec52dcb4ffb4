"""How well embeddings tell speakers apart: every pair of clips is a trial, of one speaker or of two.

Shapes: N clips, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from higgs.errors import UserError


@dataclass(frozen=True)
class Separation:
    """Equal error rate, area under the ROC curve, and the mean similarity of pairs of one speaker and of two."""

    eer: float
    auc: float
    same: float
    different: float


def separation(embeddings: Tensor, speakers: Sequence[str]) -> Separation:
    """Of unit embeddings [N, D]. UserError where there is no pair of one speaker, or none of two."""
    first, second = torch.triu_indices(len(speakers), len(speakers), offset=1)
    scores = (embeddings[first] * embeddings[second]).sum(1).double().numpy()
    same = np.array([speakers[a] == speakers[b] for a, b in zip(first.tolist(), second.tolist(), strict=True)])
    if same.all() or not same.any():
        raise UserError(
            "To see how well speakers are told apart, give at least two clips of one and a clip of another."
        )
    false_alarms, hits, _ = roc_curve(same, scores)
    crossing = np.argmin(np.abs(false_alarms - (1 - hits)))
    eer = (false_alarms[crossing] + 1 - hits[crossing]) / 2
    return Separation(
        float(eer), float(roc_auc_score(same, scores)), float(scores[same].mean()), float(scores[~same].mean())
    )
