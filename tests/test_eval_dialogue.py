"""Dialogues: turns are found by their words, and voices that do not keep apart are told."""

from pathlib import Path

import pytest
import torch
from test_eval_judges import say

from higgs.eval.dialogue import Turn, dialogue_scores, split_turns, turn_spans
from higgs.eval.judges.base import Word
from higgs.eval.judges.dvector import DVector
from higgs.eval.judges.pocketsphinx import Pocketsphinx
from higgs.eval.speech import RATE, SpeechJob

TURNS = [
    ("SPEAKER0", "Did you remember to lock the front door this morning?"),
    ("SPEAKER1", "I thought that you had the key in your pocket all the time."),
    ("SPEAKER0", "We should go back to the house before it gets dark."),
    ("SPEAKER1", "Give me a minute and I will find my winter coat."),
]
TEXT = " ".join(f"[{speaker}] {text}" for speaker, text in TURNS)


def test_turns_are_split_at_their_tags():
    assert split_turns(TEXT) == [Turn(*turn) for turn in TURNS]
    assert split_turns("No tag here.") == [Turn("", "No tag here.")]
    assert split_turns("Before. [SPEAKER2] After.\n[SPEAKER0]  ") == [Turn("", "Before."), Turn("SPEAKER2", "After.")]


def test_spans_run_from_the_first_heard_word_to_the_last():
    turns = [Turn("A", "It's late."), Turn("B", "Go home now."), Turn("A", "Never!")]
    heard = [
        Word("it's", 0.0, 0.3),
        Word("late", 0.3, 0.8),
        Word("go", 1.0, 1.2),
        Word("hum", 1.2, 1.4),
        Word("now", 1.5, 1.9),
    ]
    assert turn_spans(turns, heard) == [(0.0, 0.8), (1.0, 1.9), None]
    assert turn_spans(turns, []) == [None, None, None]


def test_scores_of_known_embeddings():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    found = dialogue_scores([x, y, x, None], ["A", "B", "A", "B"])
    assert found.intra == 1 and found.inter == pytest.approx(0.4) and found.consistency == pytest.approx(0.4**0.5)
    voiced = dialogue_scores([x, y], ["A", "B"], {"A": x, "B": x})
    assert voiced.intra == pytest.approx(0.8)
    alone = dialogue_scores([x, y], ["A", "B"])
    assert alone.intra is None and alone.consistency is None and alone.inter == pytest.approx(0.4)
    assert dialogue_scores([x, -x], ["A", "A"]).intra == 0  # within 0…1


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The dialogue in two voices and in one, and each voice alone."""
    folder = tmp_path_factory.mktemp("dialogue")
    by_voice = {voice: [say(folder, text, voice) for _, text in TURNS] for voice in ("slt", "awb")}
    pause = torch.zeros(4800)
    mixed = [by_voice["slt" if speaker == "SPEAKER0" else "awb"][n] for n, (speaker, _) in enumerate(TURNS)]
    spoken = {"two": mixed, "one": by_voice["slt"]}
    found = {name: torch.cat([part for clip in clips for part in (clip, pause)]) for name, clips in spoken.items()}
    return found | {
        voice: say(folder, "This is how I sound on most days of the week.", voice) for voice in ("slt", "awb")
    }


def judge(voices: dict[str, torch.Tensor], name: str, references: dict[str, str]) -> dict:
    job = SpeechJob(
        voices[name].numpy(), 16000, TEXT, "english", voices={tag: voices[voice].numpy() for tag, voice in references.items()}
    )  # fmt: skip
    assert RATE == 16000  # of the references
    return job.run({"recognizer": Pocketsphinx(), "speaker": DVector()})


def test_two_voices_are_more_consistent_than_one(voices: dict[str, torch.Tensor]):
    right = judge(voices, "two", {"SPEAKER0": "slt", "SPEAKER1": "awb"})
    wrong = judge(voices, "one", {"SPEAKER0": "slt", "SPEAKER1": "awb"})
    swapped = judge(voices, "two", {"SPEAKER0": "awb", "SPEAKER1": "slt"})
    assert right["error"] is None and right["wer"] < 0.25 and right["turns_found"] == 1
    assert right["dialogue_consistency"] > wrong["dialogue_consistency"] + 0.1
    assert right["inter_dissimilarity"] > wrong["inter_dissimilarity"] + 0.1
    assert right["intra_similarity"] > swapped["intra_similarity"] + 0.1
    assert "speaker_similarity" not in right


def test_turns_need_no_reference_voices(voices: dict[str, torch.Tensor]):
    found = judge(voices, "two", {})
    assert found["intra_similarity"] > 0.6 and 0 < found["inter_dissimilarity"] < 1


def test_spans_are_where_the_turns_are(voices: dict[str, torch.Tensor], tmp_path: Path):
    heard = Pocketsphinx().transcribe([voices["two"]])[0]
    spans = turn_spans(split_turns(TEXT), heard.words)
    start = 0.0
    for (speaker, text), span in zip(TURNS, spans, strict=True):
        seconds = len(say(tmp_path, text, "slt" if speaker == "SPEAKER0" else "awb")) / 16000
        assert start - 0.35 <= span[0] < span[1] <= start + seconds + 0.35
        start += seconds + 0.3
