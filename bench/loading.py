"""Loading and saving a large random checkpoint: seconds beside a plain read or write of the same bytes, and peak memory.

    python bench/loading.py                          # 2 GB in shards of 512 MB, float32
    python bench/loading.py --gigabytes 0.3 --shard-megabytes 64 --folder /tmp/random

Every task runs in a process of its own, cold: the files are dropped from the page cache first (posix_fadvise). Peak
memory is the high-water mark of resident memory (VmHWM, file pages included) above what the process held after its
imports and one tiny load; the ratio divides it by the bytes of the weights in the dtype asked for.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TASKS = ("create", "read", "load", "load bfloat16", "write", "save")
BLOCK = 2**23
# Hidden size and depth of the decoder that is made: most tensors are of 4 to 64 MB, the embeddings larger.
HIDDEN, INNER, VOCABULARY = 1024, 4096, 32000


def make_model(gigabytes: float):
    """A random decoder whose float32 weights take about `gigabytes`."""
    import torch

    from higgs import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    scale = 1 if gigabytes > 1 else 4
    hidden, inner, vocabulary = HIDDEN // scale, INNER // scale, VOCABULARY // scale
    per_layer = 4 * hidden * hidden + 6 * hidden * inner
    fixed = (vocabulary + 2 * 8 * 1026) * hidden
    layers = max(1, round((gigabytes * 1e9 / 4 - fixed) / per_layer))
    config = HiggsAudioV2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, head_dim=hidden // 8, codebook_size=1026,
        pad_token_id=vocabulary - 1, audio_token_id=vocabulary - 2, audio_delay_token_id=vocabulary - 3,
        audio_bos_token_id=vocabulary - 4, eos_token_id=vocabulary - 5,
    )  # fmt: skip
    torch.manual_seed(0)
    return HiggsAudioV2ForConditionalGeneration(config)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process in bytes; Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, and the bytes by which resident memory peaked above its level before."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return {"seconds": seconds, "peak": resident("VmHWM") - before}


def plain_read(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.read(BLOCK):
                pass


def plain_write(folder: Path, total: int) -> None:
    block = os.urandom(BLOCK)
    with open(folder / "plain", "wb", buffering=0) as handle:
        for _ in range(total // BLOCK):
            handle.write(block)


def run_task(task: str, folder: Path, gigabytes: float, shard_bytes: int) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    from higgs import HiggsAudioV2ForConditionalGeneration as Model

    torch.set_num_threads(1)
    if task == "create":
        make_model(gigabytes).save_pretrained(folder, shard_bytes)
        return {"seconds": 0.0, "peak": 0.0}
    files = weights(folder)
    total = sum(file.stat().st_size for file in files)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # Once in small, so that what Python imports on first use is not counted.
        small = make_model(0.0)
        small.save_pretrained(Path(scratch) / "small")
        Model.from_pretrained(Path(scratch) / "small", dtype="bfloat16")
        if task == "save":
            model = Model.from_pretrained(folder)
        drop_from_cache(files)
        work: dict[str, Callable[[], object]] = {
            "read": lambda: plain_read(files),
            "write": lambda: plain_write(Path(scratch), total),
            "load": lambda: Model.from_pretrained(folder),
            "load bfloat16": lambda: Model.from_pretrained(folder, dtype=torch.bfloat16),
            "save": lambda: model.save_pretrained(Path(scratch) / "saved", shard_bytes),
        }
        return {**measured(work[task]), "bytes": total / (2 if task == "load bfloat16" else 1)}


def in_own_process(task: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", task, "--folder", str(folder)]
    command += ["--gigabytes", str(args.gigabytes), "--shard-megabytes", str(args.shard_megabytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-megabytes", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is made (removed afterwards)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, default=None, help="one measurement on the folder, as JSON")
    args = parser.parse_args()
    shard_bytes = args.shard_megabytes * 2**20
    if args.task:
        print(json.dumps(run_task(args.task, args.folder, args.gigabytes, shard_bytes)))
        return
    home = Path(tempfile.mkdtemp(dir=args.folder))
    folder = home / "checkpoint"
    try:
        in_own_process("create", args, folder)
        total = sum(file.stat().st_size for file in weights(folder))
        print(f"{total / 1e9:.2f} GB in {len(weights(folder))} files, cold page cache, best of {args.repeats}\n")
        print("| task | seconds | GB/s | plain read or write, seconds | ratio | peak memory / weights |")
        print("|---|---|---|---|---|---|")
        for task, plain in (("load", "read"), ("load bfloat16", "read"), ("save", "write")):
            # The two by turns, because these machines are noisy.
            runs = [
                (in_own_process(plain, args, folder), in_own_process(task, args, folder)) for _ in range(args.repeats)
            ]
            floor = min(run[0]["seconds"] for run in runs)
            seconds = min(run[1]["seconds"] for run in runs)
            peak = max(run[1]["peak"] / run[1]["bytes"] for run in runs) + (1 if task == "save" else 0)
            print(
                f"| {task} | {seconds:.2f} | {total / 1e9 / seconds:.2f} | {floor:.2f} | {seconds / floor:.2f} | {peak:.2f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
