"""`higgs evaluate tts` from list to report: recordings, a model that is asked, cloning lists, dialogues, failures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from infer_cases import make_checkpoint
from test_eval_judges import say
from torch import Tensor

from higgs import HiggsAudioV2Processor, cli
from higgs.audio import load_audio, save_audio
from higgs.errors import UserError
from higgs.eval.command import CONFIGS
from higgs.eval.judges.base import Recognizer, SpeakerEmbedder, Transcript, Word
from higgs.eval.judges.dvector import DVector
from higgs.eval.judges.pocketsphinx import Pocketsphinx
from higgs.eval.outputs import Result
from higgs.eval.summary import read_rows
from higgs.eval.tts import SpeechEvaluation, evaluate_tts

PROJECT = Path(__file__).resolve().parents[1]
EXAMPLES = PROJECT / "examples" / "speech"
SYSTEM = {"role": "system", "content": "Generate audio following instruction."}


def run(
    out: Path, *overrides: str, recognizer: Recognizer | None = None, speaker: SpeakerEmbedder | None = None
) -> Result:
    overrides = [f"output={out}", "processes=0", "device=cpu", *overrides]
    config = cli.to_dataclass(SpeechEvaluation, cli.compose("tts", overrides, CONFIGS))
    return evaluate_tts(config, recognizer, speaker, {})


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The recordings of examples/speech, judged as if a model had made them."""
    out = tmp_path_factory.mktemp("recordings") / "out"
    return run(
        out, f"data={EXAMPLES / 'manifest.jsonl'}", f"audio={EXAMPLES}", f"clean_speech={EXAMPLES / 'manifest.jsonl'}",
        "recognize_references=true", recognizer=Pocketsphinx(), speaker=DVector(),
    )  # fmt: skip


def test_recordings_against_themselves_are_perfect(recordings: Result):
    assert len(recordings.rows) == 12 and recordings.summary["failures"]["count"] == 0
    for row in recordings.rows:
        assert row["duration_ratio"] == 1 and row["speaker_similarity"] == pytest.approx(1, abs=1e-6)
        assert row["wer"] == row["reference_wer"], "the same sound is heard the same"
        assert (
            row["runaway"] == row["clipped"] == row["repeated"] == 0 and row["stopped"] is None and row["seed"] is None
        )
        assert 0 <= row["leading_silence"] < 0.4 and 0 <= row["trailing_silence"] < 0.4
    assert recordings.summary["corpus"]["wer"]["value"] < 0.15 and recordings.summary["share_wer_above_50"] < 0.1


def test_the_meter_is_measured_beside(recordings: Result):
    meter = recordings.summary["meter"]
    assert meter["recognizer"]["name"] == "pocketsphinx" and meter["recognizer"]["version"] == "5.1.1"
    assert meter["clean_wer"]["value"] == recordings.summary["corpus"]["wer"]["value"]  # the same clips
    apart = meter["speaker"]["separation"]  # two voices, six clips each
    assert apart["same"] > apart["different"] + 0.2 and apart["eer"] < 0.1
    page = (recordings.folder / "report.html").read_text(encoding="utf-8")
    assert "its own wer is" in page and "equal error rate" in page


def test_versions_and_settings_are_kept(recordings: Result):
    stored = json.loads((recordings.folder / "summary.json").read_text())
    assert stored == json.loads(json.dumps(recordings.summary))
    for package in ("torch", "jiwer", "whisper-normalizer", "pocketsphinx", "pesq", "pyarrow"):
        assert stored["versions"][package]
    assert stored["settings"]["normalizer"] == "english" and stored["settings"]["recognizer"]["model"] == "en-us"


def test_shuffled_texts_are_found_out(recordings: Result, tmp_path: Path):
    lines = [json.loads(line) for line in (EXAMPLES / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [line["messages"][2]["content"] for line in lines]
    for line, text in zip(lines, texts[1:] + texts[:1], strict=True):
        line["messages"] = [line["messages"][0], {"role": "user", "content": text}]
    (tmp_path / "shuffled.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = run(
        tmp_path / "out",
        f"data={tmp_path / 'shuffled.jsonl'}",
        f"audio={EXAMPLES}",
        "clean_speech=null",
        recognizer=Pocketsphinx(),
    )
    assert found.summary["corpus"]["wer"]["value"] > 0.7 and found.summary["share_wer_above_50"] > 0.7


# -------------------------------------------------------------------------------------------- a model is asked


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, processor: HiggsAudioV2Processor) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), processor)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five texts; the third has no recording to clone from where it says."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copy(EXAMPLES / "slt_00.flac", folder / "voice.flac")
    lines = [
        f"n{n}|The sun rises in the east.|voice.flac|{text}."
        for n, text in enumerate(["One", "Two", "Three", "Four", "Five"])
    ]
    lines[2] = lines[2].replace("voice.flac", "gone.flac")
    (folder / "meta.lst").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "meta.lst"


def generate(out: Path, checkpoint: Path, asked: Path, *more: str) -> Result:
    return run(
        out, f"data={asked}", f"checkpoint={checkpoint}", "batch_size=2", "generation.max_new_tokens=24", "clean_speech=null",
        "generation.do_sample=true", "seed=5", *more, recognizer=Pocketsphinx(), speaker=DVector(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, asked: Path) -> Result:
    return generate(tmp_path_factory.mktemp("generated") / "out", checkpoint, asked)


def test_a_model_is_asked_and_heard(generated: Result):
    rows = {row["id"]: row for row in generated.rows}
    assert list(rows) == ["n0", "n1", "n2", "n3", "n4"]
    for number, row in enumerate(generated.rows):
        if row["id"] == "n2":
            assert "gone.flac does not exist" in row["error"] and "wer" not in row and row["seed"] is None
            continue
        assert row["seed"] == 5 + number and row["wer"] is not None and row["stopped"] in (0, 1)
        assert row["runaway"] >= 1 - row["stopped"] and -1 <= row["speaker_similarity"] <= 1
        info = soundfile.info(generated.folder / "audio" / f"{row['id']}.wav")
        assert info.samplerate == 24000 and info.duration == pytest.approx(row["seconds"], abs=1e-6)
    assert generated.summary["failures"]["count"] == 1
    assert "stopped" in generated.summary["metrics"] and "runaway" in generated.summary["metrics"]


def test_existing_files_of_a_model_get_the_figures_that_it_got(generated: Result, asked: Path, tmp_path: Path):
    found = run(
        tmp_path / "out", f"data={asked}", f"audio={generated.folder / 'audio'}", "clean_speech=null",
        recognizer=Pocketsphinx(), speaker=DVector(),
    )  # fmt: skip
    for ours, theirs in zip(found.rows, generated.rows, strict=True):
        for name in ("wer", "cer", "speaker_similarity", "seconds", "leading_silence", "hypothesis"):
            assert ours.get(name) == theirs.get(name)
    assert "There is no sound file of n2" in found.rows[2]["error"]


def test_generation_goes_on_and_ends_with_the_same_bytes(
    generated: Result, checkpoint: Path, asked: Path, tmp_path: Path
):
    out = tmp_path / "cut"
    shutil.copytree(generated.folder, out)
    lines = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "rows.jsonl").write_text(lines[0] + lines[1][:40], encoding="utf-8")  # killed in the second batch
    for name in ("rows.parquet", "summary.json", "report.html", "audio/n3.wav", "audio/n4.wav"):
        (out / name).unlink()
    generate(out, checkpoint, asked)
    for name in ("rows.parquet", "summary.json", "report.html", "audio/n3.wav", "rows.jsonl"):
        assert (out / name).read_bytes() == (generated.folder / name).read_bytes(), name


def test_a_batch_that_fails_is_asked_one_by_one(generated: Result, checkpoint: Path, asked: Path, tmp_path: Path):
    """n2 shares a batch with n3: what n3 says does not depend on it."""
    whole = asked.with_name("whole.lst")
    whole.write_text(asked.read_text(encoding="utf-8").replace("gone.flac", "voice.flac"), encoding="utf-8")
    found = generate(tmp_path / "out", checkpoint, whole)
    assert found.summary["failures"]["count"] == 0
    for place in (0, 1, 3, 4):
        ours, theirs = found.rows[place], generated.rows[place]
        assert ours["seconds"] == theirs["seconds"] and ours["seed"] == theirs["seed"]
        assert ours["speaker_similarity"] == pytest.approx(theirs["speaker_similarity"], abs=1e-3)


def test_other_weights_want_another_folder(generated: Result, checkpoint: Path, asked: Path):
    with pytest.raises(UserError, match="seed"):
        generate(generated.folder, checkpoint, asked, "seed=6")


def test_results_of_a_training_run_lie_beside_its_export(tmp_path: Path):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert SpeechEvaluation("x", str(tmp_path / "run" / "export")).folder() == tmp_path / "run" / "evaluation"
    assert SpeechEvaluation("x", "elsewhere").folder() == Path("evaluation/tts")
    assert SpeechEvaluation("x", "elsewhere", output="mine").folder() == Path("mine")


# ------------------------------------------------------------------------------------------------- dialogues


class Deaf(Recognizer):
    """Stands for a recogniser on the device; hears a fixed sentence, and fails on what is too short."""

    def load(self, device: str = "cpu") -> None:
        self.device = device

    def describe(self) -> dict[str, str]:
        return {"name": "deaf"}

    def transcribe(self, clips: list[Tensor]) -> list[Transcript]:
        if any(len(clip) < 8000 for clip in clips):
            raise ValueError("too short")
        words = ["hello", "my", "friend", "good", "evening", "to", "you"]
        return [
            Transcript(" ".join(words), [Word(word, n * 0.25, n * 0.25 + 0.2) for n, word in enumerate(words)])
            for _ in clips
        ]


class Heavy(DVector):
    """The embedding as if it needed the device."""

    light = False


def test_judges_on_the_device_do_what_light_ones_do(tmp_path: Path):
    (tmp_path / "audio").mkdir()
    first, second = say(tmp_path, "Hello my friend.", "slt"), say(tmp_path, "Good evening to you.", "awb")
    save_audio(tmp_path / "audio" / "talk.wav", torch.cat([first, second]), 16000)
    save_audio(tmp_path / "audio" / "short.wav", first[:6000], 16000)
    text = "[SPEAKER0] Hello my friend. [SPEAKER1] Good evening to you."
    lines = [{"id": name, "messages": [SYSTEM, {"role": "user", "content": text}]} for name in ("talk", "short")]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = [
        run(tmp_path / kind.__name__, f"data={tmp_path / 'talk.jsonl'}", f"audio={tmp_path / 'audio'}", "clean_speech=null",
            recognizer=Deaf(), speaker=kind())
        for kind in (DVector, Heavy)
    ]  # fmt: skip
    light, heavy = (one.rows for one in found)
    for ours, theirs in zip(light, heavy, strict=True):  # other threads, other rounding
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), name
    talk, short = light
    assert talk["error"] is None and talk["wer"] == 0 and talk["kind"] == "dialogue" and talk["turns_found"] == 1
    assert 0 < talk["inter_dissimilarity"] < 1 and talk.get("dialogue_consistency") is None
    assert "recogniser: ValueError: too short" in short["error"] and short.get("wer") is None and short["seconds"] > 0


def test_the_command_prints_figures_with_the_meter_beside(tmp_path: Path):
    out = subprocess.run(
        [sys.executable, "-m", "higgs", "evaluate", "tts", f"audio={EXAMPLES}", f"data={EXAMPLES / 'manifest.jsonl'}", f"output={tmp_path / 'out'}",
         "processes=1", "device=cpu", "speaker=none"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "wer of all words" in out.stdout and "its own wer is" in out.stdout and "| cer" in out.stdout
    assert "100%" in out.stderr and len(read_rows(tmp_path / "out" / "rows.parquet")) == 12


def test_help_shows_the_keys(capsys: pytest.CaptureFixture):
    from higgs.__main__ import main

    with pytest.raises(SystemExit):
        main(["evaluate", "tts", "--help"])
    shown = capsys.readouterr().out
    assert "recognizer: pocketsphinx" in shown and "# folder or hub id of a decoder" in shown


def test_silent_audio_is_a_row_without_words(tmp_path: Path):
    (tmp_path / "audio").mkdir()
    save_audio(tmp_path / "audio" / "a.wav", torch.zeros(24000), 24000)
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"id": "a", "messages": [SYSTEM, {"role": "user", "content": "Say it."}]}) + "\n"
    )
    row = run(
        tmp_path / "out", f"data={tmp_path / 'a.jsonl'}", f"audio={tmp_path / 'audio'}", "clean_speech=null",
        recognizer=Pocketsphinx(),
    ).rows[0]  # fmt: skip
    assert row["wer"] == 1 and row["hypothesis"] == "" and row["leading_silence"] == 1 and row["trailing_silence"] == 0
    assert load_audio(tmp_path / "audio" / "a.wav", 24000).abs().max() == 0
