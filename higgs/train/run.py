"""A training run from its config to its export: what `train.py` runs.

lm:    sources -> processor -> tokens -> LanguageModelTask ─┐
codec: sources -> crops    -> CodecTask                    ─┴-> Loop -> checkpoints, metrics, samples, export/
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from higgs.data.crops import CropDataset
from higgs.data.draws import random_generator, read_sources
from higgs.data.stream import DataConfig, Dataset, Stream, once
from higgs.errors import UserError
from higgs.folders import write_lines
from higgs.inference import GenerationOptions, check_fit
from higgs.processor import HiggsAudioV2Processor
from higgs.train.codec_task import CodecTask, CodecTrainingConfig
from higgs.train.codec_warmup import WarmupConfig
from higgs.train.distributed import World, start, stop
from higgs.train.freeze import FreezeConfig
from higgs.train.lm import Hearing, LanguageModelTask, LossConfig
from higgs.train.loop import Loop, LoopConfig, Preemption
from higgs.train.optim import OptimConfig
from higgs.train.parallel import ParallelConfig
from higgs.train.prepare import (
    Origin,
    Parts,
    as_json,
    build_decoder,
    check_same_run,
    code_sources,
    last_codes,
    note_run,
    open_dataset,
    prepare_processor,
    prompts_of,
    with_codes,
)
from higgs.train.reproduce import Match, print_matches, reproduce
from higgs.train.state import Checkpoints
from higgs.train.task import Task
from higgs.train.tracking import LoggerConfig, Tracker, record_run

# What the text tokenizer and the codec of a run are made from …
PROCESSOR = ("codec", "tokenizer", "chat", "init_from", "codec_path", "codec_warmup", "seed")
# … and what its folder belongs to; other settings may change from one start to the next.
IDENTITY = ("task", "model", "text_model", "freeze", *PROCESSOR)


@dataclass(kw_only=True)
class TrainConfig(LoopConfig):
    """The keys of configs/train.yaml, which explains them. Parts that Hydra builds are left as they are."""

    name: str
    run_dir: str
    data: DataConfig
    task: str = "lm"
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    accumulate: int = 1
    keep_checkpoints: int = 2
    milestone_every: int | None = None
    resume: str = "auto"
    sample_count: int = 4
    reproduce: bool = False
    init_from: str | None = None
    text_model: str | None = None
    codec_path: str | None = None
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    codec_warmup: WarmupConfig | None = None
    codec_training: CodecTrainingConfig = field(default_factory=CodecTrainingConfig)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    codec: Any = None
    model: Any = None
    tokenizer: Any = None
    chat: Any = None

    def __post_init__(self) -> None:
        if self.task not in ("lm", "codec"):
            raise UserError(f"task is '{self.task}'; use lm or codec.")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision is '{self.precision}'; use fp32 or bf16.")
        if min(self.max_steps, self.accumulate, self.keep_checkpoints) < 1:
            raise UserError("max_steps, accumulate and keep_checkpoints must be at least 1.")
        if self.task == "codec" and self.parallel.strategy == "fsdp":
            raise UserError("The codec fits into every process; use parallel.strategy=ddp for several.")
        if self.task == "codec":
            idle = [name for name, default in LM_ONLY.items() if getattr(self, name) != default]
            idle += [] if self.parallel == ParallelConfig(self.parallel.strategy) else ["parallel (but for strategy)"]
            if idle or self.data.layout != "bucket":
                named = ", ".join([*idle, *(["data.layout"] if self.data.layout != "bucket" else [])])
                raise UserError(f"{named}: this belongs to task=lm and would do nothing here; leave it out.")


# Keys that the codec does not read, with the values that say nothing.
LM_ONLY = {
    "reproduce": False, "init_from": None, "text_model": None, "codec_path": None, "stop_at_accuracy": None,
    "freeze": FreezeConfig(), "loss": LossConfig(),
}  # fmt: skip


@dataclass
class Setup:
    """What a task brings to the loop. `finish` runs on rank 0 after the export."""

    task: Task
    train: Dataset
    valid: Dataset | None
    finish: Callable[[], Any] = lambda: None


@dataclass
class Outcome:
    """`finished` is False where SIGTERM cut the run short; `matches` say how the training samples came back, where
    `reproduce` asks for that (on rank 0)."""

    finished: bool
    matches: list[Match] | None = None


def train(config: TrainConfig, parts: Parts, overrides: Sequence[str] = ()) -> Outcome:
    """Trains to the end and exports; or saves and returns, where SIGTERM asks for it."""
    preemption = Preemption()
    with preemption.watched():
        world = start(config.device, config.parallel.strategy)
        try:
            with only_one_in(Path(config.run_dir), world):
                return run_training(config, parts, world, preemption, overrides)
        finally:
            stop()


@contextmanager
def only_one_in(run: Path, world: World) -> Iterator[None]:
    """Holds the run's folder: a second start into it, say of a job that was queued again too early, is a UserError."""
    if not world.main:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"Another process trains in {run}. Wait for it, or give another run_dir.") from error
    with lock:
        yield


def run_training(
    config: TrainConfig, parts: Parts, world: World, preemption: Preemption, overrides: Sequence[str]
) -> Outcome:
    run, settings = Path(config.run_dir), asdict(config)
    torch.manual_seed(config.seed)
    checkpoints = Checkpoints(run / "checkpoints", world, config.keep_checkpoints, config.milestone_every)
    check_start(run, settings, checkpoints, config.resume, world)
    setup = (set_up_codec if config.task == "codec" else set_up_lm)(config, parts, world, run)
    torch.manual_seed(random_generator("run", config.seed, world.rank).initial_seed())  # dropout differs between ranks
    share = {"rank": world.rank, "size": world.size, "accumulate": config.accumulate}
    loop = Loop(
        task=setup.task,
        stream=Stream(setup.train, config.data, seed=config.seed, **share),
        config=config,
        world=world,
        run=run,
        checkpoints=checkpoints,
        tracker=None,
        preemption=preemption,
        precision=config.precision,
        valid=None if setup.valid is None else partial(once, setup.valid, config.data, **share),
    )
    resumed = config.resume != "never" and loop.restore(None if config.resume == "auto" else Path(config.resume))
    if world.main:
        note_run(run, settings, IDENTITY)
        record_run(run, settings, overrides)
        start_step = loop.progress.step
        print(
            f"{run}: {'resumed after' if resumed else 'starts at'} step {start_step} of {config.max_steps}", flush=True
        )
        loop.tracker = Tracker(run, config.name, config.logger, settings, start_step)
    try:
        finished = loop.fit()
    finally:
        if loop.tracker is not None:
            loop.tracker.close(run / "loss.png")
    if not finished:
        return Outcome(False)
    setup.task.export(run / "export")
    if not world.main:
        return Outcome(True)
    print(f"export: {run / 'export'}")
    return Outcome(True, setup.finish())


def check_start(run: Path, settings: dict[str, Any], checkpoints: Checkpoints, resume: str, world: World) -> None:
    """Whether these settings may run in this folder; looked at before anything takes time."""
    if resume == "never" and checkpoints.all():
        raise UserError(
            f"{run} holds checkpoints, but resume=never. Give another run_dir, or delete {checkpoints.folder}."
        )
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(f"resume is '{resume}'; use auto, never, or the path of a folder in a run's checkpoints/.")
    check_same_run(run, settings, IDENTITY)
    world.barrier()


def set_up_codec(config: TrainConfig, parts: Parts, world: World, run: Path) -> Setup:
    codec = parts.codec()
    task = CodecTask(
        codec, config.codec_training, config.optim, world,
        max_steps=config.max_steps, seed=config.seed, precision=config.precision,
    )  # fmt: skip
    crops = {"sample_rate": codec.sample_rate, "seconds": config.data.crop_seconds, "gain_db": config.data.gain_db}
    held_out = {**crops, "seconds": config.codec_training.valid_seconds}
    valid = config.data.valid
    return Setup(
        task,
        CropDataset(read_sources(config.data.train), **crops),
        None if valid is None else CropDataset(read_sources(valid, "data.valid"), **held_out),
    )


def set_up_lm(config: TrainConfig, parts: Parts, world: World, run: Path) -> Setup:
    started = time.perf_counter()
    sources = read_sources(config.data.train)
    origin = Origin(config.init_from, config.text_model, config.codec_path, config.codec_warmup, config.seed)
    made_from = {key: value for key, value in asdict(config).items() if key in PROCESSOR}
    prepare_processor(run, sources, origin, parts, made_from, world)
    processor = HiggsAudioV2Processor.from_pretrained(run / "processor", device_map=world.device)
    codec, limit = processor.audio_tokenizer, config.data.max_unreadable
    data = open_dataset(code_sources(run, sources, "train", codec, limit, world), processor)
    held_out = None
    if config.data.valid is not None:
        held_out = read_sources(config.data.valid, "data.valid")
        held_out = open_dataset(code_sources(run, held_out, "valid", codec, limit, world), processor)
    sharded = config.parallel.strategy == "fsdp"
    decoder = build_decoder(processor, origin, parts, config.seed, shapes_only=sharded and not world.main)
    check_fit(decoder, processor)
    prompts = prompts_of(with_codes(data if held_out is None else held_out, config.sample_count))
    task = LanguageModelTask(
        decoder, processor, world,
        max_steps=config.max_steps, optim=config.optim, loss=config.loss, parallel=config.parallel,
        freeze=config.freeze, precision=config.precision, hearing=Hearing(prompts, config.generation),
    )  # fmt: skip
    if world.main:
        count = sum(p.numel() for p in decoder.parameters()) / 1e6
        lost = [entry for dataset in (data, held_out) if dataset is not None for entry in dataset.unreadable]
        write_lines(run / "not_coded.jsonl", [asdict(entry) for entry in lost])
        without = f", without {len(lost)} that could not be coded (not_coded.jsonl)" if lost else ""
        print(f"decoder: {count:.1f} M parameters; {len(data)} training samples{without}", flush=True)

    def finish() -> list[Match]:
        """Every training sample again from its text, through the function behind infer.py."""
        targets = [sample for sample in with_codes(data) if last_codes(sample) is not None]
        write_lines(run / "prompts.jsonl", [asdict(as_json(prompt)) for prompt in prompts_of(targets)])
        matches = reproduce(run, targets, config.generation)
        print_matches(matches, time.perf_counter() - started)
        write_lines(run / "matches.jsonl", [asdict(match) for match in matches])
        return matches

    return Setup(task, data, held_out, finish if config.reproduce else lambda: None)
