"""What an evaluation leaves behind: rows.parquet, summary.json, report.html, and a table on the terminal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs.errors import UserError
from higgs.eval.catalog import metric_of
from higgs.eval.pool import Row
from higgs.eval.report import ReportClip, choose_clips, write_report
from higgs.eval.runner import attempt
from higgs.eval.summary import rows_to_parquet, summarize
from higgs.folders import write_json

ROWS, SUMMARY, REPORT = "rows.parquet", "summary.json", "report.html"


@dataclass
class Result:
    """An evaluation that is done: its folder, a row a sample, and the summary."""

    folder: Path
    rows: list[Row]
    summary: dict[str, Any]


def write_results(
    out: Path,
    title: str,
    rows: list[Row],
    extra: Mapping[str, Any],
    column: str,
    sounds: Callable[[str, Row], ReportClip],
) -> Result:
    """Writes the three files. The report plays the best, the median and the worst sample by `column`; `sounds` fetches
    what is heard of one.

    Raises:
        UserError: where every sample failed; the files are written before.
    """
    summary = summarize(rows, extra)
    rows_to_parquet(rows, out / ROWS)
    write_json(out / SUMMARY, summary)
    clips = []
    better = metric_of(column).better or "lower"
    for label, row in choose_clips(rows, column, better):
        note: Row = {}
        clip = attempt(note, "sound", lambda label=label, row=row: sounds(label, row))
        # A sound that has gone since costs the report one player; its place says so.
        clips.append(clip or ReportClip(label, {**row, "error": note["error"]}, []))
    write_report(out / REPORT, title, summary, rows, clips)
    if rows and all(row["error"] is not None and not any(metric_of(name) for name in row) for row in rows):
        raise UserError(f"Not one of {len(rows)} samples could be evaluated. The first: {rows[0]['error']}")
    return Result(out, rows, summary)
