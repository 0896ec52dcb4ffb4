"""Conversation -> rendered text with audio slots (SPEC 4), as the released chat template renders it.

    <|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n{system}{scene}<|eot_id|>
    then per message <|start_header_id|>{role}<|end_header_id|>\\n\\n{content}<|eot_id|>

A conversation is a list of messages `{"role": ..., "content": text | [items]}`; items are `{"type": "text", "text":
...}` and `{"type": "audio", ...}`. The rules live here once; `chat_template.jinja` says the same for other programs.
Beyond the released template: assistant text, also mixed with audio in order. K codebooks, T tokens.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from higgs.delay import delayed_length
from higgs.errors import UserError

ROLES = ("system", "scene", "user", "assistant")
Modality = Literal["audio", "text"]
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTokens:
    """The control tokens by name; ids are the text tokenizer's business."""

    bos: str = "<|begin_of_text|>"
    start_header: str = "<|start_header_id|>"
    end_header: str = "<|end_header_id|>"
    end_of_turn: str = "<|eot_id|>"
    end_of_message: str = "<|eom_id|>"  # never rendered here; the original ends messages with it inside one turn
    audio_bos: str = "<|audio_out_bos|>"
    audio: str = "<|AUDIO_OUT|>"
    audio_eos: str = "<|audio_eos|>"
    delay: str = "<|reserved_special_token_6|>"
    scene_start: str = "<|scene_desc_start|>"
    scene_end: str = "<|scene_desc_end|>"

    @property
    def audio_slot(self) -> str:
        return self.audio_bos + self.audio + self.audio_eos

    def header(self, role: str) -> str:
        return f"{self.start_header}{role}{self.end_header}\n\n"


@dataclass(frozen=True)
class Item:
    """One piece of content: `text`, or `audio` (the item as the user gave it)."""

    text: str | None = None
    audio: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Message:
    role: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class AudioSlot:
    """The audio behind one placeholder: the user's item and the index of its message in the conversation."""

    item: Mapping[str, Any]
    message: int


@dataclass(frozen=True)
class RenderedChat:
    """Rendered text; `audio[i]` belongs to its i-th audio placeholder. `has_scene`: message 1 is a scene message,
    which shares the system message's turn."""

    text: str
    audio: tuple[AudioSlot, ...]
    has_scene: bool


class ChatRenderer(Protocol):
    def build(
        self, conversation: Conversation, add_generation_prompt: bool = False, modality: Modality = "audio"
    ) -> RenderedChat: ...


@dataclass(frozen=True)
class ChatBuilder:
    """Renders conversations; needs no tokenizer and no checkpoint."""

    tokens: ChatTokens = field(default_factory=ChatTokens)

    def render(
        self, conversation: Conversation, add_generation_prompt: bool = False, modality: Modality = "audio"
    ) -> str:
        return self.build(conversation, add_generation_prompt, modality).text

    def build(
        self, conversation: Conversation, add_generation_prompt: bool = False, modality: Modality = "audio"
    ) -> RenderedChat:
        """Render a conversation. The generation prompt opens an assistant turn, and with `modality="audio"` the audio
        in it; with "text" the model decides what to write. UserError names the message at fault."""
        messages = self.parse(conversation)
        tokens, rest = self.tokens, messages[1:]
        has_scene = bool(rest) and rest[0].role == "scene"
        text = tokens.bos + tokens.header("system") + self._join(messages[0].items)
        if has_scene:
            text += f"\n\n{tokens.scene_start}\n{self._scene(rest[0].items)}\n{tokens.scene_end}"
            rest = rest[1:]
        text += tokens.end_of_turn
        for message in rest:
            text += tokens.header(message.role) + self._join(message.items) + tokens.end_of_turn
        if add_generation_prompt:
            if modality not in ("audio", "text"):
                raise UserError(f"modality must be 'audio' or 'text', not {modality!r}.")
            text += tokens.header("assistant") + (tokens.audio_bos if modality == "audio" else "")
        audio = tuple(
            AudioSlot(item.audio, index)
            for index, message in enumerate(messages)
            for item in message.items
            if item.audio is not None
        )
        return RenderedChat(text, audio, has_scene)

    def parse(self, conversation: Conversation) -> list[Message]:
        """Check a conversation and bring every content to a list of items with stripped texts."""
        check_conversation(conversation)
        return [self._message(index, message) for index, message in enumerate(conversation)]

    def _message(self, index: int, message: Mapping[str, Any]) -> Message:
        role = message["role"]
        where = f"Message {index} ({role})"
        if role not in ROLES:
            raise UserError(f"Message {index} has the role {role!r}; use one of {', '.join(ROLES)}.")
        if (role == "system") != (index == 0):
            if index == 0:
                raise UserError(f"{where} comes first; begin the conversation with a message of role 'system'.")
            raise UserError(f"{where} is not the first message; put all instructions into message 0.")
        if role == "scene" and index != 1:
            raise UserError(f"{where} must come directly after the system message; move it to place 1.")
        items = tuple(self._items(where, message.get("content")))
        if role == "system" and len(items) > 1:
            raise UserError(f"{where} holds {len(items)} items, but the chat format keeps one; join them.")
        if role in ("system", "user") and any(item.audio is not None for item in items):
            raise UserError(
                f"{where} holds audio, which this model reads in scene and assistant messages only; give a reference "
                "voice there."
            )
        return Message(role, items)

    def _items(self, where: str, content: Any) -> Iterator[Item]:
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or not content:
            raise UserError(f"{where} has no content; give a text, or a list of text and audio items.")
        for place, item in enumerate(content):
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "audio":
                yield Item(audio=item)
            elif kind == "text":
                yield Item(text=self._text(f"{where}, item {place},", item.get("text")))
            else:
                given = f"the type {kind!r}" if isinstance(item, Mapping) else f"{type(item).__name__} for an item"
                raise UserError(
                    f"{where}, item {place}, has {given}; use {{'type': 'text', 'text': ...}} or "
                    "{'type': 'audio', 'url': ...}."
                )

    def _text(self, where: str, text: Any) -> str:
        if not isinstance(text, str):
            raise UserError(f"{where} has no text; give {{'type': 'text', 'text': ...}} with a string.")
        # Scene tags may stand in a system text (the original's own prompts do that); any other control token would
        # open a turn or an audio slot that the conversation does not have.
        for token in (getattr(self.tokens, entry.name) for entry in fields(self.tokens)):
            if token and token in text and token not in (self.tokens.scene_start, self.tokens.scene_end):
                raise UserError(f"{where} contains the control token {token}; take it out of the text.")
        return text.strip()

    def _join(self, items: Sequence[Item]) -> str:
        return "".join(self.tokens.audio_slot if item.text is None else item.text for item in items)

    def _scene(self, items: Sequence[Item]) -> str:
        """The first text, a blank line, then a line per text, where audio continues the line of the text before it."""
        text, last = "", len(items) - 1
        for place, item in enumerate(items):
            if item.text is None:
                text += f" {self.tokens.audio_slot}" + ("\n" if place < last else "")
            elif place == last:
                text += item.text
            elif place == 0:
                text += item.text + "\n\n"
            else:
                text += item.text + ("\n" if items[place + 1].audio is None else "")
        return text


def check_conversation(conversation: Any) -> None:
    """The shape that every chat format shares: a list of messages, each a mapping with a role."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        raise UserError(f"A conversation is a list of messages, not {type(conversation).__name__}.")
    if not conversation:
        raise UserError("The conversation is empty; begin it with a message of role 'system'.")
    for index, message in enumerate(conversation):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"Message {index} is not of the form {{'role': ..., 'content': ...}}; write it so.")


def expand_audio(text: str, num_frames: Sequence[int], num_codebooks: int, tokens: ChatTokens) -> str:
    """Replace the i-th audio placeholder by one token per delayed frame of a clip of `num_frames[i]` codec frames; the
    last K - 1 of them, where codebooks run out one by one, are delay tokens. UserError if the counts differ."""
    found = text.count(tokens.audio)
    if found != len(num_frames):
        raise UserError(
            f"The text has {found} audio placeholders ({tokens.audio}) but {len(num_frames)} clips were given; "
            "give one clip per placeholder, in order."
        )
    counts = iter(delayed_length(length, num_codebooks) for length in num_frames)
    tail = num_codebooks - 1
    return re.sub(re.escape(tokens.audio), lambda _: tokens.audio * (next(counts) - tail) + tokens.delay * tail, text)
