"""Chat templates in Jinja: the one that saved checkpoints carry, and rendering with a foreign one.

A checkpoint's template comes from whoever made the checkpoint, so it runs in Jinja's sandbox.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from higgs.chat import (
    AudioSlot,
    ChatBuilder,
    ChatRenderer,
    ChatTokens,
    Conversation,
    Modality,
    RenderedChat,
    check_conversation,
)
from higgs.errors import UserError

_TEXT = {"type": "text", "text": " First line,\nsecond line. "}
_MORE = {"type": "text", "text": "SPEAKER0:"}
_AUDIO = {"type": "audio", "url": "a.wav"}
_SYSTEM = {"role": "system", "content": [_TEXT]}
_TURNS = ({"role": "user", "content": [_TEXT, _MORE]}, {"role": "assistant", "content": [_AUDIO]})
# A template that renders all of these as ChatBuilder does follows the released chat format.
PROBES: tuple[list[dict[str, Any]], ...] = (
    [_SYSTEM],
    [{"role": "system", "content": " plain text "}, {"role": "user", "content": " plain text "}],
    [_SYSTEM, {"role": "scene", "content": " plain text "}, *_TURNS],
    *(
        [_SYSTEM, {"role": "scene", "content": content}, *_TURNS, *_TURNS]
        for content in (
            [_TEXT],
            [_AUDIO],
            [_TEXT, _MORE],
            [_TEXT, _AUDIO],
            [_AUDIO, _TEXT, _AUDIO],
            [_TEXT, _MORE, _AUDIO, _MORE, _AUDIO],
            [_TEXT, _MORE, _MORE, _AUDIO, _AUDIO, _MORE],
        )
    ),
)


def own_template(tokens: ChatTokens | None = None) -> str:
    """The text of `chat_template.jinja`, with other token names where `tokens` has others."""
    text = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")
    defaults, tokens = ChatTokens(), tokens or ChatTokens()
    for entry in fields(ChatTokens):
        if entry.name != "bos":  # the template takes it as a variable
            text = text.replace(getattr(defaults, entry.name), getattr(tokens, entry.name))
    return text


@dataclass(frozen=True)
class JinjaChat:
    """Renders conversations with any chat template; `names` are the tokenizer's bos_token, eos_token and pad_token."""

    template: str
    names: Mapping[str, str]

    def build(
        self, conversation: Conversation, add_generation_prompt: bool = False, modality: Modality = "audio"
    ) -> RenderedChat:
        """As `ChatBuilder.build`. What is a valid message is the template's business; its complaints and its defects
        arrive as UserError."""
        check_conversation(conversation)
        try:
            text = self._compiled.render(
                messages=conversation, add_generation_prompt=add_generation_prompt, modality=modality, **self.names
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"The chat template cannot render this conversation: {error}") from error
        audio = tuple(
            AudioSlot(item, index)
            for index, message in enumerate(conversation)
            for item in (message.get("content") or ())
            if isinstance(item, Mapping) and item.get("type") == "audio"
        )
        return RenderedChat(text, audio, len(conversation) > 1 and conversation[1]["role"] == "scene")

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # The settings that chat templates are written for.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"The chat template is not valid Jinja (line {error.lineno}): {error.message}") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=16)
def choose_renderer(template: str, tokens: ChatTokens, names: tuple[tuple[str, str], ...]) -> ChatRenderer:
    """ChatBuilder for a template that renders the probes alike (it can do more, and explains its errors), else the
    template itself. UserError if the template is not valid Jinja."""
    builder, jinja = ChatBuilder(tokens), JinjaChat(template, dict(names))
    assert jinja._compiled is not None  # a syntax error is reported now, not at the first conversation
    for probe in PROBES:
        for prompt in (False, True):
            try:
                rendered = jinja.build(probe, prompt)
            except UserError:
                return jinja
            if rendered.text != builder.build(probe, prompt).text:
                return jinja
    return builder
