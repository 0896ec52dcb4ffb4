"""Manifests: JSONL, one conversation a line, `{"id", "messages", "start_index"?}`.

`messages` are as the processor takes them; audio paths are relative to the manifest. The same reader serves inference.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs.chat import ChatBuilder
from higgs.errors import UserError

FIELDS = {"id", "messages", "start_index"}


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


def read_manifest(path: str | Path) -> list[Sample]:
    """All samples of a manifest. Every error is a UserError naming the file and the line."""
    path = Path(path)
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        sample = parse_sample(parse_json(line, where), where, path.parent)
        if sample.id in lines:
            raise UserError(f"{where} has the id '{sample.id}' of line {lines[sample.id]}; ids must differ.")
        lines[sample.id] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"The manifest {path} holds no conversation.")
    return samples


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
    unknown = sorted(set(entry) - FIELDS)
    if unknown:
        raise UserError(f"{where} has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(FIELDS))}.")
    if "id" not in entry and name is None:
        raise UserError(f'{where} lacks an "id".')
    try:
        ChatBuilder().build(entry["messages"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    start = entry.get("start_index", 0)
    if not isinstance(start, int) or not 0 <= start <= len(entry["messages"]):
        raise UserError(f"{where}: start_index is {start!r}; it must be the number of a message.")
    return Sample(str(entry.get("id", name)), absolute_audio(entry["messages"], folder), start)


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
