"""Evaluation of a codec: clips are coded, decoded at every bandwidth, and compared with what they were.

Shapes: B clips, L samples, K codebooks, T frames.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from higgs.audio import load_part, resample, save_audio, sound_info
from higgs.checkpoint.io import load_codec
from higgs.checksums import digest_of
from higgs.codec import Codec, decode_prefix, encode_clips
from higgs.codec.quantizer import usage
from higgs.data.manifest import SoundClip
from higgs.errors import UserError
from higgs.eval.inputs import file_name, read_clips
from higgs.eval.intelligibility import estoi, pesq, stoi
from higgs.eval.judges.base import Judge, QualityJudge, SpeakerEmbedder
from higgs.eval.outputs import Result, write_results
from higgs.eval.pitch import compare_tracks, f0
from higgs.eval.pool import Row, ScoringPool
from higgs.eval.report import ReportClip, Sound
from higgs.eval.runner import Made, attempt, claim, each, environment, evaluate, fingerprint
from higgs.eval.spectral import mel_distance, si_sdr, stft_distance
from higgs.folders import resolve_folder

SPEECH = (None, "speech")  # kinds of clips for which measures of speech make sense


@dataclass
class CodecEvaluation:
    """The keys of configs/eval/codec.yaml, which explains them."""

    codec: str
    data: str
    output: str = "evaluation/codec"
    bandwidths: list[float] | None = None
    max_seconds: float | None = None
    save_audio: bool = False
    batch_size: int = 4
    processes: int | None = None
    device: str = "auto"
    seed: int = 0
    retry_errors: bool = False
    # Built apart.
    speaker: Any = None
    quality: Any = None

    def __post_init__(self) -> None:
        check_common(self.batch_size, self.processes, self.seed)
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise UserError(f"max_seconds is {self.max_seconds}; it must be more than 0, or null.")


def check_common(batch_size: int, processes: int | None, seed: int) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("processes", processes, 0), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")


@dataclass
class CodecJob:
    """A clip [L] and what the codec made of it at each bandwidth in kbit/s, all of one length."""

    original: np.ndarray
    outputs: dict[float, np.ndarray]
    sample_rate: int
    speech: bool

    def run(self, judges: dict[str, Judge]) -> Row:
        row: Row = {"error": None}
        original = torch.from_numpy(self.original)
        track = attempt(row, "f0", lambda: f0(original, self.sample_rate)) if self.speech else None
        for bandwidth, array in self.outputs.items():
            output, at = torch.from_numpy(array), f"@{bandwidth:g}"
            measures = {
                "stft_distance": lambda o=output: stft_distance(o, original),
                "mel_distance": lambda o=output: mel_distance(o, original, self.sample_rate),
                "si_sdr": lambda o=output: si_sdr(o, original),
            }
            if self.speech:
                measures |= {
                    "pesq": lambda o=output: pesq(o, original, self.sample_rate),
                    "stoi": lambda o=output: stoi(o, original, self.sample_rate),
                    "estoi": lambda o=output: estoi(o, original, self.sample_rate),
                }
                row.update({name + at: value for name, value in self.pitch(output, track, row).items()})
            for name, measure in measures.items():
                value = attempt(row, name + at, measure)
                row[name + at] = None if value is None else float(value)
        embedder = judges.get("speaker")
        if self.speech and isinstance(embedder, SpeakerEmbedder):
            attempt(row, "speaker", lambda: row.update(self.compare_voices(embedder)))
        return row

    def pitch(self, output: Tensor, track: Tensor | None, row: Row) -> Row:
        """The output's F0 against the original's, `track` [T]."""
        if track is None:
            return {}
        found = attempt(row, "f0", lambda: compare_tracks(f0(output, self.sample_rate), track))
        if found is None:
            return {}
        return {
            "f0_error": found.error_cents,
            "f0_correlation": found.correlation,
            "voicing_error": found.voicing_error,
        }

    def compare_voices(self, embedder: SpeakerEmbedder) -> Row:
        clips = [self.clip(array, embedder) for array in (self.original, *self.outputs.values())]
        original, *others = embedder.embed(clips)
        pairs = zip(self.outputs, others, strict=True)
        return {f"speaker_similarity@{bandwidth:g}": float(original @ other) for bandwidth, other in pairs}

    def clip(self, array: np.ndarray, judge: Judge) -> Tensor:
        return resample(torch.from_numpy(array), self.sample_rate, judge.sample_rate)


@dataclass
class CodecTask:
    """Clips to rows: coded and decoded in batches here, compared in the scoring processes."""

    codec: Codec
    bandwidths: Sequence[float]
    max_seconds: float | None = None
    folder: Path | None = None  # where decoded clips are kept, one folder a bandwidth
    speaker: SpeakerEmbedder | None = None
    quality: Mapping[str, QualityJudge] = field(default_factory=dict)

    @torch.no_grad()
    def make(self, samples: Sequence[SoundClip], first: int) -> list[Made]:
        made = [Made({"id": clip.id, "kind": clip.kind, "seed": None, "error": None}) for clip in samples]
        waves = [
            attempt(one.row, "sound", lambda c=clip: load_clip(c, self.codec.sample_rate, self.max_seconds))
            for clip, one in zip(samples, made, strict=True)
        ]
        read = [(wave, one) for wave, one in zip(waves, made, strict=True) if wave is not None]
        readable = [one for _, one in read]
        coded = each(lambda some, _: self.reconstruct(some), [wave for wave, _ in read], readable, "codec")
        for (wave, one), found in zip(read, coded, strict=True):
            one.row["seconds"] = len(wave) / self.codec.sample_rate
            if found is None:
                continue
            codes, outputs = found
            one.row["codes"] = codes.tolist()
            for bandwidth in outputs:
                bits = self.codec.config.num_codebooks_at(bandwidth) * math.log2(self.codec.config.codebook_size)
                one.row[f"bitrate@{bandwidth:g}"] = bits * codes.shape[1] / one.row["seconds"] / 1000
            arrays = {bandwidth: sound.numpy() for bandwidth, sound in outputs.items()}
            one.job = CodecJob(wave.numpy(), arrays, self.codec.sample_rate, one.row["kind"] in SPEECH)
            if self.folder is not None:
                for bandwidth, sound in outputs.items():
                    path = self.folder / f"{bandwidth:g}kbps" / f"{file_name(one.row['id'])}.wav"
                    attempt(one.row, "audio", lambda p=path, s=sound: save_audio(p, s, self.codec.sample_rate))
        return made

    def reconstruct(self, waves: Sequence[Tensor]) -> list[tuple[Tensor, dict[float, Tensor]]]:
        """Of each clip [L] its codes [K, T] and its sound [L] at every bandwidth."""
        codes = encode_clips(self.codec, waves)
        outputs = self.decode(codes, [len(wave) for wave in waves])
        return list(zip(codes, outputs, strict=True))

    def decode(self, codes: Sequence[Tensor], lengths: Sequence[int]) -> list[dict[float, Tensor]]:
        """The sound [L] at every bandwidth of codes [K, T] each."""
        frames = torch.tensor([row.shape[1] for row in codes], device=self.codec.device)
        padded = pad_sequence([row.T for row in codes], batch_first=True).transpose(1, 2).to(self.codec.device)
        found: list[dict[float, Tensor]] = [{} for _ in codes]
        for bandwidth in self.bandwidths:
            sound = decode_prefix(self.codec, padded, bandwidth, max(lengths), frames)[:, 0].float().cpu()
            for outputs, row, length in zip(found, sound, lengths, strict=True):
                outputs[bandwidth] = row[:length].clamp(-1, 1).clone()
        return found

    def complete(self, made: Sequence[Made]) -> None:
        there = [one for one in made if one.job is not None and one.job.speech]
        if self.speaker is not None and not self.speaker.light:
            for one in there:
                found = attempt(one.row, "speaker", lambda o=one: o.job.compare_voices(self.speaker))
                one.row.update(found or {})
        for name, judge in self.quality.items():
            for bandwidth in self.bandwidths:
                clips = [one.job.clip(one.job.outputs[bandwidth], judge) for one in there]
                scores = each(lambda some, _, j=judge: j.score(some), clips, there, f"{name}@{bandwidth:g}")
                for one, found in zip(there, scores, strict=True):
                    one.row.update({f"{key}@{bandwidth:g}": value for key, value in (found or {}).items()})


def load_clip(clip: SoundClip, sample_rate: int, max_seconds: float | None) -> Tensor:
    """Samples [L] of a clip at `sample_rate`, no more than its first `max_seconds`."""
    limits = [limit for limit in (clip.duration, max_seconds) if limit is not None]
    return load_part(clip.audio, sample_rate, clip.start, min(limits or [sound_info(clip.audio).seconds]))


def codebook_use(rows: Sequence[Row], size: int) -> dict[str, list[float]]:
    """Of each codebook the share of its codes in use and the perplexity, over all frames of all rows."""
    codes = [torch.tensor(row["codes"]) for row in rows if row.get("codes")]
    if not codes:
        return {}
    counts = torch.stack([torch.bincount(stage, minlength=size) for stage in torch.cat(codes, dim=1)])
    use, perplexity = usage(counts.double())
    return {"use": [round(x, 4) for x in use.tolist()], "perplexity": [round(x, 2) for x in perplexity.tolist()]}


def evaluate_codec(
    config: CodecEvaluation, speaker: SpeakerEmbedder | None, quality: Mapping[str, QualityJudge]
) -> Result:
    """Evaluates a codec on clips and writes rows.parquet, summary.json and report.html into `config.output`.

    Raises:
        UserError: for what the user can mend; also where not one clip could be coded.
    """
    out = Path(config.output)
    clips = read_clips(config.data)
    checkpoint = resolve_folder(config.codec)
    codec = load_codec(checkpoint, config.device).eval()
    bandwidths = sorted(config.bandwidths or codec.config.target_bandwidths)
    for bandwidth in bandwidths:
        codec.config.num_codebooks_at(bandwidth)  # says which there are
    speech = any(clip.kind in SPEECH for clip in clips)
    speaker, quality = (speaker, quality) if speech else (None, {})
    settings = {
        "task": "codec", "codec": config.codec, "weights": digest_of(checkpoint), "data": config.data,
        "inputs": fingerprint([clip.audio for clip in clips]), "clips": len(clips), "bandwidths": bandwidths,
        "max_seconds": config.max_seconds, "batch_size": config.batch_size, "seed": config.seed,
        "save_audio": config.save_audio, "device": codec.device.type,
        "speaker": None if speaker is None else speaker.describe(),
        "quality": {name: judge.describe() for name, judge in quality.items()},
    }  # fmt: skip
    claim(out, settings)
    task = CodecTask(
        codec, bandwidths, config.max_seconds, out / "audio" if config.save_audio else None, speaker, quality
    )
    light = {"speaker": speaker} if speaker is not None and speaker.light else {}
    for judge in (speaker, *quality.values()):
        if judge is not None and not judge.light:
            judge.load(config.device)
    top = f"{bandwidths[-1]:g}"
    with ScoringPool(light, config.processes, busy=codec.device.type == "cpu") as pool:
        versions = environment()
        rows = evaluate(
            out, clips, task, pool, config.batch_size, [f"stft_distance@{top}", f"pesq@{top}"], config.retry_errors
        )
    extra = {
        "settings": settings,
        "versions": versions,
        "codebooks": codebook_use(rows, codec.config.codebook_size),
        "meter": {"speaker": speaker.describe()} if speaker is not None else {},
    }

    def sounds(label: str, row: Row) -> ReportClip:
        clip = next(clip for clip in clips if clip.id == row["id"])
        wave = load_clip(clip, codec.sample_rate, config.max_seconds)
        with torch.no_grad():
            outputs = task.decode([torch.tensor(row["codes"])], [len(wave)])[0]
        named = {"original": wave, **{f"{bandwidth:g} kbit/s": sound for bandwidth, sound in outputs.items()}}
        return ReportClip(label, row, [Sound(name, sound, codec.sample_rate) for name, sound in named.items()])

    return write_results(out, "Codec evaluation", rows, extra, f"stft_distance@{top}", sounds)
