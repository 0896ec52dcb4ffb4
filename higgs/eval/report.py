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
from higgs.eval.figures import codebook_lines, figure, meter_lines, name_of, sections
from higgs.eval.pool import Row
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
    page = template.render(
        title=title,
        summary=summary,
        sections=sections(summary),
        meter=meter_lines(summary.get("meter", {})),
        histograms=[(name_of(column), uri("image/png", histogram)) for column, histogram in histograms(summary, rows)],
        clips=[shown(clip) for clip in clips],
        books=codebook_lines(summary["codebooks"]) if summary.get("codebooks") else [],
        settings=[(name, plain(value)) for name, value in sorted(summary.get("settings", {}).items())],
        versions=[(name, plain(value)) for name, value in sorted(summary.get("versions", {}).items())],
    )
    write_aside(path, page)


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


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
