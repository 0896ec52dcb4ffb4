"""Random decoders of several shapes, transformers' and this project's with the same weights, and prompts for them.

Shapes: B batch, T tokens, F audio frames, K codebooks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from higgs import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 80,
    "bos_token_id": 81,
    "eos_token_id": 82,
    "audio_bos_token_id": 83,
    "audio_token_id": 84,
    "audio_delay_token_id": 85,
    "num_codebooks": 8,
    "codebook_size": 18,
    "audio_stream_bos_id": 16,
    "audio_stream_eos_id": 17,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# A stretch so strong that all three branches (kept, blended, divided) are taken by a head of 16 within 40 positions.
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain, 8 codebooks": {},
    "grouped heads, 4 codebooks": {"num_codebooks": 4, "num_key_value_heads": 2},
    "1 codebook, one key for all": {"num_codebooks": 1, "num_key_value_heads": 1},
    "wide heads, stretched positions": {"head_dim": 16, "num_key_value_heads": 2, "rope_parameters": STRETCHED},
    "released positions": {"rope_parameters": None, "head_dim": 16, "num_codebooks": 3},
    "biases, gelu, two end tokens": {
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "eos_token_id": [82, 79],
        "rms_norm_eps": 1e-3,
        "codebook_size": 21,
    },
}


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which no part can stand in for another and logits are of order 1: norms and biases vary too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return module


@dataclass(frozen=True)
class Pair:
    """transformers' model and ours, of the same weights."""

    theirs: Any
    ours: HiggsAudioV2ForConditionalGeneration

    @property
    def config(self) -> HiggsAudioV2Config:
        return self.ours.config


def make_ours(seed: int = 0, use_text_head: bool = False, **changes: Any) -> HiggsAudioV2ForConditionalGeneration:
    config = HiggsAudioV2Config(**{**SMALL, **changes})
    return randomize(HiggsAudioV2ForConditionalGeneration(config, use_text_head=use_text_head), seed).eval()


def make_hf(seed: int = 0, use_text_head: bool = False, **changes: Any) -> Any:
    import transformers

    config = transformers.HiggsAudioV2Config(**{**SMALL, **changes})
    model = transformers.HiggsAudioV2ForConditionalGeneration(config, use_text_head=use_text_head)
    return randomize(model, seed).eval()


def make_pair(seed: int = 0, use_text_head: bool = False, **changes: Any) -> Pair:
    theirs = make_hf(seed, use_text_head, **changes)
    ours = make_ours(seed, use_text_head, **changes)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return Pair(theirs, ours)


def make_batch(
    config: HiggsAudioV2Config,
    rows: list[list[int]],
    side: str = "left",
    seed: int = 0,
    open_audio: bool = False,
) -> dict[str, Tensor]:
    """Rows of text and clips by turns: `[5, 3, 4]` is 5 text tokens, a clip of 3 codec frames, 4 text tokens.

    Frames are padded on the right, tokens on `side`. `open_audio` ends every row with `<|audio_out_bos|>`.
    """
    generator = torch.Generator().manual_seed(seed)
    codebooks, codes = config.num_codebooks, config.audio_stream_bos_id
    ids, frames = [], []
    for row in rows:
        tokens: list[int] = []
        clips = [torch.zeros(0, codebooks, dtype=torch.long)]
        for place, count in enumerate(row):
            if place % 2 == 0:
                tokens += torch.randint(0, 78, (count,), generator=generator).tolist()
                continue
            delayed = count + 2 + codebooks - 1
            tokens += [config.audio_bos_token_id] + [config.audio_token_id] * (delayed - codebooks + 1)
            tokens += [config.audio_delay_token_id] * (codebooks - 1)
            clip = torch.randint(0, codes, (delayed, codebooks), generator=generator)
            clip[0], clip[-1] = config.audio_stream_bos_id, config.audio_stream_eos_id
            clips.append(clip)
        ids.append(torch.tensor(tokens + [config.audio_bos_token_id] * open_audio))
        frames.append(torch.cat(clips))
    pad = nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(ids, True, config.pad_token_id, side),
        "attention_mask": pad([torch.ones_like(row) for row in ids], True, 0, side),
    }
    if any(len(clip) for clip in frames):
        batch["audio_input_ids"] = pad(frames, True, config.audio_stream_eos_id)
        batch["audio_input_ids_mask"] = pad([torch.ones(len(clip), dtype=torch.bool) for clip in frames], True, False)
    return batch


def tame_eos(model: nn.Module, factor: float) -> None:
    """Scales the head's rows of the end code, so that greedy decoding ends now and then, and not at once."""
    config = model.config
    with torch.no_grad():
        head = model.audio_lm_head.weight.view(config.num_codebooks, config.codebook_size, -1)
        head[:, config.audio_stream_eos_id] *= factor


def chat_sizes(processor: Any) -> dict[str, Any]:
    """The sizes and ids of a decoder for this processor's tokenizer and codec."""
    tokenizer = processor.tokenizer
    return {
        "vocab_size": tokenizer.vocab_size,
        "num_codebooks": processor.num_codebooks,
        "codebook_size": processor.audio_stream_eos_id + 1,
        "audio_stream_bos_id": processor.audio_stream_bos_id,
        "audio_stream_eos_id": processor.audio_stream_eos_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.token_to_id(tokenizer.bos_token),
        "eos_token_id": tokenizer.token_to_id("<|eot_id|>"),
        "audio_bos_token_id": processor.audio_bos_token_id,
        "audio_token_id": processor.audio_token_id,
        "audio_delay_token_id": processor.audio_delay_token_id,
        "max_position_embeddings": 2048,
    }
