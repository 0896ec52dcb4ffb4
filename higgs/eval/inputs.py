"""What is evaluated: utterances for speech (conversations, Seed-TTS lists), clips for a codec (folders, manifests)."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higgs.audio import FORMATS
from higgs.data.manifest import Sample, SoundClip, read_clip_manifest, read_text
from higgs.errors import UserError
from higgs.prompts import Reference, compose_conversation, read_conversations

KIND_OF_FOLDER = {"events": "event", "sound_events": "event", "sound_event": "event"}  # others are called as they are
SEED_TTS = (".lst", ".txt")


@dataclass(frozen=True)
class Utterance:
    """One text to be spoken.

    Attributes:
        text: what is to be said, with its `[SPEAKERn]` tags where it is a dialogue.
        prompt: the conversation that asks a model for it.
        voices: the recording (an audio item of a conversation) of each voice that is asked for, by its speaker tag; ""
            where there is none.
        reference: a recording of this very text, where there is one.
    """

    id: str
    text: str
    prompt: list[dict[str, Any]]
    voices: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: Mapping[str, Any] | None = None


def read_utterances(path: str | Path) -> list[Utterance]:
    """The utterances of a file: conversations (.jsonl, .json, .yaml), or a Seed-TTS-eval list (.lst, .txt).

    Raises:
        UserError: naming the file and the line, where it cannot be read.
    """
    path = Path(path)
    if path.suffix in SEED_TTS:
        return read_seed_tts(path)
    return [utterance_of(sample) for sample in read_conversations(path)]


def read_seed_tts(path: Path) -> list[Utterance]:
    """Lines of `name|prompt text|prompt audio|text`, with a fifth field where the text's own recording is known. Audio is
    relative to the file."""
    utterances: dict[str, Utterance] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) not in (4, 5) or not all(parts[:4]):
            raise UserError(
                f"{path}, line {number} is no line of a Seed-TTS list; write name|prompt text|prompt audio|text, and as a "
                "fifth field, if it exists, the recording of the text."
            )
        name, said, recording, text = parts[:4]
        if name in utterances:
            raise UserError(f"{path}, line {number} has the name '{name}' a second time; names must differ.")
        voice = str(path.parent / recording)
        reference = {"type": "audio", "path": str(path.parent / parts[4])} if len(parts) == 5 and parts[4] else None
        prompt = compose_conversation(text, references=[Reference(voice, said)])
        utterances[name] = Utterance(name, text, prompt, {"": {"type": "audio", "path": voice}}, reference)
    if not utterances:
        raise UserError(f"{path} holds no line.")
    return list(utterances.values())


def utterance_of(sample: Sample) -> Utterance:
    """The last user turn of a conversation is what is spoken; a last assistant turn is its recording, audio before it the
    voices."""
    answered = sample.messages[-1].get("role") == "assistant"
    prompt = sample.prompt() if answered else sample.messages
    if not prompt or prompt[-1].get("role") != "user":
        raise UserError(
            f"Sample {sample.id} must ask for its speech in a user message, before an assistant message or last."
        )
    recordings = sounds(sample.messages[-1]) if answered else []
    voices: dict[str, Mapping[str, Any]] = {}
    tag = ""
    for message in prompt[:-1]:
        if message.get("role") == "user":
            tag = ""  # of this turn; the answer below is its voice
        for item in items(message):
            if item.get("type") == "text":
                found = re.findall(r"\bSPEAKER\d+\b", item["text"])
                tag = found[-1] if found else tag
            elif message.get("role") in ("assistant", "scene"):
                voices.setdefault(tag, item)
    text = "\n".join(item["text"] for item in items(prompt[-1]) if item.get("type") == "text").strip()
    if not text:
        raise UserError(f"Sample {sample.id} asks for no text: its last user message holds none.")
    return Utterance(sample.id, text, list(prompt), voices, recordings[0] if recordings else None)


def items(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def sounds(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [item for item in items(message) if item.get("type") == "audio"]


def read_clips(path: str | Path) -> list[SoundClip]:
    """The clips of a codec's manifest (.jsonl), or every sound file of a folder and the folders in it.

    The name of the folder that a file lies in, directly below `path`, is its kind: `speech`, `music`, `events`, ….

    Raises:
        UserError: where there is no sound file, or the manifest cannot be read.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_clip_manifest(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a manifest (.jsonl). Check the path.")
    files = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in FORMATS and not name.startswith(".")
    )
    if not files:
        raise UserError(f"There is no sound file ({', '.join(FORMATS)}) in {path} or the folders in it.")
    relative = [file.relative_to(path) for file in files]
    names = [place.with_suffix("").as_posix() for place in relative]
    if len(set(names)) < len(names):  # a.wav beside a.flac
        names = [place.as_posix() for place in relative]
    folders = [place.parts[0] if len(place.parts) > 1 else None for place in relative]
    return [
        SoundClip(name, str(file), kind=KIND_OF_FOLDER.get(folder, folder))
        for name, file, folder in zip(names, files, folders, strict=True)
    ]


def find_recordings(folder: str | Path, utterances: list[Utterance]) -> dict[str, Path]:
    """The sound file of each utterance that has one, `FOLDER/ID.wav` (or .flac, .ogg, .mp3).

    Raises:
        UserError: where the folder does not exist or holds no recording of any of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}. Give the folder of the sound files, each called by its sample's id."
        )
    found = {}
    for utterance in utterances:
        places = [folder / f"{name}{suffix}" for name in (utterance.id, file_name(utterance.id)) for suffix in FORMATS]
        place = next((place for place in places if place.is_file()), None)
        if place is not None:
            found[utterance.id] = place
    if not found:
        raise UserError(
            f"{folder} holds no recording of any sample; files must be called by the ids, such as {utterances[0].id}.wav."
        )
    return found


def file_name(name: str) -> str:
    """An id as a relative path: what cannot stand in the name of a file or folder is percent-encoded."""
    return "/".join(re.sub(r"[^\w. -]|^\.", encoded, part) or encoded("/") for part in name.split("/"))


def encoded(character: str | re.Match) -> str:
    text = character if isinstance(character, str) else character.group()
    return "".join(f"%{byte:02X}" for byte in text.encode())
