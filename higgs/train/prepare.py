"""What a language-model run needs before its first step: text tokenizer, codec, coded data, and the decoder.

    init_from (a checkpoint)  ─┐
    texts -> text tokenizer   ─┴-> run_dir/processor -> run_dir/tokens (manifests coded) -> datasets; decoder

Rank 0 makes what is missing and the others wait; a second start finds it there. Coding is shared by all ranks.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from higgs.api import HiggsAudioV2ForConditionalGeneration, read_decoder_config
from higgs.chat import ChatBuilder, ChatTokens
from higgs.checkpoint.decoder import TEXT_HEAD, key_map
from higgs.checkpoint.files import stored_tensors
from higgs.checkpoint.io import load_codec
from higgs.checkpoint.meta import on_meta
from higgs.checkpoint.text_model import start_from_text_model
from higgs.codec import Codec
from higgs.data.clips import audio_items, load_clips
from higgs.data.draws import Source
from higgs.data.manifest import Sample, read_manifest, texts_of
from higgs.data.shards import CodedFolder
from higgs.data.tokenize import TokenizeConfig, codec_identity, manifest_digest, tokenize
from higgs.data.tokenized import TokenizedDataset
from higgs.errors import UserError
from higgs.folders import read_json, resolve_folder, write_json
from higgs.processor import HiggsAudioV2Processor
from higgs.text import TextTokenizer
from higgs.train.codec_warmup import WarmupConfig, warm_up
from higgs.train.distributed import World

BEGUN_WITH = "begun_with.json"


@dataclass
class Parts:
    """What Hydra (or a notebook) builds the run from. `tokenizer` is one, or what trains one (called with `texts=`); the
    model is built last, for it needs the tokenizer's ids."""

    codec: Callable[[], Codec]
    tokenizer: TextTokenizer | Callable[..., TextTokenizer]
    model: Callable[[dict[str, Any]], HiggsAudioV2ForConditionalGeneration]
    chat: ChatBuilder = field(default_factory=ChatBuilder)


@dataclass
class Origin:
    """Where a run's parts come from: a checkpoint to start from, or a text model (Llama) for the text path and, copied,
    the audio path; a trained codec, or how to train one at once."""

    init_from: str | None = None
    text_model: str | None = None
    codec_path: str | None = None
    codec_warmup: WarmupConfig | None = None
    seed: int = 0


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


def prepare_processor(
    run: Path, sources: Sequence[Source], origin: Origin, parts: Parts, settings: dict[str, Any], world: World
) -> None:
    """Makes run_dir/processor (text tokenizer, chat template, codec) on rank 0, unless it is there and was made from the
    same `settings`: a start that failed leaves one that the next may not want."""
    folder, record = run / "processor", run / "processor" / "made_from.json"
    settings = json.loads(json.dumps(settings))
    if world.main and not (record.is_file() and read_json(record) == settings):
        for stale in (folder, run / "tokens"):
            shutil.rmtree(stale, ignore_errors=True)
        make_processor(sources, origin, parts, world.device).save_pretrained(folder)
        write_json(record, settings)
    world.barrier()


def make_processor(
    sources: Sequence[Source], origin: Origin, parts: Parts, device: torch.device
) -> HiggsAudioV2Processor:
    if origin.init_from is not None:
        return HiggsAudioV2Processor.from_pretrained(origin.init_from, audio_tokenizer=origin.codec_path)
    samples = [sample for source in sources for sample in read_samples(source)]
    if not audio_items(samples):
        raise UserError("The data holds no audio, so there is nothing to train on.")
    tokenizer = parts.tokenizer(texts=texts_of(samples)) if callable(parts.tokenizer) else parts.tokenizer
    codec = load_codec(origin.codec_path) if origin.codec_path is not None else None
    tokens = parts.chat.tokens
    ids = token_ids(tokenizer, codec or parts.codec(), tokens)
    with on_meta():
        parts.model(ids)  # a config that does not fit is reported before the codec takes its minutes
    if codec is None:
        codec = warm_codec(sources, samples, origin, parts, device)
    return HiggsAudioV2Processor(
        tokenizer=tokenizer,
        audio_tokenizer=codec,
        audio_token=tokens.audio,
        audio_bos_token=tokens.audio_bos,
        audio_eos_token=tokens.audio_eos,
        audio_delay_token=tokens.delay,
        audio_stream_bos_id=ids["audio_stream_bos_id"],
        audio_stream_eos_id=ids["audio_stream_eos_id"],
    )


def warm_codec(
    sources: Sequence[Source], samples: Sequence[Sample], origin: Origin, parts: Parts, device: torch.device
) -> Codec:
    """A fresh codec, trained for some minutes on the samples' clips."""
    settings = origin.codec_warmup
    if settings is None or any(Path(source.path).is_dir() for source in sources):
        raise UserError(
            "A codec is needed: give codec_path=FOLDER of one that was trained (python train.py +experiment=codec_mini), "
            "the same that coded the data."
        )
    codec = parts.codec().to(device)
    clips = load_clips(samples, codec.sample_rate)
    bar = tqdm(total=settings.autoencoder_steps + settings.decoder_steps, desc="codec", file=sys.stderr)

    def report(phase: str, step: int, loss: float) -> None:
        bar.set_postfix_str(f"{phase}, mel distance {loss:.3f}")
        bar.update(1)

    with bar:
        result = warm_up(codec, clips, settings, torch.Generator().manual_seed(origin.seed), report)
    print(f"codec: {result.codes_used} of {result.codes_possible} codes in use, mel distance {result.mel_distance:.3f}")
    return codec.cpu()


def read_samples(source: Source) -> list[Sample]:
    """All conversations of a manifest or of a folder of codes."""
    if not Path(source.path).is_dir():
        return read_manifest(source.path)
    return list(CodedFolder(source.path).samples())


def code_sources(
    run: Path, sources: Sequence[Source], key: str, codec: Codec, max_unreadable: float, world: World
) -> list[Source]:
    """The sources as folders of codes: manifests are coded into run_dir/tokens, folders checked against the codec."""
    own = codec_identity(codec)
    coded = []
    for number, source in enumerate(sources):
        out = Path(source.path)
        if not out.is_dir():
            out = run / "tokens" / f"{key}-{number}-{manifest_digest(source.path)[:8]}"
            code_manifest(source.path, out, codec, max_unreadable, world)
            world.barrier()  # the others' shards
        folder = CodedFolder(out)
        if (folder.codec.config, folder.codec.weights) != (own.config, own.weights):
            raise UserError(
                f"{out} was coded with another codec than this run's. Give codec_path=FOLDER of the codec that coded it, "
                "or tokenize the manifest again."
            )
        coded.append(replace(source, path=str(out)))
    return coded


def code_manifest(manifest: str, out: Path, codec: Codec, max_unreadable: float, world: World) -> None:
    with tqdm(desc="tokenize", unit="sample", file=sys.stderr, disable=not world.main) as bar:
        tokenize(
            manifest, out, codec, TokenizeConfig(max_unreadable=max_unreadable), rank=world.rank, size=world.size,
            report=bar.update, log=lambda line: tqdm.write(line, file=sys.stderr),
        )  # fmt: skip


def open_dataset(sources: Sequence[Source], processor: HiggsAudioV2Processor) -> TokenizedDataset:
    return TokenizedDataset(sources, processor.renderer(processor.chat_template), processor.batch_builder)


def with_codes(dataset: TokenizedDataset, limit: int | None = None) -> list[Sample]:
    """The conversations of a dataset with the codes [K, T] of their audio in place, at most `limit` of them."""
    samples = []
    for folder in dataset.folders:
        for number in range(len(folder)):
            if limit is not None and len(samples) == limit:
                return samples
            sample = folder.sample(number)
            messages = [with_codes_of(folder, number, message) for message in sample.messages]
            samples.append(replace(sample, messages=messages))
    return samples


def with_codes_of(folder: CodedFolder, number: int, message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, list):
        return message
    items = [
        {"type": "audio", "codes": folder.codes(number, item["span"])} if item["type"] == "audio" else item
        for item in content
    ]
    return {**message, "content": items}


def prompts_of(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that end with an assistant turn, without it: what a model is asked to say."""
    spoken = [sample for sample in samples if sample.messages[-1]["role"] == "assistant"]
    return [Sample(sample.id, sample.prompt()) for sample in spoken]


def as_json(sample: Sample) -> Sample:
    """The sample with its codes as lists, for a conversation file."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, list):
            return [plain(item) for item in value]
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    return replace(sample, messages=plain(sample.messages))


def last_codes(sample: Sample) -> Tensor | None:
    """The codes [K, T] of the last clip of a last turn that is the assistant's: what a model is to say again."""
    content = sample.messages[-1]["content"]
    if sample.messages[-1]["role"] != "assistant":
        return None
    clips = [item["codes"] for item in content if item["type"] == "audio"] if isinstance(content, list) else []
    return clips[-1] if clips else None


def build_decoder(
    processor: HiggsAudioV2Processor, origin: Origin, parts: Parts, seed: int, shapes_only: bool
) -> HiggsAudioV2ForConditionalGeneration:
    """The decoder with its first weights in float32; `shapes_only` leaves them out (a rank that is sent its share)."""
    torch.manual_seed(seed)
    if origin.init_from is None:
        ids = token_ids(processor.tokenizer, processor.audio_tokenizer, processor.tokens)
        if shapes_only:
            with on_meta():
                return parts.model(ids)
        decoder = parts.model(ids)
        if origin.text_model is not None:
            start_from_text_model(decoder, resolve_folder(origin.text_model))
        return decoder
    if origin.text_model is not None:
        raise UserError("init_from and text_model both say what to start from; give one of them.")
    folder = resolve_folder(origin.init_from)
    mapped = (key_map(use_text_head=True)(name) for name in stored_tensors(folder))
    has_text_head = any(target is not None and target[0] == TEXT_HEAD for target in mapped)
    if shapes_only:
        with on_meta():
            return HiggsAudioV2ForConditionalGeneration(read_decoder_config(folder)[0], has_text_head)
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, dtype="float32", use_text_head=has_text_head)


def check_same_run(run: Path, settings: dict[str, Any], keys: Sequence[str]) -> None:
    """A run folder belongs to one model: other settings of `keys` than it was begun with are a UserError."""
    path = run / BEGUN_WITH
    if not path.is_file():
        return
    now = json.loads(json.dumps({key: settings[key] for key in keys}))
    before = read_json(path)
    changed = sorted(key for key in keys if before.get(key) != now[key])
    if changed:
        raise UserError(
            f"{run} was begun with other settings of {', '.join(changed)}. Give another run_dir, or delete the folder to "
            "start anew."
        )


def note_run(run: Path, settings: dict[str, Any], keys: Sequence[str]) -> None:
    """Notes what the folder belongs to, once everything has been made from these settings."""
    if not (run / BEGUN_WITH).is_file():
        write_json(run / BEGUN_WITH, {key: settings[key] for key in keys})
