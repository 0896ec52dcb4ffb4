"""Which tokens and which codes are trained (SPEC 6).

Spans are found on token ids, by the control tokens alone, so that they hold for text rendered by any template.
T tokens, F delayed audio frames, K codebooks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from higgs.chat import ChatTokens
from higgs.text import TextTokenizer

IGNORE = -100


@dataclass(frozen=True)
class Span:
    """Tokens `start:stop` are the content of message `message` with the token that closes it."""

    start: int
    stop: int
    message: int


def assistant_spans(
    ids: Sequence[int],
    tokenizer: TextTokenizer,
    tokens: ChatTokens | None = None,
    start_index: int = 0,
    has_scene: bool | None = None,
) -> list[Span]:
    """The content of every closed assistant turn whose message index is at least `start_index`: from behind the
    header's blank line up to and including `<|eot_id|>` (or the original's `<|eom_id|>`).

    A turn left open (a generation prompt) is no message and gives no span. The index counts the messages of the
    conversation, system 0; a scene message is index 1 although it shares the system's turn. `has_scene` says whether
    there is one; None looks for a scene tag in the first turn.
    """
    tokens = tokens or ChatTokens()
    ids = [int(i) for i in ids]
    start_header, end_header = tokenizer.token_to_id(tokens.start_header), tokenizer.token_to_id(tokens.end_header)
    closing = {
        tokenizer.token_to_id(token)
        for token in (tokens.end_of_turn, tokens.end_of_message)
        if tokenizer.has_token(token)
    }
    headers = [place for place, token in enumerate(ids) if token == start_header]
    if has_scene is None:
        scene = tokenizer.token_to_id(tokens.scene_start) if tokenizer.has_token(tokens.scene_start) else None
        has_scene = scene in ids[: headers[1] if len(headers) > 1 else len(ids)]
    spans = []
    for turn, (header, following) in enumerate(zip(headers, [*headers[1:], len(ids)], strict=True)):
        message = turn + (has_scene and turn > 0)
        try:
            content = ids.index(end_header, header, following) + 1
        except ValueError:
            continue  # a header cut off at the end of the sequence
        if message < start_index or tokenizer.decode(ids[header + 1 : content - 1]).strip() != "assistant":
            continue
        content += _blank_line(ids[content : content + 3], tokenizer)
        stop = next((place + 1 for place in range(content, following) if ids[place] in closing), None)
        if stop is not None:
            spans.append(Span(content, stop, message))
    return spans


def _blank_line(ids: Sequence[int], tokenizer: TextTokenizer) -> int:
    """How many tokens the header's blank line takes: Llama 3 has one for it, SentencePiece writes two."""
    return next((count for count in range(1, len(ids) + 1) if tokenizer.decode(ids[:count]) == "\n\n"), 0)


def span_mask(spans: Sequence[Span], length: int) -> Tensor:
    """-> bool [T], True inside the spans."""
    mask = torch.zeros(length, dtype=torch.bool)
    for span in spans:
        mask[span.start : span.stop] = True
    return mask


def text_labels(ids: Tensor, mask: Tensor, ignored: Sequence[int]) -> Tensor:
    """ids, mask [T] -> labels [T]: the id where `mask` is True, save the ids in `ignored` (audio placeholders: what
    stands there is predicted by the audio head)."""
    keep = mask & ~torch.isin(ids, torch.tensor(list(ignored), dtype=ids.dtype))
    return ids.where(keep, IGNORE)


def audio_labels(frames: Tensor, bos: int, eos: int) -> Tensor:
    """One trained clip's delayed frames [F, K] -> labels [F, K]: its codes and, per codebook, the first stream EOS.
    BOS is forced when generating, and what follows a codebook's EOS is padding: neither is learnt."""
    is_eos = frames == eos
    repeated = is_eos & (is_eos.cumsum(0) > 1)
    return frames.masked_fill((frames == bos) | repeated, IGNORE)
