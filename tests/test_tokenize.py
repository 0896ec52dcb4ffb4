"""`higgs tokenize`: what it writes, that it survives being killed, and that damage is found.

Shapes: K codebooks, T codec frames.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from higgs.__main__ import main
from higgs.audio import load_audio
from higgs.checkpoint.io import load_codec
from higgs.codec import Codec
from higgs.data import shards
from higgs.data.draws import read_sources
from higgs.data.shards import CodedFolder
from higgs.data.stream import Unreadable
from higgs.data.tokenize import TokenizeConfig, TokenizeResult, tokenize
from higgs.data.tokenized import TokenizedDataset
from higgs.errors import UserError

CUT = TokenizeConfig(shard_samples=3, batch_seconds=1.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the command has it, so that what runs here can be compared with what runs in a process of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def codec(codec_folder: Path) -> Codec:
    return load_codec(codec_folder)


def message(*items: dict | str) -> list[dict]:
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": content},
    ]


def write_manifest(path: Path, conversations: dict[str, list[dict]]) -> Path:
    rows = [json.dumps({"id": name, "messages": messages}) for name, messages in conversations.items()]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def noise(path: Path, seconds: float, seed: int = 0, rate: int = 24000) -> dict:
    samples = np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * rate)).astype(np.float32)
    soundfile.write(path, samples, rate)
    return {"type": "audio", "url": path.name}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten conversations with none to three clips of unequal length, at several rates; one clip is given as codes."""
    folder = tmp_path_factory.mktemp("data")
    count = iter(range(100))
    conversations = {}
    for number in range(10):
        clips = [
            noise(folder / f"{place}.wav", 0.1 + 0.07 * (place % 7), place, [24000, 16000, 22050][place % 3])
            for place in (next(count) for _ in range((number * 3) % 4))
        ]
        conversations[f"c{number}"] = message("Yes.", *clips)
    conversations["c4"][2]["content"].append({"type": "audio", "codes": [[k] * 5 for k in range(8)]})
    return write_manifest(folder / "manifest.jsonl", conversations)


@pytest.fixture(scope="module")
def finished(manifest: Path, codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("codes") / "out"
    result = tokenize(manifest, out, codec, CUT)
    assert result == TokenizeResult(coded=10, kept=0, unreadable=[], complete=True)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_codes_are_those_of_each_clip_alone(manifest: Path, finished: Path, codec: Codec) -> None:
    folder = CodedFolder(finished)
    samples = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [sample.id for sample in folder.samples()] == [sample["id"] for sample in samples]
    clips = 0
    for number, before in enumerate(samples):
        after = folder.sample(number)
        assert (after.id, after.start_index) == (before["id"], 0)
        assert after.messages[:2] == before["messages"][:2]
        for item, coded in zip(before["messages"][2]["content"], after.messages[2]["content"], strict=True):
            if item["type"] == "text":
                assert coded == item
                continue
            codes = folder.codes(number, coded["span"])
            assert set(coded) == {"type", "span"}
            assert codes.dtype == torch.long
            if "codes" in item:
                assert codes.tolist() == item["codes"], "codes that were given stay"
            else:
                clips += 1
                waveform = load_audio(manifest.parent / item["url"], codec.sample_rate)
                with torch.no_grad():
                    expected = codec.encode(waveform[None, None]).audio_codes[0]
                assert codes.shape == expected.shape
                assert (codes == expected).float().mean() > 0.99, "but for ties that rounding decides"
    assert clips == 15
    assert sum(record.clips for record in folder.records) == 16
    assert folder.codec.num_codebooks == 8 and folder.codec.codebook_size == 1024
    assert len(folder.records) == 4 and folder.source.samples == 10


def test_real_speech(shared_data: Path, codec: Codec, tmp_path: Path, processor) -> None:
    rows = [line.split("\t") for line in (shared_data / "ljspeech" / "transcripts.tsv").read_text().splitlines()]
    rows = [row for row in rows if (shared_data / "ljspeech" / row[0]).is_file()][:4]
    said = {name: message({"type": "audio", "url": str(shared_data / "ljspeech" / name)}) for name, _ in rows}
    assert len(said) == 4
    tokenize(write_manifest(tmp_path / "lj.jsonl", said), tmp_path / "out", codec)
    renderer = processor.renderer(processor.chat_template)
    dataset = TokenizedDataset(read_sources(str(tmp_path / "out")), renderer, processor.batch_builder)
    for number, messages in enumerate(said.values()):
        expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, output_labels=True)
        row = dataset.row(number)
        assert torch.equal(row.ids, expected["input_ids"][0])
        assert torch.equal(row.labels, expected["labels"][0])
        assert row.frames.shape == expected["audio_input_ids"][0].shape
        assert (row.frames == expected["audio_input_ids"][0]).float().mean() > 0.99
        assert (row.frame_labels == expected["audio_labels"][0]).float().mean() > 0.99


def test_any_number_of_ranks_gives_the_same_bytes(manifest, finished, codec, tmp_path: Path) -> None:
    for size in (2, 3, 7):
        results = [
            tokenize(manifest, tmp_path / str(size), codec, CUT, rank=rank, size=size) for rank in reversed(range(size))
        ]
        assert content(tmp_path / str(size)) == content(finished)
        # With more ranks than shards the last ones have nothing to do, and find nothing complete.
        assert [result.complete for result in results].index(True) == size - 1
        assert sum(result.coded for result in results) == 10


class Crash(BaseException):
    """Stands for SIGKILL: no clean-up that catches exceptions sees it."""


def test_a_run_that_ends_at_any_write_is_finished_by_the_next(
    manifest, finished, codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shards.write_aside
    coded = kept = 0

    def crash_at(last: int, torn: bool) -> None:
        writes = 0

        def write(path: Path, data: bytes) -> None:
            nonlocal writes
            if writes == last:
                if torn:
                    path.with_name(f".{path.name}.1.part").write_bytes(data[: len(data) // 2])
                raise Crash
            writes += 1
            plain(path, data)

        for module in (shards, sys.modules["higgs.data.tokenize"]):
            monkeypatch.setattr(module, "write_aside", write)

    for last in range(14):  # source.json, three files for each of four shards, index.json
        out = tmp_path / str(last)
        crash_at(last, torn=last % 2 == 0)
        with pytest.raises(Crash):
            tokenize(manifest, out, codec, CUT)
        if last:
            with pytest.raises(UserError, match="is not complete"):
                CodedFolder(out)
        crash_at(-1, torn=False)
        result = tokenize(manifest, out, codec, CUT)
        assert result.complete and result.coded + result.kept == 10
        coded, kept = coded + result.coded, kept + result.kept
        assert content(out) == content(finished)
    assert kept > coded / 2, "finished shards are kept"
    crash_at(14, torn=False)
    tokenize(manifest, tmp_path / "whole", codec, CUT)


def start(manifest: Path, out: Path, codec_folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "higgs", "tokenize", str(manifest), str(out), "--codec", str(codec_folder)]
    cut = ["--shard-samples", "3", "--batch-seconds", "1"]
    return subprocess.Popen([*command, *cut, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_with_sigkill_and_started_again(manifest, finished, codec_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for enough, processes in ((2, "1"), (6, "2")):
        process = start(manifest, out, codec_folder, "--processes", processes)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(out.glob("[!.]*"))) <= enough and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "index.json").exists():  # the kill may come too late
            assert content(finished).items() <= content(out).items()
    process = start(manifest, out, codec_folder, "--processes", "1")
    printed, bar = process.communicate(timeout=120)
    assert process.returncode == 0, bar
    assert "10 samples coded, 0 unreadable" in printed and "complete" in printed
    assert "10/10" in bar
    assert content(out) == content(finished)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00002.jsonl", "index.json"])
def test_damage_is_found_when_the_folder_is_opened_and_repaired_by_the_command(
    manifest, finished, codec, tmp_path: Path, name: str
) -> None:
    for damage in ("cut", "changed", "lost", "empty"):
        out = tmp_path / damage
        out.mkdir()
        for file, data in content(finished).items():
            (out / file).write_bytes(data)
        CodedFolder(out)
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        new = {"cut": data[:-10], "changed": data, "lost": None, "empty": b""}[damage]
        (out / name).unlink()
        if new is not None:
            (out / name).write_bytes(new)
        with pytest.raises(UserError, match=str(out)) as error:
            CodedFolder(out)
        assert name in str(error.value) or damage == "lost"
        assert "higgs tokenize" in str(error.value)
        result = tokenize(manifest, out, codec, CUT)
        assert result.coded == (0 if name == "index.json" else 3)
        assert content(out) == content(finished)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"codebook_size": 1024', '"codebook_size": 512'),
        ('"batch_seconds": 1.0', '"batch_seconds": 2.0'),
        ('"unreadable": []', '"unreadable": [{"id": "c1", "reason": "none"}]'),
    ],
)
def test_an_index_that_was_edited_is_refused(finished, tmp_path: Path, before: str, after: str) -> None:
    for file, data in content(finished).items():
        (tmp_path / file).write_bytes(data)
    text = (tmp_path / "index.json").read_text()
    assert before in text
    (tmp_path / "index.json").write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=r"index\.json was altered"):
        CodedFolder(tmp_path)


def test_a_folder_belongs_to_one_manifest_codec_and_cut(manifest, codec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize(manifest, out, codec, CUT)
    before = content(out)
    other = write_manifest(tmp_path / "other.jsonl", {"a": message("Yes.")})
    changed = Codec(codec.config)
    changed.load_state_dict(codec.state_dict())
    with torch.no_grad():
        changed.fc2.bias[0] += 1e-3
    for args, said in (
        ((other, out, codec, CUT), "another manifest"),
        ((manifest, out, changed, CUT), "another codec"),
        ((manifest, out, codec, TokenizeConfig(shard_samples=4, batch_seconds=1.0)), "shard_samples=3"),
    ):
        with pytest.raises(UserError, match=said):
            tokenize(*args)
    assert content(out) == before
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="choose an empty folder"):
        tokenize(manifest, tmp_path / "model", codec, CUT)


@pytest.fixture(scope="module")
def broken_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty conversations, five of which cannot be read, each for a reason of its own."""
    folder = tmp_path_factory.mktemp("broken")
    good = noise(folder / "good.wav", 0.2)
    conversations = {f"good{number}": message(good) for number in range(25)}
    (folder / "text.wav").write_text("this is no sound")
    soundfile.write(folder / "nan.wav", np.full(4800, np.nan, dtype=np.float32), 24000, subtype="FLOAT")
    bad = {
        "missing": {"type": "audio", "url": "nowhere.wav"},
        "text": {"type": "audio", "url": "text.wav"},
        "nan": {"type": "audio", "url": "nan.wav"},
        "short": noise(folder / "short.wav", 0.001),
        "codes": {"type": "audio", "codes": [[5000] * 3] * 8},
    }
    for name, item in bad.items():
        conversations[name] = message(good, item)
    return write_manifest(folder / "manifest.jsonl", conversations)


def test_unreadable_samples_are_logged_counted_and_recorded(broken_manifest, codec, tmp_path: Path) -> None:
    lines: list[str] = []
    config = TokenizeConfig(shard_samples=8, max_unreadable=0.2)
    result = tokenize(broken_manifest, tmp_path / "out", codec, config, log=lines.append)
    reasons = {
        "missing": "does not exist",
        "text": "cannot be read as sound",
        "nan": "NaN",
        "short": "at least|needs",
        "codes": "0 to 1023",
    }
    assert (result.coded, len(result.unreadable), len(lines)) == (25, 5, 5)
    folder = CodedFolder(tmp_path / "out")
    assert len(folder) == 25
    for entry, line in zip(folder.unreadable, lines, strict=True):
        assert entry["id"] in line and entry["reason"] in line
        assert any(word in entry["reason"] for word in reasons[entry["id"]].split("|")), entry
    assert {entry["id"] for entry in folder.unreadable} == set(reasons)
    again = tokenize(broken_manifest, tmp_path / "out", codec, config)
    assert (again.coded, again.kept, again.unreadable) == (0, 25, folder.unreadable)
    assert Unreadable(**folder.unreadable[0]).id == "missing"


def test_too_many_unreadable_samples_stop_the_run(broken_manifest, codec, codec_folder, tmp_path, capsys) -> None:
    with pytest.raises(UserError, match=r"5 of 30 samples cannot be read, more than max_unreadable=0\.1"):
        tokenize(broken_manifest, tmp_path / "a", codec, TokenizeConfig(max_unreadable=0.1))
    with pytest.raises(UserError, match="is not complete"):
        CodedFolder(tmp_path / "a")
    arguments = ["tokenize", str(broken_manifest), str(tmp_path / "b"), "--codec", str(codec_folder)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--max-unreadable", "0.1", "--processes", "1"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "error: 5 of 30 samples cannot be read" in printed
    assert "sample missing cannot be read and is left out" in printed


def test_ranks_of_torchrun_share_the_work(manifest, finished, codec_folder, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["tokenize", str(manifest), str(tmp_path / "out"), "--codec", str(codec_folder)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((1, "not complete yet"), (0, "is complete")):
        monkeypatch.setenv("RANK", str(rank))
        main([*arguments, "--shard-samples", "3", "--batch-seconds", "1"])
        assert said in capsys.readouterr().out
    assert content(tmp_path / "out") == content(finished)
    with pytest.raises(SystemExit):
        main([*arguments, "--processes", "2"])
    assert "leave --processes out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.jsonl", "out", "--codec", "x"], "none.jsonl cannot be read"),
        (["{manifest}", "out", "--codec", "{codec}/none"], "no checkpoint folder"),
        (["{manifest}", "out", "--codec", "{codec}", "--shard-samples", "0"], "shard_samples must be at least 1"),
        (["{manifest}", "out", "--codec", "{codec}", "--processes", "0"], "--processes is 0"),
        (["{manifest}", "out", "--codec", "{codec}", "--device", "warp"], "names no device"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, manifest, codec_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", *(part.format(manifest=manifest, codec=codec_folder) for part in arguments)])
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1 and said in printed
    assert not os.listdir(tmp_path)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index\.json"):
        CodedFolder(tmp_path)
