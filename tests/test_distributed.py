"""Several processes (gloo, on the CPU) train what one process trains."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train_cases as cases

from higgs import HiggsAudioV2ForConditionalGeneration
from higgs.errors import UserError

STEPS = 6
SEEN = ["valid_every=3", "sample_every=3", "sample_count=1", "generation.max_new_tokens=12"]  # beside the steps
MORE = [f"max_steps={STEPS}", "save_every=3", "keep_checkpoints=5", "optim.ema_decay=0.9"]


@pytest.fixture(scope="module")
def alone(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    cases.run_here(cases.arguments(run, *parts, *MORE, f"data.valid={parts[0]}"))
    return run


def together(run: Path, parts: tuple[Path, Path], processes: int, strategy: str, *more: str) -> Path:
    overrides = cases.arguments(run, *parts, *MORE, f"parallel.strategy={strategy}", *more)
    cases.finish(cases.start(overrides, processes, cases.free_port()))
    return run


def assert_close(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = cases.losses(a), cases.losses(b)
    assert ours.keys() == theirs.keys()
    for step, row in ours.items():
        np.testing.assert_allclose(row, theirs[step], rtol=tolerance, err_msg=f"step {step}")


@pytest.fixture(scope="module")
def ddp(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torchrun starts it."""
    run = tmp_path_factory.mktemp("ddp") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "train.py"]
    overrides = cases.arguments(run, *parts, *MORE, "parallel.strategy=ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *overrides], cwd=cases.PROJECT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def fsdp(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return together(tmp_path_factory.mktemp("fsdp") / "run", parts, 2, "fsdp", f"data.valid={parts[0]}", *SEEN)


def test_two_ranks_train_what_one_trains(alone: Path, ddp: Path, fsdp: Path) -> None:
    assert_close(ddp, alone)
    assert_close(fsdp, alone)


def test_counts_and_validation_are_global(alone: Path, ddp: Path, fsdp: Path) -> None:
    for run in (ddp, fsdp):
        assert cases.log(run)[STEPS]["samples_seen"] == cases.log(alone)[STEPS]["samples_seen"] == 4 * STEPS
    valid = [
        [row for row in cases.records(run) if row["split"] == "valid" and row["step"] == STEPS] for run in (alone, fsdp)
    ]
    assert valid[0][0]["loss"] == pytest.approx(valid[1][0]["loss"], rel=1e-5)


def test_a_single_sharded_process_exports_the_averages(alone: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Also ddp alone: the command of a run on several ranks works on one."""
    for strategy in ("fsdp", "ddp"):
        cases.run_here(cases.arguments(tmp_path / strategy, *parts, *MORE, f"parallel.strategy={strategy}"))
        assert_close(tmp_path / strategy, alone)
        ours, theirs = (
            HiggsAudioV2ForConditionalGeneration.from_pretrained(run / "export", use_text_head=True).state_dict()
            for run in (tmp_path / strategy, alone)
        )
        for name, tensor in ours.items():
            np.testing.assert_allclose(tensor.numpy(), theirs[name].numpy(), atol=1e-5, err_msg=name)


def test_tied_tables_are_not_sharded(parts: tuple[Path, Path], tmp_path: Path) -> None:
    more = cases.arguments(tmp_path, *parts, "parallel.strategy=fsdp", "+model.config.tie_word_embeddings=true")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        cases.run_here(more)


def test_the_export_is_whole(alone: Path, fsdp: Path) -> None:
    ours, theirs = (
        HiggsAudioV2ForConditionalGeneration.from_pretrained(run / "export", use_text_head=True).state_dict()
        for run in (alone, fsdp)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor.numpy(), theirs[name].numpy(), atol=2e-5, err_msg=name)


def test_two_ranks_killed_go_on_bit_for_bit(ddp: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = cases.arguments(tmp_path, *parts, *MORE, "parallel.strategy=ddp")
    cases.kill_at(4, tmp_path, overrides, 2, cases.free_port())
    assert "resumed after step 3" in cases.finish(cases.start(overrides, 2, cases.free_port()))
    assert cases.losses(tmp_path) == cases.losses(ddp)


def test_two_sharded_ranks_killed_go_on_bit_for_bit(fsdp: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = cases.arguments(tmp_path, *parts, *MORE, "parallel.strategy=fsdp")
    cases.kill_at(5, tmp_path, overrides, 2, cases.free_port())
    cases.finish(cases.start(overrides, 2, cases.free_port()))
    assert cases.losses(tmp_path) == cases.losses(fsdp)


@pytest.mark.parametrize(("processes", "more"), [(1, []), (4, []), (4, ["parallel.replicate=2"])])
def test_two_sharded_ranks_resume_on_others(
    fsdp: Path, parts: tuple[Path, Path], tmp_path: Path, processes: int, more: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fsdp, run)
    shutil.rmtree(cases.newest(run))
    together(run, parts, processes, "fsdp", *more)
    assert_close(run, fsdp)


def test_a_sharded_checkpoint_resumes_without_sharding(fsdp: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fsdp, run)
    shutil.rmtree(cases.newest(run))
    cases.run_here(cases.arguments(run, *parts, *MORE))
    assert_close(run, fsdp)


def test_packing_micro_batches_and_recomputation_change_nothing(parts: tuple[Path, Path], tmp_path: Path) -> None:
    packed = ["data.layout=pack", "data.row_length=128", "max_steps=3"]
    cases.run_here(cases.arguments(tmp_path / "one", *parts, *MORE, *packed))
    more = [*packed, "accumulate=2", "parallel.activation_checkpointing=full"]
    together(tmp_path / "two", parts, 2, "fsdp", *more)
    assert_close(tmp_path / "one", tmp_path / "two")


def test_sigterm_to_one_rank_saves_on_both(parts: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = cases.arguments(tmp_path, *parts, *MORE, "max_steps=100000", "parallel.strategy=ddp")
    started = cases.start(overrides, 2, cases.free_port())
    cases.wait_for_step(tmp_path, 2, started)
    started[1].send_signal(signal.SIGTERM)
    assert "SIGTERM" in cases.finish(started, code=0)
    assert int(cases.newest(tmp_path).name.removeprefix("step-")) == max(cases.log(tmp_path))


def test_several_processes_need_a_strategy(parts: tuple[Path, Path], tmp_path: Path) -> None:
    started = cases.start(cases.arguments(tmp_path, *parts, "max_steps=1"), 2, cases.free_port())
    assert "parallel.strategy" in cases.finish(started, code=2)


def test_a_batch_that_does_not_divide_is_an_error(parts: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = cases.arguments(tmp_path, *parts, "parallel.strategy=ddp", "data.batch_size=3")
    assert "multiple of 2" in cases.finish(cases.start(overrides, 2, cases.free_port()), code=2)
