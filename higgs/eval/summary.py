"""What rows say together: statistics with intervals, errors of a whole corpus, failures; and rows as Parquet."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from higgs.errors import UserError
from higgs.eval.catalog import metric_columns
from higgs.eval.pool import Row
from higgs.eval.statistics import ratio_of_sums, summary_of
from higgs.folders import write_aside

COUNTS = {"wer": ("word_errors", "words"), "cer": ("character_errors", "characters")}
HIGH_WER = 0.5
TEXTS, WHOLE = (
    ("id", "kind", "text", "hypothesis", "error"),
    ("seed", *(name for pair in COUNTS.values() for name in pair)),
)


def summarize(rows: Sequence[Row], extra: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """All that a reader asks of an evaluation, as JSON holds it: `metrics` by column, `kinds` alike for each kind of
    sample where there are several, `failures`, and `extra` (settings, versions, meter, …)."""
    kinds = sorted({row["kind"] or "unlabelled" for row in rows})
    failed = [{"id": row["id"], "error": row["error"]} for row in rows if row["error"] is not None]
    found: dict[str, Any] = {
        "samples": len(rows),
        "failures": {"count": len(failed), "samples": failed},
        **part(rows, seed),
        "kinds": {},
    }
    if len(kinds) > 1:
        of_kind = {kind: [row for row in rows if (row["kind"] or "unlabelled") == kind] for kind in kinds}
        found["kinds"] = {kind: {"samples": len(some), **part(some, seed)} for kind, some in of_kind.items()}
    return {**found, **extra}


def part(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Statistics of some rows: of every metric over the samples, and of errors over all words or characters."""
    metrics = {}
    for column in metric_columns(rows):
        values = [row[column] for row in rows if row.get(column) is not None]
        if values:
            metrics[column] = asdict(summary_of(values, seed))
    corpus = {}
    for name, (errors, length) in COUNTS.items():
        counted = [row for row in rows if row.get(length)]
        if counted:
            corpus[name] = asdict(ratio_of_sums([r[errors] for r in counted], [r[length] for r in counted], seed))
    heard = [row["wer"] for row in rows if row.get("wer") is not None]
    share = {"share_wer_above_50": sum(wer > HIGH_WER for wer in heard) / len(heard)} if heard else {}
    return {"metrics": metrics, "corpus": corpus, **share}


def rows_to_parquet(rows: Sequence[Row], path: Path) -> None:
    """One row a sample; the same rows give the same bytes. Columns: texts, whole numbers, metrics, codes."""
    columns = {name: pa.string() for name in TEXTS} | {"seed": pa.int64()}
    columns |= {name: pa.int64() for name in WHOLE if any(name in row for row in rows)}
    columns |= dict.fromkeys(metric_columns(rows), pa.float64())
    if any(row.get("codes") for row in rows):
        columns["codes"] = pa.list_(pa.list_(pa.int16()))
    unknown = {name for row in rows for name in row} - columns.keys() - {"codes"}
    assert not unknown, f"columns without a type: {sorted(unknown)}"
    table = pa.table(
        {name: pa.array([row.get(name) for row in rows], kind) for name, kind in columns.items()}
    )  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_aside(path, buffer.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of `rows_to_parquet`. UserError where the file is missing or no such table."""
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read ({error}). Run the evaluation again.") from error
