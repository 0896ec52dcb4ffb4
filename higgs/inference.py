"""From texts or conversations to sound files: what `infer.py` runs, and what training runs to hear itself.

Shapes: B batch, F frames, K codebooks, L samples.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from higgs.api import HiggsAudioV2ForConditionalGeneration
from higgs.audio import FORMATS
from higgs.batch import BatchFeature
from higgs.chat import ChatBuilder
from higgs.data.clips import audio_items
from higgs.data.manifest import Sample
from higgs.delay import split_clips
from higgs.errors import UserError
from higgs.generation.state import check_prompt
from higgs.inputs import read_audio_item
from higgs.processor import HiggsAudioV2Processor
from higgs.prompts import Reference, compose_conversation, read_conversations


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
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0.")


@dataclass
class Speech:
    """What one conversation became: samples [L] at `sample_rate`, codes [K, F], and text where the model wrote any."""

    name: str
    waveform: Tensor
    codes: Tensor
    sample_rate: int
    text: str
    stopped: bool


class ProgressBar:
    """A streamer that shows frames/s, the real-time factor (seconds of work per second of audio), time to first frame."""

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
            f"{rate:.0f} frames/s, real-time factor {self.frame_rate / max(rate, 1e-9):.3f}, first frame {(self.first or 0) * 1000:.0f} ms"
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
    """Generates speech for conversations, `batch_size` at a time; `options` go to `model.generate`.

    All prompts are built and checked before the first is spoken, so that a mistake in the last costs nothing.
    """
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    frames_wanted = model.generation_config.updated(**options).max_new_tokens
    prompts = [prepare(model, processor, rows, modality, frames_wanted, named=len(jobs) > 1) for rows in batches]
    bar = ProgressBar(len(jobs), processor.audio_tokenizer.frame_rate, progress)
    start = 0
    with bar.bar:
        for rows, prompt in zip(batches, prompts, strict=True):
            bar.begin()
            inputs = prompt.to(model.device)
            out = model.generate(**inputs, streamer=bar, seed=seed + start, **options, return_dict_in_generate=True)
            prompt_frames = inputs["audio_input_ids"].shape[1] if "audio_input_ids" in inputs else 0
            frames, own = out.audio_sequences[:, prompt_frames:], out.audio_sequences_mask[:, prompt_frames:]
            # A row that goes back to text may open several clips; they sound one after the other.
            clips = [
                split_clips(row[mask], model.config.audio_stream_bos_id) for row, mask in zip(frames, own, strict=True)
            ]
            flat = [clip for row in clips for clip in row]
            padded = (
                pad_sequence(flat, batch_first=True, padding_value=model.config.audio_stream_eos_id) if flat else None
            )
            waveforms = iter(processor.batch_decode(padded) if flat else [])
            codes = iter(processor.generated_codes(padded) if flat else [])
            written = out.sequences[:, inputs["input_ids"].shape[1] :]
            ends = torch.isin(written, torch.tensor(model.config.eos_token_ids, device=written.device)).any(dim=1)
            no_codes = torch.zeros(processor.num_codebooks, 0, dtype=torch.long)
            for row, job in enumerate(rows):
                text = written[row]
                text = text[~model.model.audio_placeholders(text)].tolist()
                yield Speech(
                    job.id,
                    torch.cat([torch.zeros(0), *islice(waveforms, len(clips[row]))]),
                    torch.cat([no_codes, *(rows.cpu() for rows in islice(codes, len(clips[row])))], dim=1),
                    processor.audio_tokenizer.sample_rate,
                    processor.tokenizer.decode(text, skip_special_tokens=True).strip(),
                    bool(ends[row]),
                )
            bar.done(len(rows))
            start += len(rows)


def prepare(
    model: HiggsAudioV2ForConditionalGeneration,
    processor: HiggsAudioV2Processor,
    jobs: Sequence[Sample],
    modality: str = "audio",
    max_new_tokens: int | None = None,
    named: bool = False,
) -> BatchFeature:
    """The prompts of one batch, checked against the model. With `named` an error says which conversation is at fault."""
    try:
        prompt = processor.apply_chat_template(
            [job.messages for job in jobs],
            add_generation_prompt=True,
            modality=modality,
            tokenize=True,
            return_dict=True,
        )
        check_prompt(
            model.config,
            prompt["input_ids"],
            prompt["attention_mask"],
            prompt.get("audio_input_ids"),
            prompt.get("audio_input_ids_mask"),
            max_new_tokens,
            model.text_lm_head is not None,
        )
    except UserError as error:
        if len(jobs) > 1:
            for job in jobs:
                prepare(model, processor, [job], modality, max_new_tokens, named)
        raise UserError(f"Conversation {jobs[0].id}: {error}") if named and len(jobs) == 1 else error from error
    return prompt


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
        if not job.id or Path(job.id).name != job.id:
            raise UserError(f"The id '{job.id}' cannot be part of a file name; it needs a character, and no slash.")
        # The folder itself is made when the first file is written.
        folder = next(parent for parent in target.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{target} cannot be written: {folder} is no folder that can be written to.")
    return paths


def check_audio(jobs: Sequence[Sample]) -> None:
    """Reads every audio file once, so that a bad one is named before a model is loaded and sound is generated."""
    for sample, item in audio_items(jobs):
        if not any("://" in str(item.get(key)) for key in ("url", "audio")):  # the web is asked once, later
            read_audio_item(item, 24000, f"Audio of conversation {sample.id}")


def check_fit(model: HiggsAudioV2ForConditionalGeneration, processor: HiggsAudioV2Processor) -> None:
    """Refuses a decoder with the codec or the tokenizer of another checkpoint, before anything is generated."""
    ours, codec = model.config, processor.audio_tokenizer.config
    if processor.num_codebooks != ours.num_codebooks:
        raise UserError(
            f"The codec has {processor.num_codebooks} codebooks but the decoder {ours.num_codebooks}. Use "
            "the codec that belongs to the checkpoint (audio_tokenizer=… of infer.py, codec_path=… of train.py)."
        )
    if codec.codebook_size > ours.codebook_size:
        raise UserError(
            f"The codec has {codec.codebook_size} codes per codebook but the decoder only {ours.codebook_size} rows. Use "
            "the codec that belongs to the checkpoint (audio_tokenizer=… of infer.py, codec_path=… of train.py)."
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
        composed = compose_conversation(config.text, config.scene, config.system, config.reference, config.normalize)
        jobs = [Sample("output", composed)]
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


def require_sound(spoken: Sequence[Speech]) -> None:
    """Raises UserError if a conversation was answered with neither sound nor text; the others' files are written."""
    silent = [speech.name for speech in spoken if not speech.waveform.numel() and not speech.text]
    if silent:
        raise UserError(
            f"No sound was generated for {', '.join(silent)}. Allow more frames (generation.max_new_tokens; the first "
            "codes of a clip need as many as there are codebooks), or try another seed."
        )
