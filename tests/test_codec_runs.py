"""The codec through `train.py`: killed and resumed bit for bit, two ranks as one, export."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import train_cases as cases

from higgs.checkpoint.io import load_codec

TINY = [
    "+experiment=codec_debug", "device=cpu", "max_steps=7", "save_every=2", "valid_every=4", "sample_every=null",
    "data.batch_size=4", "data.crop_seconds=0.32", "codec_training.quantizer_start=1",
    "codec_training.discriminator_start=3", "codec_training.replace_every=2", "codec_training.dead_below=0.05",
    "codec_training.discriminator.period_widths=[4,8,8,8]", "codec_training.loss.mel_windows=[512]",
    "codec_training.loss.mel_bands=[40]", "optim.ema_decay=0.9", "codec.config.acoustic_model_config.decoder_hidden_size=32",
    "codec.config.acoustic_model_config.encoder_hidden_size=4",
]  # fmt: skip
NUMBERS = ("loss", "mel_loss", "feature_loss", "discriminator_loss", "commitment_loss", "semantic_loss", "grad_norm")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips: tones that glide, with some noise."""
    folder = tmp_path_factory.mktemp("sounds")
    chance = np.random.default_rng(0)
    lines = []
    for number in range(5):
        time = np.arange(16000 * 2) / 16000
        tone = np.sin(2 * np.pi * (120 + 60 * number) * time * (1 + 0.1 * time))
        sound = 0.3 * tone + 0.02 * chance.normal(size=len(time))
        soundfile.write(folder / f"{number}.wav", sound, 16000)
        lines.append(json.dumps({"audio": f"{number}.wav", "kind": "speech"}))
    (folder / "clips.jsonl").write_text("\n".join(lines))
    return folder / "clips.jsonl"


def overrides(run: Path, manifest: Path, *more: str) -> list[str]:
    return [*TINY, f"run_dir={run}", f"data.train={manifest}", f"data.valid={manifest}", *more]


def numbers(run: Path) -> dict[int, list]:
    return {
        step: [*(row[name] for name in NUMBERS), *row.get("codebook_use", [])] for step, row in cases.log(run).items()
    }


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    cases.finish(cases.start(overrides(run, manifest)))
    return run


def test_killed_it_goes_on_bit_for_bit(whole: Path, manifest: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (3, 5):
        cases.kill_at(step, run, overrides(run, manifest))
    cases.finish(cases.start(overrides(run, manifest)))
    assert numbers(run) == numbers(whole)
    valid = [[row for row in cases.records(one) if row["split"] == "valid"] for one in (run, whole)]
    assert valid[0] == valid[1] and [row["step"] for row in valid[0]] == [4, 7]
    ours, theirs = (load_codec(one / "export").state_dict() for one in (run, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_two_ranks_train_what_one_trains(whole: Path, manifest: Path, tmp_path: Path) -> None:
    more = overrides(tmp_path, manifest, "parallel.strategy=ddp")
    cases.finish(cases.start(more, 2, cases.free_port()))
    ours, theirs = numbers(tmp_path), numbers(whole)
    for step in theirs:
        np.testing.assert_allclose(ours[step], theirs[step], rtol=2e-4, atol=1e-6, err_msg=f"step {step}")
    codes, again = (load_codec(run / "export").quantizer.quantizers for run in (whole, tmp_path))
    for stage, other in zip(codes, again, strict=True):
        torch.testing.assert_close(stage.codebook.embed, other.codebook.embed, rtol=1e-3, atol=1e-4)


def test_the_export_has_no_weight_norm(whole: Path) -> None:
    codec = load_codec(whole / "export")
    assert not any(torch.nn.utils.parametrize.is_parametrized(module) for module in codec.acoustic_decoder.modules())
    row = [row for row in cases.records(whole) if row["split"] == "valid"][-1]
    assert set(row["mel_distance"]) == {"0.35", "0.7", "1.05", "1.4"}
    assert len(row["codebook_use"]) == len(row["codebook_perplexity"]) == 8
