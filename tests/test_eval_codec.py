"""`higgs evaluate codec` from folder to report: rows, kinds, bandwidths, failures, and runs that were killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor
from train_cases import write_codec

from higgs import cli
from higgs.audio import load_audio
from higgs.checkpoint.io import load_codec
from higgs.codec import decode_prefix
from higgs.codec.quantizer import usage
from higgs.errors import UserError
from higgs.eval.codec import CodecEvaluation, CodecJob, evaluate_codec
from higgs.eval.command import CONFIGS
from higgs.eval.judges.base import QualityJudge
from higgs.eval.judges.dvector import DVector
from higgs.eval.outputs import Result
from higgs.eval.spectral import stft_distance
from higgs.eval.summary import read_rows

PROJECT = Path(__file__).resolve().parents[1]
BANDWIDTHS = ("0.35", "0.7", "1.05", "1.4")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codec(tmp_path_factory.mktemp("codec") / "codec")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A benchmark's folder, as AudioTokenBench has it, with one file that is no sound."""
    folder = tmp_path_factory.mktemp("clips")
    parts = {
        "speech/a.wav": ("ljspeech/LJ001-0001.flac", 0), "speech/b.wav": ("ljspeech/LJ001-0003.flac", 1),
        "music/brahms.wav": ("music/brahms-hungarian-dance-5.ogg", 3), "events/robin.wav": ("events/robin.ogg", 0),
    }  # fmt: skip
    for name, (source, start) in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        wave = load_audio(shared_data / source, 24000)
        soundfile.write(folder / name, wave[start * 24000 :][:36000].numpy(), 24000)
    (folder / "speech" / "broken.wav").write_bytes(b"RIFF but no sound")
    return folder


def run(codec: Path, clips: Path, out: Path, *more: str, speaker: bool = False) -> Result:
    overrides = [f"codec={codec}", f"data={clips}", f"output={out}", "processes=0", "device=cpu", "batch_size=2", *more]
    config = cli.to_dataclass(CodecEvaluation, cli.compose("codec", overrides, CONFIGS))
    return evaluate_codec(config, DVector() if speaker else None, {})


@pytest.fixture(scope="module")
def done(codec: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(codec, clips, tmp_path_factory.mktemp("out") / "done", speaker=True)


def test_every_clip_is_a_row_with_every_metric_at_every_bandwidth(done: Result):
    rows = {row["id"]: row for row in done.rows}
    assert list(rows) == ["events/robin", "music/brahms", "speech/a", "speech/b", "speech/broken"]
    for bandwidth in BANDWIDTHS:
        for name in ("stft_distance", "mel_distance", "si_sdr", "bitrate"):
            assert all(isinstance(row[f"{name}@{bandwidth}"], float) for row in done.rows[:4])
        for name in ("pesq", "stoi", "estoi", "voicing_error", "speaker_similarity"):
            assert isinstance(rows["speech/a"][f"{name}@{bandwidth}"], float)
            assert f"{name}@{bandwidth}" not in rows["music/brahms"], "measures of speech are for speech"
    assert rows["speech/a"]["bitrate@0.7"] == pytest.approx(0.7, abs=0.03)
    assert [row["kind"] for row in done.rows] == ["event", "music", "speech", "speech", "speech"]


def test_a_file_that_cannot_be_read_is_a_row(done: Result):
    row = done.rows[-1]
    assert "cannot be read as sound" in row["error"] and not any("@" in name for name in row)
    assert done.summary["failures"]["count"] == 1 and done.summary["samples"] == 5
    assert done.summary["failures"]["samples"][0]["id"] == "speech/broken"


def test_figures_are_those_of_the_functions(done: Result, codec: Path, clips: Path):
    network = load_codec(codec, "cpu").eval()
    wave = load_audio(clips / "speech" / "b.wav", 24000)
    row = next(row for row in done.rows if row["id"] == "speech/b")
    with torch.no_grad():
        codes = network.encode(wave[None, None]).audio_codes
        output = decode_prefix(network, codes, 0.7, len(wave))[0, 0].clamp(-1, 1)
    assert (torch.tensor(row["codes"]) == codes[0]).float().mean() > 0.99
    assert row["stft_distance@0.7"] == pytest.approx(float(stft_distance(output, wave)), rel=1e-3)
    told = done.summary["codebooks"]
    every = torch.cat([torch.tensor(row["codes"]) for row in done.rows[:4]], dim=1)
    use, perplexity = usage(torch.stack([torch.bincount(stage, minlength=128) for stage in every]))
    assert told["use"] == pytest.approx(use.tolist(), abs=1e-4)
    assert told["perplexity"] == pytest.approx(perplexity.tolist(), abs=1e-2)


def test_kinds_are_summed_up_apart(done: Result):
    assert set(done.summary["kinds"]) == {"event", "music", "speech"}
    values = [row["stft_distance@1.4"] for row in done.rows if row["kind"] == "speech" and row["error"] is None]
    assert done.summary["kinds"]["speech"]["metrics"]["stft_distance@1.4"]["mean"] == pytest.approx(sum(values) / 2)
    assert done.summary["kinds"]["speech"]["samples"] == 3


def test_rows_come_back_from_parquet(done: Result):
    stored = read_rows(done.folder / "rows.parquet")
    for ours, theirs in zip(done.rows, stored, strict=True):
        assert {name: value for name, value in theirs.items() if value is not None} == {
            name: value for name, value in ours.items() if value is not None
        }


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("rows.parquet", "summary.json", "report.html")}


def test_the_same_inputs_and_seed_give_the_same_bytes(done: Result, codec: Path, clips: Path, tmp_path: Path):
    again = run(codec, clips, tmp_path / "again", speaker=True)
    assert files(again.folder) == files(done.folder)
    assert run(codec, clips, tmp_path / "again", speaker=True).rows == done.rows  # nothing is left to do


def test_a_killed_evaluation_continues_to_the_same_bytes(codec: Path, clips: Path, tmp_path: Path):
    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "higgs", "evaluate", "codec", f"codec={codec}", f"data={clips}", f"output={out}",
            "processes=2", "device=cpu", "batch_size=1",
        ]  # fmt: skip

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command(tmp_path / "cut"), cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / "cut" / "rows.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_text().count("\n") >= 1):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = journal.read_bytes()
    whole = subprocess.run(command(tmp_path / "whole"), cwd=PROJECT, env=environment, capture_output=True, text=True)
    again = subprocess.run(command(tmp_path / "cut"), cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert whole.returncode == again.returncode == 0, whole.stderr + again.stderr
    assert not (tmp_path / "cut" / "report.html").read_text().count("cut off")
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]) and files(tmp_path / "cut") == files(
        tmp_path / "whole"
    )
    # What a user reads: one line of kinds, figures, the failure, and where the files are.
    assert again.stdout == whole.stdout.replace("/whole/", "/cut/")
    assert "stft distance" in again.stdout and "speech/broken" in again.stdout and "report.html" in again.stdout


def test_other_settings_want_another_folder(done: Result, codec: Path, clips: Path):
    with pytest.raises(UserError, match="max_seconds"):
        run(codec, clips, done.folder, "max_seconds=1", speaker=True)


def test_only_so_much_of_a_clip_and_only_these_bandwidths(codec: Path, clips: Path, tmp_path: Path):
    found = run(codec, clips / "music", tmp_path / "out", "max_seconds=0.5", "bandwidths=[0.7]", "save_audio=true")
    assert found.rows[0]["seconds"] == 0.5 and {name.partition("@")[2] for name in found.rows[0]} == {"", "0.7"}
    kept = soundfile.info(tmp_path / "out" / "audio" / "0.7kbps" / "brahms.wav")
    assert kept.frames == 12000
    with pytest.raises(UserError, match="kbit/s"):
        run(codec, clips, tmp_path / "other", "bandwidths=[9]")


def test_where_every_sample_fails_that_is_an_error(codec: Path, tmp_path: Path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match="Not one of 1 samples"):
        run(codec, tmp_path / "clips", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_same_sound_through_a_job_is_perfect(shared_data: Path):
    wave = load_audio(shared_data / "speech" / "jfk.flac", 24000)[:72000].numpy()
    row = CodecJob(wave, {2.0: wave.copy()}, 24000, speech=True).run({"speaker": DVector()})
    assert row["error"] is None
    for name, perfect in {
        "stft_distance": 0, "mel_distance": 0, "pesq": 4.6439, "stoi": 1, "estoi": 1, "f0_error": 0,
        "f0_correlation": 1, "voicing_error": 0, "speaker_similarity": 1,
    }.items():  # fmt: skip
        assert row[f"{name}@2"] == pytest.approx(perfect, abs=1e-4)


class Loudness(QualityJudge):
    """A judge that hears how loud a clip is, and fails on one that is silent."""

    def load(self, device: str = "cpu") -> None:
        self.device = device

    def describe(self) -> dict[str, str]:
        return {"name": "loudness"}

    def score(self, clips: list[Tensor]) -> list[dict[str, float]]:
        if not all(clip.any() for clip in clips):
            raise ValueError("silence")
        return [{"utmos": float(clip.square().mean())} for clip in clips]


def test_judges_on_the_device_hear_every_bandwidth(codec: Path, clips: Path, tmp_path: Path):
    overrides = [
        f"codec={codec}",
        f"data={clips / 'speech'}",
        f"output={tmp_path / 'out'}",
        "processes=0",
        "device=cpu",
    ]
    config = cli.to_dataclass(CodecEvaluation, cli.compose("codec", overrides, CONFIGS))
    found = evaluate_codec(config, None, {"loudness": Loudness()})
    assert all(found.rows[0][f"utmos@{bandwidth}"] > 0 for bandwidth in BANDWIDTHS)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["quality"] == {
        "loudness": {"name": "loudness"}
    }


@pytest.mark.parametrize(("arguments", "told"), [
    (["codec", "data=x"], "'codec' has no value"),
    (["codec", "codec=x", "data=y", "bandwith=1"], "Did you mean 'bandwidths'?"),
    (["codec", "codec=x", "data=nowhere"], "neither a folder nor a manifest"),
    (["codec", "codec=x", "data=y", "batch_size=0"], "batch_size is 0"),
    (["codec", "codec=x", "data=y", "speaker=whisperer"], "There are: dvector, none, wavlm"),
    (["tts", "data=x"], "checkpoint=PATH, or audio=FOLDER"),
    (["tts", "data=x", "audio=y", "normalizer=german"], "use one of english, basic"),
    (["tts", "data=x", "audio=y", "recognizer.size=3"], "recognizer.size"),
    (["tts", "data=nowhere.lst", "audio=y"], "cannot be read"),
])  # fmt: skip
def test_mistakes_are_one_sentence(arguments: list[str], told: str, capsys: pytest.CaptureFixture, tmp_path: Path):
    from higgs.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments, f"output={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error and error.startswith("error: ") and error.count("\n") == 1
