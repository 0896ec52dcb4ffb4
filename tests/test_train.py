"""The first training slice: from a manifest to a checkpoint that says its samples again, and its failures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir

from higgs import HiggsAudioV2ForConditionalGeneration, cli
from higgs.checkpoint.io import load_codec
from higgs.data.coded import code_samples, load_clips, training_batch
from higgs.data.manifest import read_manifest
from higgs.errors import UserError
from higgs.processor import HiggsAudioV2Processor
from higgs.train.codec_warmup import WarmupConfig, warm_up
from higgs.train.loop import OptimConfig, batch_loss, learning_rate
from higgs.train.run import Match, Parts, TrainConfig, equal_codes, train

PROJECT = Path(__file__).parents[1]
SPEECH = PROJECT / "examples" / "speech"
SMALL = [
    "codec_warmup.autoencoder_steps=2", "codec_warmup.decoder_steps=1", "codec_warmup.batch_size=2",
    "model.config.hidden_size=128", "model.config.intermediate_size=256", "model.config.num_hidden_layers=2",
    "model.config.head_dim=32", "optim.lr=4e-3", "optim.warmup_steps=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three shipped samples."""
    path = tmp_path_factory.mktemp("data") / "manifest.jsonl"
    lines = (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    path.write_text("\n".join(line.replace('"url": "', f'"url": "{SPEECH}/') for line in lines), encoding="utf-8")
    return path


def run_training(*overrides: str) -> list[Match]:
    with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
        config = compose("train", ["+experiment=overfit", *SMALL, *overrides])
    parts = Parts(
        codec=lambda: cli.build(config.codec),
        tokenizer=cli.build(config.tokenizer),
        model=lambda ids: cli.build(config.model, config=ids),
        chat=cli.build(config.chat),
    )
    return train(cli.to_dataclass(TrainConfig, config), parts)


@pytest.fixture(scope="module")
def finished(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Match]]:
    run = tmp_path_factory.mktemp("run")
    matches = run_training(f"data.train={manifest}", f"run_dir={run}", "max_steps=300")
    return run, matches


def test_every_code_comes_back_from_the_text_alone(finished: tuple[Path, list[Match]]) -> None:
    _, matches = finished
    assert len(matches) == 3
    for match in matches:
        assert match.codes_equal >= 0.99
        assert match.frames_off <= 1
        assert match.stopped


def test_the_run_leaves_its_records(finished: tuple[Path, list[Match]]) -> None:
    run, matches = finished
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {"loss", "text_loss", "audio_loss", "codebook_loss", "lr", "grad_norm"} <= set(rows[0])
    assert len(rows[0]["codebook_loss"]) == 8
    assert rows[-1]["loss"] < rows[0]["loss"] / 5
    assert (run / "loss.png").stat().st_size > 1000
    assert len((run / "matches.jsonl").read_text().splitlines()) == len(matches)
    assert sorted(path.suffix for path in (run / "samples").iterdir()) == [".png"] * 3 + [".wav"] * 3


def test_infer_py_says_it_again(finished: tuple[Path, list[Match]], tmp_path: Path) -> None:
    run, _ = finished
    command = [sys.executable, "infer.py", f"checkpoint={run}/export", f"conversation={run}/prompts.jsonl"]
    done = subprocess.run(
        [*command, f"output={tmp_path}/out", "generation=greedy", "device=cpu"],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in sorted((run / "samples").glob("*.wav")):
        again, first = (soundfile.read(folder / path.name)[0] for folder in (tmp_path / "out", path.parent))
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
    run_training(f"data.train={manifest}", f"run_dir={tmp_path}", f"codec_path={run}/codec", "max_steps=1")
    again = load_codec(tmp_path / "export" / "audio_tokenizer").state_dict()
    for name, tensor in load_codec(run / "codec").state_dict().items():
        assert torch.equal(tensor, again[name])


def test_labels_of_a_batch_have_one_stop_code_per_codebook_and_clip(
    finished: tuple[Path, list[Match]], manifest: Path
) -> None:
    processor = HiggsAudioV2Processor.from_pretrained(finished[0] / "export")
    samples = read_manifest(manifest)
    coded = code_samples(processor, samples, load_clips(samples, processor.audio_tokenizer.sample_rate))
    batch = training_batch(processor, coded)
    stops = (batch["audio_labels"] == processor.audio_stream_eos_id).sum(dim=1)
    assert torch.equal(stops, torch.ones_like(stops))
    frames = torch.tensor([sample.messages[-1]["content"][0]["codes"].shape[1] for sample in coded])
    assert torch.equal((batch["audio_labels"] >= 0).sum(dim=1), frames[:, None].expand(-1, 8) + 1)


def test_loss_does_not_depend_on_padding_or_batching(finished: tuple[Path, list[Match]], manifest: Path) -> None:
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(finished[0] / "export", use_text_head=True).double()
    processor = HiggsAudioV2Processor.from_pretrained(finished[0] / "export")
    samples = read_manifest(manifest)
    coded = code_samples(processor, samples, load_clips(samples, processor.audio_tokenizer.sample_rate))
    whole = batch_loss(model, training_batch(processor, coded))
    alone = [batch_loss(model, training_batch(processor, [sample])) for sample in coded]
    for name in ("codebook_sum", "codebook_count", "text_sum", "text_count"):
        torch.testing.assert_close(getattr(whole, name), sum(getattr(one, name) for one in alone), rtol=1e-6, atol=1e-6)


def test_warm_up_refuses_codes_that_mean_little() -> None:
    with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
        codec = cli.build(compose("codec/debug").codec)
    silence = [torch.zeros(24000), torch.zeros(30000)]
    settings = WarmupConfig(autoencoder_steps=0, decoder_steps=0, batch_size=1)
    with pytest.raises(UserError, match="codes would mean little"):
        warm_up(codec, silence, settings, torch.Generator().manual_seed(0), lambda *_: None)


def test_learning_rate_warms_up_and_falls() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


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
        (["+model.config.hidden=3"], "hidden"),
        (["+experiment=nonsense"], "nonsense"),
    ],
)
def test_train_py_says_one_sentence(overrides: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", f"run_dir={tmp_path}", f"data.train={tmp_path}/none.jsonl", *overrides]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr or said == "hidden"
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
