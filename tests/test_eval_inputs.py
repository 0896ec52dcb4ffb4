"""What an evaluation reads: conversations, Seed-TTS lists, folders and manifests of clips."""

import json
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from higgs.data.manifest import Sample
from higgs.errors import UserError
from higgs.eval.inputs import file_name, find_recordings, read_clips, read_utterances, utterance_of

VOICE = {"type": "audio", "url": "voice.wav"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def test_the_recording_of_a_conversation_is_its_reference_and_not_part_of_the_prompt():
    messages = [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": [text("Hello there.")]},
        {"role": "assistant", "content": [{"type": "audio", "url": "said.wav"}]},
    ]
    found = utterance_of(Sample("a", messages))
    assert found.text == "Hello there." and found.reference["url"] == "said.wav"
    assert found.prompt == messages[:-1] and found.voices == {}
    assert utterance_of(Sample("a", messages[:-1])).reference is None


def test_voices_are_found_by_turn_and_by_scene():
    turns = [
        {"role": "user", "content": "[SPEAKER0] I am first."},
        {"role": "assistant", "content": [{"type": "audio", "url": "zero.wav"}]},
        {"role": "user", "content": "[SPEAKER1] I am second."},
        {"role": "assistant", "content": [{"type": "audio", "url": "one.wav"}]},
        {"role": "user", "content": "[SPEAKER0] Hi. [SPEAKER1] Hello."},
    ]
    found = utterance_of(Sample("a", turns))
    assert {tag: item["url"] for tag, item in found.voices.items()} == {"SPEAKER0": "zero.wav", "SPEAKER1": "one.wav"}
    scene = [
        {"role": "system", "content": "Speak."},
        {"role": "scene", "content": [text("A quiet room."), text("SPEAKER0:"), VOICE, text("SPEAKER1: masculine")]},
        {"role": "user", "content": "[SPEAKER0] Hi. [SPEAKER1] Hello."},
    ]
    assert utterance_of(Sample("a", scene)).voices == {"SPEAKER0": VOICE}
    plain = [{"role": "user", "content": "A voice."}, {"role": "assistant", "content": [VOICE]}, turns[-1]]
    assert utterance_of(Sample("a", plain)).voices == {"": VOICE}


@pytest.mark.parametrize("messages", [
    [{"role": "user", "content": "  "}],
    [{"role": "user", "content": [VOICE]}],
    [{"role": "system", "content": "Speak."}, {"role": "assistant", "content": [VOICE]}],
])  # fmt: skip
def test_a_conversation_that_asks_for_nothing_is_named(messages: list):
    with pytest.raises(UserError, match="Sample lost"):
        utterance_of(Sample("lost", messages))


def test_a_seed_tts_list_clones_its_prompt(tmp_path: Path):
    lines = "a-1|I said this.|wavs/p.wav|Say that.\n\nb|So.|p2.wav|And now?|real/b.wav\n"
    (tmp_path / "meta.lst").write_text(lines, encoding="utf-8")
    first, second = read_utterances(tmp_path / "meta.lst")
    assert (first.id, first.text, first.reference) == ("a-1", "Say that.", None)
    assert first.voices[""]["path"] == str(tmp_path / "wavs/p.wav")
    # The prompt is the pair of turns that clones a voice, then the text.
    spoken = [message for message in first.prompt if message["role"] in ("user", "assistant")]
    assert spoken[0]["content"] == [text("I said this.")] and spoken[2]["content"] == [text("Say that.")]
    assert spoken[1]["content"][0]["url"] == str(tmp_path / "wavs/p.wav")
    assert second.reference == {"type": "audio", "path": str(tmp_path / "real/b.wav")}


@pytest.mark.parametrize(("lines", "told"), [
    ("a|b|c\n", "line 1"), ("a|b|c.wav|d\na|b|c.wav|d\n", "line 2"), ("\n", "no line"), ("a||c.wav|d\n", "line 1"),
])  # fmt: skip
def test_a_broken_seed_tts_list_is_told_by_line(tmp_path: Path, lines: str, told: str):
    (tmp_path / "meta.lst").write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        read_utterances(tmp_path / "meta.lst")


def test_kinds_are_the_folders(shared_data: Path, tmp_path: Path):
    for kind in ("speech", "music", "events"):
        (tmp_path / kind).symlink_to(shared_data / kind)
    soundfile.write(tmp_path / "loose.wav", [0.0] * 100, 16000)
    (tmp_path / "notes.txt").write_text("not sound")
    clips = read_clips(tmp_path)
    assert len({clip.id for clip in clips}) == len(clips) == 11
    kinds = {clip.id.partition("/")[0]: clip.kind for clip in clips}
    assert kinds == {"speech": "speech", "music": "music", "events": "event", "loose": None}
    (tmp_path / "loose.flac").write_bytes((tmp_path / "loose.wav").read_bytes())
    assert {"loose.wav", "loose.flac", "speech/jfk.flac"} < {clip.id for clip in read_clips(tmp_path)}
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(json.dumps({"audio": "loose.wav", "kind": "event"}) + "\n")
    assert [clip.kind for clip in read_clips(manifest)] == ["event"]


def test_a_folder_without_sound_says_so(tmp_path: Path):
    with pytest.raises(UserError, match="no sound file"):
        read_clips(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor"):
        read_clips(tmp_path / "nowhere")


def test_recordings_are_found_by_id(tmp_path: Path):
    utterances = [utterance_of(Sample(name, [{"role": "user", "content": "Hi."}])) for name in ("a", "b/c", "d")]
    with pytest.raises(UserError, match="no recording"):
        find_recordings(tmp_path, utterances)
    soundfile.write(tmp_path / "a.flac", [0.0] * 100, 16000)
    (tmp_path / "b").mkdir()
    soundfile.write(tmp_path / f"{file_name('b/c')}.wav", [0.0] * 100, 16000)
    assert set(find_recordings(tmp_path, utterances)) == {"a", "b/c"}


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_ids_become_names_of_files_one_to_one(one: str, other: str):
    if not (one.isascii() and other.isascii()):
        return
    for name in (file_name(one), file_name(other)):
        assert "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))
    assert (file_name(one) == file_name(other)) == (one == other)
