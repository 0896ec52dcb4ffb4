"""Loading and saving take little more memory than the weights; measured in processes of their own (bench/loading.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench" / "loading.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Runs one task of the benchmark on a checkpoint of 300 MB in shards of 64 MB."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"

    def run(task: str) -> dict[str, float]:
        command = [sys.executable, str(BENCH), "--task", task, "--folder", str(folder)]
        command += ["--gigabytes", "0.3", "--shard-megabytes", "64"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    run("create")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 250e6
    return run


@pytest.mark.parametrize("task", ["load", "load bfloat16"])
def test_loading_peaks_near_the_weights_in_the_dtype_asked_for(measure, task: str):
    result = measure(task)
    assert 0.9 < result["peak"] / result["bytes"] < 1.2, result


def test_saving_adds_little_to_the_weights(measure):
    result = measure("save")
    assert result["peak"] / result["bytes"] < 0.2, result


def test_loading_does_not_import_the_compiler(measure, tmp_path):
    """PyTorch imports it for random fills on the meta device; that took longer than loading itself."""
    code = (
        "import sys, torch\n"
        "from higgs import HiggsAudioV2ForConditionalGeneration as Model\n"
        f"Model.from_pretrained({str(tmp_path)!r})\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    from decoder_cases import make_ours

    make_ours().save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BENCH.parent.parent)
