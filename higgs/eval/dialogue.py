"""Dialogues: whose turn it is when, and whether speakers keep their voices and differ in them.

Nobody tells where a turn of generated sound begins. The words that a recogniser hears are aligned with the words of the
text, and a turn lasts from its first heard word to its last.

Shapes: D embedding size.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from higgs.eval.judges.base import Word
from higgs.eval.words import align, normalize


@dataclass(frozen=True)
class Turn:
    """What one speaker says; `speaker` is "" where the text has no tag."""

    speaker: str
    text: str


@dataclass(frozen=True)
class DialogueScores:
    """`intra`: mean cosine similarity of turns of one speaker, and of turns and their reference voices; `inter`: one
    minus that of turns of different speakers; both within 0…1, None where there is no such pair; `consistency`: their
    geometric mean."""

    intra: float | None
    inter: float | None
    consistency: float | None


def split_turns(text: str) -> list[Turn]:
    """The turns of a text with `[SPEAKERn]` tags, in order; a text without any is one turn."""
    before, *parts = re.split(r"\[(SPEAKER\d+)\]", text)
    turns = [Turn("", before.strip())] if before.strip() else []
    return turns + [Turn(tag, said.strip()) for tag, said in zip(parts[::2], parts[1::2], strict=True) if said.strip()]


def turn_spans(
    turns: Sequence[Turn], words: Sequence[Word], normalizer: str = "english"
) -> list[tuple[float, float] | None]:
    """Start and end in seconds of each turn; None for a turn of which no word was heard."""
    asked = [(word, place) for place, turn in enumerate(turns) for word in normalize(turn.text, normalizer).split()]
    # A heard word may become several ("it's" -> "it is") or none ("um").
    heard = [(part, word) for word in words for part in normalize(word.text, normalizer).split()]
    times: list[list[Word]] = [[] for _ in turns]
    for (_, word), index in zip(heard, align([w for w, _ in asked], [w for w, _ in heard]), strict=True):
        if index is not None:
            times[asked[index][1]].append(word)
    return [(min(w.start for w in turn), max(w.end for w in turn)) if turn else None for turn in times]


def dialogue_scores(
    embeddings: Sequence[Tensor | None], speakers: Sequence[str], voices: Mapping[str, Tensor] | None = None
) -> DialogueScores:
    """Scores of the turns' unit embeddings [D] (None: not heard), their speakers, and embeddings of reference voices."""
    there = [(e, speaker) for e, speaker in zip(embeddings, speakers, strict=True) if e is not None]
    same = [float(a @ b) for (a, one), (b, other) in combinations(there, 2) if one == other]
    same += [float(e @ (voices or {})[speaker]) for e, speaker in there if speaker in (voices or {})]
    different = [float(a @ b) for (a, one), (b, other) in combinations(there, 2) if one != other]
    intra = within(sum(same) / len(same)) if same else None
    inter = within(1 - sum(different) / len(different)) if different else None
    return DialogueScores(intra, inter, (intra * inter) ** 0.5 if intra is not None and inter is not None else None)


def within(value: float) -> float:
    return min(1.0, max(0.0, value))
