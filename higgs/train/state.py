"""Checkpoints of a run: written aside and renamed, verified when read, by any number of ranks.

    run_dir/checkpoints/step-00000020/
        tensors/*.safetensors      every tensor, in the pieces that the ranks hold (torch.distributed.checkpoint)
        rng-00000.safetensors      the random state of each rank
        checkpoint.json            the step, the rest of the state, and size and SHA-256 of every file

Tensors go through DCP's safetensors storage, not its default one, whose metadata is a pickle.
"""

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from higgs.checksums import fault, mark_of
from higgs.data.draws import random_generator
from higgs.errors import UserError
from higgs.folders import read_json, write_json
from higgs.train.distributed import World

RECORD = "checkpoint.json"
TENSORS = "tensors"


@dataclass
class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and those of every `milestone_every`-th step for good."""

    folder: Path
    world: World
    keep: int = 2
    milestone_every: int | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> Path:
        """Writes the state after `step` steps; all ranks call this. The folder appears when it is whole."""
        final, aside = self.folder / name_of(step), self.folder / f".{name_of(step)}.part"
        if self.world.main:
            for unfinished in self.folder.glob(".step-*.part"):  # of a run that was killed while it saved
                shutil.rmtree(unfinished)
            (aside / TENSORS).mkdir(parents=True)
        self.world.barrier()
        writer = HuggingFaceStorageWriter(str(aside / TENSORS), save_distributed=True)
        with quiet():
            dcp.save({name: t.detach() for name, t in tensors.items()}, storage_writer=writer, no_dist=self._alone)
        save_file(random_state(self.world.device), aside / f"rng-{self.world.rank:05d}.safetensors")
        self.world.barrier()
        files = self._digests(aside)
        if self.world.main:
            record = {"step": step, "ranks": self.world.size, "torch": torch.__version__, "files": files}
            record["scalars"] = dict(scalars)
            write_json(aside / RECORD, {**record, "sha256": own_digest(record)})
            if final.exists():  # the same step again, after falling back from a damaged checkpoint
                shutil.rmtree(final)
            aside.rename(final)
            self._prune()
        self.world.barrier()
        return final

    def restore(self, tensors: Mapping[str, Tensor], only: Path | None = None) -> tuple[int, dict[str, Any]] | None:
        """Fills `tensors` in place from the newest checkpoint that is whole (or from `only`) and sets this rank's random
        state; returns the step and the scalars, or None where there is no checkpoint.

        A damaged one is reported and the one before is taken. Those of later steps, damaged or of a history that is left
        here, are renamed to `old-step-…`. Raises UserError where all are damaged, or where the checkpoint is of another
        model.
        """
        candidates = [only] if only is not None else self.all()[::-1]
        for folder in candidates:
            damage = self._damage(folder)
            if damage is None:
                step, scalars = self._load(folder, tensors)
                self._set_aside_after(step)
                return step, scalars
            if self.world.main:
                print(f"warning: the checkpoint {folder} is damaged ({damage}).", file=sys.stderr)
        if only is not None:
            raise UserError(f"{only} is no whole checkpoint. Give the path of a folder step-… in a run's checkpoints/.")
        if candidates:
            raise UserError(
                f"No checkpoint in {self.folder} is whole. Copy one back, or delete the folder to start from nothing."
            )
        return None

    def _set_aside_after(self, step: int) -> None:
        if self.world.main:
            for path in self.all():
                if int(path.name.removeprefix("step-")) > step:
                    old = path.with_name(f"old-{path.name}")
                    shutil.rmtree(old, ignore_errors=True)
                    path.rename(old)
                    print(f"warning: {path} is of a later step than {step}; it is now {old.name}.", file=sys.stderr)
        self.world.barrier()

    def all(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    @property
    def _alone(self) -> bool:
        return self.world.size == 1

    def _prune(self) -> None:
        for path in self.all()[: -self.keep]:
            step = int(path.name.removeprefix("step-"))
            if not self.milestone_every or step % self.milestone_every:
                shutil.rmtree(path)

    def _digests(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file; each rank reads its share."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = {str(path.relative_to(folder)): mark_of(path) for path in paths[self.world.rank :: self.world.size]}
        return {name: entry for part in self.world.gather_json(mine) for name, entry in part.items()}

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same answer on every rank; None where nothing is."""
        try:
            record = read_json(folder / RECORD)
            files = record["files"]
            if record.pop("sha256") != own_digest(record):
                raise UserError("it was altered")
            mine = sorted(files)[self.world.rank :: self.world.size]
            found = next((f"{name} {what}" for name in mine if (what := fault(folder / name, files[name]))), None)
        except (UserError, KeyError, TypeError) as error:
            found = f"{RECORD} cannot be used: {error}"
        return next((what for what in self.world.gather_json(found) if what is not None), None)

    def _load(self, folder: Path, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
        reader = HuggingFaceStorageReader(str(folder / TENSORS))
        stored = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"The checkpoint {folder} is of another model: {name} is {list(stored.get(name, ())) or 'not there'}, "
                    f"here it is {list(wanted.get(name, ())) or 'not there'}. Use the config of that run, or give "
                    "another run_dir."
                )
        with quiet():
            dcp.load({name: t.detach() for name, t in tensors.items()}, storage_reader=reader, no_dist=self._alone)
        record = read_json(folder / RECORD)
        own = folder / f"rng-{self.world.rank:05d}.safetensors"
        if record["ranks"] == self.world.size and own.is_file():
            set_random_state(load_file(own), self.world.device)
        else:  # other ranks than those that saved: a stream of its own for each
            torch.manual_seed(random_generator("resumed", record["step"], self.world.rank).initial_seed())
        return record["step"], record["scalars"]


@contextmanager
def quiet() -> Iterator[None]:
    """Without DCP's remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def own_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
