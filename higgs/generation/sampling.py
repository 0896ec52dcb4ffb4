"""Choosing codes: forcing by the delay pattern, warping, drawing, repetition-aware redrawing.

All pure functions of batched tensors, without a loop over rows and without waiting for the device.
Shapes: B batch, K codebooks, V rows per codebook (or the text vocabulary), W window of frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")


def force_delay(scores: Tensor, audio_step: Tensor, delay_step: Tensor, bos: int, eos: int) -> Tensor:
    """Leaves only BOS where a codebook has not started, only EOS where it has ended: [B, K, V] -> [B, K, V].

    `audio_step` [B] counts the audio frames since `<|audio_out_bos|>`: codebook k starts after k+1 of them.
    `delay_step` [B] counts the delay tokens since the first EOS: that many codebooks have ended.
    """
    codebook = torch.arange(scores.shape[1], device=scores.device)
    code = torch.arange(scores.shape[2], device=scores.device)
    only_bos = (audio_step[:, None] <= codebook)[..., None] & (code != bos)
    only_eos = (codebook < delay_step[:, None])[..., None] & (code != eos)
    return scores.masked_fill(only_bos | only_eos, NEVER)


def warp(scores: Tensor, temperature: float | None, top_k: int | None, top_p: float | None) -> Tensor:
    """Temperature, top-k and nucleus (top-p; Holtzman et al., 2020) filtering over the last dimension: [..., V]."""
    if temperature is not None and temperature != 1.0:
        scores = scores / temperature
    if top_k:
        kth = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, NEVER)
    if top_p is not None and top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        tail[..., -1].fill_(False)  # the likeliest always stays
        scores = scores.masked_fill(tail.scatter(-1, order, tail), NEVER)
    return scores


def uniform(shape: tuple[int, ...], seeds: Tensor, step: Tensor | int, stream: int) -> Tensor:
    """Numbers in (0, 1) of shape [B, ...] that depend on the row's seed, the step and the place alone.

    A generator's state would make a row's draws depend on its batch; a hash of (seed, step, stream, place) does not,
    gives the same numbers on every device and can be captured in a graph. Three rounds of the 32-bit mixer "lowbias32"
    (Wellons, 2018, hash-prospector), run in 64-bit integers.
    """
    size = 1
    for length in shape[1:]:
        size *= length
    place = torch.arange(size, device=seeds.device)
    key = _mix(_mix(seeds & 0xFFFFFFFF) ^ ((seeds >> 32) & 0xFFFFFFFF))
    # Added on the device: a step that is a plain number made into a tensor would be a copy from the host, and a wait.
    key = _mix(key ^ _mix(torch.zeros_like(seeds) + step * 8 + stream))
    bits = _mix(key[:, None] ^ _mix(place + 0x9E3779B9))
    # 23 bits and a half fit float32 exactly. One bit more would round up to 1, whose Gumbel number is infinite and would
    # win over every score, a forbidden one included.
    return (((bits >> 9).float() + 0.5) / 2**23).view(shape)


def _mix(x: Tensor) -> Tensor:
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def draw(scores: Tensor, seeds: Tensor, step: Tensor | int, stream: int) -> Tensor:
    """One draw from softmax(scores) over the last dimension, by the Gumbel-max trick: [B, ..., V] -> [B, ...]."""
    gumbel = -torch.log(-torch.log(uniform(tuple(scores.shape), seeds, step, stream)))
    return (scores + gumbel).argmax(dim=-1)


def repeats(codes: Tensor, window: Tensor, max_repeat: int, bos: int, eos: int) -> Tensor:
    """Which codes [B, K] occur `max_repeat` times or more in their codebook's window [B, W, K]; BOS, EOS never do."""
    same = (window == codes[:, None]) & (window != bos) & (window != eos)
    return same.sum(dim=1) >= max_repeat
