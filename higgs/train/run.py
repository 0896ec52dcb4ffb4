"""A training run of the language model, from a manifest to a checkpoint and the sound it makes (one process).

    manifest -> text tokenizer -> codec (given, or warmed up) -> coded samples -> decoder -> export/ -> infer -> samples/

Shapes: K codebooks, F frames.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from higgs.api import HiggsAudioV2ForConditionalGeneration
from higgs.chat import ChatBuilder, ChatTokens
from higgs.checkpoint.io import load_codec, pick_device, save_codec
from higgs.checkpoint.meta import on_meta
from higgs.codec import Codec
from higgs.data.coded import audio_items, code_samples, endless_batches, load_clips
from higgs.data.manifest import Sample, read_manifest, texts_of
from higgs.errors import UserError
from higgs.inference import GenerationOptions, InferConfig, infer
from higgs.plots import save_curves
from higgs.processor import HiggsAudioV2Processor
from higgs.text import TextTokenizer
from higgs.train.codec_warmup import WarmupConfig, warm_up
from higgs.train.loop import OptimConfig, StepMetrics, train_decoder


@dataclass
class DataConfig:
    """Where the samples come from: a manifest (see higgs.data.manifest)."""

    train: str
    batch_size: int = 16


@dataclass
class TrainConfig:
    """The keys of configs/train.yaml, which explains them. Parts that Hydra builds are left as they are."""

    name: str
    run_dir: str
    data: DataConfig
    max_steps: int = 1000
    seed: int = 0
    device: str = "cpu"
    codec_path: str | None = None
    stop_at_accuracy: float | None = None
    log_every: int = 10
    optim: OptimConfig = field(default_factory=OptimConfig)
    codec_warmup: WarmupConfig = field(default_factory=WarmupConfig)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    codec: Any = None
    model: Any = None
    tokenizer: Any = None
    chat: Any = None


@dataclass
class Parts:
    """What Hydra (or a notebook) builds the run from. The model is built last: it needs the tokenizer's ids."""

    codec: Callable[[], Codec]
    tokenizer: Callable[..., TextTokenizer]
    model: Callable[[dict[str, Any]], HiggsAudioV2ForConditionalGeneration]
    chat: ChatBuilder = field(default_factory=ChatBuilder)


@dataclass
class Match:
    """How well a sample was reproduced: share of equal codes over the longer of the two, and the frames it is off."""

    id: str
    frames: int
    codes_equal: float
    frames_off: int
    stopped: bool


def token_ids(tokenizer: TextTokenizer, codec: Codec, tokens: ChatTokens) -> dict[str, int]:
    """The fields of the decoder's config that the tokenizer and the codec decide."""
    size = codec.config.codebook_size
    return {
        "vocab_size": tokenizer.vocab_size,
        "num_codebooks": codec.num_codebooks,
        "codebook_size": size + 2,  # and the two stream codes
        "audio_stream_bos_id": size,
        "audio_stream_eos_id": size + 1,
        "audio_token_id": tokenizer.token_to_id(tokens.audio),
        "audio_bos_token_id": tokenizer.token_to_id(tokens.audio_bos),
        "audio_delay_token_id": tokenizer.token_to_id(tokens.delay),
        "bos_token_id": tokenizer.token_to_id(tokens.bos),
        "eos_token_id": tokenizer.token_to_id(tokens.end_of_turn),
        "pad_token_id": tokenizer.pad_token_id,
    }


def train(config: TrainConfig, parts: Parts) -> list[Match]:
    """Runs the whole thing and returns how well every training sample comes back from its text alone."""
    run = Path(config.run_dir)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    device = pick_device(config.device)
    samples = read_manifest(config.data.train)
    prompts = [Sample(sample.id, sample.prompt()) for sample in samples]
    tokenizer = parts.tokenizer(texts=texts_of(samples))
    if not audio_items(samples):
        raise UserError(f"{config.data.train} holds no audio, so there is nothing to train on.")
    codec = parts.codec() if config.codec_path is None else load_codec(config.codec_path)
    tokens = parts.chat.tokens
    ids = token_ids(tokenizer, codec, tokens)
    with on_meta():
        parts.model(ids)  # a config that does not fit is reported before the codec takes its minutes
    clips = load_clips(samples, codec.sample_rate)
    run.mkdir(parents=True, exist_ok=True)
    if config.codec_path is None:
        prepare_codec(config, codec, clips)
    processor = HiggsAudioV2Processor(
        tokenizer=tokenizer,
        audio_tokenizer=codec,
        audio_token=tokens.audio,
        audio_bos_token=tokens.audio_bos,
        audio_eos_token=tokens.audio_eos,
        audio_delay_token=tokens.delay,
        audio_stream_bos_id=ids["audio_stream_bos_id"],
        audio_stream_eos_id=ids["audio_stream_eos_id"],
    )
    coded = code_samples(processor, samples, clips)
    model = parts.model(ids).to(device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"decoder: {count:.1f} M parameters; {len(samples)} samples from {config.data.train}")
    batches = endless_batches(processor, coded, config.data.batch_size, config.seed)
    fit(config, model, batches, run)

    model.to("cpu")
    model.save_pretrained(run / "export")
    processor.save_pretrained(run / "export")
    write_jsonl(run / "prompts.jsonl", [{"id": p.id, "messages": p.messages} for p in prompts])
    print(f"checkpoint: {run / 'export'}; now each sample from its text, as infer.py does it")
    matches = reproduce(run, coded, config.generation)
    print_matches(matches, time.perf_counter() - started)
    write_jsonl(run / "matches.jsonl", [asdict(match) for match in matches])
    return matches


def prepare_codec(config: TrainConfig, codec: Codec, clips: Sequence[Tensor]) -> None:
    """Warms a fresh codec up on the samples' clips and keeps it in the run's folder."""
    settings = config.codec_warmup
    bar = tqdm(total=settings.autoencoder_steps + settings.decoder_steps, desc="codec", file=sys.stderr)

    def report(phase: str, step: int, loss: float) -> None:
        bar.set_postfix_str(f"{phase}, mel distance {loss:.3f}")
        bar.update(1)

    with bar:
        result = warm_up(codec, clips, settings, torch.Generator().manual_seed(config.seed), report)
    print(f"codec: {result.codes_used} of {result.codes_possible} codes in use, mel distance {result.mel_distance:.3f}")
    save_codec(codec, Path(config.run_dir) / "codec")  # codec_path=RUN/codec saves the minutes next time


def fit(config: TrainConfig, model: HiggsAudioV2ForConditionalGeneration, batches: Any, run: Path) -> None:
    """The loop with its log: metrics.jsonl, a progress bar, and loss.png at the end."""
    steps, losses = [], []
    bar = tqdm(total=config.max_steps, desc="decoder", file=sys.stderr)
    right_in_a_row = 0
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as log:

        def report(metrics: StepMetrics) -> bool:
            nonlocal right_in_a_row
            steps.append(metrics.step)
            losses.append(metrics.loss)
            log.write(json.dumps(asdict(metrics)) + "\n")
            log.flush()
            bar.update(1)
            if metrics.step % config.log_every == 0:
                bar.set_postfix_str(f"loss {metrics.loss:.3f}, codes right {metrics.code_accuracy:.2%}")
            goal = config.stop_at_accuracy
            # Several steps in a row: a single perfect one may be luck.
            right_in_a_row = right_in_a_row + 1 if goal is not None and metrics.code_accuracy >= goal else 0
            return right_in_a_row >= 10

        train_decoder(model, batches, config.max_steps, config.optim, report)
    bar.close()
    save_curves(run / "loss.png", {"train": (steps, losses)}, "step")


def reproduce(run: Path, coded: Sequence[Sample], generation: GenerationOptions) -> list[Match]:
    """Asks the exported checkpoint for every sample, through the function behind infer.py."""
    spoken = infer(
        InferConfig(
            checkpoint=str(run / "export"),
            conversation=str(run / "prompts.jsonl"),
            output=str(run / "samples"),
            plot=True,
            batch_size=16,
            device="cpu",
            generation=generation,
        )
    )
    matches = []
    for speech, sample in zip(spoken, coded, strict=True):
        target = sample.messages[-1]["content"][-1]["codes"]
        matches.append(
            Match(
                sample.id,
                target.shape[1],
                equal_codes(speech.codes, target),
                abs(speech.codes.shape[1] - target.shape[1]),
                speech.stopped,
            )
        )
    return matches


def equal_codes(codes: Tensor, target: Tensor) -> float:
    """Share of equal codes of [K, F] and [K, F'], frames that one of them lacks counted as wrong."""
    common = min(codes.shape[1], target.shape[1])
    right = int((codes[:, :common] == target[:, :common]).sum())
    return right / (target.shape[0] * max(codes.shape[1], target.shape[1], 1))


def print_matches(matches: Sequence[Match], seconds: float) -> None:
    print(f"\n{'sample':<16}{'frames':>7}{'codes equal':>13}{'frames off':>12}")
    for match in matches:
        note = "" if match.stopped else "  did not stop"
        print(f"{match.id:<16}{match.frames:>7}{match.codes_equal:>12.2%}{match.frames_off:>12}{note}")
    worst = min(match.codes_equal for match in matches)
    print(f"worst sample {worst:.2%}; {seconds:.0f} s in all")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    aside.replace(path)
