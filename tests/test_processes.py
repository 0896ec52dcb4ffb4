"""How a process ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import train_cases as cases

# What is alive at the very end says so when the interpreter is taken down.
WITNESS = """
import atexit, os, runpy, sys
from higgs.processes import leaving

class Witness:
    def __del__(self, write=os.write):
        write(1, b"torn down")

atexit.register(print, "registered")
kept = Witness()
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITNESS + script, *arguments]
    return subprocess.run(command, cwd=cases.PROJECT, capture_output=True, text=True, timeout=240)


def test_the_witness_sees_an_ordinary_end() -> None:
    done = run("print('written', end=' ')")
    assert (done.returncode, done.stdout) == (0, "written registered\ntorn down")


@pytest.mark.parametrize(
    ("end", "status"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(2)", 2), ("sys.exit(True)", 1)]
)
def test_leaving_keeps_status_and_output(end: str, status: int) -> None:
    done = run(f"with leaving():\n    print('written', end=' ')\n    {end}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "written registered\n", "")


def test_a_message_and_an_exception_go_their_usual_way() -> None:
    for end, said in (("sys.exit('no room')", "no room\n"), ("raise KeyError('gone')", "KeyError: 'gone'\n")):
        done = run(f"with leaving():\n    {end}")
        assert done.returncode == 1
        assert done.stderr.endswith(said)


def test_training_leaves_gloo_behind(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Its threads may not see the interpreter go: a finished rank was aborted by them, once in hundreds of runs."""
    script = "sys.argv = ['train.py', *sys.argv[1:]]\nrunpy.run_path('train.py', run_name='__main__')"
    done = run(script, *cases.arguments(tmp_path, *parts, "max_steps=1", "parallel.strategy=ddp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("registered\n")
    assert (tmp_path / "export").is_dir()


def test_a_mistake_still_ends_training_with_two(tmp_path: Path) -> None:
    done = run("sys.argv = ['train.py', 'no_such=1']\nrunpy.run_path('train.py', run_name='__main__')")
    assert (done.returncode, done.stdout) == (2, "registered\n")
    assert done.stderr.startswith("error: There is no config key 'no_such'")
