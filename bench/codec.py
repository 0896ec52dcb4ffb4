"""Codec speed: this project, batched with lengths, against transformers, clip by clip as its processor does.

    python bench/codec.py [--clips 8] [--seconds 4] [--threads 2] [--sizes debug mini release] [--device cuda]

Both run the same random weights on the same clips (of --seconds, and shorter ones down to half of that) in one run,
turn by turn, and the best of --rounds counts. The table gives seconds of audio per second of computing.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf

from higgs.codec import Codec

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "codec"


def build(size: str, device: str) -> tuple[Codec, torch.nn.Module]:
    """This project's codec and transformers', with equal random weights."""
    ours = instantiate(OmegaConf.load(CONFIGS / f"{size}.yaml"))
    ours.init_weights(torch.Generator().manual_seed(0))
    config = transformers.HiggsAudioV2TokenizerConfig(**ours.config.to_dict())
    theirs = transformers.HiggsAudioV2TokenizerModel(config)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval().to(device), theirs.eval().to(device)


def seconds_of(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: str) -> str:
    chip = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        chip = names[0].partition(":")[2].strip() if names else chip
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{chip}, {torch.get_num_threads()} threads{gpu}; {versions}; fp32"


@torch.inference_mode()
def measure(size: str, num_clips: int, seconds: float, rounds: int, device: str) -> list[str]:
    """Rows of the table for one size."""
    ours, theirs = build(size, device)
    generator = torch.Generator().manual_seed(0)
    longest = int(seconds * ours.sample_rate)
    lengths = [longest - longest * i // (2 * num_clips) for i in range(num_clips)]
    batch = 0.1 * torch.randn(num_clips, 1, longest, generator=generator).to(device)
    clips = [batch[row : row + 1, :, :length] for row, length in enumerate(lengths)]
    fit = ours.fit_codebooks(batch[:2], iterations=2, generator=generator)
    assert int(fit.min()) > 1
    theirs.load_state_dict(ours.state_dict())
    encoded = ours.encode(batch, lengths=torch.tensor(lengths))
    codes = [encoded.audio_codes[row : row + 1, :, :frames] for row, frames in enumerate(encoded.lengths.tolist())]
    agree = [(theirs.encode(clip).audio_codes == mine).float().mean() for clip, mine in zip(clips, codes, strict=True)]

    rows = []
    for task, mine, reference in (
        (
            "encode",
            lambda: ours.encode(batch, lengths=torch.tensor(lengths)),
            lambda: [theirs.encode(c) for c in clips],
        ),
        (
            "decode",
            lambda: ours.decode(encoded.audio_codes, lengths=encoded.lengths),
            lambda: [theirs.decode(c) for c in codes],
        ),
    ):
        times = [(seconds_of(mine, device), seconds_of(reference, device)) for _ in range(rounds)]
        fast, slow = (sum(lengths) / ours.sample_rate / min(column) for column in zip(*times, strict=True))
        rows.append(f"| {size} | {task} | {num_clips} | {fast:.1f} | {slow:.1f} | {fast / slow:.2f}× |")
    print(f"{size}: {float(torch.stack(agree).mean()):.2%} of the codes equal", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["debug", "mini", "release"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for size in arguments.sizes:
        rows += measure(size, arguments.clips, arguments.seconds, arguments.rounds, arguments.device)
    print(f"\n{machine(arguments.device)}; clips of {arguments.seconds / 2:g} to {arguments.seconds:g} s\n")
    print("| size | task | clips | higgs, s of audio per s | transformers, s of audio per s | ratio |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
