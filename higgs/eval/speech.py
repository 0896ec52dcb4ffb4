"""Speech is judged: where its sound comes from, what is measured on each clip, and the judges that listen on the device.

Shapes: L samples, D embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from higgs.api import HiggsAudioV2ForConditionalGeneration
from higgs.audio import load_audio, read_audio, resample, save_audio
from higgs.data.manifest import Sample
from higgs.errors import UserError
from higgs.eval.dialogue import dialogue_scores, split_turns, turn_spans
from higgs.eval.inputs import Utterance, file_name
from higgs.eval.judges.base import Judge, QualityJudge, Recognizer, SpeakerEmbedder, Transcript, Word
from higgs.eval.pool import Row
from higgs.eval.runner import Made, attempt, each
from higgs.eval.shape import clipped_share, edge_silence, expected_seconds, is_runaway
from higgs.eval.words import character_errors, repeated_share, spoken_text, word_errors
from higgs.inference import speak
from higgs.inputs import read_audio_item
from higgs.processor import HiggsAudioV2Processor

RATE = 16000  # of reference recordings, in Hz: that of all judges, so that a recording equals itself
LEAST_TURN = 0.4  # seconds of a turn from which its voice can be told


@dataclass
class Spoken:
    """Sound for an utterance: samples [L], whether the model stopped by itself (None: unknown), its seed, its file."""

    waveform: Tensor
    sample_rate: int
    stopped: bool | None = None
    seed: int | None = None


class Source(Protocol):
    """Where the sound of utterances comes from."""

    def speak(self, utterances: Sequence[Utterance], first: int) -> list[Spoken]:
        """The sound of each; `first` is the number of the first of them. An error concerns all of them."""


@dataclass
class Recordings:
    """Sound files that exist already."""

    files: Mapping[str, Path]

    def speak(self, utterances: Sequence[Utterance], first: int) -> list[Spoken]:
        return [self._read(utterance) for utterance in utterances]

    def _read(self, utterance: Utterance) -> Spoken:
        if utterance.id not in self.files:
            raise UserError(f"There is no sound file of {utterance.id}.")
        found = read_audio(self.files[utterance.id])
        return Spoken(found.samples, found.sample_rate)


class References:
    """The recordings of the texts themselves: how well the judges do on real speech."""

    def speak(self, utterances: Sequence[Utterance], first: int) -> list[Spoken]:
        return [Spoken(read(utterance.reference, "The recording of " + utterance.id), RATE) for utterance in utterances]


@dataclass
class Generated:
    """A model that is asked, and whose answers are kept as `folder/ID.wav`. Utterance n draws with `seed + n`."""

    model: HiggsAudioV2ForConditionalGeneration
    processor: HiggsAudioV2Processor
    folder: Path
    seed: int
    options: Mapping[str, Any]

    def speak(self, utterances: Sequence[Utterance], first: int) -> list[Spoken]:
        jobs = [Sample(utterance.id, utterance.prompt) for utterance in utterances]
        spoken = speak(
            self.model, self.processor, jobs, len(jobs), self.seed + first, progress=False, **self.options
        )  # fmt: skip
        answers = []
        for place, speech in enumerate(spoken):
            if not speech.waveform.numel() and len(jobs) == 1:
                raise UserError("No sound was generated.")
            if speech.waveform.numel():
                path = self.path(speech.name)
                save_audio(path, speech.waveform, speech.sample_rate)
                heard = load_audio(path, speech.sample_rate)  # what a listener gets is what is judged
            else:
                heard = speech.waveform
            answers.append(Spoken(heard, speech.sample_rate, speech.stopped, self.seed + first + place))
        return answers

    def path(self, name: str) -> Path:
        return self.folder / f"{file_name(name)}.wav"


def read(item: Mapping[str, Any] | None, where: str, rate: int = RATE) -> Tensor:
    """Samples [L] of an audio item at `rate` Hz. UserError where there is none, or only codes."""
    if item is None:
        raise UserError(f"{where} is not known.")
    sound = read_audio_item(item, rate, where)
    if not sound.is_floating_point():
        raise UserError(f"{where} is given as codes; give its sound file.")
    return sound


@dataclass
class SpeechJob:
    """Everything that is measured on one clip without the device. Arrays, because they travel to another process.

    Attributes:
        sound: samples [L] at `sample_rate`.
        voices: samples at `RATE` of the voices asked for, by speaker tag.
        reference: samples at `RATE` of a recording of the same text.
        heard: what a recogniser on the device has heard; None: the light one is asked, if there is one.
    """

    sound: np.ndarray
    sample_rate: int
    text: str
    normalizer: str
    stopped: bool | None = None
    voices: dict[str, np.ndarray] = field(default_factory=dict)
    reference: np.ndarray | None = None
    recognize_reference: bool = False
    heard: Transcript | None = None

    def run(self, judges: dict[str, Judge]) -> Row:
        row: Row = {"error": None}
        sound = torch.from_numpy(self.sound)
        attempt(row, "shape", lambda: row.update(self.shape(sound)))
        recognizer, embedder = judges.get("recognizer"), judges.get("speaker")
        heard = self.heard
        if isinstance(recognizer, Recognizer):
            heard = attempt(row, "recogniser", lambda: recognizer.transcribe([self.clip(recognizer)])[0])
            if self.recognize_reference and self.reference is not None:
                theirs = resample(torch.from_numpy(self.reference), RATE, recognizer.sample_rate)
                said = attempt(row, "reference", lambda: recognizer.transcribe([theirs])[0])
                if said is not None:
                    row["reference_wer"] = word_errors(self.text, said.text, self.normalizer).rate
        if heard is not None:
            row["hypothesis"] = heard.text
            attempt(row, "words", lambda: row.update(self.words(heard.text)))
        if isinstance(embedder, SpeakerEmbedder):
            attempt(row, "speaker", lambda: row.update(self.compare_voices(embedder, heard)))
        row["heard"] = None if heard is None else [[word.text, word.start, word.end] for word in heard.words]
        return row

    def clip(self, judge: Judge) -> Tensor:
        """The sound [L] at a judge's rate."""
        return resample(torch.from_numpy(self.sound), self.sample_rate, judge.sample_rate)

    def shape(self, sound: Tensor) -> Row:
        seconds = len(sound) / self.sample_rate
        recorded = None if self.reference is None else len(self.reference) / RATE
        silence = edge_silence(sound, self.sample_rate)
        expected = recorded or expected_seconds(self.text)
        return {
            "seconds": seconds,
            "duration_ratio": seconds / recorded if recorded else None,
            "stopped": None if self.stopped is None else float(self.stopped),
            "runaway": float(is_runaway(seconds, expected, self.stopped)),
            "leading_silence": silence.leading,
            "trailing_silence": silence.trailing,
            "clipped": clipped_share(sound),
        }

    def words(self, heard: str) -> Row:
        words, characters = (
            errors(self.text, heard, self.normalizer) for errors in (word_errors, character_errors)
        )  # fmt: skip
        return {
            "wer": words.rate,
            "cer": characters.rate,
            "word_errors": words.count,
            "words": words.length,
            "character_errors": characters.count,
            "characters": characters.length,
            "repeated": repeated_share(self.text, heard, self.normalizer),
        }

    def compare_voices(self, embedder: SpeakerEmbedder, heard: Transcript | None) -> Row:
        """Similarity to the voice asked for; for a dialogue, how alike its speakers' turns are, and how unlike others'."""
        turns = split_turns(self.text)
        speakers = {turn.speaker for turn in turns}
        rate = embedder.sample_rate
        sound = self.clip(embedder)
        voices = {tag: resample(torch.from_numpy(voice), RATE, rate) for tag, voice in self.voices.items()}
        if len(speakers) < 2:
            voice = voices.get(next(iter(speakers), "") or "")
            if voice is None and len(voices) == 1:
                voice = next(iter(voices.values()))
            if voice is None and not voices and self.reference is not None:
                voice = resample(torch.from_numpy(self.reference), RATE, rate)
            if voice is None:
                return {}
            ours, theirs = embedder.embed([sound, voice])
            return {"speaker_similarity": float(ours @ theirs)}
        if heard is None or not heard.words:
            return {"turns_found": 0.0} if heard is not None else {}
        spans = turn_spans(turns, heard.words, self.normalizer)
        spans = [span if span is not None and span[1] - span[0] >= LEAST_TURN else None for span in spans]
        cuts = [None if span is None else sound[round(span[0] * rate) : round(span[1] * rate)] for span in spans]
        known = [tag for tag in voices if tag in speakers]
        clips = [cut for cut in cuts if cut is not None] + [voices[tag] for tag in known]
        embedded = iter(embedder.embed(clips)) if clips else iter(())
        found = [None if cut is None else next(embedded) for cut in cuts]
        scores = dialogue_scores(found, [turn.speaker for turn in turns], {tag: next(embedded) for tag in known})
        return {
            "intra_similarity": scores.intra,
            "inter_dissimilarity": scores.inter,
            "dialogue_consistency": scores.consistency,
            "turns_found": sum(span is not None for span in spans) / len(spans),
        }


@dataclass
class SpeechTask:
    """Utterances to rows: sound from `source`; judges that are not light listen here, batch by batch."""

    source: Source
    normalizer: str
    recognizer: Recognizer | None = None
    speaker: SpeakerEmbedder | None = None
    quality: Mapping[str, QualityJudge] = field(default_factory=dict)
    recognize_references: bool = False

    def light(self) -> dict[str, Judge]:
        """The judges that the scoring processes hold."""
        judges = {"recognizer": self.recognizer, "speaker": self.speaker}
        return {name: judge for name, judge in judges.items() if judge is not None and judge.light}

    def load(self, device: str) -> None:
        """Loads the other judges."""
        for judge in (self.recognizer, self.speaker, *self.quality.values()):
            if judge is not None and not judge.light:
                judge.load(device)

    def make(self, samples: Sequence[Utterance], first: int) -> list[Made]:
        made = [Made(self.row(utterance)) for utterance in samples]
        spoken = each(
            lambda utterances, place: self.source.speak(utterances, first + place), samples, made, "sound"
        )  # fmt: skip
        for utterance, one, sound in zip(samples, made, spoken, strict=True):
            if sound is None or not sound.waveform.numel():
                one.row["error"] = one.row["error"] or "sound: No sound was generated."
                continue
            one.row["seed"] = sound.seed
            one.job = SpeechJob(
                sound.waveform.numpy(), sound.sample_rate, utterance.text, self.normalizer, sound.stopped
            )
            reference = utterance.reference
            if reference is not None and "codes" not in reference:
                one.job.reference = attempt(one.row, "reference", lambda r=reference: read(r, "The recording").numpy())
            for tag, item in utterance.voices.items():
                voice = attempt(one.row, "voice", lambda v=item: read(v, "The voice").numpy())
                if voice is not None:
                    one.job.voices[tag] = voice
            one.job.recognize_reference = self.recognize_references
        there = [one for one in made if one.job is not None]
        if self.recognizer is not None and not self.recognizer.light:
            clips = [one.job.clip(self.recognizer) for one in there]
            heard = each(lambda some, _: self.recognizer.transcribe(some), clips, there, "recogniser")
            for one, transcript in zip(there, heard, strict=True):
                one.job.heard = transcript
            if self.recognize_references:
                self.hear_references([one for one in there if one.job.reference is not None])
        return made

    def hear_references(self, made: Sequence[Made]) -> None:
        clips = [resample(torch.from_numpy(one.job.reference), RATE, self.recognizer.sample_rate) for one in made]
        heard = each(lambda some, _: self.recognizer.transcribe(some), clips, made, "reference")
        for one, said in zip(made, heard, strict=True):
            if said is not None:
                errors = attempt(
                    one.row, "reference", lambda o=one, s=said: word_errors(o.job.text, s.text, self.normalizer)
                )
                one.row["reference_wer"] = None if errors is None else errors.rate

    def row(self, utterance: Utterance) -> Row:
        several = len({turn.speaker for turn in split_turns(utterance.text)}) > 1
        text = spoken_text(utterance.text) if not several else utterance.text
        return {
            "id": utterance.id, "kind": "dialogue" if several else "speech", "seed": None, "text": text,
            "hypothesis": None, "error": None,
        }  # fmt: skip

    def complete(self, made: Sequence[Made]) -> None:
        there = [one for one in made if one.job is not None]
        for one in there:
            words = one.row.pop("heard", None)
            if self.speaker is not None and not self.speaker.light:
                heard = None if words is None else Transcript("", [Word(*word) for word in words])
                found = attempt(one.row, "speaker", lambda o=one, h=heard: o.job.compare_voices(self.speaker, h))
                one.row.update(found or {})
        for name, judge in self.quality.items():
            clips = [one.job.clip(judge) for one in there]
            for one, scores in zip(
                there, each(lambda some, _, j=judge: j.score(some), clips, there, name), strict=True
            ):
                one.row.update(scores or {})
