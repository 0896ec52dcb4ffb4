"""Samples whose audio has been coded once, and batches of them.

Shapes: B batch, T tokens, F delayed frames, K codebooks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from higgs.batch import BatchFeature
from higgs.data.manifest import Sample
from higgs.inputs import read_audio_item
from higgs.processor import HiggsAudioV2Processor


def audio_items(samples: Sequence[Sample]) -> list[tuple[Sample, dict]]:
    """Every audio item with its sample, in order."""
    return [
        (sample, item)
        for sample in samples
        for message in sample.messages
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == "audio"
    ]


def load_clips(samples: Sequence[Sample], sample_rate: int) -> list[Tensor]:
    """The waveforms [L] of all audio items that hold sound, in order; a bad one is a UserError naming its sample."""
    read = [read_audio_item(item, sample_rate, f"Sample {sample.id}") for sample, item in audio_items(samples)]
    return [clip for clip in read if clip.is_floating_point()]


def code_samples(processor: HiggsAudioV2Processor, samples: Sequence[Sample], clips: Sequence[Tensor]) -> list[Sample]:
    """The same samples with codes [K, T] in place of sound, all coded in one batch; items with codes stay."""
    codes = iter(processor.encode_audio(clips))
    coded = []
    for sample in samples:
        messages = []
        for message in sample.messages:
            content = message["content"]
            if isinstance(content, list):
                content = [
                    {"type": "audio", "codes": next(codes)}
                    if item["type"] == "audio" and item.get("codes") is None
                    else item
                    for item in content
                ]
            messages.append({**message, "content": content})
        coded.append(replace(sample, messages=messages))
    return coded


def training_batch(processor: HiggsAudioV2Processor, samples: Sequence[Sample]) -> BatchFeature:
    """Inputs and labels of the samples, padded on the right: where trained, assistant turns and one EOS per codebook."""
    return processor.apply_chat_template(
        [sample.messages for sample in samples],
        tokenize=True,
        return_dict=True,
        output_labels=True,
        start_index=[sample.start_index for sample in samples],
        padding_side="right",
    )


def endless_batches(
    processor: HiggsAudioV2Processor, samples: Sequence[Sample], batch_size: int, seed: int
) -> Iterator[BatchFeature]:
    """Batches for ever, every sample once an epoch, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    if batch_size >= len(samples):
        whole = training_batch(processor, samples)
        while True:
            yield whole
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield training_batch(processor, [samples[i] for i in order[start : start + batch_size]])
