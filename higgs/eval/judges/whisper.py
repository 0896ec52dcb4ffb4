"""Whisper (arXiv 2212.04356) as a recogniser, through transformers: the meter of the Seed-TTS tables for English.

Shapes: L samples, N tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from higgs.eval.judges.base import Recognizer, Transcript, Word
from higgs.eval.judges.pretrained import LEAST, from_pretrained, identity, network

LAST = 1.0  # seconds given to the last word, whose end the model does not tell
SPACE = "Ġ"  # how the tokenizer writes a space


@dataclass
class Whisper(Recognizer):
    """Greedy transcription. Clips of up to 30 s are padded to that and heard together, without time tokens, as published
    tables do; longer ones alone, window after window. So what a clip gets does not depend on its batch.

    Attributes:
        path: folder or hub id.
        language: in English words, such as "english"; None lets the model tell.
        words: also ask for the times of words, which dialogues need, if the model knows its alignment heads. Clips are
            then heard one by one, because the alignment would look at the padding. Words are what spaces separate.
        batch_size: clips heard together, where `words` does not forbid it.
    """

    path: str = "openai/whisper-large-v3"
    language: str | None = "english"
    words: bool = True
    batch_size: int = 8
    _model: Any = field(default=None, init=False, repr=False, compare=False)
    _tokenizer: Any = field(default=None, init=False, repr=False, compare=False)
    _extractor: Any = field(default=None, init=False, repr=False, compare=False)

    def load(self, device: str = "cpu") -> None:
        if self._model is not None:
            return
        self._tokenizer = from_pretrained("AutoTokenizer", self.path)
        self._extractor = from_pretrained("AutoFeatureExtractor", self.path)
        self._model = network("WhisperForConditionalGeneration", self.path, device)

    def describe(self) -> dict[str, Any]:
        return identity("whisper", self.path) | {"language": self.language}

    @torch.no_grad()
    def transcribe(self, clips: Sequence[Tensor]) -> list[Transcript]:
        self.load()
        timed = self.words and getattr(self._model.generation_config, "alignment_heads", None) is not None
        size = 1 if timed else self.batch_size
        window = self._extractor.n_samples
        short = [place for place, clip in enumerate(clips) if LEAST <= len(clip) <= window]
        groups = [short[start : start + size] for start in range(0, len(short), size)]
        groups += [[place] for place, clip in enumerate(clips) if len(clip) > window]
        found = {place: Transcript("") for place in range(len(clips))}
        for group in groups:
            found |= dict(zip(group, self._hear([clips[place] for place in group], timed), strict=True))
        return [found[place] for place in range(len(clips))]

    def _hear(self, clips: Sequence[Tensor], timed: bool) -> list[Transcript]:
        """Transcripts of clips that all fit the window, or of one that does not."""
        long = len(clips[0]) > self._extractor.n_samples
        whole = {"truncation": False, "padding": "longest"} if long else {}
        inputs = self._extractor(
            [clip.numpy() for clip in clips], sampling_rate=self.sample_rate, return_tensors="pt",
            return_attention_mask=True, **whole,
        ).to(self._model.device)  # fmt: skip
        options: dict[str, Any] = {"return_token_timestamps": True, "return_segments": long} if timed else {}
        if getattr(self._model.generation_config, "is_multilingual", True):
            options |= {"task": "transcribe"} | ({"language": self.language} if self.language else {})
        made = self._model.generate(**inputs, num_beams=1, do_sample=False, return_timestamps=long, **options)
        sequences = (made["sequences"] if timed else made).tolist()
        # All that is not text comes from the end token on.
        text = [[token for token in tokens if token < self._tokenizer.eos_token_id] for tokens in sequences]
        said = [self._tokenizer.decode(tokens).strip() for tokens in text]
        if not timed:
            return [Transcript(one) for one in said]
        times = made["token_timestamps"][0]
        if long:
            # Those would start from 0 in every window; the segments, which hold the same tokens, count from the first.
            times = torch.cat([segment["token_timestamps"] for segment in made["segments"][0]])
        return [Transcript(said[0], self._words(sequences[0], times.tolist(), len(clips[0])))]

    def _words(self, tokens: Sequence[int], times: Sequence[float], samples: int) -> list[Word]:
        names = self._tokenizer.convert_ids_to_tokens(tokens)
        is_text = [token < self._tokenizer.eos_token_id for token in tokens]
        return words_of(tokens, names, is_text, times, samples / self.sample_rate, self._tokenizer.decode)


def words_of(
    tokens: Sequence[int], names: Sequence[str], is_text: Sequence[bool], times: Sequence[float], end: float,
    decode: Callable[[list[int]], str],
) -> list[Word]:  # fmt: skip
    """Tokens as words with their times.

    Args:
        tokens: [N], with those that are no text, and what each is called.
        times: when each begins, in seconds; N or more.
        end: length of the clip in seconds.
        decode: tokens -> text.
    """
    groups: list[list[int]] = []
    for place, (name, text) in enumerate(zip(names, is_text, strict=True)):
        if text and (not groups or name.startswith(SPACE)):
            groups.append([place])
        elif text:
            groups[-1].append(place)
    words = []
    for number, group in enumerate(groups):
        start, last = times[group[0]], times[group[-1]]
        if number + 1 < len(groups):
            # The token after the word may be a time or the start of a window: it tells the end, but never past the next.
            stop = min(times[group[-1] + 1], times[groups[number + 1][0]])
        else:
            stop = min(end, last + LAST)
        text = decode([tokens[place] for place in group]).strip()
        if text:
            words.append(Word(text, start, max(start, stop)))
    return words
