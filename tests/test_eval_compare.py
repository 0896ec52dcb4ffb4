"""`higgs evaluate compare`: pairs, verdicts, warnings, and the runs of a sweep."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from higgs.errors import UserError
from higgs.eval.compare import compare, find_evaluations, read_evaluation, run_compare
from higgs.eval.statistics import paired
from higgs.eval.summary import rows_to_parquet, summarize
from higgs.folders import write_json


def write_evaluation(folder: Path, errors: np.ndarray, names: list[str] | None = None, **settings: object) -> Path:
    """An evaluation of one-hundred-word texts with these numbers of wrong words."""
    names = names or [f"s{number:02d}" for number in range(len(errors))]
    rows = [
        {
            "id": name, "kind": "speech", "seed": 0, "text": "a", "hypothesis": "b", "error": None, "wer": count / 100,
            "word_errors": int(count), "words": 100, "speaker_similarity": 0.5 + count / 1000, "seconds": 1.0,
        }
        for name, count in zip(names, errors, strict=True)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    rows_to_parquet(rows, folder / "rows.parquet")
    extra = {"settings": {"normalizer": "english", "weights": folder.name, **settings}, "versions": {"torch": "2.11.0"}}
    write_json(folder / "summary.json", summarize(rows, {**extra, "meter": {"recognizer": {"name": "pocketsphinx"}}}))
    return folder


@pytest.fixture
def errors() -> np.ndarray:
    return np.random.default_rng(0).integers(5, 30, size=40)


def test_a_better_system_is_told_so(tmp_path: Path, errors: np.ndarray):
    a = read_evaluation(write_evaluation(tmp_path / "a", errors))
    b = read_evaluation(write_evaluation(tmp_path / "b", errors - 3 + np.arange(40) % 3))
    found = compare(a, b)
    by_name = {one.column: one for one in found.differences}
    assert by_name["wer"].verdict == "better" and by_name["wer"].found.p < 0.001
    assert by_name["wer"].found.difference == pytest.approx(-0.02025, abs=1e-4)
    assert by_name["wer"].found.low < by_name["wer"].found.difference < by_name["wer"].found.high < 0
    assert by_name["speaker_similarity"].verdict == "worse"  # where higher is better
    assert by_name["seconds"].verdict == "no difference shown" and by_name["seconds"].found.p == 1
    assert compare(b, a).differences[0].verdict == "worse" and found.unpaired == 0 and found.warnings == []


def test_the_same_system_is_no_better(tmp_path: Path, errors: np.ndarray):
    noise = np.random.default_rng(1).integers(-2, 3, size=40)
    found = compare(
        *(read_evaluation(write_evaluation(tmp_path / n, e)) for n, e in (("a", errors), ("b", errors + noise)))
    )
    wer = found.differences[0].found
    assert found.differences[0].verdict == "no difference shown" and wer.low < 0 < wer.high
    assert wer == paired((errors / 100).tolist(), ((errors + noise) / 100).tolist())


def test_samples_are_paired_by_id(tmp_path: Path, errors: np.ndarray):
    names = [f"s{number:02d}" for number in range(40)]
    a = read_evaluation(write_evaluation(tmp_path / "a", errors, names))
    b = read_evaluation(write_evaluation(tmp_path / "b", errors[::-1][:39], names[::-1][:39]))
    found = compare(a, b)
    assert (found.paired, found.unpaired) == (39, 1) and found.differences[0].found.difference == 0
    c = read_evaluation(write_evaluation(tmp_path / "c", errors[:2], ["x", "y"]))
    with pytest.raises(UserError, match="no sample in common"):
        compare(a, c)
    with pytest.raises(UserError, match="no metric pesq"):
        compare(a, b, ["pesq"])


def test_what_makes_figures_incomparable_is_told(tmp_path: Path, errors: np.ndarray):
    a = write_evaluation(tmp_path / "a", errors, normalizer="english", recognizer={"name": "pocketsphinx"})
    b = write_evaluation(tmp_path / "b", errors, normalizer="basic", recognizer={"name": "whisper"})
    shown = run_compare([a, b])
    assert 'warning: normalizer differs: "english" and "basic".' in shown and "warning: recognizer differs" in shown
    assert "warning: weights" not in shown  # that is what is compared


def test_the_table_and_the_file_say_the_same(tmp_path: Path, errors: np.ndarray):
    a, b = write_evaluation(tmp_path / "a", errors), write_evaluation(tmp_path / "b", errors + 5)
    shown = run_compare([a, b], "wer", tmp_path / "out" / "compare.json")
    assert "| wer " in shown and "+0.05" in shown and "worse" in shown and "speaker_similarity" not in shown
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored[0]["differences"]["wer"]["difference"] == pytest.approx(0.05) and stored[0]["paired"] == 40


def test_runs_of_a_sweep_stand_beside_the_keys_in_which_they_differ(tmp_path: Path, errors: np.ndarray):
    for name, rate, more in (("lr_a", 1e-3, 0), ("lr_b", 3e-4, -4), ("lr_c", 1e-4, 6)):
        run = tmp_path / "sweep" / name
        write_evaluation(run / "evaluation", errors + more)
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "train", "loss": 1.0}) + "\n")
        (run / "config.yaml").write_text(yaml.safe_dump({"name": name, "optim": {"lr": rate}, "seed": 0}))
    for given in ([tmp_path / "sweep" / n for n in ("lr_a", "lr_b", "lr_c")], [tmp_path / "sweep"]):
        shown = run_compare(given)
        heading, _, first, second, third = shown.splitlines()[:5]
        assert "optim.lr" in heading and "seed" not in heading and "wer" in heading
        assert first.startswith("| lr_a") and "0.001" in first and "0.0003" in second and third.startswith("| lr_c")
        assert "better" in shown and "worse" in shown and shown.count("samples in both") == 2
    assert [one.name for one in find_evaluations(tmp_path / "sweep" / "lr_b")] == ["lr_b"]


def test_a_folder_without_an_evaluation_is_one_sentence(tmp_path: Path, errors: np.ndarray):
    with pytest.raises(UserError, match="no finished evaluation"):
        run_compare([tmp_path, tmp_path])
    with pytest.raises(UserError, match="two evaluations"):
        run_compare([write_evaluation(tmp_path / "a", errors)])
    (tmp_path / "a" / "rows.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="cannot be read"):
        find_evaluations(tmp_path / "a")


def test_the_command_prints_it(tmp_path: Path, errors: np.ndarray, capsys: pytest.CaptureFixture):
    from higgs.__main__ import main

    a, b = write_evaluation(tmp_path / "a", errors), write_evaluation(tmp_path / "b", errors)
    main(["evaluate", "compare", str(a), str(b)])
    shown = capsys.readouterr().out
    assert "40 samples in both" in shown and "no difference shown" in shown
