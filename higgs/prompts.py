"""What to ask a model for: conversations composed from a text and voices, or read from a file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from higgs.data.manifest import Sample, parse_json, parse_sample, read_text
from higgs.errors import UserError
from higgs.transcript import normalize_transcript

ONE_VOICE = "Generate audio following instruction."
SEVERAL_VOICES = """You are an AI assistant designed to convert text into speech.
If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following text, using the specified voice.
If no speaker tag is present, select a suitable voice on your own."""
QUIET_ROOM = "Audio is recorded from a quiet room."


@dataclass
class Reference:
    """A voice to clone: its recording, what is said in it, and the speaker tag it stands for."""

    audio: str
    text: str | None = None
    speaker: str | None = None


def compose_conversation(
    text: str,
    scene: str | None = None,
    system: str | None = None,
    references: Sequence[Reference] = (),
    normalize: bool = False,
) -> list[dict[str, Any]]:
    """The conversation that text, scene, system and references describe, as the original's own script builds it.

    A reference with its text becomes a user/assistant turn pair; one without goes into the scene. A dialogue without
    references describes its speakers as feminine and masculine in turn.
    """
    text = normalize_transcript(text) if normalize else text
    tags = sorted(set(re.findall(r"\[(SPEAKER\d+)\]", text)))
    several = bool(tags) or len(references) > 1
    setting = [_text(scene or QUIET_ROOM)]
    turns = []
    for number, voice in enumerate(references):
        speaker = voice.speaker or (f"SPEAKER{number}" if several else None)
        if voice.text is None:
            setting += [_text(f"{speaker or 'SPEAKER0'}:"), {"type": "audio", "url": voice.audio}]
        else:
            spoken = f"[{speaker}] {voice.text}" if several else voice.text
            turns.append({"role": "user", "content": [_text(spoken)]})
            turns.append({"role": "assistant", "content": [{"type": "audio", "url": voice.audio}]})
    if tags and not references:
        kinds = ("feminine", "masculine")
        setting += [_text(f"{tag}: {kinds[i % 2]}") for i, tag in enumerate(tags)]
    system = system or (SEVERAL_VOICES if several else ONE_VOICE)
    return [
        {"role": "system", "content": [_text(system)]},
        {"role": "scene", "content": setting},
        *turns,
        {"role": "user", "content": [_text(text)]},
    ]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def read_conversations(path: str | Path) -> list[Sample]:
    """Conversations from YAML, JSON or JSONL: a list of messages, `{"id"?, "messages"}`, or a list of such.

    Audio paths are relative to the file. Raises UserError naming the file and, in JSONL, the line.
    """
    path = Path(path)
    content = read_text(path)
    if path.suffix == ".jsonl":
        lines = [
            (f"{path}, line {number}", line) for number, line in enumerate(content.splitlines(), 1) if line.strip()
        ]
        entries = [(where, parse_json(line, where)) for where, line in lines]
    else:
        try:
            value = parse_json(content, str(path)) if path.suffix == ".json" else yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
        many = isinstance(value, list) and value and not (isinstance(value[0], dict) and "role" in value[0])
        entries = [(f"{path}, entry {i}", one) for i, one in enumerate(value)] if many else [(str(path), value)]
    if not entries:
        raise UserError(f"{path} holds no conversation.")
    samples = [parse_sample(entry, where, path.parent, f"{i:03d}") for i, (where, entry) in enumerate(entries)]
    names = [sample.id for sample in samples]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has the id '{twice}' twice; every output file needs its own.")
    return samples
