"""Figures as readers see them: lines of a table, on the terminal and in the report, with what judges get wrong beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from higgs.eval.catalog import METRICS
from higgs.tables import markdown_table

HEARD = ("wer", "cer", "repeated", "turns_found")  # what a recogniser's own errors enter
TOLD_APART = ("speaker_similarity", "intra_similarity", "inter_dissimilarity", "dialogue_consistency")


@dataclass(frozen=True)
class Cell:
    """A mean with its unit, its interval, a median, and over how many samples; each may be empty."""

    mean: str
    bounds: str = ""
    median: str = ""
    count: str = ""


@dataclass(frozen=True)
class Line:
    """A metric: its name, what it is, which way is better, which judge's errors it carries, and a cell a bandwidth."""

    name: str
    about: str
    better: str
    judge: str
    cells: list[Cell]


@dataclass(frozen=True)
class Section:
    """The lines of all samples, or of one kind of them; `bandwidths` head the cells (one empty one where there is none)."""

    title: str
    bandwidths: list[str]
    lines: list[Line]


def sections(summary: Mapping[str, Any]) -> list[Section]:
    """All figures of a summary: of all samples, then by kind where there are several."""
    parts = [("all samples" if summary["kinds"] else "", summary), *summary["kinds"].items()]
    return [section(title, part) for title, part in parts]


def section(title: str, part: Mapping[str, Any]) -> Section:
    found = part["metrics"]
    bandwidths = sorted({column.partition("@")[2] for column in found} - {""}, key=float) or [""]
    lines = []
    for name in dict.fromkeys(column.partition("@")[0] for column in found):
        metric = METRICS[name]
        columns = [f"{name}@{bandwidth}" if f"{name}@{bandwidth}" in found else name for bandwidth in bandwidths]
        if name in found:
            columns = [name]
        cells = [cell_of(found[column], metric.unit) if column in found else Cell("") for column in columns]
        lines.append(Line(name.replace("_", " "), metric.description, metric.better or "", judge_of(name), cells))
    for name, ratio in part["corpus"].items():
        unit = "words" if name == "wer" else "characters"
        cell = Cell(figure(ratio["value"]), bounds(ratio), "", str(part["samples"]))
        lines.append(Line(f"{name} of all {unit}", f"errors over all {unit}", "lower", "recognizer", [cell]))
    if "share_wer_above_50" in part:
        cell = Cell(figure(part["share_wer_above_50"]), "", "", str(part["samples"]))
        lines.append(
            Line("wer above 50 %", "share of samples, more than every second word wrong", "lower", "recognizer", [cell])
        )
    return Section(title, bandwidths, lines)


def cell_of(found: Mapping[str, Any], unit: str) -> Cell:
    return Cell(figure(found["mean"], unit), bounds(found), figure(found["median"]), str(found["count"]))


def judge_of(name: str) -> str:
    """Which judge a metric comes from; "" for one that is computed."""
    return "recognizer" if name in HEARD else "speaker" if name in TOLD_APART else ""


def table(summary: Mapping[str, Any]) -> str:
    """The figures as Markdown tables, with what the judges themselves get wrong below, and failures."""
    parts = []
    for one in sections(summary):
        if one.bandwidths == [""]:
            header = ["metric", "mean", "95 % interval", "median", "samples", "better"]
            rows = [
                [line.name, cell.mean, cell.bounds, cell.median, cell.count, line.better]
                for line in one.lines
                for cell in line.cells
            ]
        else:
            header = ["metric", *(f"{bandwidth} kbit/s" for bandwidth in one.bandwidths), "samples", "better"]
            rows = [
                [line.name, *(cell.mean for cell in line.cells), *[""] * (len(one.bandwidths) - len(line.cells)),
                 max((cell.count for cell in line.cells), key=lambda count: int(count or 0)), line.better]
                for line in one.lines
            ]  # fmt: skip
        parts.append((f"{one.title}:\n\n" if one.title else "") + markdown_table(header, rows))
    if summary.get("codebooks"):
        parts.append(markdown_table(["codebook", "codes in use", "perplexity"], codebook_lines(summary["codebooks"])))
    notes = meter_lines(summary.get("meter", {}))
    failures = summary["failures"]
    if failures["count"]:
        first = failures["samples"][0]
        notes.append(
            f"{failures['count']} of {summary['samples']} samples have an error; the first, {first['id']}: {first['error']}"
        )
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def codebook_lines(codebooks: Mapping[str, Sequence[float]]) -> list[list[str]]:
    pairs = zip(codebooks["use"], codebooks["perplexity"], strict=True)
    return [[str(stage), f"{use:.1%}", f"{perplexity:.1f}"] for stage, (use, perplexity) in enumerate(pairs)]


def meter_lines(meter: Mapping[str, Any]) -> list[str]:
    """What the judges themselves get wrong, as sentences to stand beside their figures."""
    lines = []
    if "recognizer" in meter:
        told = f"Word and character errors are of what {meter['recognizer']['name']} hears"
        if "clean_wer" in meter:
            clean = meter["clean_wer"]
            told += (
                f"; on clean speech ({meter['clean_speech']}) its own wer is {figure(clean['value'])} {bounds(clean)}"
            )
        lines.append(f"{told}.")
    if "speaker" in meter:
        told = f"Similarities of voices are of {meter['speaker']['name']}"
        if meter["speaker"].get("separation"):
            of = meter["speaker"]["separation"]
            told += (
                f"; on clean speech it gives clips of one voice {of['same']:.3f} and of two voices {of['different']:.3f} "
                f"(equal error rate {of['eer']:.1%})"
            )
        lines.append(f"{told}.")
    return lines


def figure(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.4g} {unit}".rstrip()


def bounds(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f"[{figure(found['low'])}, {figure(found['high'])}]"


def name_of(column: str) -> str:
    """A column's name for readers: `pesq@1.5` -> `pesq at 1.5 kbit/s`."""
    name, at, bandwidth = column.partition("@")
    return f"{name.replace('_', ' ')} at {bandwidth} kbit/s" if at else name.replace("_", " ")
