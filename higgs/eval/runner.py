"""The run around every evaluation: a folder that belongs to one, a journal that a killed run goes on from, and a bar.

Work goes batch by batch, always the same samples in one batch, so that a run that was interrupted computes what an
undisturbed one does. While the scoring processes work on a batch, the main process makes the next.
"""

import hashlib
import json
import math
import platform
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from higgs.checksums import mark_of
from higgs.errors import UserError
from higgs.eval.catalog import metric_of
from higgs.eval.pool import Job, Row, ScoringPool
from higgs.folders import read_json, read_records, write_aside, write_json
from higgs.versions import PROJECT, git, versions

SETTINGS, JOURNAL = "evaluation.json", "rows.jsonl"
AHEAD = 2  # batches that are made before the first of them must be scored
PACKAGES = (
    "higgs", "torch", "torchaudio", "transformers", "numpy", "scipy", "librosa", "soundfile", "jiwer",
    "whisper-normalizer", "pocketsphinx", "resemblyzer", "pesq", "pystoi", "pyworld", "torchmetrics", "onnxruntime",
    "pyarrow", "matplotlib",
)  # fmt: skip
SampleT, ThingT, AnswerT = TypeVar("SampleT"), TypeVar("ThingT"), TypeVar("AnswerT")


@dataclass
class Made:
    """A sample before it is scored: what is known of its row, and the job that finds the rest (None: it failed)."""

    row: Row
    job: Job | None = None


class Task(Protocol[SampleT]):
    """What one kind of evaluation does in the main process, batch by batch."""

    def make(self, samples: Sequence[SampleT], first: int) -> list[Made]:
        """Sound for the samples from number `first` on. What fails for one sample becomes the `error` of its row."""

    def complete(self, made: Sequence[Made]) -> None:
        """Adds to scored rows what needs the device."""


class Journal(Generic[SampleT]):
    """Finished batches, a line each, in the order of the samples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = {line["batch"]: line["rows"] for line in read_records(path)}
        # Aside and renamed: a last line that a kill cut off goes.
        write_aside(path, "".join(self._line(number) for number in sorted(self.rows)))
        self._file = path.open("a", encoding="utf-8")

    def add(self, number: int, rows: list[Row]) -> None:
        self.rows[number] = rows
        self._file.write(self._line(number))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _line(self, number: int) -> str:
        return json.dumps({"batch": number, "rows": self.rows[number]}, ensure_ascii=False, allow_nan=False) + "\n"


def evaluate(
    out: Path,
    samples: Sequence[SampleT],
    task: Task[SampleT],
    pool: ScoringPool,
    batch_size: int,
    shown: Sequence[str],
    retry_errors: bool = False,
) -> list[Row]:
    """All rows, in the order of the samples. The bar shows the means of the columns `shown` so far.

    Batches that stand in the folder's journal are not computed again; with `retry_errors`, those with an error are.
    """
    journal = Journal(out / JOURNAL)
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    failed = {number for number, rows in journal.rows.items() if any(row["error"] for row in rows)}
    for number in failed if retry_errors else ():
        del journal.rows[number]
    waiting: deque[tuple[int, list[Made], list]] = deque()
    kept = sum(len(rows) for rows in journal.rows.values())
    with tqdm(total=len(samples), initial=kept, unit="clip", desc="evaluate", file=sys.stderr) as bar:

        def finish() -> None:
            number, made, tickets = waiting.popleft()
            for one, ticket in zip(made, tickets, strict=True):
                if ticket is not None:
                    found = pool.result(ticket)
                    found["error"] = together(one.row["error"], found.get("error"))
                    one.row.update(found)
            task.complete(made)
            journal.add(number, [clean(one.row) for one in made])
            bar.update(len(made))
            bar.set_postfix_str(means([row for rows in journal.rows.values() for row in rows], shown))

        for number, batch in enumerate(batches):
            if number in journal.rows:
                continue
            made = task.make(batch, number * batch_size)
            waiting.append((number, made, [None if one.job is None else pool.submit(one.job) for one in made]))
            if len(waiting) > AHEAD:
                finish()
        while waiting:
            finish()
    journal.close()
    return [row for number in range(len(batches)) for row in journal.rows[number]]


def means(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A few words on rows: means of columns, and how many failed."""
    told = []
    for column in columns:
        values = [row[column] for row in rows if row.get(column) is not None]
        if values:
            told.append(f"{column} {sum(values) / len(values):.3g}")
    failed = sum(row["error"] is not None for row in rows)
    return ", ".join([*told, f"{failed} failed"] if failed else told)


def together(*errors: str | None) -> str | None:
    """Several errors of one sample as one text; None where there is none."""
    return " ".join(error for error in errors if error) or None


def attempt(row: Row, name: str, function: Callable[[], Any]) -> Any:
    """The result of `function`, or None with the error noted in the row: a metric that fails costs no other."""
    try:
        return function()
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        row["error"] = together(row.get("error"), f"{name}: {' '.join(reason.split())}")
        return None


def each(
    function: Callable[[Sequence[ThingT], int], list[AnswerT]],
    things: Sequence[ThingT],
    made: Sequence[Made],
    name: str,
) -> list[AnswerT | None]:
    """`function` of all things at once; where that fails, of each alone, and the error goes to the row of the guilty."""
    if not things:
        return []
    try:
        return function(things, 0)
    except Exception:
        answers: list[AnswerT | None] = []
        for place, (thing, one) in enumerate(zip(things, made, strict=True)):
            answer = attempt(one.row, name, lambda t=thing, p=place: function([t], p))
            answers.append(None if answer is None else answer[0])
        return answers


def clean(row: Row) -> Row:
    """A row that JSON can hold: floats to nine digits, what is not finite as None; every row has an `error`."""

    def value(name: str, given: Any) -> Any:
        if isinstance(given, float) and metric_of(name):
            return float(f"{given:.9g}") if math.isfinite(given) else None
        return given

    return {"error": None} | {name: value(name, given) for name, given in row.items()}


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Notes in the folder which evaluation it holds, or checks that it is this one.

    Raises:
        UserError: naming what differs, or where something else lies in the folder.
    """
    path = out / SETTINGS
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} holds something else already. Choose another folder: output=…")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    theirs = read_json(path)
    settings = json.loads(json.dumps(settings))
    changed = [key for key in sorted({*theirs, *settings}) if theirs.get(key) != settings.get(key)]
    if changed:
        told = ", ".join(f"{key} ({theirs.get(key)} there, {settings.get(key)} now)" for key in changed)
        raise UserError(
            f"{out} holds an evaluation with other settings: {told}. Choose another folder (output=…), or delete that one."
        )


def environment() -> dict[str, Any]:
    """Versions of everything, and the machine as far as it can change a figure. Nothing of it depends on the time."""
    return {
        "python": platform.python_version(),
        **versions(PACKAGES),
        "commit": git(PROJECT, "rev-parse", "HEAD"),
        "changed": bool(git(PROJECT, "status", "--porcelain")),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def fingerprint(files: Sequence[str | Path]) -> str:
    """One SHA-256 of the contents of files, in their order; of one that is missing, of its absence."""
    marks = [mark_of(Path(file))["sha256"] if Path(file).is_file() else None for file in files]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()
