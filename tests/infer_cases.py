"""A tiny checkpoint folder, and infer.py run as a user runs it, but inside the test's process."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from decoder_cases import chat_sizes, make_ours, tame_eos

from higgs import HiggsAudioV2Processor

PROJECT = Path(__file__).resolve().parent.parent


def make_checkpoint(folder: Path, processor: HiggsAudioV2Processor, seed: int = 5, **changes: object) -> Path:
    """A random decoder with its processor and codec; its speech ends by itself after one or two seconds."""
    model = make_ours(seed=seed, use_text_head=True, **{**chat_sizes(processor), **changes})
    tame_eos(model, 1.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """How a call of infer.py ended."""

    status: int
    out: str
    error: str


class Runner:
    """Calls infer.py in an empty working directory."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, checkpoint: Path
    ) -> None:
        self.folder, self.monkeypatch, self.capsys, self.checkpoint = folder, monkeypatch, capsys, checkpoint
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str, checkpoint: Path | str | None = "given") -> Outcome:
        if checkpoint is not None:
            where = self.checkpoint if checkpoint == "given" else checkpoint
            arguments = (f"checkpoint={where}", *arguments)
        self.monkeypatch.setattr(sys, "argv", ["infer.py", "device=cpu", *arguments])
        self.capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(PROJECT / "infer.py"), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *self.capsys.readouterr())

    def good(self, *arguments: str) -> Outcome:
        outcome = self(*arguments)
        assert outcome.status == 0, outcome.error
        return outcome

    def files(self) -> dict[str, bytes]:
        """Everything in the working directory, hidden files and folders too."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else b""
            for path in sorted(self.folder.rglob("*"))
        }
