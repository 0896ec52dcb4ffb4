"""Apply and revert the delay pattern (SPEC 5): codebook k runs k frames behind codebook 0.

    codebook 0   B c1 c2 c3 E  E  E        B stream BOS, E stream EOS; here K = 3 codebooks and T = 3 codes:
    codebook 1   B B  c1 c2 c3 E  E        T + 2 frames with BOS and EOS, T + 2 + K - 1 once delayed.
    codebook 2   B B  B  c1 c2 c3 E

B batch, T frames before the delay, F frames after it (F = T + K - 1), K codebooks.
"""

import torch
from torch import Tensor


def delayed_length(num_frames: int, num_codebooks: int) -> int:
    """Placeholders (= delayed frames) of a clip of `num_frames` codec frames: with BOS and EOS, then the delay."""
    return num_frames + 2 + num_codebooks - 1


def build_delay_pattern(codes: Tensor, bos: int, eos: int) -> Tensor:
    """Shift codebook k right by k frames, the gap on its left filled with `bos`, on its right with `eos`.

    codes [B, K, T] -> [B, K, T + K - 1], int64, on the device of `codes`.
    """
    batch, num_codebooks, length = codes.shape
    shift = torch.arange(num_codebooks, device=codes.device)[:, None]
    source = torch.arange(length + num_codebooks - 1, device=codes.device)[None] - shift  # [K, F]: frame shown there
    padded = torch.nn.functional.pad(codes.long(), (1, 1))
    padded[..., 0], padded[..., -1] = bos, eos
    index = source.clamp(-1, length) + 1
    return padded.gather(2, index.expand(batch, -1, -1))


def revert_delay_pattern(frames: Tensor) -> Tensor:
    """Take the diagonal back: frames [F, K] (or [B, F, K]) -> [max(F - K + 1, 0), K], dtype kept.

    The inverse of `build_delay_pattern` (up to the transposition) when no frame is cut off. A sequence shorter
    than K frames holds no complete frame and gives none.
    """
    length, num_codebooks = frames.shape[-2:]
    kept = max(length - num_codebooks + 1, 0)
    columns = [frames[..., k : k + kept, k] for k in range(num_codebooks)]
    return torch.stack(columns, dim=-1)


def wrap_and_delay(codes: Tensor, bos: int, eos: int) -> Tensor:
    """One clip's codes [K, T] -> its delayed frames [T + 2 + K - 1, K] with stream BOS and EOS, as the decoder reads
    them: the first frame all BOS, the last all EOS."""
    wrapped = torch.nn.functional.pad(codes.long(), (1, 1))
    wrapped[:, 0], wrapped[:, -1] = bos, eos
    return build_delay_pattern(wrapped[None], bos, eos)[0].T.contiguous()


def generated_codes(frames: Tensor, bos: int, eos: int) -> Tensor:
    """The codes [K, T] of the last clip in one sequence of delayed frames [F, K], as a decoder wrote it.

    The clip runs from behind the last all-BOS frame (else from the start) to the first all-EOS frame after it (else to
    the end). Frames in which any codebook has ended are dropped: they are no sound, and decoding them adds noise. T is
    0 where no frame is complete.
    """
    opened = (frames == bos).all(-1).nonzero()[-1:, 0].tolist()
    frames = frames[opened[0] + 1 :] if opened else frames
    codes = revert_delay_pattern(frames[: _first((frames == eos).all(-1))])
    return codes[: _first((codes == eos).any(-1))].T


def split_clips(frames: Tensor, bos: int) -> list[Tensor]:
    """The clips [F_i, K] in one sequence of delayed frames [F, K]: each begins with its all-BOS frame. None where none begins."""
    starts = (frames == bos).all(-1).nonzero()[:, 0].tolist()
    return [frames[start:stop] for start, stop in zip(starts, [*starts, len(frames)][1:], strict=True)]


def _first(mask: Tensor) -> int | None:
    """The index of the first True of a mask [F]; None, the end of a slice, without one."""
    found = mask.nonzero()[:1, 0].tolist()
    return found[0] if found else None
