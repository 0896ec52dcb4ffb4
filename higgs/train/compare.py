"""`higgs compare runs/*`: final metrics of several runs beside the keys in which they differ, and their curves."""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from higgs.errors import UserError
from higgs.folders import read_json, read_records
from higgs.plots import save_curves
from higgs.tables import markdown_table
from higgs.train.tracking import METRICS

COLUMNS = ("loss", "text_loss", "audio_loss", "code_accuracy", "mel_loss", "tokens_per_s", "mfu")
SKIPPED = ("name", "run_dir")  # they differ by nature
LAST = 20  # training steps whose median counts as the final value: single steps are noisy


@dataclass
class Run:
    """A run's folder, its settings as dotted keys, its overrides, and its log by split."""

    folder: Path
    settings: dict[str, Any]
    overridden: set[str]
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        return self.train[-1]["step"] if self.train else 0


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="final metrics of runs beside the keys in which they differ, and their curves",
        description="Prints a table of final metrics (the median of the last twenty steps, the last validation) against the "
        "keys that the runs override or in which they differ, best first, and draws their losses.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, such as runs/sweep_dualffn/*")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), help="picture of the curves (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    folders = [folder for folder in arguments.runs if is_run(folder)]
    for other in sorted(set(arguments.runs) - set(folders)):
        print(f"left out: {other} is no run (no {METRICS} and config.yaml in it)", file=sys.stderr)
    if not folders:
        raise UserError(
            "None of the given paths is the folder of a run that train.py wrote; give some, such as runs/*."
        )
    runs = [read_run(folder) for folder in folders]
    print(table(runs))
    if shared := shared_overrides(runs):
        print(f"\nall: {shared}")
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    save_curves(arguments.plot, curves(runs), "step")
    print(f"\ncurves: {arguments.plot}")


def is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() and (folder / "config.yaml").is_file()


def read_run(folder: Path) -> Run:
    rows = read_records(folder / METRICS)
    settings = dotted(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    environment = folder / "environment.json"
    overrides = read_json(environment)["overrides"] if environment.is_file() else []
    keys = {text.partition("=")[0].lstrip("+~") for text in overrides}
    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "valid")}
    return Run(folder, settings, keys, split["train"], split["valid"])


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` -> `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differing_keys(runs: Sequence[Run]) -> list[str]:
    every = {key for one in runs for key in one.settings}
    differ = {key for key in every if len({repr(one.settings.get(key)) for one in runs}) > 1}
    return sorted(differ - set(SKIPPED))


def shared_overrides(runs: Sequence[Run]) -> str:
    """What was overridden alike in all runs, as `key=value, …`."""
    keys = {key for one in runs for key in one.overridden} & set(runs[0].settings)
    return ", ".join(
        f"{key}={runs[0].settings[key]}" for key in sorted(keys - set(differing_keys(runs)) - set(SKIPPED))
    )


def final_metrics(one: Run) -> dict[str, float]:
    """The median of the last training steps, and the last validation."""
    found = {}
    for column in COLUMNS:
        values = [row[column] for row in one.train[-LAST:] if isinstance(row.get(column), int | float)]
        if values:
            found[column] = statistics.median(values)
    if one.valid:
        last = one.valid[-1]
        found |= {f"valid_{key}": last[key] for key in COLUMNS if isinstance(last.get(key), int | float)}
    return found


def table(runs: Sequence[Run]) -> str:
    """A Markdown table, best validation (else training) loss first."""
    keys, finals = differing_keys(runs), [final_metrics(one) for one in runs]
    columns = [
        c for prefix in ("valid_", "") for c in (prefix + name for name in COLUMNS) if any(c in f for f in finals)
    ]
    ranked = sorted(zip(runs, finals, strict=True), key=lambda pair: rank_of(pair[1]))
    rows = []
    for one, final in ranked:
        metrics = [f"{final[column]:.4g}" if column in final else "" for column in columns]
        rows.append([one.name, *(str(one.settings.get(key, "")) for key in keys), str(one.steps), *metrics])
    return markdown_table(["run", *keys, "steps", *columns], rows)


def rank_of(final: Mapping[str, float]) -> float:
    return final.get("valid_loss", final.get("loss", float("inf")))


def curves(runs: Sequence[Run]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """The training loss of every run, and its validation loss where there is one."""
    drawn: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for one in runs:
        for rows, label in ((one.train, one.name), (one.valid, f"{one.name}, validation")):
            points = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
            if points:
                drawn[label] = tuple(zip(*points, strict=True))
    if not drawn:
        raise UserError("None of the runs has a loss in its log yet.")
    return drawn
