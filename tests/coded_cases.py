"""Conversations with random codes in a folder, as `higgs tokenize` leaves it, without coding any sound."""

import hashlib
from pathlib import Path

import torch

from higgs.batch import BatchBuilder
from higgs.chat import ChatTokens
from higgs.data.manifest import Sample
from higgs.data.shards import CodedWith, CodeSource, write_index, write_shard
from higgs.text import HFTokenizer

K, CODES = 3, 16
CODEC = CodedWith("config", "weights", K, CODES, 24000, 960)


def clip(first: int, frames: int) -> dict:
    return {"type": "audio", "span": [first, first + frames]}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def conversation(number: int, lengths: list[int], first: int) -> Sample:
    """One of four kinds: a sentence, a reference voice in the scene, several turns of which some are trained, text."""
    spans, place = [], first
    for frames in lengths:
        spans.append(clip(place, frames))
        place += frames
    system = {"role": "system", "content": "Generate audio following instruction."}
    ask = {"role": "user", "content": [text(" ".join(["The sun rises."] * (1 + number % 3)))]}
    kind = number % 4 if len(lengths) > 1 else 0
    if kind == 1:
        scene = {"role": "scene", "content": [text("Quiet."), text("SPEAKER0:"), *spans[:-1]]}
        return Sample(f"c{number}", [system, scene, ask, {"role": "assistant", "content": spans[-1:]}], 2)
    if kind == 2:
        turns = [message for span in spans for message in (ask, {"role": "assistant", "content": [span]})]
        return Sample(f"c{number}", [system, *turns], start_index=3)
    if kind == 3:  # clips that touch
        return Sample(f"c{number}", [system, ask, {"role": "assistant", "content": [text("So:"), *spans]}])
    return Sample(f"c{number}", [system, ask, {"role": "assistant", "content": spans or [text("In the east.")]}])


def trained_clips(sample: Sample) -> int:
    return sum(
        item["type"] == "audio"
        for index, message in enumerate(sample.messages)
        if message["role"] == "assistant" and index >= sample.start_index and isinstance(message["content"], list)
        for item in message["content"]
    )


def write_folder(folder: Path, clips: list[list[int]], seed: int = 0, shard_samples: int = 5) -> Path:
    """A complete folder of one conversation per list of clip lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    records = []
    for number, start in enumerate(range(0, len(clips), shard_samples)):
        codes, samples, first = [], [], 0
        for place, lengths in enumerate(clips[start : start + shard_samples]):
            samples.append(conversation(start + place, lengths, first))
            codes += [torch.randint(CODES, (K, length), generator=generator) for length in lengths]
            first += sum(lengths)
        records.append(write_shard(folder, number, codes, samples, [], CODEC))
    source = CodeSource(hashlib.sha256(str(clips).encode()).hexdigest(), len(clips), shard_samples, 60.0, CODEC)
    write_index(folder, source, records)
    return folder


def make_builder(tokenizer_folder: Path) -> BatchBuilder:
    return BatchBuilder(HFTokenizer.from_folder(tokenizer_folder), ChatTokens(), K, CODES, CODES + 1)
