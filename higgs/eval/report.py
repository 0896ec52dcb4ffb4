"""The report: one page that holds everything it shows, and opens from disk.

Shapes: L samples.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from higgs.audio import encode_audio
from higgs.eval.catalog import METRICS
from higgs.eval.pool import Row
from higgs.eval.summary import bounds, figure, meter_lines, name_of
from higgs.folders import write_aside
from higgs.plots import histogram_png, spectrograms_png

TEMPLATE = "report.html.jinja"
LABELS = ("best", "median", "worst")


@dataclass
class Sound:
    """Samples [L] under a name."""

    name: str
    waveform: Tensor
    sample_rate: int


@dataclass
class ReportClip:
    """A sample that can be heard and seen, and why it was chosen: the best, the median or the worst."""

    label: str
    row: Row
    sounds: list[Sound]


def choose_clips(rows: Sequence[Row], column: str, better: str) -> list[tuple[str, Row]]:
    """The best, the median and the worst row by a column, each row once; with a tie, the earlier one."""
    there = sorted((row for row in rows if row.get(column) is not None), key=lambda row: row[column])
    if better == "higher":
        there.reverse()
    places = {0: "best", (len(there) - 1) // 2: "median", len(there) - 1: "worst"} if there else {}
    if len(there) in (1, 2):
        places = dict(zip((0, len(there) - 1), ("best", "worst"), strict=True)) if len(there) == 2 else {0: "best"}
    return [(places[place], there[place]) for place in sorted(places)]


def write_report(
    path: Path, title: str, summary: Mapping[str, Any], rows: Sequence[Row], clips: Sequence[ReportClip]
) -> None:
    """Writes the page: the figures with their intervals, overall and by kind of sample; how each metric is spread; the
    clips with spectrograms and players; failures; settings and versions. The same input gives the same bytes."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((files("higgs.eval") / TEMPLATE).read_text(encoding="utf-8"))
    parts = [("all samples", summary), *summary["kinds"].items()] if summary["kinds"] else [("", summary)]
    page = template.render(
        title=title,
        summary=summary,
        tables=[(name, table_of(part)) for name, part in parts],
        meter=meter_lines(summary.get("meter", {})),
        histograms=[(name_of(column), uri("image/png", histogram)) for column, histogram in histograms(summary, rows)],
        clips=[shown(clip) for clip in clips],
        books=books_of(summary.get("codebooks") or {}),
        settings=[(name, plain(value)) for name, value in sorted(summary.get("settings", {}).items())],
        versions=[(name, plain(value)) for name, value in sorted(summary.get("versions", {}).items())],
    )
    write_aside(path, page)


def table_of(part: Mapping[str, Any]) -> list[dict[str, str]]:
    """The lines of a table of figures."""
    lines = []
    for column, found in part["metrics"].items():
        metric = METRICS[column.partition("@")[0]]
        lines.append({
            "name": name_of(column), "about": metric.description, "better": metric.better or "",
            "mean": figure(found["mean"], metric.unit), "bounds": bounds(found), "median": figure(found["median"]),
            "count": str(found["count"]), "judged": judge_of(column),
        })  # fmt: skip
    for name, found in part["corpus"].items():
        unit = "words" if name == "wer" else "characters"
        lines.append({
            "name": f"{name} of all {unit}", "about": f"errors of all samples over all {unit}", "better": "lower",
            "mean": figure(found["value"]), "bounds": bounds(found), "median": "", "count": str(part["samples"]),
            "judged": "recognizer",
        })  # fmt: skip
    if "share_wer_above_50" in part:
        lines.append({
            "name": "wer above 50 %", "about": "share of samples with more than every second word wrong",
            "better": "lower", "mean": figure(part["share_wer_above_50"]), "bounds": "", "median": "",
            "count": str(part["samples"]), "judged": "recognizer",
        })  # fmt: skip
    return lines


def judge_of(column: str) -> str:
    """Which judge a figure comes from, whose own error must be read with it; "" for those that are computed."""
    name = column.partition("@")[0]
    if name in ("wer", "cer", "repeated", "turns_found"):
        return "recognizer"
    return (
        "speaker"
        if name in ("speaker_similarity", "intra_similarity", "inter_dissimilarity", "dialogue_consistency")
        else ""
    )


def histograms(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, bytes]]:
    found = []
    for column in summary["metrics"]:
        values = [row[column] for row in rows if row.get(column) is not None]
        unit = METRICS[column.partition("@")[0]].unit
        found.append((column, histogram_png(values, f"{name_of(column)}{f' in {unit}' if unit else ''}")))
    return found


def shown(clip: ReportClip) -> dict[str, Any]:
    row = clip.row
    return {
        "label": clip.label,
        "row": row,
        "figures": [
            (name_of(c), figure(v, METRICS[c.partition("@")[0]].unit)) for c, v in row.items() if is_figure(c, v)
        ],
        "picture": uri("image/png", spectrograms_png([(s.name, s.waveform, s.sample_rate) for s in clip.sounds]))
        if clip.sounds
        else "",
        "sounds": [(s.name, uri("audio/flac", encode_audio(s.waveform, s.sample_rate))) for s in clip.sounds],
    }


def is_figure(column: str, value: Any) -> bool:
    return column.partition("@")[0] in METRICS and value is not None


def books_of(codebooks: Mapping[str, Sequence[float]]) -> list[tuple[str, str, str]]:
    pairs = zip(codebooks.get("use", []), codebooks.get("perplexity", []), strict=True)
    return [(str(stage), f"{use:.1%}", f"{perplexity:.1f}") for stage, (use, perplexity) in enumerate(pairs)]


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
