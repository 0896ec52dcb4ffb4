"""The run around an evaluation: journal, failures, processes that die, folders that belong to one evaluation."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from higgs.errors import UserError
from higgs.eval.judges.base import Judge
from higgs.eval.pool import Row, ScoringPool
from higgs.eval.runner import JOURNAL, Made, attempt, claim, clean, each, evaluate


@dataclass
class Halve:
    """A job that fails on request, or takes its process with it."""

    number: int
    fate: str = ""

    def run(self, judges: dict[str, Judge]) -> Row:
        if self.fate == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        row: Row = {"error": None, "wer": self.number / 2}
        if self.fate == "fail":
            attempt(row, "cer", lambda: 1 / 0)
        return row


@dataclass
class Numbers:
    """A task that notes which batches it was asked for, and can be cut off."""

    fates: dict[int, str] = field(default_factory=dict)
    stop_at: int | None = None
    asked: list[int] = field(default_factory=list)

    def make(self, samples: Sequence[int], first: int) -> list[Made]:
        if first == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(first)
        made = [Made({"id": str(number), "error": None}) for number in samples]
        for number, one in zip(samples, made, strict=True):
            if self.fates.get(number) == "unreadable":
                one.row["error"] = "sound: unreadable"
            else:
                one.job = Halve(number, self.fates.get(number, ""))
        return made

    def complete(self, made: Sequence[Made]) -> None:
        for one in made:
            one.row["seed"] = 7


def run(out: Path, task: Numbers, processes: int = 0, **more: bool) -> list[Row]:
    out.mkdir(exist_ok=True)
    with ScoringPool({}, processes) as pool:
        return evaluate(out, list(range(10)), task, pool, 3, ["wer"], **more)


def test_rows_come_in_the_order_of_the_samples_whatever_the_processes(tmp_path: Path):
    rows = run(tmp_path / "a", Numbers())
    assert [row["id"] for row in rows] == [str(n) for n in range(10)] and rows[9]["wer"] == 4.5
    assert all(row["seed"] == 7 and row["error"] is None for row in rows)
    assert run(tmp_path / "b", Numbers(), processes=2) == rows
    assert (tmp_path / "a" / JOURNAL).read_bytes() == (tmp_path / "b" / JOURNAL).read_bytes()


def test_a_failure_is_a_row_and_costs_no_other_metric(tmp_path: Path):
    rows = run(tmp_path, Numbers({2: "unreadable", 5: "fail"}))
    assert rows[2] == {"id": "2", "error": "sound: unreadable", "seed": 7}
    assert rows[5]["wer"] == 2.5 and "cer: ZeroDivisionError" in rows[5]["error"]
    assert sum(row["error"] is not None for row in rows) == 2


def test_a_sample_that_kills_its_process_is_a_row(tmp_path: Path):
    rows = run(tmp_path, Numbers({4: "die"}), processes=2)
    assert "died" in rows[4]["error"] and [row["id"] for row in rows if row["error"]] == ["4"]
    assert [row.get("wer") for row in rows if row["id"] != "4"] == [n / 2 for n in range(10) if n != 4]


@pytest.mark.parametrize("stop_at", [0, 3, 9])
def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, stop_at: int):
    whole = run(tmp_path / "whole", Numbers())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Numbers(stop_at=stop_at))
    journal = tmp_path / "cut" / JOURNAL
    journal.write_text(journal.read_text() + '{"batch": 9, "ro')  # killed while it wrote
    done = {json.loads(line)["batch"] for line in journal.read_text().splitlines()[:-1]}
    task = Numbers()
    assert run(tmp_path / "cut", task) == whole
    assert task.asked == [3 * n for n in range(4) if n not in done]
    assert journal.read_bytes() == (tmp_path / "whole" / JOURNAL).read_bytes()
    again = Numbers()
    assert run(tmp_path / "cut", again) == whole and again.asked == []


def test_failed_samples_are_tried_again_where_that_is_asked(tmp_path: Path):
    run(tmp_path, Numbers({5: "fail"}))
    kept = Numbers()
    assert run(tmp_path, kept)[5]["error"] and kept.asked == []
    mended = Numbers()
    assert run(tmp_path, mended, retry_errors=True)[5]["error"] is None and mended.asked == [3]


def test_each_blames_the_guilty_alone():
    made = [Made({"error": None}) for _ in range(3)]

    def inverse(numbers: Sequence[int], first: int) -> list[float]:
        return [1 / number for number in numbers]

    assert each(inverse, [1, 2, 4], made, "x") == [1, 0.5, 0.25]
    assert each(inverse, [1, 0, 4], made, "x") == [1, None, 0.25]
    assert [one.row["error"] for one in made] == [None, "x: ZeroDivisionError: division by zero", None]


def test_a_row_holds_what_json_can_hold():
    row = clean({"wer": float("nan"), "pesq@1.5": float("inf"), "cer": 1 / 3, "text": "a", "words": 3})
    assert row == {"error": None, "wer": None, "pesq@1.5": None, "cer": 0.333333333, "text": "a", "words": 3}


def test_a_folder_belongs_to_one_evaluation(tmp_path: Path):
    claim(tmp_path / "new", {"seed": 0, "bandwidths": [1.0]})
    claim(tmp_path / "new", {"seed": 0, "bandwidths": [1.0]})
    with pytest.raises(UserError, match=r"seed \(0 there, 1 now\)"):
        claim(tmp_path / "new", {"seed": 1, "bandwidths": [1.0]})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        claim(tmp_path / "other", {"seed": 0})
