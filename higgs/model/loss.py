"""The decoder's loss as sums and counts, so that it does not depend on how a batch is split.

Shapes: B batch, T sequence, F audio frames, K codebooks, V rows per codebook, C hidden size, N labelled positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs.errors import UserError

if TYPE_CHECKING:
    from higgs.model.decoder import DualFFNDecoder

IGNORE = -100


@dataclass
class LossSums:
    """Summed cross-entropies and their label counts: codebooks [K] each, text scalars (None without a text loss).

    Sums add up over micro-batches and ranks; divide once, by the global counts. `codebook_right` [K] counts the labels
    that were also the likeliest code.
    """

    codebook_sum: Tensor | None = None
    codebook_count: Tensor | None = None
    codebook_right: Tensor | None = None
    text_sum: Tensor | None = None
    text_count: Tensor | None = None

    @property
    def codebook_loss(self) -> Tensor | None:
        """Mean cross-entropy of each codebook [K]; 0 where nothing was to be learnt."""
        return None if self.codebook_sum is None else self.codebook_sum / self.codebook_count.clamp(min=1)

    @property
    def text_loss(self) -> Tensor | None:
        return None if self.text_sum is None else self.text_sum / self.text_count.clamp(min=1)

    def loss(self, codebook_weights: Tensor | None = None, text_weight: float = 1.0) -> Tensor | None:
        """Weighted sum of the codebooks' means plus the text's mean.

        Ones (the default) sum over codebooks as Hugging Face does; 1/K each averages as the original release does.
        None if nothing was given to train.
        """
        total = None
        if self.codebook_sum is not None:
            losses = self.codebook_loss
            if codebook_weights is not None:
                losses = losses * codebook_weights.to(losses)
            total = losses.sum()
        if self.text_sum is not None:
            text = text_weight * self.text_loss
            total = text if total is None else total + text
        return total


def decoder_loss(
    model: DualFFNDecoder,
    hidden: Tensor,
    placeholders: Tensor,
    labels: Tensor | None,
    audio_labels: Tensor | None,
    audio_mask: Tensor | None,
) -> LossSums:
    """Next-token losses from hidden states [B, T, C]; heads run only where the next position carries a label.

    `placeholders` [B, T] marks audio positions, `audio_labels` [B, F, K] are the frames' labels in order, valid where
    `audio_mask` [B, F]. Labels of the first column have nothing before them and are dropped. Text labels without a
    text head are ignored, as documented.
    """
    sums = LossSums()
    before = hidden[:, :-1].flatten(0, 1)
    if audio_labels is not None:
        if audio_mask is not None and audio_mask.shape != audio_labels.shape[:2]:
            raise UserError(
                f"audio_labels are {list(audio_labels.shape)}, but audio_input_ids_mask is {list(audio_mask.shape)}; both "
                "need the same rows and frames. Build them with the processor from the same conversation."
            )
        frames = audio_labels.flatten(0, 1) if audio_mask is None else audio_labels[audio_mask.bool()]
        if frames.shape[0] != int(placeholders.sum()):
            raise UserError(
                f"There are {frames.shape[0]} labelled audio frames for {int(placeholders.sum())} placeholders. "
                "Build labels and inputs with the processor from the same conversation."
            )
        spread = frames.new_full((*placeholders.shape, frames.shape[-1]), IGNORE)
        spread[placeholders] = frames
        targets = spread[:, 1:].flatten(0, 1)
        rows = (targets != IGNORE).any(dim=-1).nonzero()[:, 0]
        logits, targets = model.audio_logits(before.index_select(0, rows)).float(), targets[rows]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        sums.codebook_sum = losses.view_as(targets).sum(dim=0)
        sums.codebook_count = (targets != IGNORE).sum(dim=0)
        sums.codebook_right = (logits.detach().argmax(dim=-1) == targets).sum(dim=0)
    if labels is not None and model.text_lm_head is not None:
        targets = labels[:, 1:].flatten()
        rows = (targets != IGNORE).nonzero()[:, 0]
        logits = model.text_lm_head(before.index_select(0, rows)).float()
        sums.text_sum = F.cross_entropy(logits, targets[rows], reduction="sum")
        sums.text_count = torch.tensor(rows.numel(), device=hidden.device)
    return sums


def label_counts(labels: Tensor, audio_labels: Tensor, audio_mask: Tensor) -> Tensor:
    """How many labels `decoder_loss` sums over: [K + 1], the codebooks' [K] and the text's, known before any forward."""
    frames = ((audio_labels != IGNORE) & audio_mask.bool()[..., None]).sum(dim=(0, 1))
    return torch.cat([frames, (labels[:, 1:] != IGNORE).sum()[None]])
