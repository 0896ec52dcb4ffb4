"""Random crops of sound files, for training the codec.

A crop is decided by the seed and the number of its draw, so it is the same on any rank and after resuming.
Shapes: B crops, L samples.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from higgs.audio import load_part, sound_info
from higgs.batch import BatchFeature
from higgs.data.draws import Draw, Source, random_generator
from higgs.data.manifest import SoundClip, read_clip_manifest
from higgs.data.stream import Rows, Unreadable
from higgs.errors import UserError

MAX_ATTEMPTS = 20  # clips tried in place of one that cannot be read


@dataclass(frozen=True)
class Chances:
    """What is random about a crop, each in 0…1: its place in the clip, its loudness, and the clip to take instead."""

    place: float
    loudness: float
    other: float

    @classmethod
    def of(cls, *key: int | str) -> "Chances":
        return cls(*torch.rand(3, dtype=torch.float64, generator=random_generator("crop", *key)).tolist())


class CropDataset:
    """Crops of the clips of one or several codec manifests (`higgs.data.manifest`); one crop of each clip an epoch.

    Args:
        sources: the manifests, with their weights (`higgs.data.draws.read_sources`).
        sample_rate: of the crops, in Hz.
        seconds: length of a crop. A shorter clip is followed by silence.
        gain_db: in training, loudness changes by a number of decibels drawn evenly from ±`gain_db`, but never so far
            that a sample that was within -1…1 leaves it.
    """

    in_tokens = False

    def __init__(self, sources: Sequence[Source], *, sample_rate: int, seconds: float, gain_db: float) -> None:
        manifests = [read_clip_manifest(source.path) for source in sources]
        self.weights = [source.weight for source in sources]
        self.sizes = [len(clips) for clips in manifests]
        self.clips: list[SoundClip] = [clip for clips in manifests for clip in clips]
        named = [[clip.id, clip.start, clip.duration] for clip in self.clips]
        self.digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        self.sample_rate, self.gain_db = sample_rate, gain_db
        self.samples = round(seconds * sample_rate)
        if self.samples < 1:
            raise UserError(f"data.crop_seconds={seconds} is shorter than a sample at {sample_rate} Hz.")

    def __len__(self) -> int:
        return len(self.clips)

    def length(self, sample: int) -> int:
        return 1

    def id(self, sample: int) -> str:
        return self.clips[sample].id

    def collate(self, rows: Sequence[Sequence[Draw]], seed: int | None, row_length: int | None) -> Rows:
        """`waveform` [B, 1, L]. In training a clip that cannot be read is replaced by another of its source; in
        validation it is left out (`batch` is None if nothing is left). Either way it is reported."""
        assert row_length is None, "crops are not packed"
        waves, ids, unreadable = [], [], []
        for draw in (draw for row in rows for draw in row):
            wave, name, failed = self._crop(draw, seed)
            unreadable += failed
            if wave is not None:
                waves.append(wave)
                ids.append(name)
        batch = BatchFeature(waveform=torch.stack(waves)[:, None]) if waves else None
        return Rows(batch, ids, unreadable)

    def _crop(self, draw: Draw, seed: int | None) -> tuple[Tensor | None, str, list[Unreadable]]:
        sample, failed = draw.sample, []
        for attempt in range(MAX_ATTEMPTS):
            chances = Chances.of("valid", sample) if seed is None else Chances.of(seed, draw.number, attempt)
            if attempt:
                sample = self._other(draw.sample, chances)
            clip = self.clips[sample]
            try:
                wave = self.crop(clip, chances.place)
                return (wave if seed is None else self.jitter(wave, chances.loudness)), clip.id, failed
            except UserError as error:
                failed.append(Unreadable(clip.id, str(error)))
            if seed is None:
                return None, clip.id, failed
        raise UserError(f"{MAX_ATTEMPTS} clips in a row cannot be read. The last: {failed[-1].reason}")

    def _other(self, sample: int, chances: Chances) -> int:
        """A clip of the same source."""
        ends = list(accumulate(self.sizes))
        source = bisect_right(ends, sample)
        return ends[source] - self.sizes[source] + int(chances.other * self.sizes[source])

    def crop(self, clip: SoundClip, place: float) -> Tensor:
        """A crop [L] of a clip, `place` (0…1) between its first and last one; silence follows where the clip ends.

        Raises:
            UserError: the file cannot be read, or ends before the clip begins.
        """
        seconds = sound_info(clip.audio).seconds
        end = seconds if clip.duration is None else min(seconds, clip.start + clip.duration)
        wanted = self.samples / self.sample_rate
        if end <= clip.start:
            raise UserError(f"{clip.audio} lasts {seconds:.2f} s, but the clip begins at {clip.start:.2f} s.")
        start = clip.start + place * max(0.0, end - clip.start - wanted)
        wave = load_part(clip.audio, self.sample_rate, start, min(wanted, end - start))[: self.samples]
        return torch.nn.functional.pad(wave, (0, self.samples - len(wave)))

    def jitter(self, wave: Tensor, loudness: float) -> Tensor:
        """A waveform [L] made louder or softer; `loudness` 0 is -gain_db, 1 is +gain_db."""
        gain = 10 ** (self.gain_db * (2 * loudness - 1) / 20)
        peak = float(wave.abs().max())
        return wave * (min(gain, max(1.0, 1 / peak)) if peak > 0 and gain > 1 else gain)
