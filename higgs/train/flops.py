"""Floating-point operations of a training step, counted on what each token really uses, and what hardware can do.

A multiplication and an addition are two operations. Every weight that a token passes costs 2 forward and 4 backward
(one product for the input's gradient, one for the weight's), hence 6. Attention costs, for each pair of a query and a key
that it may see, 2 D for the score and 2 D for the sum per head, three times over with the backward pass. Recomputed
activations, masked pairs, padding, lookups, norms and the optimiser do not count (Chowdhery et al., 2022, appendix B),
and frozen weights count as if they learnt, so that figures of one size compare.

Shapes: B batch, T tokens, F audio frames, K codebooks, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor

from higgs.model.config import HiggsAudioV2Config
from higgs.model.loss import IGNORE


@dataclass(frozen=True)
class TokenCounts:
    """What a batch holds: tokens by kind, labelled positions, and pairs (query, key) of causal attention.

    `pairs` counts all tokens of a piece, `text_pairs` and `audio_pairs` those of one kind with their own kind.
    """

    text: int = 0
    audio: int = 0
    text_labels: int = 0
    audio_labels: int = 0
    pairs: int = 0
    text_pairs: int = 0
    audio_pairs: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def tokens(self) -> int:
        return self.text + self.audio

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], config: HiggsAudioV2Config) -> TokenCounts:
        """Counts a batch of the processor (padded, `attention_mask`) or of packed rows (`position_ids`)."""
        ids = batch["input_ids"]
        audio = (ids == config.audio_token_id) | (ids == config.audio_delay_token_id)
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        real = torch.ones_like(audio) if mask is None else mask.bool()
        starts = torch.zeros_like(audio)
        starts[:, 0] = True
        if mask is None and positions is not None:
            starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
            # A piece of padding alone, as it ends a packed row, is no work that anybody asked for.
            real = ids != config.pad_token_id
        piece = starts.flatten().cumsum(0) - 1
        of_piece = [torch.bincount(piece, weights=kind.flatten().double()) for kind in (real, real & audio)]
        alls, audios = of_piece
        texts = alls - audios
        labels, audio_labels = batch.get("labels"), batch.get("audio_labels")
        return cls(
            text=int(texts.sum()),
            audio=int(audios.sum()),
            text_labels=0 if labels is None else int((labels[:, 1:] != IGNORE).sum()),
            audio_labels=0 if audio_labels is None else int((audio_labels != IGNORE).any(dim=-1).sum()),
            pairs=_triangle(alls),
            text_pairs=_triangle(texts),
            audio_pairs=_triangle(audios),
        )


def _triangle(lengths: Tensor) -> int:
    return int((lengths * (lengths + 1) / 2).sum())


def training_flops(config: HiggsAudioV2Config, counts: TokenCounts, use_text_head: bool = True) -> float:
    """Operations of forward and backward over `counts`: one feed-forward per token, heads at labelled positions only.

    Ablations count as what they save or add: skipped layers, audio's own attention, the projector.
    """
    size, width = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention, feed_forward = size * (2 * width + 2 * keys), 3 * size * config.intermediate_size
    dual = len(config.dual_layers)
    others = config.num_hidden_layers - dual
    weights, pairs = float(dual * counts.tokens * (attention + feed_forward)), float(dual * counts.pairs)
    if config.audio_fast_forward:
        weights += others * counts.text * (attention + feed_forward)
        pairs += others * counts.text_pairs
    else:
        weights += others * counts.tokens * (attention + feed_forward)
        pairs += others * counts.pairs
    if config.audio_attention:
        weights += dual * counts.audio * attention
        pairs += dual * counts.audio_pairs
    if config.audio_embed_projector:
        weights += counts.audio * size * size
    weights += counts.audio_labels * size * config.num_codebooks * config.codebook_size
    if use_text_head:
        weights += counts.text_labels * size * config.vocab_size
    return 6.0 * weights + 12.0 * width * pairs


# Published peaks without sparsity, in operations per second: the vendors' data sheets, tensor cores, bf16 with float32
# sums where they tell the two apart (consumer cards); fp32 is what PyTorch does by default, that is without TF32.
PEAKS: dict[str, dict[torch.dtype, float]] = {
    "B200": {torch.bfloat16: 2250e12, torch.float32: 75e12},  # NVIDIA HGX B200 data sheet
    "GH200": {torch.bfloat16: 989e12, torch.float32: 67e12},  # NVIDIA GH200 data sheet
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12},  # NVIDIA H200 data sheet, SXM
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float32: 51e12},  # NVIDIA H100 data sheet
    "H100 NVL": {torch.bfloat16: 835e12, torch.float32: 60e12},  # NVIDIA H100 data sheet
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12},  # NVIDIA H100 data sheet, SXM
    "H800": {torch.bfloat16: 989e12, torch.float32: 67e12},  # as H100 SXM
    "A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12},  # NVIDIA A100 data sheet
    "A800": {torch.bfloat16: 312e12, torch.float32: 19.5e12},  # as A100
    "A10": {torch.bfloat16: 125e12, torch.float32: 31.2e12},  # NVIDIA A10 data sheet
    "L40S": {torch.bfloat16: 362e12, torch.float32: 91.6e12},  # NVIDIA L40S data sheet
    "L4": {torch.bfloat16: 121e12, torch.float32: 30.3e12},  # NVIDIA L4 data sheet
    "RTX 6000 Ada": {torch.bfloat16: 364e12, torch.float32: 91.1e12},  # NVIDIA RTX 6000 Ada data sheet
    "RTX 4090": {torch.bfloat16: 165.2e12, torch.float32: 82.6e12},  # NVIDIA Ada GPU architecture, appendix A
    "RTX 3090": {torch.bfloat16: 71e12, torch.float32: 35.6e12},  # NVIDIA GA102 architecture, appendix A
    "MI300X": {torch.bfloat16: 1307e12, torch.float32: 163.4e12},  # AMD Instinct MI300X data sheet
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that a device can do in `dtype`: published for a GPU, measured once for a CPU, else None."""
    if device.type == "cpu":
        return _measured_cpu(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    return published_peak(torch.cuda.get_device_name(device), dtype)


def published_peak(name: str, dtype: torch.dtype) -> float | None:
    """The peak of the GPU that PyTorch calls `name`, None where it is not in the table. The longest match counts."""
    words = f" {name} ".replace("-", " ")
    found = [known for known in PEAKS if f" {known} " in words]
    return PEAKS[max(found, key=len)].get(dtype) if found else None


@cache
def _measured_cpu(dtype: torch.dtype, threads: int) -> float:
    """The best square product of half a second of them: other jobs disturb most, seldom all."""
    size = 768
    a, b = torch.randn(2, size, size).to(dtype)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
