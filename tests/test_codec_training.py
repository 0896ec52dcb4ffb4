"""The codec's training step: one that lowers the loss, resumes bit for bit, and does not depend on ranks."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from codec_cases import SHAPES, TEACHER, make_codec
from torch import Tensor

from higgs.audio import load_audio
from higgs.checkpoint.io import load_codec
from higgs.codec import Codec, HiggsAudioV2TokenizerConfig
from higgs.codec.acoustic import Snake, SnakeFunction, add_weight_norm, convolutions, remove_weight_norm
from higgs.codec.discriminators import DiscriminatorConfig
from higgs.codec.losses import LossConfig, mel_distance
from higgs.data.stream import StepBatch
from higgs.errors import UserError
from higgs.train.codec_task import CodecTask, CodecTrainingConfig
from higgs.train.distributed import World
from higgs.train.optim import OptimConfig

# Hop 960, 2 and 3 codebooks of 16 codes, as small as it gets.
TINY = {
    "target_bandwidths": [0.21, 0.31],
    "codebook_size": 16,
    "codebook_dim": 8,
    "acoustic_model_config": {
        "encoder_hidden_size": 4,
        "downsampling_ratios": [12, 10, 8],
        "decoder_hidden_size": 32,
        "upsampling_ratios": [8, 10, 12],
        "hidden_size": 16,
    },
    "semantic_model_config": {**TEACHER, "num_hidden_layers": 1},
}
CRITICS = {
    "periods": [2, 3],
    "period_widths": [4, 4],
    "windows": [256],
    "bands": [[0.0, 0.5], [0.5, 1.0]],
    "band_width": 4,
}
CROP = 4800


def config(**change: Any) -> CodecTrainingConfig:
    settings = {
        "dead_below": 0.5,
        "discriminator_start": 1,
        "loss": LossConfig(mel_windows=[128, 1024], mel_bands=[10, 80]),
        "discriminator": DiscriminatorConfig(**CRITICS),
        "num_samples": 1,
    }
    return CodecTrainingConfig(**{**settings, **change})


def make_task(world: World | None = None, optim: dict | None = None, **change: Any) -> CodecTask:
    codec = Codec(HiggsAudioV2TokenizerConfig.from_dict(copy.deepcopy(TINY)))
    settings = {"lr": 2e-3, "betas": [0.8, 0.99], "warmup_steps": 1, "clip_grad_norm": 1.0, **(optim or {})}
    return CodecTask(codec, config(**change), OptimConfig(**settings), world or World(), max_steps=50, seed=3)


def step_batch(step: int, rank: int = 0, size: int = 1, accumulate: int = 1, rows: int = 8) -> StepBatch:
    """Rows of chords with noise, as a stream deals them out: micro-batch m of rank r is the (m·size + r)-th piece."""
    generator = torch.Generator().manual_seed(100 + step)
    time = torch.arange(CROP) / 24000
    pitches = 100 + 900 * torch.rand(rows, 3, 1, generator=generator)
    waves = 0.1 * torch.sin(2 * torch.pi * pitches * time).sum(1) + 0.01 * torch.randn(rows, CROP, generator=generator)
    pieces = waves[:, None].split(rows // (size * accumulate))
    return StepBatch([{"waveform": pieces[m * size + rank]} for m in range(accumulate)], [], rows)


def run_steps(task: CodecTask, steps: range, **split: int) -> list[dict]:
    return [task.train_step(step_batch(step, **split), step).metrics for step in steps]


def codebooks(task: CodecTask) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in task.codec.quantizer.named_buffers()}


# ------------------------------------------------------------------------------------------------- the step


def test_a_step_reports_everything():
    task = make_task()
    first, second = (task.train_step(step_batch(step), step) for step in range(2))
    for result, judged in ((first, False), (second, True)):
        metrics = result.metrics
        assert result.finite and result.frames == result.tokens == 8 * 5
        assert {"loss", "mel_loss", "semantic_loss", "commitment_loss", "lr", "grad_norm"} <= metrics.keys()
        assert metrics["audio_seconds"] == pytest.approx(8 * CROP / 24000)
        assert len(metrics["codebook_use"]) == len(metrics["codebook_perplexity"]) == metrics["codebooks"] in (2, 3)
        assert all(
            (metrics[name] != 0) == judged for name in ("adversarial_loss", "discriminator_loss", "feature_loss")
        )
        loss = task.config.loss
        expected = (
            loss.mel_weight * metrics["mel_loss"] + loss.feature_weight * metrics["feature_loss"]
            + loss.adversarial_weight * metrics["adversarial_loss"] + loss.semantic_weight * metrics["semantic_loss"]
            + loss.commitment_weight * metrics["commitment_loss"]
        )  # fmt: skip
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_bandwidths_are_drawn_from_seed_and_step():
    task = make_task()
    again, drawn = make_task(), [task.num_codebooks_at(step) for step in range(40)]
    assert set(drawn) == {2, 3} and drawn == [again.num_codebooks_at(step) for step in range(40)]
    fixed = make_task(random_bandwidth=False)
    assert {fixed.num_codebooks_at(step) for step in range(10)} == {3}


def test_stages_that_a_step_leaves_out_do_not_change():
    task = make_task()
    run_steps(task, range(2))
    step = next(step for step in range(2, 50) if task.num_codebooks_at(step) == 2)
    before = copy.deepcopy(task.codec.quantizer.state_dict())
    task.train_step(step_batch(step), step)
    changed = {
        name for name, tensor in task.codec.quantizer.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert {name.split(".")[1] for name in changed} == {"0", "1"}


def test_what_learns_and_what_does_not():
    task = make_task()
    before = {name: tensor.clone() for name, tensor in task.tensors().items()}
    run_steps(task, range(4))
    still = {name for name, tensor in task.tensors().items() if torch.equal(tensor, before[name])}
    assert all(name.startswith("codec.semantic_model.") for name in still if ".exp_avg" not in name), still
    assert any(name.startswith("codec.semantic_model.") for name in still)


def test_nothing_is_quantized_before_the_start():
    task = make_task(quantizer_start=2, discriminator_start=2)
    early = [task.train_step(step_batch(step), step).metrics for step in range(2)]
    assert not task.fitted and all(m["codebooks"] == 0 and m["commitment_loss"] == 0 for m in early)
    assert not task.codec.quantizer.quantizers[0].codebook.embed.any()
    later = task.train_step(step_batch(2), 2).metrics
    assert task.fitted and later["codebooks"] in (2, 3)
    with pytest.raises(UserError, match="start them later"):
        config(quantizer_start=5, discriminator_start=2)


def test_a_step_that_is_not_finite_changes_nothing():
    task = make_task()
    run_steps(task, range(2))
    before = {name: tensor.clone() for name, tensor in task.tensors().items()}
    batch = step_batch(2)
    batch.micro[0]["waveform"][0, 0, 7] = math.nan
    assert not task.train_step(batch, 2).finite
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.tensors().items())
    assert task.train_step(step_batch(3), 3).finite


def test_a_first_batch_that_is_not_finite_fits_no_codebooks():
    task = make_task()
    batch = step_batch(0)
    batch.micro[0]["waveform"][3, 0, 7] = math.inf
    assert not task.train_step(batch, 0).finite
    assert not task.fitted
    assert task.train_step(step_batch(1), 1).finite and task.fitted


def test_a_threshold_that_no_code_can_reach_is_told():
    with pytest.warns(UserWarning, match="only 2.5 vectors for each code"):
        run_steps(make_task(dead_below=2.5), range(1))


def test_operations_are_counted():
    task = make_task()
    early, judged = (task.train_step(step_batch(step), step).flops for step in range(2))
    assert 0 < early < judged
    # The first convolution of the decoder alone, forward and backward, over 5 frames of 8 clips: 2 operations a product.
    assert early > 3 * 8 * 5 * 2 * 16 * 32 * 7


def test_loss_falls_on_real_speech(shared_data: Path):
    wave = load_audio(shared_data / "ljspeech" / "LJ001-0002.flac", 24000)[: 4 * CROP].view(4, 1, CROP)
    task = make_task(optim={"lr": 4e-3}, discriminator_start=20)
    losses = [task.train_step(StepBatch([{"waveform": wave}], [], 4), step).metrics["mel_loss"] for step in range(25)]
    assert losses[-1] < 0.6 * losses[0]


def test_bf16_stays_near_fp32():
    task = make_task()
    codec = Codec(HiggsAudioV2TokenizerConfig.from_dict(copy.deepcopy(TINY)))
    half = CodecTask(codec, config(), task.optim, World(), max_steps=50, seed=3, precision="bf16")
    for step in range(2):
        full, low = (each.train_step(step_batch(step), step).metrics for each in (task, half))
        assert low["mel_loss"] == pytest.approx(full["mel_loss"], rel=0.1)
        assert math.isfinite(low["loss"])
    assert all(p.dtype == torch.float32 for p in half.codec.parameters())


# ------------------------------------------------------------------------------------- state, ranks, micro-batches


def test_resumed_steps_are_the_same_bit_for_bit():
    task = make_task(optim={"ema_decay": 0.9})
    run_steps(task, range(3))
    tensors = {name: tensor.detach().clone() for name, tensor in task.tensors().items()}
    scalars = copy.deepcopy(task.scalars())
    expected = run_steps(task, range(3, 6))
    after = {name: tensor.detach().clone() for name, tensor in task.tensors().items()}
    for again in (task, make_task(optim={"ema_decay": 0.9})):
        with torch.no_grad():
            for name, tensor in again.tensors().items():
                tensor.copy_(tensors[name])
        again.load_scalars(scalars)
        assert run_steps(again, range(3, 6)) == expected
        assert all(torch.equal(tensor, after[name]) for name, tensor in again.tensors().items())


def test_micro_batches_do_not_change_the_step():
    whole, parts = make_task(), make_task()
    for one, other in zip(run_steps(whole, range(3)), run_steps(parts, range(3), accumulate=2), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["codebooks"] == other["codebooks"]
    for name, buffer in codebooks(whole).items():
        torch.testing.assert_close(buffer, codebooks(parts)[name], atol=1e-4, rtol=1e-4)


def codebooks_in_double(world: World, split: dict[str, int]) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps, of k-means, moving averages and dead codes (most of them, at this threshold), in float64, where two
    halves of a batch are rounded as the whole is."""
    codec = Codec(HiggsAudioV2TokenizerConfig.from_dict(copy.deepcopy(TINY))).double()
    settings = config(dead_below=3.0, discriminator_start=100)
    task = CodecTask(codec, settings, OptimConfig(lr=2e-3, warmup_steps=1), world, max_steps=50, seed=3)
    losses = []
    for step in range(3):
        batch = step_batch(step, **split)
        for micro in batch.micro:
            micro["waveform"] = micro["waveform"].double()
        losses.append(task.train_step(batch, step).metrics["loss"])
    return losses, codebooks(task)


def one_rank(rank: int, size: int, store: str, found: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    losses, buffers = codebooks_in_double(World(rank, size, torch.device("cpu")), {"rank": rank, "size": size})
    found[rank] = losses, {name: buffer.numpy() for name, buffer in buffers.items()}
    torch.distributed.destroy_process_group()


def test_two_ranks_on_half_batches_give_the_codebooks_of_one(tmp_path: Path):
    losses, alone = codebooks_in_double(World(), {})
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        found = manager.dict()
        mp.spawn(one_rank, args=(2, str(tmp_path / "store"), found), nprocs=2)
        results = dict(found)
    for rank in range(2):
        assert results[rank][0] == pytest.approx(losses, rel=1e-6)
        for name, buffer in alone.items():
            torch.testing.assert_close(torch.from_numpy(results[rank][1][name]), buffer, atol=1e-6, rtol=1e-6)


def test_gradients_of_two_ranks_are_those_of_one():
    """Without processes: what the ranks would send each other is averaged by hand."""
    first = make_task()
    first.train_step(step_batch(0), 0)

    def gradients(rank: int, size: int) -> dict[str, Tensor]:
        task = make_task()
        task.fitted = True
        with torch.no_grad():
            for name, tensor in task.tensors().items():
                tensor.copy_(first.tensors()[name])
        task._update = lambda *_: None
        task.train_step(step_batch(1, rank, size), 1)
        return {name: p.grad for name, p in {**task.weights, **task.critic_weights}.items() if p.grad is not None}

    whole, halves = gradients(0, 1), [gradients(rank, 2) for rank in range(2)]
    for name, gradient in whole.items():
        mean = (halves[0][name] + halves[1][name]) / 2
        torch.testing.assert_close(mean, gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-7, rtol=1e-3)


# ------------------------------------------------------------------------------------------ validation, export


def test_validation_measures_every_prefix(tmp_path: Path):
    task = make_task()
    run_steps(task, range(3))
    found = task.validate([step_batch(50), step_batch(51)])
    assert list(found["mel_distance"]) == ["0.21", "0.31"]
    clips = torch.cat([step_batch(step).micro[0]["waveform"] for step in (50, 51)])
    task.codec.eval()
    with torch.no_grad():
        for bandwidth, distance in found["mel_distance"].items():
            heard = task.codec(clips, bandwidth=float(bandwidth)).audio_values
            expected = sum(mel_distance(a, b, 24000) for a, b in zip(heard, clips, strict=True)) / len(clips)
            assert distance == pytest.approx(float(expected), abs=1e-5)
        codes = task.codec.encode(clips).audio_codes
    assert found["codebook_use"] == pytest.approx([codes[:, k].unique().numel() / 16 for k in range(3)], abs=1e-4)
    files = task.write_samples(tmp_path, 3)
    assert len(files) == 2 * 3 and all(file.stat().st_size > 1000 for file in files)
    assert load_audio(tmp_path / "step-00000003-0-original.wav").shape == (CROP,)
    with pytest.raises(UserError, match="no clip"):
        task.validate([])


def test_silence_that_fills_up_a_clip_does_not_count():
    task = make_task()
    run_steps(task, range(2))
    wave = step_batch(50).micro[0]["waveform"][:2]
    filled = torch.nn.functional.pad(wave, (0, 3 * CROP))
    alone, padded = (task.validate([StepBatch([{"waveform": clips}], [], 2)]) for clips in (wave, filled))
    assert padded["codebook_use"] == alone["codebook_use"]
    for bandwidth, distance in alone["mel_distance"].items():
        assert padded["mel_distance"][bandwidth] == pytest.approx(distance, abs=1e-4)


def test_the_export_is_the_codec_that_was_trained_and_transformers_reads_it(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    task = make_task(optim={"ema_decay": 0.5})
    run_steps(task, range(4))
    task.validate([step_batch(50)])
    task.export(tmp_path / "export")
    assert (tmp_path / "trend.png").stat().st_size > 1000
    assert not any(
        "parametrizations.weight" in name for name in load_codec(tmp_path / "export").acoustic_encoder.state_dict()
    )
    waves = step_batch(60).micro[0]["waveform"]
    theirs = transformers.HiggsAudioV2TokenizerModel.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad(), task._averaged():
        expected = task.codec.encode(waves).audio_codes
        sound = task.codec.decode(expected).audio_values
        exported = load_codec(tmp_path / "export")
        assert torch.equal(exported.encode(waves).audio_codes, expected)
        torch.testing.assert_close(exported.decode(expected).audio_values, sound)
        torch.testing.assert_close(theirs.decode(expected).audio_values, sound, atol=1e-5, rtol=1e-4)
        for row, clip in zip(expected, waves, strict=True):
            assert torch.equal(theirs.encode(clip[None]).audio_codes[0], row)
    # A trained codec goes on from where it is.
    more = CodecTask(load_codec(tmp_path / "export"), config(), task.optim, World(), max_steps=50)
    assert more.fitted and torch.equal(
        codebooks(more)["quantizers.0.codebook.embed"], codebooks(task)["quantizers.0.codebook.embed"]
    )


# --------------------------------------------------------------------------------------------- weight norm, Snake


def test_weight_norm_comes_and_goes_without_a_trace():
    codec = make_codec("release-like")
    wave = torch.randn(1, 1, 4800)
    with torch.no_grad():
        before, codes = codec.state_dict(), codec.encode(wave).audio_codes
        sound = codec.decode(codes).audio_values
        add_weight_norm(codec.acoustic_encoder, codec.acoustic_decoder)
        add_weight_norm(codec.acoustic_encoder)  # no harm
        for branch in (codec.acoustic_encoder, codec.acoustic_decoder):
            for conv in convolutions(branch):
                length = conv.parametrizations.weight.original0
                assert length.shape == (conv.weight.shape[0], 1, 1)
                torch.testing.assert_close(length, conv.weight.flatten(1).norm(dim=1)[:, None, None])
        assert not any("parametrizations" in name for name in codec.encoder_semantic.state_dict())
        torch.testing.assert_close(codec.decode(codes).audio_values, sound)
        remove_weight_norm(codec.acoustic_encoder, codec.acoustic_decoder)
    after = codec.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name])


def test_first_weights_are_the_same_with_weight_norm():
    plain, normed = make_codec("release-like"), make_codec("release-like")
    add_weight_norm(normed.acoustic_encoder, normed.acoustic_decoder)
    for codec in (plain, normed):
        codec.init_weights(torch.Generator().manual_seed(5))
    remove_weight_norm(normed.acoustic_encoder, normed.acoustic_decoder)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(normed.state_dict()[name], tensor)


def test_snakes_gradient_by_hand_is_autograds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 20, dtype=torch.double, generator=generator).requires_grad_()
    alpha = (0.5 + torch.rand(1, 3, 1, dtype=torch.double, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(SnakeFunction.apply, (x, alpha))
    layer = Snake(3)
    with torch.no_grad():
        silent = layer(x.float())
    assert torch.equal(layer(x.float()), silent)


def test_a_shape_of_every_kind_trains():
    for shape in SHAPES.values():
        codec = Codec(HiggsAudioV2TokenizerConfig.from_dict(copy.deepcopy(shape)))
        task = CodecTask(codec, config(discriminator_start=0), OptimConfig(), World(), max_steps=5)
        wave = 0.1 * torch.randn(2, 1, 5000, generator=torch.Generator().manual_seed(0))
        assert task.train_step(StepBatch([{"waveform": wave}], [], 2), 0).finite
