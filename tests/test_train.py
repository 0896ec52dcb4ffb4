"""`+experiment=overfit`, from the shipped clips to a checkpoint that says them again; records; mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import train_cases as cases
from hydra import compose, initialize_config_dir

from higgs import HiggsAudioV2ForConditionalGeneration, cli
from higgs.checkpoint.io import load_codec
from higgs.data.manifest import read_manifest
from higgs.errors import UserError
from higgs.processor import HiggsAudioV2Processor
from higgs.train.codec_warmup import WarmupConfig, warm_up
from higgs.train.reproduce import Match, equal_codes

PROJECT = cases.PROJECT
SPEECH = PROJECT / "examples" / "speech"
SMALL = [
    "+experiment=overfit", "codec_warmup.autoencoder_steps=2", "codec_warmup.decoder_steps=1",
    "codec_warmup.batch_size=2", "model.config.hidden_size=128", "model.config.intermediate_size=256",
    "model.config.num_hidden_layers=2", "model.config.head_dim=32", "optim.lr=4e-3", "optim.warmup_steps=10",
    "device=cpu", "data.batch_size=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three shipped samples."""
    path = tmp_path_factory.mktemp("data") / "manifest.jsonl"
    lines = (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    path.write_text("\n".join(line.replace('"url": "', f'"url": "{SPEECH}/') for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Match]]:
    run = tmp_path_factory.mktemp("run")
    more = ["max_steps=300", "sample_every=50", "sample_count=1", f"data.valid={manifest}", "valid_every=20"]
    return run, cases.run_here([*SMALL, *more, f"data.train={manifest}", f"run_dir={run}"])


def test_every_code_comes_back_from_the_text_alone(finished: tuple[Path, list[Match]]) -> None:
    _, matches = finished
    assert len(matches) == 3
    for match in matches:
        assert match.codes_equal >= 0.99
        assert match.frames_off <= 1
        assert match.stopped


def test_the_run_leaves_its_records(finished: tuple[Path, list[Match]]) -> None:
    run, matches = finished
    rows = cases.records(run)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, len(train) + 1))
    for row in train:
        fields = (
            "step loss text_loss audio_loss codebook_loss lr grad_norm tokens_per_s frames_per_s mfu data_wait_s "
            "memory_gb samples_seen"
        )
        assert all(row[field] is not None for field in fields.split())
        assert len(row["codebook_loss"]) == 8
        assert 0 < row["mfu"] < 1.5 and 0 < row["frames_per_s"] < row["tokens_per_s"] and row["memory_gb"] > 0.05
        assert row["samples_seen"] == 3 * row["step"]
    assert train[-1]["loss"] < train[0]["loss"] / 5
    # Each loss is made of its parts.
    first = train[0]
    assert first["loss"] == pytest.approx(sum(first["codebook_loss"]) + first["text_loss"], rel=1e-5)
    assert first["audio_loss"] == pytest.approx(sum(first["codebook_loss"]) / 8, rel=1e-5)
    valid = [row for row in rows if row["split"] == "valid"]
    assert [row["step"] for row in valid] == [*range(20, len(train), 20), len(train)]
    # Validation comes after the update and training's loss before it: on one batch, one is the next of the other.
    assert valid[0]["loss"] == pytest.approx(train[20]["loss"], rel=1e-4)
    assert (run / "loss.png").stat().st_size > 1000
    assert len((run / "matches.jsonl").read_text().splitlines()) == len(matches)
    sounds = sorted(path.name for path in (run / "samples").glob("*.wav"))
    assert len([name for name in sounds if name.startswith("step-")]) >= 1
    assert len([name for name in sounds if not name.startswith("step-")]) == 3
    assert all((run / "samples" / name).with_suffix(".png").is_file() for name in sounds)


def test_config_versions_and_git_state_are_recorded(finished: tuple[Path, list[Match]]) -> None:
    import yaml

    run, _ = finished
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["max_steps"] == 300 and config["model"]["config"]["hidden_size"] == 128
    environment = json.loads((run / "environment.json").read_text())
    assert torch.__version__.startswith(environment["versions"]["torch"])
    assert "max_steps=300" in environment["overrides"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    assert environment["git"]["commit"] == (commit or None)


def test_infer_py_says_it_again(finished: tuple[Path, list[Match]], tmp_path: Path) -> None:
    run, _ = finished
    command = [sys.executable, "infer.py", f"checkpoint={run}/export", f"conversation={run}/prompts.jsonl"]
    done = subprocess.run(
        [*command, f"output={tmp_path}/out", "generation=greedy", "device=cpu"],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "out").glob("*.wav")):
        again, first = (soundfile.read(folder / path.name)[0] for folder in (path.parent, run / "samples"))
        # Another process may sum in another order (it has more threads): the last bit of a sample.
        np.testing.assert_allclose(again, first, atol=2 / 2**15)


def test_transformers_loads_the_export(finished: tuple[Path, list[Match]], manifest: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run, _ = finished
    theirs = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(run / "export", use_text_head=True)
    ours = HiggsAudioV2ForConditionalGeneration.from_pretrained(run / "export", use_text_head=True)
    processor = HiggsAudioV2Processor.from_pretrained(run / "export")
    prompt = read_manifest(manifest)[0].prompt()
    inputs = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    expected = theirs.generate(**inputs, max_new_tokens=200, do_sample=False)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=200, do_sample=False), expected)


def test_the_text_head_opens_the_audio_itself(finished: tuple[Path, list[Match]], manifest: Path) -> None:
    run, _ = finished
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(run / "export", use_text_head=True)
    processor = HiggsAudioV2Processor.from_pretrained(run / "export")
    prompts = [sample.prompt() for sample in read_manifest(manifest)]
    both = {}
    for modality in ("audio", "text"):
        inputs = processor.apply_chat_template(
            prompts, add_generation_prompt=True, modality=modality, tokenize=True, return_dict=True
        )
        both[modality] = model.generate(**inputs, return_dict_in_generate=True)
    opened, written = both["audio"], both["text"]
    for row in range(len(prompts)):
        frames = written.audio_sequences[row][written.audio_sequences_mask[row]]
        assert torch.equal(frames, opened.audio_sequences[row][opened.audio_sequences_mask[row]])
        # Training taught what follows the audio too: its closing token and the end of the turn.
        told = processor.tokenizer.decode(written.sequences[row].tolist()).rstrip()
        assert "<|audio_eos|><|eot_id|>" in told


def test_a_codec_is_used_again(finished: tuple[Path, list[Match]], manifest: Path, tmp_path: Path) -> None:
    run, _ = finished
    codec = f"codec_path={run}/processor/audio_tokenizer"
    cases.run_here([*SMALL, f"data.train={manifest}", f"run_dir={tmp_path}", codec, "max_steps=1", "reproduce=false"])
    again = load_codec(tmp_path / "export" / "audio_tokenizer").state_dict()
    for name, tensor in load_codec(run / "processor" / "audio_tokenizer").state_dict().items():
        assert torch.equal(tensor, again[name])


def tokens_of(run: Path) -> Path:
    (folder,) = (run / "tokens").glob("train-0-*")
    return folder


def test_tokens_of_another_codec_are_refused(finished: tuple[Path, list[Match]], tmp_path: Path) -> None:
    run, _ = finished
    codec = cases.write_codec(tmp_path / "codec")
    overrides = [*SMALL, f"data.train={tokens_of(run)}", f"run_dir={tmp_path}/run", f"codec_path={codec}"]
    with pytest.raises(UserError, match="another codec"):
        cases.run_here(overrides)


def test_data_alone_cannot_bring_a_codec(finished: tuple[Path, list[Match]], tmp_path: Path) -> None:
    run, _ = finished
    with pytest.raises(UserError, match="codec_path"):
        cases.run_here([*SMALL, f"data.train={tokens_of(run)}", f"run_dir={tmp_path}/run"])


def test_warm_up_refuses_codes_that_mean_little() -> None:
    with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
        codec = cli.build(compose("codec/debug").codec)
    silence = [torch.zeros(24000), torch.zeros(30000)]
    settings = WarmupConfig(autoencoder_steps=0, decoder_steps=0, batch_size=1)
    with pytest.raises(UserError, match="codes would mean little"):
        warm_up(codec, silence, settings, torch.Generator().manual_seed(0), lambda *_: None)


def test_equal_codes_counts_missing_frames_as_wrong() -> None:
    codes = torch.arange(8).view(2, 4)
    assert equal_codes(codes, codes) == 1.0
    assert equal_codes(codes[:, :3], codes) == 0.75
    assert equal_codes(codes[:, :0], codes) == 0.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["optim.learning_rate=1"], "optim.learning_rate"),
        (["+experiment=overfit", "+max_step=3"], "max_step"),
        (["+model.config.hidden=3"], "model.config.hidden"),
        (["+codec.config.codebook_sise=3"], "codebook_sise"),
        (["+model.config.rope_parameters.teta=3"], "teta"),
        (["task=codec", "parallel.compile=true"], "task=lm"),
        (["+experiment=nonsense"], "nonsense"),
        (["-m", "sed=0,1"], "Did you mean 'seed'"),
        (["+experiment=finetune"], "init_from=PATH"),
        (["+experiment=mini"], "data.train"),
        (["+experiment=base_3b"], "tokenizer.folder"),
        (["precision=fp16"], "precision"),
        (["task=asr"], "task"),
    ],
)
def test_train_py_says_one_sentence(overrides: list[str], said: str, tmp_path: Path) -> None:
    given = [] if said == "data.train" else [f"data.train={tmp_path}/none.jsonl"]
    command = [sys.executable, "train.py", f"run_dir={tmp_path}", *given, *overrides]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
