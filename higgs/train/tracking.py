"""The records of a run: metrics.jsonl, samples, loss.png, the config with versions and git state, and Weights & Biases."""

import json
import platform
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from higgs.errors import UserError
from higgs.folders import read_records, write_aside, write_json, write_lines
from higgs.plots import save_curves
from higgs.versions import PROJECT, git, versions

METRICS = "metrics.jsonl"
PACKAGES = ("higgs", "torch", "torchaudio", "hydra-core", "safetensors", "tokenizers", "sentencepiece", "numpy")


@dataclass
class LoggerConfig:
    """Weights & Biases: `mode` is disabled, offline (files in run_dir/wandb for `wandb sync`) or online."""

    mode: str = "disabled"
    project: str = "higgs"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("disabled", "offline", "online"):
            raise UserError(f"logger.mode is '{self.mode}'; use disabled, offline or online.")


class Tracker:
    """Writes a run's records; lines after step `resumed_at` of an earlier start are taken out, for they come again."""

    def __init__(self, run: Path, name: str, config: LoggerConfig, settings: Mapping[str, Any], resumed_at: int = 0):
        self.path = run / METRICS
        write_lines(self.path, [row for row in read_records(self.path) if row["step"] <= resumed_at])
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = None if config.mode == "disabled" else start_wandb(run, name, config, settings)

    def log(self, row: Mapping[str, Any]) -> None:
        """One JSON object, flushed. `step` and `split` (train or valid) are part of it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({"step": row["step"], **flat(row, row["split"])})

    def samples(self, files: Sequence[Path], step: int) -> None:
        """Sounds and pictures that were written to the run's folder, shown in Weights & Biases too."""
        if self._wandb is None or not files:
            return
        import wandb

        # The step stays out of the key, so that the sound of one prompt can be followed over time.
        kinds = {".wav": wandb.Audio, ".png": wandb.Image}
        shown = {f"samples/{path.name.split('-', 2)[-1]}": kinds[path.suffix](str(path)) for path in files}
        self._wandb.log({"step": step, **shown})

    def close(self, picture: Path) -> None:
        """Ends the log and draws the losses."""
        self._file.close()
        draw_losses(read_records(self.path), picture)
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(run: Path, name: str, config: LoggerConfig, settings: Mapping[str, Any]) -> Any:
    """Begins the run in Weights & Biases, or goes on with the one that this folder began."""
    import wandb

    path = run / "wandb_id.txt"
    if not path.is_file():
        write_aside(path, secrets.token_hex(4))
    logged = wandb.init(
        project=config.project, entity=config.entity, name=name, tags=config.tags, mode=config.mode, dir=str(run),
        config=dict(settings), id=path.read_text(encoding="utf-8"), resume="allow",
    )  # fmt: skip
    # A step of its own: wandb's must grow, and after a kill some steps come again.
    logged.define_metric("step")
    logged.define_metric("*", step_metric="step")
    return logged


def draw_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss over the steps, training and validation."""
    curves = {}
    for split in ("train", "valid"):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split and row.get("loss") is not None]
        if points:
            curves[split] = tuple(zip(*points, strict=True))
    if curves:
        save_curves(path, curves, "step")


def flat(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """`{"codebook_loss": [a, b]}` -> `{"train/codebook_loss_0": a, …}`; entries of a dict have their key in that place."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list | dict):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            numbers |= {f"{prefix}/{name}_{place}": item for place, item in items}
        elif isinstance(value, int | float) and name != "step":
            numbers[f"{prefix}/{name}"] = value
    return numbers


def record_run(run: Path, settings: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """What this run is: config.yaml, environment.json (versions, machine, git state, command), and git.diff where the
    code differs from its commit."""
    write_aside(run / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    changes = git(PROJECT, "diff", "HEAD")
    write_json(
        run / "environment.json",
        {
            "overrides": list(overrides),
            "versions": {"python": platform.python_version(), **versions(PACKAGES)},
            "machine": {
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
            "git": {
                "commit": git(PROJECT, "rev-parse", "HEAD"),
                "changed": None if changes is None else bool(changes),
                "untracked": (git(PROJECT, "ls-files", "--others", "--exclude-standard") or "").splitlines(),
            },
            "command": sys.argv,
        },
    )
    if changes:
        (run / "git.diff").write_text(changes + "\n", encoding="utf-8")
