"""Every experiment takes three steps at debug size; sweeps, comparison, and Weights & Biases without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import train_cases as cases
import yaml
from test_checkpoint_boson import boson_folder

from higgs import HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Processor
from higgs.__main__ import main as higgs_command
from higgs.data.manifest import read_manifest
from higgs.errors import UserError

EXPERIMENTS = sorted(path.stem for path in (cases.PROJECT / "configs" / "experiment").glob("*.yaml"))
LANGUAGE = [name for name in EXPERIMENTS if not name.startswith("codec_")]
CODEC = [name for name in EXPERIMENTS if name.startswith("codec_")]
# What makes any of them small; batch sizes stay a multiple of the micro-batches.
SMALL = [
    *cases.TINY, "max_steps=3", "save_every=null", "valid_every=2", "sample_every=2", "sample_count=1", "accumulate=1",
    "data.workers=0", "parallel.strategy=none", "parallel.compile=false", "precision=fp32",
    "generation.max_new_tokens=12", "model.config.max_position_embeddings=512",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to fine-tune."""
    run = tmp_path_factory.mktemp("trained")
    cases.run_here(cases.arguments(run, *parts, "max_steps=3"))
    return run / "export"


def check_records(run: Path) -> list[dict]:
    rows = cases.records(run)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3]
    assert [row["step"] for row in rows if row["split"] == "valid"] == [2, 3]
    assert all(row["loss"] is not None and row["loss"] > 0 for row in rows)
    assert (run / "loss.png").is_file() and (run / "checkpoints" / "step-00000003").is_dir()
    return rows


@pytest.mark.parametrize("experiment", LANGUAGE)
def test_language_models_take_three_steps(
    experiment: str, parts: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    manifest, codec = parts
    more = [f"run_dir={tmp_path}", f"data.train={manifest}", f"data.valid={manifest}"]
    more += [f"init_from={trained}"] if experiment == "finetune" else [f"codec_path={codec}"]
    if experiment == "base_3b":
        more += ["tokenizer=file", f"tokenizer.folder={trained}"]
    cases.run_here([f"+experiment={experiment}", *SMALL, *more])
    check_records(tmp_path)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "export", use_text_head=True)
    assert model.config.hidden_size == 32


@pytest.mark.parametrize("experiment", CODEC)
def test_codecs_take_three_steps(experiment: str, shared_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    manifest = tmp_path / "sounds.jsonl"
    clips = sorted((shared_data / "ljspeech").glob("*.flac"))[:3]
    manifest.write_text(
        "".join(json.dumps({"audio": str(path), "kind": "speech", "duration": 1.5}) + "\n" for path in clips)
    )
    small = [
        "codec=debug", "max_steps=3", "save_every=null", "valid_every=2", "sample_every=2", "accumulate=1", "device=cpu",
        "data.workers=0", "data.batch_size=2", "data.crop_seconds=0.5", "parallel.strategy=none", "precision=fp32",
        "codec_training.quantizer_start=1", "codec_training.discriminator_start=1", "codec_training.teacher=null",
        "codec_training.discriminator.period_widths=[4,8,8,8]", "codec_training.discriminator.band_width=4",
    ]  # fmt: skip
    cases.run_here([f"+experiment={experiment}", *small, f"run_dir={tmp_path}/run", *both(manifest)])
    rows = check_records(tmp_path / "run")
    assert len(rows[-1]["codebook_use"]) == 8
    assert (tmp_path / "run" / "trend.png").is_file()
    sounds = list((tmp_path / "run" / "samples").glob("*.wav"))
    assert sounds and all(soundfile.info(path).samplerate == 24000 for path in sounds)
    transformers.HiggsAudioV2TokenizerModel.from_pretrained(tmp_path / "run" / "export")


def both(manifest: Path) -> list[str]:
    return [f"data.train={manifest}", f"data.valid={manifest}"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loops_loss_is_that_of_the_public_model(
    parts: tuple[Path, Path], trained: Path, tmp_path: Path, precision: str
) -> None:
    """A checkpoint that is fine-tuned at rate 0: validation gives what `model(**batch, labels=…)` gives."""
    more = [f"init_from={trained}", "codec_path=null", "optim.lr=0", "max_steps=1", f"precision={precision}"]
    cases.run_here(cases.arguments(tmp_path, *parts, *more, f"data.valid={parts[0]}"))
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(trained, use_text_head=True)
    processor = HiggsAudioV2Processor.from_pretrained(trained)
    conversations = [sample.messages for sample in read_manifest(parts[0])]
    batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, output_labels=True)
    row = cases.records(tmp_path)[-1]
    assert row["split"] == "valid"
    assert row["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5 if precision == "fp32" else 2e-3)


def test_loss_weights_come_from_the_config(parts: tuple[Path, Path], tmp_path: Path) -> None:
    weights = [0.5, 0, 0, 1, 0, 0, 0, 2]
    more = ["loss.text=0.25", f"loss.codebooks={weights}", "max_steps=2"]
    cases.run_here(cases.arguments(tmp_path, *parts, *more))
    for row in cases.log(tmp_path).values():
        weighted = sum(weight * loss for weight, loss in zip(weights, row["codebook_loss"], strict=True))
        assert row["loss"] == pytest.approx(weighted + 0.25 * row["text_loss"], rel=1e-5)
    with pytest.raises(UserError, match="has 1 weights"):
        cases.run_here(cases.arguments(tmp_path / "other", *parts, "loss.codebooks=[1]"))


def test_the_original_releases_checkpoint_is_fine_tuned(
    parts: tuple[Path, Path], processor: HiggsAudioV2Processor, tmp_path: Path
) -> None:
    """A decoder in the original's format, with tokenizer and codec beside it; the text table and head stay."""
    processor.save_pretrained(tmp_path / "boson")
    names = (
        "audio_token_id",
        "audio_bos_token_id",
        "audio_delay_token_id",
        "audio_stream_bos_id",
        "audio_stream_eos_id",
    )
    ids = {name: getattr(processor, name) for name in names}
    boson_folder(tmp_path / "boson", vocab_size=processor.tokenizer.vocab_size, codebook_size=1026, **ids)
    before = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "boson", use_text_head=True)
    config = before.config
    clips = cases.write_manifest(tmp_path / "clips.jsonl", 4, config.num_codebooks, 1024)
    more = [f"init_from={tmp_path}/boson", "codec_path=null", "freeze.text_rows=true", "max_steps=2", "optim.lr=0.01"]
    cases.run_here(cases.arguments(tmp_path / "run", clips, parts[1], *more))
    after = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "run" / "export", use_text_head=True)
    for name, tensor in before.state_dict().items():
        stays = name in ("model.embed_tokens.weight", "text_lm_head.weight")
        assert torch.equal(tensor, after.state_dict()[name]) == stays, name


def test_a_text_model_is_the_start(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """With nothing learnt, the export's text path and its audio path are the Llama's."""
    import transformers

    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": 300,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    llama.save_pretrained(tmp_path / "llama")
    more = [f"text_model={tmp_path}/llama", "optim.lr=0", "max_steps=1"]
    cases.run_here(cases.arguments(tmp_path / "run", *parts, *more))
    started = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "run" / "export")
    layer, theirs = started.model.layers[1], llama.model.layers[1]
    for ours in (layer.mlp, layer.audio_mlp):
        assert torch.equal(ours.gate_proj.weight, theirs.mlp.gate_proj.weight)
    assert torch.equal(started.model.embed_tokens.weight[:300], llama.model.embed_tokens.weight)


def test_fine_tuning_keeps_frozen_rows(parts: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    more = [
        f"init_from={trained}",
        "freeze.embedding_rows=50",
        "optim.weight_decay=0.5",
        "optim.lr=0.01",
        "codec_path=null",
    ]
    cases.run_here(cases.arguments(tmp_path, *parts, *more, "max_steps=3"))
    before = HiggsAudioV2ForConditionalGeneration.from_pretrained(trained, use_text_head=True)
    after = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "export", use_text_head=True)
    rows = [model.model.embed_tokens.weight for model in (before, after)]
    assert rows[0][:50].equal(rows[1][:50]) and not rows[0][50:].equal(rows[1][50:])


def test_one_line_sweeps_and_compare(parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [sys.executable, "train.py", "-m", *cases.arguments(tmp_path / "sweep", *parts, "max_steps=2")]
    done = subprocess.run([*command, "seed=1,2"], cwd=cases.PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["seed=1", "seed=2"]
    picture = tmp_path / "compare.png"
    higgs_command(["compare", *map(str, runs), "--plot", str(picture)])
    told = capsys.readouterr().out
    header, _, *rows = told.splitlines()[:4]
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["run", "seed", "steps"]
    assert {row.split("|")[2].strip() for row in rows} == {"1", "2"}
    assert "max_steps=2" in told and picture.stat().st_size > 1000
    higgs_command(["compare", *map(str, runs), str(tmp_path), "--plot", str(picture)])
    told = capsys.readouterr()
    assert f"left out: {tmp_path} is no run" in told.err and "seed=2" in told.out
    with pytest.raises(SystemExit):
        higgs_command(["compare", str(tmp_path)])
    assert "None of the given paths" in capsys.readouterr().err


def test_sweeps_run_side_by_side(parts: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [sys.executable, "train.py", "-m", "+sweep=parallel"]
    overrides = cases.arguments(tmp_path / "sweep", *parts, "max_steps=2", "optim.lr=0.001,0.002")
    done = subprocess.run([*command, *overrides], cwd=cases.PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["optim.lr=0.001", "optim.lr=0.002"]
    assert all((run / "export" / "model.safetensors").is_file() for run in runs)


def test_weights_and_biases_offline(parts: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = ["logger.mode=offline", "max_steps=2", "sample_every=1", "sample_count=1", "generation.max_new_tokens=20"]
    command = [sys.executable, "train.py", *cases.arguments(tmp_path, *parts, *more)]
    done = subprocess.run(command, cwd=cases.PROJECT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    logs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 1 and b"train/codebook_loss_7" in logs[0].read_bytes()
    media = list((tmp_path / "wandb").glob("offline-run-*/files/media/**/*.png"))
    assert len(media) == len(list((tmp_path / "samples").glob("*.png"))) > 0


def test_an_untaken_checkpoint_is_named(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resume is"):
        cases.run_here(cases.arguments(tmp_path, *parts, "resume=nowhere"))


def test_the_config_of_a_run_is_plain_yaml(trained: Path) -> None:
    text = (trained.parent / "config.yaml").read_text()
    assert "!!python" not in text and yaml.safe_load(text)["data"]["batch_size"] == 4
