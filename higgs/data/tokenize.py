"""`higgs tokenize`: the audio of a conversation manifest -> a folder of codes (`higgs.data.shards`).

A shard is a fixed slice of the manifest and is coded in batches that follow from that slice alone. So any number of
processes gives the same bytes, and a run that was killed keeps its finished shards and makes the others.

Shapes: L samples, K codebooks, T codec frames.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higgs.audio import sound_info
from higgs.codec import Codec, encode_clips
from higgs.data.clips import audio_items
from higgs.data.manifest import Sample, read_manifest, read_text
from higgs.data.shards import (
    SOURCE,
    CodedWith,
    CodeSource,
    ShardRecord,
    finished_shard,
    remove_stale,
    shard_name,
    to_json,
    write_index,
    write_shard,
)
from higgs.errors import UserError
from higgs.folders import write_aside
from higgs.inputs import read_audio_item

MIN_SAMPLES = 20  # before the share of unreadable samples is judged
LOADER_THREADS = 4


@dataclass
class TokenizeConfig:
    """How the work is cut. All but `max_unreadable` decide which clips are coded together, and so, by rounding, the
    bytes: a folder that was begun must be finished with the same values."""

    shard_samples: int = 256  # conversations a shard
    batch_seconds: float = 60.0  # sound in a batch, padding counted
    max_unreadable: float = 0.05  # stop when more than this share of the samples cannot be read

    def __post_init__(self) -> None:
        if self.shard_samples < 1 or self.batch_seconds <= 0 or not 0 <= self.max_unreadable <= 1:
            raise UserError(
                "shard_samples must be at least 1, batch_seconds above 0, and max_unreadable between 0 and 1."
            )


@dataclass
class TokenizeResult:
    """This rank's samples (or all, once `complete`): how many were coded now, kept from before, and unreadable."""

    coded: int = 0
    kept: int = 0
    unreadable: list[dict[str, str]] = field(default_factory=list)
    complete: bool = False


@dataclass
class Clip:
    """An audio item on its way: `samples` is its estimated length [L], `codes` [K, T] what became of it."""

    sample: int
    item: dict[str, Any]
    samples: int
    codes: Tensor | None = None


def tokenize(
    manifest: str | Path,
    out: str | Path,
    codec: Codec,
    config: TokenizeConfig | None = None,
    *,
    rank: int = 0,
    size: int = 1,
    report: Callable[[int], None] = lambda samples: None,
    log: Callable[[str], None] = lambda line: None,
) -> TokenizeResult:
    """Codes the shards of this rank, and writes the index if they are the last ones missing.

    `report` gets the number of samples whenever a shard is done, `log` a line for each unreadable one.

    Raises:
        UserError: the manifest is faulty, the folder was begun with another manifest, codec or cut, or more than
            `config.max_unreadable` of the samples (at least 20 of them, or all) cannot be read.
    """
    config = config or TokenizeConfig()
    out = Path(out)
    samples = read_manifest(manifest)
    source = code_source(manifest, samples, codec, config)
    claim_folder(out, source)
    return code_shards(out, samples, source, codec, config, rank, size, report, log)


def code_shards(
    out: Path,
    samples: Sequence[Sample],
    source: CodeSource,
    codec: Codec,
    config: TokenizeConfig,
    rank: int,
    size: int,
    report: Callable[[int], None],
    log: Callable[[str], None],
) -> TokenizeResult:
    """What `tokenize` does, in a folder that is claimed."""
    result = TokenizeResult()
    for number in range(rank, source.num_shards, size):
        first = number * config.shard_samples
        part = samples[first : first + config.shard_samples]
        record = finished_shard(out, number)
        if record is None:
            record = code_shard(out, number, part, codec, source, log)
            result.coded += record.samples
        else:
            result.kept += record.samples
        result.unreadable += record.unreadable
        report(len(part))
        seen = result.coded + result.kept + len(result.unreadable)
        if seen >= MIN_SAMPLES:
            check_share(result.unreadable, seen, config)
    records = finished_folder(out, source, config)
    if records is not None:
        result.unreadable = [entry for record in records for entry in record.unreadable]
        result.complete = True
    return result


def finished_folder(out: Path, source: CodeSource, config: TokenizeConfig) -> list[ShardRecord] | None:
    """Writes the index once all shards, of all ranks, are there; else None."""
    paths = [out / f"{shard_name(number)}.json" for number in range(source.num_shards)]
    if not all(path.is_file() for path in paths):
        return None
    records = [ShardRecord(**json.loads(path.read_bytes())) for path in paths]
    check_share([entry for record in records for entry in record.unreadable], source.samples, config)
    write_index(out, source, records)
    return records


def check_share(unreadable: Sequence[dict[str, str]], seen: int, config: TokenizeConfig) -> None:
    if len(unreadable) > config.max_unreadable * seen:
        worst = unreadable[0]
        raise UserError(
            f"{len(unreadable)} of {seen} samples cannot be read, more than max_unreadable={config.max_unreadable} "
            f"allows. The first: {worst['id']}, {worst['reason']}"
        )


def manifest_digest(manifest: str | Path) -> str:
    """What tells one manifest from another: the SHA-256 of its text."""
    return hashlib.sha256(read_text(Path(manifest)).encode()).hexdigest()


def code_source(manifest: str | Path, samples: Sequence[Sample], codec: Codec, config: TokenizeConfig) -> CodeSource:
    digest = manifest_digest(manifest)
    return CodeSource(digest, len(samples), config.shard_samples, float(config.batch_seconds), codec_identity(codec))


def codec_identity(codec: Codec) -> CodedWith:
    """Digests of a codec's config and weights."""
    weights = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = hashlib.sha256(json.dumps(codec.config.to_dict(), sort_keys=True).encode())
    return CodedWith(
        config.hexdigest(),
        weights.hexdigest(),
        codec.num_codebooks,
        codec.config.codebook_size,
        codec.sample_rate,
        codec.config.hop_length,
    )


def claim_folder(out: Path, source: CodeSource) -> None:
    """Notes in the folder what it is made from, or checks that it is the same."""
    path = out / SOURCE
    if not path.exists():
        if out.is_dir() and any(out.glob("*.safetensors")):
            raise UserError(f"{out} holds tensors but no {SOURCE}; choose an empty folder.")
        out.mkdir(parents=True, exist_ok=True)
        write_aside(path, to_json(asdict(source)))
        return
    try:
        before = CodeSource.from_dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete the folder or choose another.") from error
    if before == source:
        return
    if before.codec != source.codec:
        what = "another codec"
    elif before.manifest != source.manifest:
        what = "another manifest"
    else:
        what = f"shard_samples={before.shard_samples} and batch_seconds={before.batch_seconds}"
    raise UserError(f"{out} was begun with {what}. Choose another folder, or delete this one first.")


def code_shard(
    out: Path, number: int, samples: Sequence[Sample], codec: Codec, source: CodeSource, log: Callable[[str], None]
) -> ShardRecord:
    remove_stale(out, shard_name(number))
    faults: dict[int, str] = {}
    clips = [clip for place, sample in enumerate(samples) for clip in find_clips(place, sample, codec, faults)]
    code_clips([clip for clip in clips if clip.codes is None], codec, source.batch_seconds, faults)
    good = [place for place in range(len(samples)) if place not in faults]
    for place, reason in sorted(faults.items()):
        log(f"sample {samples[place].id} cannot be read and is left out: {reason}")
    kept: list[Tensor] = []
    placed: list[Sample] = []
    by_sample = {place: iter([clip for clip in clips if clip.sample == place]) for place in good}
    position = 0
    for place in good:
        spans = []
        for clip in by_sample[place]:
            spans.append([position, position + clip.codes.shape[1]])
            position += clip.codes.shape[1]
            kept.append(clip.codes)
        placed.append(with_spans(samples[place], iter(spans)))
    unreadable = [{"id": samples[place].id, "reason": reason} for place, reason in sorted(faults.items())]
    return write_shard(out, number, kept, placed, unreadable, source.codec)


def find_clips(place: int, sample: Sample, codec: Codec, faults: dict[int, str]) -> Iterator[Clip]:
    """The audio items of a sample; those that hold codes keep them. The first fault is noted."""
    for _, item in audio_items([sample]):
        try:
            path = next((item[key] for key in ("url", "path", "audio") if isinstance(item.get(key), str)), None)
            if path is not None and Path(path).is_file():
                yield Clip(place, item, int(sound_info(path).seconds * codec.sample_rate))
                continue
            read = read_audio_item(item, codec.sample_rate, "audio item")
            codes = None if read.is_floating_point() else check_codes(read, codec)
            yield Clip(place, item, len(read), codes)
        except UserError as error:
            faults.setdefault(place, str(error))


def code_clips(clips: Sequence[Clip], codec: Codec, batch_seconds: float, faults: dict[int, str]) -> None:
    """Fills in `codes`, longest clips first, a batch at a time. The next batch is loaded meanwhile."""

    def load(clip: Clip) -> Tensor | UserError:
        try:
            waveform = read_audio_item(clip.item, codec.sample_rate, "audio item")
            if len(waveform) < codec.minimum_samples:
                seconds = len(waveform) / codec.sample_rate
                raise UserError(
                    f"it lasts {1000 * seconds:.1f} ms; the codec needs {codec.minimum_samples} samples at "
                    f"{codec.sample_rate} Hz"
                )
            return waveform
        except UserError as error:
            return error

    batches = length_batches(clips, batch_seconds * codec.sample_rate)
    with ThreadPoolExecutor(LOADER_THREADS) as pool:
        coming = [pool.submit(load, clip) for clip in batches[0]] if batches else []
        for place, batch in enumerate(batches):
            loaded = [future.result() for future in coming]
            coming = [pool.submit(load, clip) for clip in batches[place + 1]] if place + 1 < len(batches) else []
            good = [(clip, wave) for clip, wave in zip(batch, loaded, strict=True) if isinstance(wave, Tensor)]
            for clip, wave in zip(batch, loaded, strict=True):
                if not isinstance(wave, Tensor):
                    faults.setdefault(clip.sample, str(wave))
            codes = encode_clips(codec, [wave for _, wave in good])
            for (clip, _), one in zip(good, codes, strict=True):
                clip.codes = one


def length_batches(clips: Sequence[Clip], limit: float) -> list[list[Clip]]:
    """From long to short, batches whose padded size is at most `limit` samples (or one clip)."""
    batches: list[list[Clip]] = []
    for clip in sorted(clips, key=lambda clip: -clip.samples):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].samples <= limit:
            batches[-1].append(clip)
        else:
            batches.append([clip])
    return batches


def check_codes(codes: Tensor, codec: Codec) -> Tensor:
    fits = codes.ndim == 2 and len(codes) == codec.num_codebooks and codes.shape[1] > 0
    if not fits or not 0 <= int(codes.min()) <= int(codes.max()) < codec.config.codebook_size:
        raise UserError(
            f"its codes have the shape {list(codes.shape)}; this codec gives [{codec.num_codebooks}, frames] of 0 to "
            f"{codec.config.codebook_size - 1}"
        )
    return codes


def with_spans(sample: Sample, spans: Iterator[list[int]]) -> Sample:
    """The sample with the span of its codes in place of each audio item."""
    messages = []
    for message in sample.messages:
        content = message["content"]
        if isinstance(content, list):
            content = [{"type": "audio", "span": next(spans)} if item["type"] == "audio" else item for item in content]
        messages.append({**message, "content": content})
    return replace(sample, messages=messages)
