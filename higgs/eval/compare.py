"""`higgs evaluate compare A B …`: evaluations sample by sample, with the chance that a difference is none."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from higgs.errors import UserError
from higgs.eval.catalog import METRICS, metric_columns
from higgs.eval.figures import figure, meter_lines
from higgs.eval.outputs import ROWS, SUMMARY
from higgs.eval.pool import Row
from higgs.eval.statistics import Paired, paired
from higgs.eval.summary import read_rows
from higgs.folders import read_json, write_aside
from higgs.tables import markdown_table
from higgs.train.compare import differing_keys, is_run, read_run

CERTAIN = 0.05
MEANT_TO_DIFFER = {"weights", "checkpoint", "codec", "audio", "inputs"}  # settings of two systems under one test


@dataclass
class Evaluation:
    """An evaluation's folder, its rows by sample id, and its summary; `run` is the training run that it lies in."""

    folder: Path
    rows: dict[str, Row]
    summary: dict[str, Any]
    run: Path | None = None

    @property
    def name(self) -> str:
        return self.run.name if self.run is not None else self.folder.name


@dataclass
class Difference:
    """One metric of B against A, over the samples that both have."""

    column: str
    found: Paired
    verdict: str


@dataclass
class Comparison:
    """B against A: differences by metric, how many samples have no partner, and settings that should not differ."""

    a: Evaluation
    b: Evaluation
    differences: list[Difference]
    paired: int
    unpaired: int
    warnings: list[str]


def find_evaluations(path: Path) -> list[Evaluation]:
    """The evaluation in a folder, or those of a training run (or of each run of a sweep), which lie in the folders below.

    Raises:
        UserError: where there is none.
    """
    if (path / ROWS).is_file():
        return [read_evaluation(path)]
    depths = ("*", "*/*") if not is_run(path) else ("*",)
    found = sorted({file.parent for depth in depths for file in path.glob(f"{depth}/{ROWS}")})
    if not found:
        raise UserError(
            f"{path} holds no finished evaluation ({ROWS}, {SUMMARY}). Give the output folder of `higgs evaluate codec` or "
            "`tts`, or a training run in which one lies."
        )
    return [read_evaluation(folder) for folder in found]


def read_evaluation(folder: Path) -> Evaluation:
    rows = read_rows(folder / ROWS)
    run = folder.parent if is_run(folder.parent) else None
    return Evaluation(folder, {row["id"]: row for row in rows}, read_json(folder / SUMMARY), run)


def compare(a: Evaluation, b: Evaluation, columns: Sequence[str] | None = None, seed: int = 0) -> Comparison:
    """B against A in every metric that both have (or `columns`), over the samples in which both have a value.

    Raises:
        UserError: where they share no sample, or naming a metric that one of them lacks.
    """
    shared = [name for name in a.rows if name in b.rows]
    if not shared:
        raise UserError(f"{a.folder} and {b.folder} have no sample in common, so they cannot be paired.")
    known = [set(metric_columns(list(one.rows.values()))) for one in (a, b)]
    absent = [column for column in columns or () if column not in known[0] & known[1]]
    if absent:
        raise UserError(
            f"There is no metric {', '.join(absent)} in both; both have {', '.join(sorted(known[0] & known[1]))}."
        )
    differences = []
    for column in columns or [name for name in metric_columns(list(a.rows.values())) if name in known[1]]:
        pairs = [(a.rows[name].get(column), b.rows[name].get(column)) for name in shared]
        pairs = [(one, other) for one, other in pairs if one is not None and other is not None]
        if len(pairs) >= 2:
            found = paired(*zip(*pairs, strict=True), seed)
            differences.append(Difference(column, found, verdict(column, found)))
    unpaired = len(a.rows) + len(b.rows) - 2 * len(shared)
    return Comparison(a, b, differences, len(shared), unpaired, warnings(a, b))


def verdict(column: str, found: Paired) -> str:
    better = METRICS[column.partition("@")[0]].better
    if found.p >= CERTAIN or found.difference == 0:
        return "no difference shown"
    if better is None:
        return "more" if found.difference > 0 else "less"
    return "better" if (found.difference > 0) == (better == "higher") else "worse"


def warnings(a: Evaluation, b: Evaluation) -> list[str]:
    """What makes figures of the two less comparable: other judges, normalisers, samples, versions."""
    ours, theirs = a.summary.get("settings", {}), b.summary.get("settings", {})
    differ = sorted(key for key in {*ours, *theirs} - MEANT_TO_DIFFER if ours.get(key) != theirs.get(key))
    told = [f"{key} differs: {short(ours.get(key))} and {short(theirs.get(key))}" for key in differ]
    old, new = a.summary.get("versions", {}), b.summary.get("versions", {})
    told += [
        f"version of {key} differs: {old.get(key)} and {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    for one in (a, b):
        if one.summary["failures"]["count"]:
            told.append(f"{one.name} has {one.summary['failures']['count']} samples with an error")
    return told


def short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def told(comparison: Comparison) -> str:
    """A comparison as Markdown."""
    a, b = comparison.a, comparison.b
    rows = []
    for one in comparison.differences:
        found, unit = one.found, METRICS[one.column.partition("@")[0]].unit
        rows.append([
            one.column, figure(found.mean_a), figure(found.mean_b), f"{found.difference:+.4g} {unit}".rstrip(),
            f"[{found.low:+.4g}, {found.high:+.4g}]", f"{found.p:.4f}", str(found.count), one.verdict,
        ])  # fmt: skip
    lines = [
        f"A = {a.folder}\nB = {b.folder}\n{comparison.paired} samples in both, {comparison.unpaired} in one alone.\n",
        markdown_table(["metric", "A", "B", "B - A", "95 % interval", "p", "samples", "B is"], rows),
        "",
        f"p: two-sided paired bootstrap, not corrected for {len(rows)} metrics.",
        *meter_lines(b.summary.get("meter", {})),
        *(f"warning: {line}." for line in comparison.warnings),
    ]
    return "\n".join(lines)


def overview(evaluations: Sequence[Evaluation], columns: Sequence[str] | None) -> str:
    """Means of several evaluations beside the keys in which their training runs differ."""
    runs = [read_run(one.run) for one in evaluations if one.run is not None]
    keys = differing_keys(runs) if len(runs) == len(evaluations) else []
    names = list(columns or dict.fromkeys(name for one in evaluations for name in one.summary["metrics"]))
    rows = []
    for place, one in enumerate(evaluations):
        metrics = one.summary["metrics"]
        means = [figure(metrics[name]["mean"]) if name in metrics else "" for name in names]
        rows.append(
            [one.name, *(str(runs[place].settings.get(key, "")) for key in keys), str(one.summary["samples"]), *means]
        )
    return markdown_table(["evaluation", *keys, "samples", *names], rows)


def run_compare(folders: Sequence[Path], metrics: str | None = None, json_file: Path | None = None) -> str:
    """All evaluations against the first, as Markdown.

    Raises:
        UserError: where there are not two, or they cannot be paired.
    """
    evaluations = [one for folder in folders for one in find_evaluations(folder)]
    if len(evaluations) < 2:
        raise UserError("A comparison needs two evaluations or more; give the folders of both.")
    columns = [name.strip() for name in metrics.split(",")] if metrics else None
    first, *others = evaluations
    comparisons = [compare(first, other, columns) for other in others]
    parts = [told(comparison) for comparison in comparisons]
    if len(evaluations) > 2 or all(one.run is not None for one in evaluations):
        parts.insert(0, overview(evaluations, columns))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(json_file, json.dumps([as_json(comparison) for comparison in comparisons], indent=2) + "\n")
    return "\n\n".join(parts)


def as_json(comparison: Comparison) -> Mapping[str, Any]:
    return {
        "a": str(comparison.a.folder), "b": str(comparison.b.folder), "paired": comparison.paired,
        "unpaired": comparison.unpaired, "warnings": comparison.warnings,
        "differences": {one.column: asdict(one.found) | {"verdict": one.verdict} for one in comparison.differences},
    }  # fmt: skip
