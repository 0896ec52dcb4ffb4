"""A folder of coded conversations: shards with checksums, written whole, checked when opened.

    source.json              what is coded with what; a folder belongs to one manifest and one codec
    shard-00000.safetensors  `codes`, int16 (int32 past 32,767) [frames, K]: the clips of the shard one after the other
    shard-00000.jsonl        its samples: id, messages, start_index; a clip is {"type": "audio", "span": [first, stop]}
    shard-00000.json         size and SHA-256 of both files, counts, and samples that could not be read; written last
    index.json               all of the above in one, and its own checksum; its presence says that the folder is complete

Shapes: K codebooks, T codec frames of a clip.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from higgs.checksums import fault
from higgs.data.manifest import Sample
from higgs.errors import UserError
from higgs.folders import write_aside

FORMAT = "higgs codes 1"
SOURCE, INDEX = "source.json", "index.json"
OPEN_SHARDS = 64  # memory maps kept open
HASH_THREADS = 4


@dataclass(frozen=True)
class CodedWith:
    """The codec behind a folder: digests of its config and weights, and what its codes look like."""

    config: str
    weights: str
    num_codebooks: int
    codebook_size: int
    sample_rate: int
    hop_length: int


@dataclass(frozen=True)
class CodeSource:
    """What a folder is made from. Shards and batches follow from it, so the same source gives the same bytes."""

    manifest: str  # SHA-256 of the file
    samples: int
    shard_samples: int
    batch_seconds: float
    codec: CodedWith

    @property
    def num_shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CodeSource":
        return cls(**{**values, "codec": CodedWith(**values["codec"])})


@dataclass(frozen=True)
class ShardRecord:
    """The content of `shard-N.json`: `files` maps a name to its size and SHA-256; `unreadable` are ids and reasons."""

    files: dict[str, dict[str, Any]]
    samples: int
    clips: int
    frames: int
    unreadable: list[dict[str, str]]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def remove_stale(folder: Path, name: str) -> None:
    """Removes what writers of a file left behind that were killed."""
    for stale in folder.glob(f".{name}.*.part"):
        stale.unlink(missing_ok=True)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def write_shard(
    folder: Path, number: int, clips: Sequence[Tensor], samples: Sequence[Sample], unreadable: list[dict[str, str]],
    codec: CodedWith,
) -> ShardRecord:  # fmt: skip
    """Writes the codes [K, T] of the clips and the samples that refer to them."""
    dtype = torch.int16 if codec.codebook_size <= 2**15 else torch.int32
    empty = torch.zeros(codec.num_codebooks, 0, dtype=dtype)
    codes = torch.cat([empty, *(clip.to(dtype) for clip in clips)], dim=1).T.contiguous()
    rows = [asdict(sample) for sample in samples]
    content = {
        f"{shard_name(number)}.safetensors": save({"codes": codes}),
        f"{shard_name(number)}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    }
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}
    record = ShardRecord(files, len(samples), len(clips), len(codes), unreadable)
    for name, data in content.items():
        write_aside(folder / name, data)
    write_aside(folder / f"{shard_name(number)}.json", to_json(asdict(record)))
    return record


def finished_shard(folder: Path, number: int) -> ShardRecord | None:
    """The record of a shard that is on disk, whole and unaltered; else None."""
    try:
        values = json.loads((folder / f"{shard_name(number)}.json").read_bytes())
        record = ShardRecord(**values)
        whole = all(fault(folder / name, mark) is None for name, mark in record.files.items())
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return record if whole else None


def self_digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json({key: value for key, value in index.items() if key != "sha256"})).hexdigest()


def write_index(folder: Path, source: CodeSource, records: Sequence[ShardRecord]) -> None:
    index = {"format": FORMAT, "source": asdict(source), "shards": [asdict(record) for record in records]}
    write_aside(folder / INDEX, to_json({**index, "sha256": self_digest(index)}))
    for name in (SOURCE, INDEX):
        remove_stale(folder, name)


class CodedFolder:
    """A folder of coded conversations, opened for reading.

    Raises:
        UserError: naming the file, where the folder is not complete, or a file is missing, cut off or altered.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self._read_index()
        self.digest: str = index["sha256"]
        self.source = CodeSource.from_dict(index["source"])
        self.records = [ShardRecord(**values) for values in index["shards"]]
        self._check_files()
        self._lines = [self.path / f"{shard_name(number)}.jsonl" for number in range(len(self.records))]
        sizes = [[len(line) for line in path.read_bytes().splitlines(keepends=True)] for path in self._lines]
        # Arrays, not objects: there may be millions, shared by forked loader processes.
        self._shard = np.repeat(np.arange(len(sizes), dtype=np.int32), [len(one) for one in sizes])
        self._size = np.array([size for one in sizes for size in one], dtype=np.int32)
        self._first = np.concatenate([np.cumsum([0, *one], dtype=np.int64)[:-1] for one in sizes])
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # memory maps stay in their process

    @property
    def codec(self) -> CodedWith:
        return self.source.codec

    @property
    def unreadable(self) -> list[dict[str, str]]:
        """Samples of the manifest that could not be coded: `id` and `reason`."""
        return [entry for record in self.records for entry in record.unreadable]

    def sample(self, number: int) -> Sample:
        """Sample `number`, with `span` in its audio items; see `codes`."""
        with self._lines[self._shard[number]].open("rb") as file:
            file.seek(int(self._first[number]))
            return Sample(**json.loads(file.read(int(self._size[number]))))

    def samples(self) -> Iterator[Sample]:
        """All samples in order, as `sample` gives them."""
        for path in self._lines:
            with path.open("rb") as file:
                yield from (Sample(**json.loads(line)) for line in file)

    def codes(self, number: int, span: Sequence[int]) -> Tensor:
        """The codes [K, T] (int64) of a clip of sample `number`."""
        first, stop = span
        return self._shard_codes(int(self._shard[number]))[first:stop].T.long()

    def _shard_codes(self, shard: int) -> Any:
        if shard not in self._open:
            file = self.path / f"{shard_name(shard)}.safetensors"
            self._open[shard] = safe_open(file, framework="pt").get_slice("codes")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _read_index(self) -> dict[str, Any]:
        path = self.path / INDEX
        if not path.is_file() and (self.path / SOURCE).is_file():
            raise UserError(f"{self.path} is not complete: run the `higgs tokenize` command that began it once more.")
        if not path.is_file():
            raise UserError(f"{self.path} holds no {INDEX}; give a folder made by `higgs tokenize`.")
        try:
            index = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is cut off or altered ({error}). Run `higgs tokenize` into it again.") from error
        if index.get("format") != FORMAT:
            raise UserError(f"{path} is of the format {index.get('format')!r}, not {FORMAT!r}; make the folder again.")
        if index.get("sha256") != self_digest(index):
            raise UserError(f"{path} was altered: its checksum differs. Run `higgs tokenize` into this folder again.")
        return index

    def _check_files(self) -> None:
        files = [(name, mark) for record in self.records for name, mark in record.files.items()]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            faults = list(pool.map(lambda entry: fault(self.path / entry[0], entry[1]), files))
        for (name, _), found in zip(files, faults, strict=True):
            if found is not None:
                raise UserError(
                    f"{self.path / name} {found}. Run the `higgs tokenize` command of this folder again: it makes the "
                    "shard anew and keeps the others."
                )
