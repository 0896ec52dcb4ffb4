"""A run that is killed, asked to leave, or damaged goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_cases as cases

from higgs.errors import UserError

STEPS = 10
MORE = ["max_steps=10", "save_every=3", "optim.ema_decay=0.9", "data.workers=0"]
# What happens beside the steps must not change them.
BESIDE = ["valid_every=4", "sample_every=3", "sample_count=1", "generation=sample", "generation.max_new_tokens=10"]


@pytest.fixture(scope="module")
def whole(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    cases.finish(cases.start(cases.arguments(run, *parts, *MORE)))
    return run


def test_killed_at_any_step_it_goes_on_bit_for_bit(whole: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = cases.arguments(run, *parts, *MORE, *BESIDE, f"data.valid={parts[0]}")
    for step in (1, 5, 8):  # before the first checkpoint, and between others
        cases.kill_at(step, run, overrides)
    said = cases.finish(cases.start(overrides))
    assert "resumed after step" in said
    assert cases.losses(run) == cases.losses(whole)
    assert [row["step"] for row in cases.records(run) if row["split"] == "valid"] == [4, 8, 10]
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (run / "export" / name).read_bytes() == (whole / "export" / name).read_bytes()


def test_workers_and_packing_change_nothing_in_that(parts: tuple[Path, Path], tmp_path: Path) -> None:
    more = [*MORE, "data.layout=pack", "data.row_length=128", "data.batch_size=2", "accumulate=2", "max_steps=6"]
    cases.finish(cases.start(cases.arguments(tmp_path / "a", *parts, *more)))
    overrides = cases.arguments(tmp_path / "b", *parts, *more, "data.workers=2")
    cases.kill_at(4, tmp_path / "b", overrides)
    cases.finish(cases.start(overrides))
    assert cases.losses(tmp_path / "b") == cases.losses(tmp_path / "a")


def test_sigterm_saves_and_exits_0(whole: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = cases.arguments(tmp_path, *parts, *MORE, "save_every=null")
    started = cases.start(overrides)
    cases.wait_for_step(tmp_path, 2, started)
    started[0].send_signal(signal.SIGTERM)
    said = cases.finish(started, code=0)
    saved = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert len(saved) == 1 and "SIGTERM" in said
    step = int(saved[0].removeprefix("step-"))
    assert 2 <= step < STEPS and max(cases.log(tmp_path)) == step
    assert not (tmp_path / "export").exists()
    cases.finish(cases.start(overrides))
    assert cases.losses(tmp_path) == cases.losses(whole)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The finished run, to be damaged."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def again(copied: Path, parts: tuple[Path, Path], *more: str) -> None:
    cases.run_here(cases.arguments(copied, *parts, *MORE, *more))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-120] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize("file", ["tensors/*.safetensors", "checkpoint.json", "rng-00000.safetensors"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    copied: Path, whole: Path, parts: tuple[Path, Path], harm, file: str, capfd: pytest.CaptureFixture
) -> None:
    harm(next(cases.newest(copied).glob(file)))
    again(copied, parts)
    said = capfd.readouterr()
    assert "damaged" in said.err and cases.newest(whole).name in said.err
    assert "resumed after step 9" in said.out
    assert cases.losses(copied) == cases.losses(whole)


def test_only_damaged_checkpoints_are_an_error(copied: Path, parts: tuple[Path, Path]) -> None:
    for folder in (copied / "checkpoints").iterdir():
        (folder / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match="is whole"):
        again(copied, parts)


def test_the_last_checkpoints_and_the_milestones_stay(parts: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = ["max_steps=10", "save_every=4", "keep_checkpoints=1", "milestone_every=3"]
    cases.run_here(cases.arguments(tmp_path, *parts, *overrides))
    assert [int(path.name[5:]) for path in sorted((tmp_path / "checkpoints").iterdir())] == [3, 6, 9, 10]


def test_a_given_checkpoint_is_gone_on_from(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Those of later steps belong to another history from then on: they are set aside, and `auto` goes on with the new."""
    arguments = cases.arguments(tmp_path, *parts, *MORE, "keep_checkpoints=3")
    cases.run_here(arguments)
    before = cases.losses(tmp_path)
    cases.run_here(
        [*arguments, f"resume={tmp_path}/checkpoints/step-00000006", "max_steps=8", "optim.lr=0.01", "save_every=1"]
    )
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["old-step-00000009", "old-step-00000010", "step-00000006", "step-00000007", "step-00000008"]
    after = cases.losses(tmp_path)
    assert max(after) == 8 and all(after[step] == before[step] for step in range(1, 7)) and after[8] != before[8]
    cases.run_here([*arguments, "max_steps=9", "optim.lr=0.01"])
    assert cases.losses(tmp_path)[8] == after[8]
    with pytest.raises(UserError, match="no whole checkpoint"):
        cases.run_here([*arguments, f"resume={tmp_path}/tokens"])


def test_a_folder_belongs_to_one_model(copied: Path, parts: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="begun with other settings of model"):
        again(copied, parts, "model.config.hidden_size=64")
    with pytest.raises(UserError, match="resume=never"):
        again(copied, parts, "resume=never")
    processor = (copied / "processor" / "audio_tokenizer" / "model.safetensors").stat().st_mtime_ns
    for more in ("seed=1", "codec_warmup.lr=0.5", "codec.config.codebook_dim=16"):
        with pytest.raises(UserError, match="begun with other settings of"):
            again(copied, parts, more, "max_steps=12")
    assert (copied / "processor" / "audio_tokenizer" / "model.safetensors").stat().st_mtime_ns == processor


def test_more_steps_go_on_from_the_end(copied: Path, parts: tuple[Path, Path]) -> None:
    again(copied, parts, "max_steps=12", "optim.schedule=wsd")
    assert sorted(cases.log(copied)) == list(range(1, 13))


def poison(parts: tuple[Path, Path], run: Path, monkeypatch: pytest.MonkeyPatch, steps: set[int], **settings) -> None:
    """A run whose gradient is not a number at the given steps."""
    from higgs.train.lm import LanguageModelTask

    plain = LanguageModelTask._combine
    state = {"step": -1}

    def train_step(self, batch, step, plain=LanguageModelTask.train_step):
        state["step"] = step
        return plain(self, batch, step)

    monkeypatch.setattr(LanguageModelTask, "train_step", train_step)
    monkeypatch.setattr(
        LanguageModelTask,
        "_combine",
        lambda self, *sums: plain(self, *sums) * (float("nan") if state["step"] in steps else 1.0),
    )
    cases.run_here(cases.arguments(run, *parts, "max_steps=8", *(f"{k}={v}" for k, v in settings.items())))


def test_a_loss_that_is_not_finite_skips_the_step_and_is_counted(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(parts, tmp_path, monkeypatch, {2, 5, 6})
    rows = cases.log(tmp_path)
    assert [rows[step]["loss"] is None for step in range(1, 9)] == [s in (3, 6, 7) for s in range(1, 9)]
    assert rows[8]["skipped"] == 3
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    record = json.loads((cases.newest(tmp_path) / "checkpoint.json").read_text())
    assert record["scalars"]["task"]["updates"] == 5


def test_several_in_a_row_stop_the_run_and_name_the_batch(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"3 steps in a row .*sample-\d\d"):
        poison(parts, tmp_path, monkeypatch, {3, 4, 5, 6}, max_nonfinite=3)


def test_a_sweep_under_torchrun_is_refused() -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "train.py", "-m", "seed=0,1"],
        cwd=cases.PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: torchrun") and len(done.stderr.splitlines()) == 1


def test_sigterm_before_the_first_step_leaves_with_0(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """While the codec is trained, say: what is there is found again, the rest is made anew."""
    manifest = cases.PROJECT / "examples" / "speech" / "manifest.jsonl"
    overrides = [
        *cases.TINY,
        f"run_dir={tmp_path}/run",
        f"data.train={manifest}",
        "codec_warmup.autoencoder_steps=9999",
    ]
    started = cases.start(overrides)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / ".lock").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    started[0].send_signal(signal.SIGTERM)
    cases.finish(started, code=0)
    assert not (tmp_path / "run" / "processor").exists()


def test_sigterm_ends_a_sweep(parts: tuple[Path, Path], tmp_path: Path) -> None:
    started = cases.start(["-m", *cases.arguments(tmp_path, *parts, "max_steps=100000", "seed=1,2")])
    cases.wait_for_step(tmp_path / "seed=1", 1, started)
    started[0].send_signal(signal.SIGTERM)
    cases.finish(started, code=0)
    assert not (tmp_path / "seed=2").exists() and list((tmp_path / "seed=1" / "checkpoints").glob("step-*"))


def test_one_run_at_a_time_in_a_folder(parts: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = cases.arguments(tmp_path, *parts, "max_steps=100000")
    first = cases.start(overrides)
    cases.wait_for_step(tmp_path, 1, first)
    second = cases.start(overrides)
    _, err = second[0].communicate(timeout=120)
    first[0].kill()
    first[0].communicate()
    assert second[0].returncode == 2 and "Another process trains in" in err


def test_a_start_that_failed_does_not_bind_the_folder(parts: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="codec_path"):
        cases.run_here([*cases.TINY, f"run_dir={run}", f"data.train={parts[0]}", "codec_warmup=null"])
    other = tmp_path / "other"
    cases.write_codec(other, seed=1)
    with pytest.raises(UserError, match="multiple of 3"):  # found out when the other codec has been taken over
        cases.run_here(cases.arguments(run, parts[0], other, "accumulate=3"))
    cases.run_here(cases.arguments(run, *parts, "max_steps=1"))
    weights = "audio_tokenizer/model.safetensors"
    assert (run / "export" / weights).read_bytes() == (run / "processor" / weights).read_bytes()
    assert (run / "export" / weights).read_bytes() == (parts[1] / "model.safetensors").read_bytes()


def test_validation_data_may_change(copied: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    other = cases.write_manifest(tmp_path / "other.jsonl", count=5)
    again(copied, parts, f"data.valid={parts[0]}", "max_steps=11")
    again(copied, parts, f"data.valid={other}", "max_steps=12")
    assert [row["step"] for row in cases.records(copied) if row["split"] == "valid"] == [11, 12]
