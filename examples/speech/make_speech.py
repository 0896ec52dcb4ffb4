"""Makes this folder: twelve short utterances in two voices of flite, as FLAC, and their manifest.

    apt-get install flite && python examples/speech/make_speech.py

flite (Carnegie Mellon University) and its voices are under a permissive, BSD-like licence; the sentences are our own.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import soundfile

HERE = Path(__file__).parent
VOICES = {"slt": "feminine", "awb": "masculine"}
SENTENCES = [
    "The sun rises in the east.",
    "Please close the door behind you.",
    "Seven birds sat on a wire.",
    "I will call you tomorrow.",
    "Fresh bread smells wonderful.",
    "How far is the station?",
    "Rain is falling on the roof.",
    "She sings in the morning.",
    "We found an old map.",
    "Turn left at the bridge.",
    "My coffee is getting cold.",
    "That was a good idea!",
]


def speak(text: str, voice: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", wav], check=True)
        samples, rate = soundfile.read(wav, dtype="int16")
    soundfile.write(path, samples, rate, subtype="PCM_16")


def conversation(text: str, voice: str, file: str) -> list[dict]:
    scene = ["Audio is recorded from a quiet room.", f"SPEAKER0: {VOICES[voice]}"]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]},
        {"role": "scene", "content": [{"type": "text", "text": line} for line in scene]},
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "audio", "url": file}]},
    ]


def main() -> None:
    lines = []
    for number, text in enumerate(SENTENCES):
        voice = list(VOICES)[number % 2]
        name = f"{voice}_{number:02d}"
        speak(text, voice, HERE / f"{name}.flac")
        lines.append(json.dumps({"id": name, "messages": conversation(text, voice, f"{name}.flac")}) + "\n")
    (HERE / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
