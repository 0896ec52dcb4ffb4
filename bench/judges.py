"""How far the judges that need no download can be trusted: python bench/judges.py

Word errors of the recogniser on flite's voices and on LJ Speech, and how well the speaker embedding tells the six speakers
of the Free Spoken Digit Dataset apart. Needs flite and the real audio ($HIGGS_SHARED_DATA, else ../shared/data).
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from higgs import cli
from higgs.audio import load_audio
from higgs.eval.command import CONFIGS
from higgs.eval.judges.base import Recognizer, SpeakerEmbedder
from higgs.eval.judges.separation import separation
from higgs.eval.statistics import ratio_of_sums
from higgs.eval.words import word_errors

PROJECT = Path(__file__).resolve().parents[1]
VOICES = ("slt", "awb", "rms", "kal16")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recognizer", default="pocketsphinx", help="an option of configs/eval/recognizer")
    parser.add_argument("--speaker", default="dvector", help="an option of configs/eval/speaker")
    parser.add_argument("--sentences", type=int, default=40, help="spoken by each of flite's voices")
    options = parser.parse_args()
    data = Path(os.environ.get("HIGGS_SHARED_DATA") or PROJECT.parent / "shared" / "data")
    overrides = [f"recognizer={options.recognizer}", f"speaker={options.speaker}", "data=none", "audio=none"]
    config = cli.compose("tts", overrides, CONFIGS)
    hear(cli.build(config.recognizer), data, options.sentences)
    tell_apart(cli.build(config.speaker), data)


def hear(recognizer: Recognizer, data: Path, sentences: int) -> None:
    print(f"| {options_of(recognizer)} | clips | words | word error rate | 95 % interval |\n|---|---|---|---|---|")
    texts = (data / "text" / "ljspeech-sentences.txt").read_text(encoding="utf-8").splitlines()
    texts = [text for text in texts if 40 <= len(text) <= 90][:: max(1, len(texts) // (3 * sentences))][:sentences]
    with tempfile.TemporaryDirectory() as folder:
        for voice in VOICES:
            clips = []
            for text in texts:
                path = Path(folder) / "said.wav"
                subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)
                clips.append(load_audio(path, recognizer.sample_rate))
            line(f"flite {voice}", recognizer, texts, clips)
    pairs = [
        one.split("\t") for one in (data / "ljspeech" / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    ]
    clips = [load_audio(data / "ljspeech" / name, recognizer.sample_rate) for name, _ in pairs]
    line("LJ Speech", recognizer, [text for _, text in pairs], clips)


def line(name: str, recognizer: Recognizer, texts: list[str], clips: list[Tensor]) -> None:
    heard = recognizer.transcribe(clips)
    errors = [word_errors(text, one.text) for text, one in zip(texts, heard, strict=True)]
    rate = ratio_of_sums([one.count for one in errors], [one.length for one in errors])
    words = sum(one.length for one in errors)
    print(f"| {name} | {len(texts)} | {words} | {rate.value:.1%} | {rate.low:.1%} to {rate.high:.1%} |", flush=True)


def tell_apart(speaker: SpeakerEmbedder, data: Path) -> None:
    print(f"\n| {options_of(speaker)} | clips | seconds each | equal error rate | AUC | one voice | two voices |")
    print("|---|---|---|---|---|---|---|")
    singles = {
        name: [load_audio(data / "fsdd" / f"{digit}_{name}_{take}.wav", speaker.sample_rate) for take in range(5) for digit in range(10)]
        for name in SPEAKERS
    }  # fmt: skip
    for count in (1, 2, 5):
        joined = [
            (name, torch.cat(clips[n : n + count])) for name, clips in singles.items() for n in range(0, 50, count)
        ]
        found = separation(speaker.embed([clip for _, clip in joined]), [name for name, _ in joined])
        seconds = sum(len(clip) for _, clip in joined) / len(joined) / speaker.sample_rate
        print(
            f"| fsdd, {count} digit{'s' if count > 1 else ''} | {len(joined)} | {seconds:.2f} | {found.eer:.1%} | "
            f"{found.auc:.3f} | {found.same:.3f} | {found.different:.3f} |", flush=True
        )  # fmt: skip


def options_of(judge: Recognizer | SpeakerEmbedder) -> str:
    return str(judge.describe()["name"])


if __name__ == "__main__":
    main()
