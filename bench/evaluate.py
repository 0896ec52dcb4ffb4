"""How long evaluation takes: python bench/evaluate.py

A hundred clips of five seconds (two sentences of examples/speech, spoken by flite), with every metric of tier one: as
speech with voices and references, and through an untrained codec at four bandwidths. Once with each of `--processes`.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from higgs import cli
from higgs.audio import load_audio, resample, save_audio
from higgs.checkpoint.io import save_codec
from higgs.eval.codec import CodecEvaluation, evaluate_codec
from higgs.eval.command import CONFIGS
from higgs.eval.tts import SpeechEvaluation, evaluate_tts

PROJECT = Path(__file__).resolve().parents[1]
VOICES = ("slt", "awb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--codec", help="folder of a trained codec; else an untrained one of configs/codec/debug.yaml")
    parser.add_argument("--tasks", nargs="+", default=["codec", "tts"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_speech(work / "speech", options.clips, options.seconds)
        codec = options.codec or write_codec(work / "codec")
        print("| task | clips | audio, s | processes | seconds | audio s per s | against the first |")
        print("|---|---|---|---|---|---|---|")
        for task in options.tasks:
            first = None
            for processes in options.processes:
                started = time.perf_counter()
                out = str(work / f"{task}-{processes}")
                if task == "codec":
                    evaluate(task, [f"codec={codec}", f"data={work / 'speech' / 'spoken'}"], out, processes)
                else:
                    evaluate(
                        task,
                        [f"audio={work / 'speech' / 'spoken'}", f"data={work / 'speech' / 'list.jsonl'}"],
                        out,
                        processes,
                    )
                took = time.perf_counter() - started
                first = first or took
                audio = options.clips * options.seconds
                print(
                    f"| {task} | {options.clips} | {audio:.0f} | {processes} | {took:.1f} | {audio / took:.1f} | "
                    f"{first / took:.2f} |", flush=True
                )  # fmt: skip


def evaluate(task: str, overrides: list[str], out: str, processes: int) -> None:
    overrides = [*overrides, f"output={out}", f"processes={processes}", "device=cpu"]
    config = cli.compose(task, overrides, CONFIGS)
    if task == "codec":
        evaluate_codec(cli.to_dataclass(CodecEvaluation, config), cli.build(config.speaker), {})
    else:
        typed = cli.to_dataclass(SpeechEvaluation, config)
        evaluate_tts(typed, cli.build(config.recognizer), cli.build(config.speaker), {})


def write_speech(folder: Path, clips: int, seconds: float) -> None:
    """Recordings, their texts, and for each a voice and a reference recording, all of `seconds`."""
    lines = (PROJECT / "examples" / "speech" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["messages"][2]["content"][0]["text"] for line in lines]
    pairs = itertools.cycle(itertools.permutations(texts, 2))
    manifest, system = [], {"role": "system", "content": "Generate audio following instruction."}
    for number, (one, other) in zip(range(clips), pairs, strict=False):
        text, voice = f"{one} {other}", VOICES[number % 2]
        path = folder / "spoken" / f"{number:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)
        wave = resample(load_audio(path, 16000), 16000, 24000)
        wave = torch.nn.functional.pad(wave, (0, max(0, round(24000 * seconds) - len(wave))))[: round(24000 * seconds)]
        save_audio(path, wave, 24000)
        turn = [
            {"role": "user", "content": one},
            {"role": "assistant", "content": [{"type": "audio", "url": "spoken/000.wav"}]},
        ]
        asked = {"role": "user", "content": text}
        answer = {"role": "assistant", "content": [{"type": "audio", "url": f"spoken/{number:03d}.wav"}]}
        manifest.append(json.dumps({"id": f"{number:03d}", "messages": [system, *turn, asked, answer]}))
    (folder / "list.jsonl").write_text("\n".join(manifest) + "\n", encoding="utf-8")


def write_codec(folder: Path) -> Path:
    """An untrained codec of configs/codec/debug.yaml: how it sounds does not matter for the time."""
    codec = cli.build(cli.compose("train", []).codec)
    generator = torch.Generator().manual_seed(0)
    codec.init_weights(generator)
    for stage in codec.quantizer.quantizers:
        book = stage.codebook
        book.assign_(torch.randn(book.embed.shape, generator=generator), torch.ones(len(book.embed)))
    save_codec(codec, folder)
    return folder


if __name__ == "__main__":
    main()
