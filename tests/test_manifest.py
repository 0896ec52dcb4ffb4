"""Manifests: what is read, and that every mistake is named with its line."""

import json
from pathlib import Path

import pytest

from higgs.data.manifest import read_manifest, texts_of
from higgs.errors import UserError

SPEECH = Path(__file__).parents[1] / "examples" / "speech" / "manifest.jsonl"


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
