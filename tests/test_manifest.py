"""Manifests: what is read, and that every mistake is named with its line."""

import json
from pathlib import Path

import pytest

from higgs.data.manifest import SoundClip, read_clip_manifest, read_manifest, texts_of
from higgs.errors import UserError

SPEECH = Path(__file__).parents[1] / "examples" / "speech" / "manifest.jsonl"

SILENT = {"role": "assistant", "content": [{"type": "audio"}]}
DOUBLE = {"role": "assistant", "content": [{"type": "audio", "url": "a.wav", "codes": [[1]]}]}


def line(**changes) -> dict:
    messages = [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": [{"type": "audio", "url": "hello.wav"}]},
    ]
    return {"id": "a", "messages": messages, **changes}


def write(folder: Path, *lines: dict | str) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), encoding="utf-8")
    return path


def test_shipped_speech_is_complete_and_small() -> None:
    samples = read_manifest(SPEECH)
    assert 8 <= len(samples) <= 16
    assert len({sample.id.split("_")[0] for sample in samples}) == 2, "two voices"
    for sample in samples:
        assert Path(sample.messages[-1]["content"][0]["url"]).is_file()
        assert sample.prompt() == sample.messages[:-1]
    assert sum(path.stat().st_size for path in SPEECH.parent.iterdir()) < 1.5e6


def test_audio_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    (sample,) = read_manifest(write(tmp_path, line(start_index=2)))
    assert sample.messages[-1]["content"][0]["url"] == str(tmp_path / "hello.wav")
    assert sample.start_index == 2
    assert texts_of([sample])[-2:] == ["Speak.", "Hello."]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{not json", "not valid JSON"),
        ('["a list"]', '"id" and "messages"'),
        (json.dumps({"messages": []}), "lacks"),
        (json.dumps(line(id="a")), "line 1"),
        (json.dumps(line(id="b", speed=2)), "unknown fields: speed"),
        (json.dumps(line(id="b", start_index=7)), "start_index"),
        (json.dumps(line(id="b", messages=[{"role": "robot", "content": "x"}])), "robot"),
        (json.dumps(line(id="b", messages=[])), "line 2"),
        (json.dumps(line(id="b", start_index=True)), "start_index is True"),
        (json.dumps(line(id="b", start_index=-1)), "start_index is -1"),
        (json.dumps(line(id="b", start_index="1")), "start_index is '1'"),
        (json.dumps(line(id="b", messages=[*line()["messages"][:2], SILENT])), "message 2 must hold one of"),
        (json.dumps(line(id="b", messages=[*line()["messages"][:2], DOUBLE])), "several (url, codes)"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, bad: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_manifest(write(tmp_path, line(), bad))
    assert "line 2" in str(error.value)
    assert said in str(error.value)


def test_missing_and_empty_manifests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no conversation"):
        read_manifest(write(tmp_path, ""))


def test_a_prompt_needs_an_assistant_turn_at_the_end(tmp_path: Path) -> None:
    (sample,) = read_manifest(write(tmp_path, line(messages=line()["messages"][:2])))
    with pytest.raises(UserError, match="assistant"):
        sample.prompt()


# ------------------------------------------------------------------------------------------------ clips for the codec


def test_clips_of_a_codec_manifest(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"audio": "a.wav"},
        {"audio": "a.wav", "start": 2, "duration": 1.5, "kind": "music"},
        {"audio": "/far/b.flac", "id": "b", "kind": "event", "start": 0},
        "",
    )
    first, second, third = read_clip_manifest(path)
    assert first == SoundClip("a.wav", str(tmp_path / "a.wav"))
    assert second == SoundClip("a.wav@2", str(tmp_path / "a.wav"), 2.0, 1.5, "music")
    assert third == SoundClip("b", "/far/b.flac", 0.0, None, "event")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{not json", "not valid JSON"),
        ([], "must be an object"),
        ({"id": "b"}, '"audio"'),
        ({"audio": 3}, '"audio"'),
        ({"audio": ""}, '"audio"'),
        ({"audio": "b.wav", "speed": 2, "end": 1}, "unknown fields: end, speed"),
        ({"audio": "b.wav", "start": -1}, "start is -1"),
        ({"audio": "b.wav", "start": "1"}, "start is '1'"),
        ({"audio": "b.wav", "start": True}, "start is True"),
        ({"audio": "b.wav", "start": None}, "start is None"),
        ('{"audio": "b.wav", "start": NaN}', "start is nan"),
        ('{"audio": "b.wav", "duration": Infinity}', "duration is inf"),
        ({"audio": "b.wav", "duration": -0.5}, "duration is -0.5"),
        ({"audio": "b.wav", "duration": 0}, "duration is 0"),
        ({"audio": "b.wav", "kind": "noise"}, "speech, music, event"),
        ({"audio": "b.wav", "kind": None}, "kind is None"),
        ({"audio": "b.wav", "kind": ["speech"]}, "kind is"),
        ({"audio": "b.wav", "id": ""}, "id is ''"),
        ({"audio": "b.wav", "id": [1]}, "id is"),
        ({"audio": "a.wav"}, "the id 'a.wav' of line 1"),
        ({"audio": "b.wav", "id": "a.wav"}, "the id 'a.wav' of line 1"),
    ],
)
def test_mistakes_in_a_codec_manifest_are_named_with_their_line(tmp_path: Path, bad: object, said: str) -> None:
    path = write(tmp_path, {"audio": "a.wav"}, bad)
    with pytest.raises(UserError) as error:
        read_clip_manifest(path)
    assert f"{path}, line 2" in str(error.value)
    assert said in str(error.value)


def test_missing_and_empty_codec_manifests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_clip_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no clip"):
        read_clip_manifest(write(tmp_path, ""))


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_a_text_may_hold_any_line_separator(tmp_path: Path, separator: str) -> None:
    entry = line()
    entry["messages"][1]["content"][0]["text"] = f"One{separator}two."
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(entry, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (sample,) = read_manifest(path)
    assert sample.messages[1]["content"][0]["text"] == f"One{separator}two."
