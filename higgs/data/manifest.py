"""Manifests: JSONL, for the language model one conversation a line, for the codec one clip a line.

    {"id", "messages", "start_index"?}                       `messages` as the processor takes them; serves inference too
    {"audio", "start"?, "duration"?, "kind"?, "id"?}         seconds of a sound file, speech, music or event

Audio paths are relative to the manifest. Every error is a UserError naming the file and the line.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from higgs.chat import ChatBuilder
from higgs.errors import UserError
from higgs.inputs import SOURCES

FIELDS = {"id", "messages", "start_index"}
CLIP_FIELDS = {"audio", "start", "duration", "kind", "id"}
KINDS = ("speech", "music", "event")


@dataclass(frozen=True)
class Sample:
    """One conversation; assistant turns from message `start_index` on are trained."""

    id: str
    messages: list[dict[str, Any]]
    start_index: int = 0

    def prompt(self) -> list[dict[str, Any]]:
        """The conversation up to its last assistant turn, for which a model is to be asked."""
        if self.messages[-1].get("role") != "assistant":
            raise UserError(f"Sample {self.id} must end with an assistant message, the one to be generated.")
        return self.messages[:-1]


@dataclass(frozen=True)
class SoundClip:
    """Part of a sound file: `duration` seconds from second `start` on (None: to its end)."""

    id: str
    audio: str
    start: float = 0.0
    duration: float | None = None
    kind: str | None = None


Entry = TypeVar("Entry", Sample, SoundClip)


def read_manifest(path: str | Path) -> list[Sample]:
    """All conversations of a manifest."""
    samples = _read_lines(Path(path), parse_sample)
    if not samples:
        raise UserError(f"The manifest {path} holds no conversation.")
    return samples


def read_clip_manifest(path: str | Path) -> list[SoundClip]:
    """All clips of a manifest for the codec. A clip without an id is called by its path, and its start if it has one."""
    clips = _read_lines(Path(path), parse_clip)
    if not clips:
        raise UserError(f"The manifest {path} holds no clip.")
    return clips


def _read_lines(path: Path, parse: Callable[[Any, str, Path], Entry]) -> list[Entry]:
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):  # a text may hold the other line separators
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = parse(parse_json(line, where), where, path.parent)
        if entry.id in lines:
            raise UserError(f"{where} has the id '{entry.id}' of line {lines[entry.id]}; ids must differ.")
        lines[entry.id] = number
        entries.append(entry)
    return entries


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Check the path.") from error


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error}).") from error


def parse_sample(entry: Any, where: str, folder: Path, name: str | None = None) -> Sample:
    """A sample from a manifest line, or, where a default `name` is given, from a bare list of messages too."""
    if name is not None and isinstance(entry, list):
        entry = {"messages": entry}
    if not isinstance(entry, dict) or "messages" not in entry:
        raise UserError(f'{where} must be an object with "id" and "messages".')
    _check_fields(entry, FIELDS, where)
    if "id" not in entry and name is None:
        raise UserError(f'{where} lacks an "id".')
    try:
        chat = ChatBuilder().build(entry["messages"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for slot in chat.audio:
        given = [name for name in SOURCES if slot.item.get(name) is not None]
        if len(given) != 1:
            what = f"several ({', '.join(given)})" if given else "none"
            raise UserError(
                f"{where}: audio in message {slot.message} must hold one of {', '.join(SOURCES)}; it holds {what}."
            )
    start = entry.get("start_index", 0)
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start <= len(entry["messages"]):
        raise UserError(f"{where}: start_index is {start!r}; it must be the number of a message.")
    return Sample(str(entry.get("id", name)), absolute_audio(entry["messages"], folder), start)


def parse_clip(entry: Any, where: str, folder: Path) -> SoundClip:
    """A clip from a line of a codec's manifest."""
    if not isinstance(entry, dict) or not isinstance(entry.get("audio"), str) or not entry["audio"]:
        raise UserError(f'{where} must be an object with "audio", the path of a sound file.')
    _check_fields(entry, CLIP_FIELDS, where)
    for name in ("start", "duration"):
        value = entry.get(name, 0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise UserError(f"{where}: {name} is {value!r}; it must be a number of seconds, not negative.")
    if "duration" in entry and entry["duration"] == 0:
        raise UserError(f"{where}: duration is 0; leave it out to use the file to its end.")
    if entry.get("kind", KINDS[0]) not in KINDS:
        raise UserError(f"{where}: kind is {entry['kind']!r}; use one of {', '.join(KINDS)}, or leave it out.")
    if not isinstance(entry.get("id", ""), str | int) or entry.get("id") == "":
        raise UserError(f"{where}: id is {entry['id']!r}; it must be text.")
    name = entry["audio"] + (f"@{entry['start']:g}" if "start" in entry else "")
    return SoundClip(
        str(entry.get("id", name)),
        str(folder / entry["audio"]),
        float(entry.get("start", 0.0)),
        float(entry["duration"]) if "duration" in entry else None,
        entry.get("kind"),
    )


def _check_fields(entry: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(entry) - known)
    if unknown:
        raise UserError(f"{where} has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}.")


def absolute_audio(messages: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The messages with audio paths that are relative to `folder` resolved."""

    def item(value: Any) -> Any:
        if not isinstance(value, dict) or value.get("type") != "audio":
            return value
        moved = dict(value)
        for key in ("url", "path", "audio"):
            if isinstance(moved.get(key), str) and not re.match(r"\w+://|data:", moved[key]):
                moved[key] = str(folder / moved[key])
        return moved

    return [
        {**message, "content": [item(one) for one in message["content"]]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def texts_of(samples: Sequence[Sample]) -> list[str]:
    """Every text of the samples, roles included, in order: what a text tokenizer is trained on."""
    texts = ["system", "user", "assistant"]
    for sample in samples:
        for message in sample.messages:
            content = message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts += [item["text"] for item in items if item["type"] == "text"]
    return texts
