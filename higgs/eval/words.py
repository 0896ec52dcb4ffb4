"""Texts are compared: what was asked for with what a recogniser heard.

Both sides pass the same normaliser first: "english" is Whisper's (package whisper-normalizer, pinned: it decides what a
word error rate means), which writes numbers as digits (and digits in a row as one number), expands contractions and drops
fillers and punctuation; "basic" is Whisper's for all languages: lower case, no punctuation. In languages without spaces the character error rate is the
one that counts.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from higgs.errors import UserError

SPEAKER_TAG = r"\[SPEAKER\d+\]"
SOUND_TAGS = re.compile(
    rf"{SPEAKER_TAG}"
    r"|<SE(?:_[se])?>.*?</SE(?:_[se])?>"
    r"|\[(?:laugh|applause|cheering|cough|music|humming|sing)(?:ing)?(?: start| end)?\]"
    r"|<\|[^|]*\|>",
    re.IGNORECASE,
)
LONGEST_RUN = 8  # words of a run whose repetition is looked for


@dataclass(frozen=True)
class Errors:
    """Edits that make the heard from the asked; `length` words (or characters) were asked for."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def count(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def length(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        return self.count / self.length


def spoken_text(text: str) -> str:
    """What is to be heard of a text: speaker tags, sound tags such as `<SE>[Laughter]</SE>` and `[laugh]`, and special
    tokens are left out."""
    return " ".join(SOUND_TAGS.sub(" ", text).split())


@lru_cache(maxsize=2)
def normalizer_of(name: str) -> Callable[[str], str]:
    if name not in ("english", "basic"):
        raise UserError(f"There is no normaliser '{name}'; use english or basic.")
    return EnglishTextNormalizer() if name == "english" else BasicTextNormalizer()


def normalize(text: str, normalizer: str = "english") -> str:
    """The words of a text, in the form in which they are compared."""
    return " ".join(normalizer_of(normalizer)(spoken_text(text)).split())


def word_errors(reference: str, hypothesis: str, normalizer: str = "english") -> Errors:
    """Edits between the words of two texts, after normalising both. UserError where the reference holds no word."""
    return _errors(jiwer.process_words, reference, hypothesis, normalizer)


def character_errors(reference: str, hypothesis: str, normalizer: str = "english") -> Errors:
    """As `word_errors`, for characters; spaces count."""
    return _errors(jiwer.process_characters, reference, hypothesis, normalizer)


def _errors(process: Callable[[str, str], Any], reference: str, hypothesis: str, normalizer: str) -> Errors:
    asked, heard = (normalize(text, normalizer) for text in (reference, hypothesis))
    if not any(map(str.isalnum, asked)):
        raise UserError(f"The text {reference!r} holds no word to be heard, so there is no error rate.")
    found = process(asked, heard)
    return Errors(found.hits, found.substitutions, found.deletions, found.insertions)


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[int | None]:
    """For each word that was heard the index of the word it stands for (the same or a mistaken one); None for one that
    was added."""
    places: list[int | None] = [None] * len(hypothesis)
    if not reference or not hypothesis:
        return places
    found = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    for chunk in found.alignments[0]:
        if chunk.type in ("equal", "substitute"):
            for offset in range(chunk.hyp_end_idx - chunk.hyp_start_idx):
                places[chunk.hyp_start_idx + offset] = chunk.ref_start_idx + offset
    return places


def repeated_share(reference: str, hypothesis: str, normalizer: str = "english") -> float:
    """Share of heard words that repeat the run of 1 to 8 words right before them, less those that the text itself
    repeats; 0 where nothing is heard. It finds loops such as "the sun the sun the sun"."""
    asked, heard = (normalize(text, normalizer).split() for text in (reference, hypothesis))
    return max(0, repeated_words(heard) - repeated_words(asked)) / len(heard) if heard else 0.0


def repeated_words(words: Sequence[str]) -> int:
    """How many words belong to a second or later copy of the run right before."""
    repeats = [False] * len(words)
    for size in range(1, LONGEST_RUN + 1):
        for start in range(size, len(words) - size + 1):
            if words[start : start + size] == words[start - size : start]:
                repeats[start : start + size] = [True] * size
    return sum(repeats)
