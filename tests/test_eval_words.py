"""Words are counted as a hand counts them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgs.errors import UserError
from higgs.eval.words import align, character_errors, normalize, repeated_share, spoken_text, word_errors

# asked, heard, substitutions, deletions, insertions, words asked for: counted by hand, after the normaliser.
TABLE = [
    ("The sun rises in the east.", "the sun rises in the east", 0, 0, 0, 6),
    ("The sun rises in the east.", "the son rises in east", 1, 1, 0, 6),
    ("The sun rises in the east.", "", 0, 6, 0, 6),
    ("Close the door.", "please close the the door", 0, 0, 2, 3),
    ("It costs twenty-five dollars.", "it costs 25 dollars", 0, 0, 0, 3),  # it costs $25
    ("Chapter 7, please.", "chapter seven please", 0, 0, 0, 3),
    ("It's late.", "it is late", 0, 0, 0, 3),
    ("I can't go, Mr. Brown!", "I cannot go mister brown", 1, 1, 0, 6),  # i can not go … ; cannot is one word
    ("Colour the harbour grey.", "color the harbor gray", 0, 0, 0, 4),
    ("[SPEAKER0] Hello. [SPEAKER1] Hi there.", "hello hi there", 0, 0, 0, 3),
    ("Well <SE>[Laughter]</SE> done [laugh] you.", "well done you", 0, 0, 0, 3),
    ("red blue green white", "white green blue red", 4, 0, 0, 4),
    ("one two three four", "one two three five", 1, 0, 0, 1),  # the normaliser joins digits: 1234 is one word
]


@pytest.mark.parametrize(("asked", "heard", "substitutions", "deletions", "insertions", "words"), TABLE)
def test_errors_are_those_counted_by_hand(asked, heard, substitutions, deletions, insertions, words):
    found = word_errors(asked, heard)
    total = substitutions + deletions + insertions
    assert found.count == total or (found.substitutions, found.deletions, found.insertions) == (
        substitutions,
        deletions,
        insertions,
    )
    assert found.length == words and found.rate == pytest.approx(total / words)


def test_characters_are_counted_with_spaces():
    found = character_errors("abc de", "abx de")
    assert (found.count, found.length) == (1, 6)
    assert character_errors("你好吗", "你好", "basic").rate == pytest.approx(1 / 3)


def test_a_text_without_words_has_no_error_rate():
    for text in ("", " ... ", "[SPEAKER0]", "<SE>[Laughter]</SE>"):
        with pytest.raises(UserError, match="no word"):
            word_errors(text, "anything")
    with pytest.raises(UserError, match="english or basic"):
        normalize("a", "german")


def test_what_is_not_spoken_is_left_out():
    text = "[SPEAKER0] Oh <SE>[Laughter]</SE> my. [laugh] <SE_s>[Humming]</SE_s> la <SE_e>[Humming]</SE_e> <|eot_id|> [Music start]"
    assert spoken_text(text) == "Oh my. la"
    assert spoken_text("an array[3] and [a note]") == "an array[3] and [a note]"


def test_the_basic_normaliser_serves_other_languages():
    assert normalize("Öffne die Tür, BITTE!", "basic") == "öffne die tür bitte"
    assert word_errors("Öffne die Tür", "öffne die tür", "basic").rate == 0


@pytest.mark.parametrize(("asked", "heard", "share"), [
    ("the sun rises", "the sun rises", 0),
    ("the sun rises", "the sun the sun the sun rises", 4 / 7),
    ("the sun rises", "the sun rises rises", 1 / 4),
    ("no no no", "no no no", 0),
    ("no no no", "no no no no", 1 / 4),
    ("a b c d e f g h i", "a b c d e f g h i a b c d e f g h i", 0),  # a run of nine is beyond the eight looked for
    ("the sun rises", "", 0),
])  # fmt: skip
def test_repeats_that_nobody_asked_for(asked: str, heard: str, share: float):
    assert repeated_share(asked, heard) == pytest.approx(share)


words = st.lists(st.sampled_from(["sun", "moon", "star", "sky", "sea"]), max_size=8)


@given(words.filter(bool), words)
def test_errors_hold_together(asked: list[str], heard: list[str]):
    found = word_errors(" ".join(asked), " ".join(heard))
    assert found.length == len(asked)
    assert found.hits + found.substitutions + found.insertions == len(heard)
    assert abs(len(asked) - len(heard)) <= found.count <= max(len(asked), len(heard))
    places = align(asked, heard)
    known = [place for place in places if place is not None]
    assert len(places) == len(heard) and known == sorted(set(known))
    assert (
        sum(asked[place] == word for place, word in zip(places, heard, strict=True) if place is not None) == found.hits
    )


@given(words.filter(bool))
def test_the_same_words_are_perfect(asked: list[str]):
    text = " ".join(asked)
    assert word_errors(text, text).count == 0 and character_errors(text, text).count == 0
    assert repeated_share(text, text) == 0 and align(asked, asked) == list(range(len(asked)))
