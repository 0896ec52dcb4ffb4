"""From texts or conversations to sound files: what `infer.py` runs, and what training runs to hear itself.

Shapes: B batch, F frames, K codebooks, L samples.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from higgs.api import HiggsAudioV2ForConditionalGeneration
from higgs.audio import FORMATS, load_audio
from higgs.batch import BatchFeature
from higgs.chat import ChatBuilder
from higgs.data.manifest import Sample, parse_json, parse_sample, read_text
from higgs.errors import UserError
from higgs.processor import HiggsAudioV2Processor
from higgs.transcript import normalize_transcript

ONE_VOICE = "Generate audio following instruction."
SEVERAL_VOICES = """You are an AI assistant designed to convert text into speech.
If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following text, using the specified voice.
If no speaker tag is present, select a suitable voice on your own."""
QUIET_ROOM = "Audio is recorded from a quiet room."


@dataclass
class Reference:
    """A voice to clone: its recording, what is said in it, and the speaker tag it stands for."""

    audio: str
    text: str | None = None
    speaker: str | None = None


@dataclass
class GenerationOptions:
    """Fields of `GenerationConfig` to override; None keeps the checkpoint's."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class InferConfig:
    """The keys of configs/infer.yaml, which explains them."""

    checkpoint: str
    audio_tokenizer: str | None = None
    text: str | None = None
    scene: str | None = None
    system: str | None = None
    reference: list[Reference] = field(default_factory=list)
    normalize: bool = False
    conversation: str | None = None
    output: str = "output.wav"
    plot: bool = False
    modality: str = "audio"
    batch_size: int = 8
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def __post_init__(self) -> None:
        if (self.text is None) == (self.conversation is None):
            raise UserError("Say what to speak: give either text=… or conversation=FILE.")
        if self.conversation is not None and (self.scene or self.system or self.reference):
            raise UserError("scene, system and reference belong to text=…; a conversation file holds its own.")
        if self.text is not None and not self.text.strip():
            raise UserError("The text is empty; give at least one word.")
        if self.modality not in ("audio", "text"):
            raise UserError(f"modality is '{self.modality}'; use audio or text.")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1.")


@dataclass
class Speech:
    """What one conversation became: samples [L] at `sample_rate`, codes [K, F], and text where the model wrote any."""

    name: str
    waveform: Tensor
    codes: Tensor
    sample_rate: int
    text: str
    stopped: bool


def compose_conversation(config: InferConfig) -> list[dict[str, Any]]:
    """The conversation that text, scene, system and references describe, as the original's own script builds it.

    A reference with its text becomes a user/assistant turn pair; one without goes into the scene. A dialogue without
    references describes its speakers as feminine and masculine in turn.
    """
    text = normalize_transcript(config.text) if config.normalize else config.text
    tags = sorted(set(re.findall(r"\[(SPEAKER\d+)\]", text)))
    several = bool(tags) or len(config.reference) > 1
    scene = [_text(config.scene or QUIET_ROOM)]
    turns = []
    for number, voice in enumerate(config.reference):
        speaker = voice.speaker or (f"SPEAKER{number}" if several else None)
        if voice.text is None:
            scene += [_text(f"{speaker or 'SPEAKER0'}:"), {"type": "audio", "url": voice.audio}]
        else:
            spoken = f"[{speaker}] {voice.text}" if several else voice.text
            turns.append({"role": "user", "content": [_text(spoken)]})
            turns.append({"role": "assistant", "content": [{"type": "audio", "url": voice.audio}]})
    if tags and not config.reference:
        kinds = ("feminine", "masculine")
        scene += [_text(f"{tag}: {kinds[i % 2]}") for i, tag in enumerate(tags)]
    system = config.system or (SEVERAL_VOICES if several else ONE_VOICE)
    return [
        {"role": "system", "content": [_text(system)]},
        {"role": "scene", "content": scene},
        *turns,
        {"role": "user", "content": [_text(text)]},
    ]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def read_conversations(path: str | Path) -> list[Sample]:
    """Conversations from YAML, JSON or JSONL: a list of messages, `{"id"?, "messages"}`, or a list of such.

    Audio paths are relative to the file. Raises UserError naming the file and, in JSONL, the line.
    """
    path = Path(path)
    content = read_text(path)
    if path.suffix == ".jsonl":
        lines = [
            (f"{path}, line {number}", line) for number, line in enumerate(content.splitlines(), 1) if line.strip()
        ]
        entries = [(where, parse_json(line, where)) for where, line in lines]
    else:
        try:
            value = parse_json(content, str(path)) if path.suffix == ".json" else yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
        many = isinstance(value, list) and value and not (isinstance(value[0], dict) and "role" in value[0])
        entries = [(f"{path}, entry {i}", one) for i, one in enumerate(value)] if many else [(str(path), value)]
    if not entries:
        raise UserError(f"{path} holds no conversation.")
    samples = [parse_sample(entry, where, path.parent, f"{i:03d}") for i, (where, entry) in enumerate(entries)]
    names = [sample.id for sample in samples]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has the id '{twice}' twice; every output file needs its own.")
    return samples


class ProgressBar:
    """A streamer that shows frames/s, real-time factor (seconds of audio per second) and time to first frame."""

    def __init__(self, total: int, frame_rate: float, shown: bool = True) -> None:
        self.bar = tqdm(total=total, unit="clip", disable=not shown, file=sys.stderr)
        self.frame_rate = frame_rate
        self.frames, self.first, self.busy = 0, None, 0.0
        self.started = time.perf_counter()

    def begin(self) -> None:
        self.started = time.perf_counter()

    def put(self, tokens: Tensor) -> None:
        """Text tokens are of no use here."""

    def put_frames(self, frames: Tensor, is_frame: Tensor) -> None:
        now = time.perf_counter()
        if self.first is None and bool(is_frame.any()):
            self.first = now - self.started
        self.frames += int(is_frame.sum())
        rate = self.frames / (self.busy + now - self.started)
        self.bar.set_postfix_str(
            f"{rate:.0f} frames/s, {rate / self.frame_rate:.2f}x real time, first frame {(self.first or 0) * 1000:.0f} ms"
        )

    def end(self) -> None:
        self.busy += time.perf_counter() - self.started

    def done(self, clips: int) -> None:
        self.bar.update(clips)


@torch.no_grad()
def speak(
    model: HiggsAudioV2ForConditionalGeneration,
    processor: HiggsAudioV2Processor,
    jobs: Sequence[Sample],
    batch_size: int = 8,
    seed: int = 0,
    modality: str = "audio",
    progress: bool = True,
    **options: Any,
) -> Iterator[Speech]:
    """Generates speech for conversations, `batch_size` at a time; `options` go to `model.generate`."""
    bar = ProgressBar(len(jobs), processor.audio_tokenizer.frame_rate, progress)
    for start in range(0, len(jobs), batch_size):
        rows = jobs[start : start + batch_size]
        bar.begin()
        inputs: BatchFeature = processor.apply_chat_template(
            [job.messages for job in rows],
            add_generation_prompt=True,
            modality=modality,
            tokenize=True,
            return_dict=True,
        ).to(model.device)
        out = model.generate(**inputs, streamer=bar, seed=seed + start, **options, return_dict_in_generate=True)
        prompt_frames = inputs["audio_input_ids"].shape[1] if "audio_input_ids" in inputs else 0
        frames = out.audio_sequences[:, prompt_frames:]
        codes = processor.generated_codes(frames)
        waveforms = processor.batch_decode(frames)
        written = out.sequences[:, inputs["input_ids"].shape[1] :]
        ends = torch.isin(written, torch.tensor(model.config.eos_token_ids, device=written.device)).any(dim=1)
        for row, job in enumerate(rows):
            text = written[row]
            text = text[~model.model.audio_placeholders(text)].tolist()
            yield Speech(
                job.id,
                waveforms[row],
                codes[row].cpu(),
                processor.audio_tokenizer.sample_rate,
                processor.tokenizer.decode(text, skip_special_tokens=True).strip(),
                bool(ends[row]),
            )
        bar.done(len(rows))
    bar.bar.close()


def output_paths(output: str, jobs: Sequence[Sample]) -> list[Path]:
    """Where each conversation's sound goes; a mistake is reported before anything is loaded."""
    path = Path(output)
    if path.suffix == "" or path.is_dir():
        paths = [path / f"{job.id}.wav" for job in jobs]
    elif path.suffix.lower() not in FORMATS:
        raise UserError(f"Sound files of type '{path.suffix}' cannot be written; use one of {', '.join(FORMATS)}.")
    elif len(jobs) == 1:
        paths = [path]
    else:
        paths = [path.with_name(f"{path.stem}_{job.id}{path.suffix}") for job in jobs]
    for job, target in zip(jobs, paths, strict=True):
        if Path(job.id).name != job.id:
            raise UserError(f"The id '{job.id}' cannot be part of a file name; leave out slashes.")
        target.parent.mkdir(parents=True, exist_ok=True)
    return paths


def check_audio(jobs: Sequence[Sample]) -> None:
    """Reads every audio file once, so that a bad one is named before a model is loaded and sound is generated."""
    for job in jobs:
        for message in job.messages:
            for item in message["content"] if isinstance(message["content"], list) else ():
                source = item.get("path") or item.get("url")
                if item.get("type") == "audio" and source and "://" not in source:
                    load_audio(source)


def check_fit(model: HiggsAudioV2ForConditionalGeneration, processor: HiggsAudioV2Processor) -> None:
    """Refuses a decoder with the codec or the tokenizer of another checkpoint, before anything is generated."""
    ours, codec = model.config, processor.audio_tokenizer.config
    if processor.num_codebooks != ours.num_codebooks:
        raise UserError(
            f"The codec has {processor.num_codebooks} codebooks but the decoder {ours.num_codebooks}. Point "
            "audio_tokenizer=… to the codec that belongs to the checkpoint."
        )
    if codec.codebook_size > ours.codebook_size:
        raise UserError(
            f"The codec has {codec.codebook_size} codes per codebook but the decoder only {ours.codebook_size} rows. Point "
            "audio_tokenizer=… to the codec that belongs to the checkpoint."
        )
    for name in (
        "audio_token_id",
        "audio_bos_token_id",
        "audio_delay_token_id",
        "audio_stream_bos_id",
        "audio_stream_eos_id",
    ):
        if getattr(processor, name) != getattr(ours, name):
            raise UserError(
                f"{name} is {getattr(processor, name)} in the processor but {getattr(ours, name)} in the decoder's "
                "config.json. Use tokenizer, processor and decoder of one checkpoint."
            )


def infer(config: InferConfig) -> list[Speech]:
    """Runs a whole inference job and writes its files. Raises UserError for what the user can mend."""
    if config.conversation is not None:
        jobs = read_conversations(config.conversation)
    else:
        jobs = [Sample("output", compose_conversation(config))]
        ChatBuilder().build(jobs[0].messages, add_generation_prompt=True)
    paths = output_paths(config.output, jobs)
    check_audio(jobs)
    processor = HiggsAudioV2Processor.from_pretrained(
        config.checkpoint, device_map=config.device, audio_tokenizer=config.audio_tokenizer
    )
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        config.checkpoint, device_map=config.device, dtype=config.dtype, use_text_head=config.modality == "text"
    )
    check_fit(model, processor)
    spoken = []
    results = speak(
        model, processor, jobs, config.batch_size, config.seed, config.modality, **config.generation.given()
    )
    for speech, path in zip(results, paths, strict=True):
        spoken.append(speech)
        report = [f"{speech.waveform.numel() / speech.sample_rate:.2f} s"]
        if speech.text:
            report.append(f"text: {speech.text}")
        if not speech.stopped:
            report.append("cut off: the model did not stop within the given frames")
        if speech.waveform.numel():
            processor.save_audio(speech.waveform, path)
            if config.plot:
                from higgs.plots import save_speech_plot

                save_speech_plot(path.with_suffix(".png"), speech.waveform, speech.sample_rate, speech.codes)
            tqdm.write(f"{path}: {', '.join(report)}")
        else:
            tqdm.write(f"{speech.name}: no sound was generated ({', '.join(report)}); {path} is not written")
    return spoken
