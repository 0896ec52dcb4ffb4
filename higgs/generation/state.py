"""What a batch carries from step to step, as tensors.

Shapes: B batch, K codebooks, W window of frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from higgs.errors import UserError
from higgs.model.config import HiggsAudioV2Config


@dataclass
class DecodeState:
    """Where each row of the batch stands. Every field has one row per conversation; nothing here is on the host."""

    token: Tensor  # [B] the last text token; stands for the frame where `is_audio`
    frame: Tensor  # [B, K] the last audio frame
    is_audio: Tensor  # [B] whether the last position is an audio frame
    speaking: Tensor  # [B] whether the next position is an audio frame
    to_text: Tensor  # [B] whether the row goes back to text when its audio ends, instead of finishing
    audio_step: Tensor  # [B] audio frames since the stream opened
    delay_step: Tensor  # [B] delay tokens since the stream's first EOS
    finished: Tensor  # [B]
    position: Tensor  # [B] position of the next token in the row, padding not counted
    window: Tensor  # [B, W, K] the row's last W frames, its own prompt's included
    seeds: Tensor  # [B]


def initial_state(
    config: HiggsAudioV2Config,
    input_ids: Tensor,
    attention_mask: Tensor,
    audio_input_ids: Tensor | None,
    audio_input_ids_mask: Tensor | None,
    seeds: Tensor,
    window: int,
) -> DecodeState:
    """Reads the state off left-padded prompts [B, T] and their frames [B, F, K].

    A row whose last `<|audio_out_bos|>` is followed by nothing but audio placeholders continues that audio; any other
    row goes on with text.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    run, speaking = open_audio(config, input_ids)
    in_run = torch.arange(length, device=device) >= (length - run)[:, None]
    delay_step = ((input_ids == config.audio_delay_token_id) & in_run).sum(dim=1)

    history = torch.full((batch, max(window, 1), config.num_codebooks), config.audio_stream_bos_id, device=device)
    if audio_input_ids is not None and audio_input_ids.shape[1]:
        mask = audio_input_ids_mask
        mask = torch.ones(audio_input_ids.shape[:2], dtype=torch.bool, device=device) if mask is None else mask.bool()
        # The last frames of each row itself: neither its padding nor its neighbours count.
        count = mask.sum(dim=1)
        slot = torch.arange(history.shape[1], device=device) - history.shape[1] + count[:, None]
        order = torch.argsort(mask.long(), dim=1, descending=True, stable=True)
        rows = order.gather(1, slot.clamp(min=0, max=order.shape[1] - 1))
        last = audio_input_ids.gather(1, rows[..., None].expand(-1, -1, config.num_codebooks))
        history = torch.where((slot >= 0)[..., None], last, history)
    return DecodeState(
        token=input_ids[:, -1],
        frame=history[:, -1],
        is_audio=run > 0,
        speaking=speaking,
        to_text=~speaking,
        audio_step=run,
        delay_step=delay_step,
        finished=torch.zeros(batch, dtype=torch.bool, device=device),
        position=attention_mask.long().sum(dim=1),
        window=history,
        seeds=seeds,
    )


def open_audio(config: HiggsAudioV2Config, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """How many audio placeholders end each row, and whether `<|audio_out_bos|>` stands before them: [B], [B]."""
    length = input_ids.shape[1]
    placeholder = (input_ids == config.audio_token_id) | (input_ids == config.audio_delay_token_id)
    run = placeholder.flip(1).long().cumprod(dim=1).sum(dim=1)
    opener = input_ids.gather(1, (length - 1 - run).clamp(min=0)[:, None])[:, 0]
    return run, (opener == config.audio_bos_token_id) & (run < length)


def check_prompt(
    config: HiggsAudioV2Config,
    input_ids: Tensor,
    attention_mask: Tensor,
    audio_input_ids: Tensor | None,
    audio_input_ids_mask: Tensor | None,
    max_new_tokens: int | None,
    has_text_head: bool,
) -> int:
    """Refuses prompts that cannot be continued, and returns the number of steps. Runs once, before the first step."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UserError(f"input_ids must be [batch, tokens] with at least one token, but is {list(input_ids.shape)}.")
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask {list(attention_mask.shape)} and input_ids {list(input_ids.shape)} must have the same shape."
        )
    highest = int(input_ids.max())
    if highest >= config.vocab_size:
        raise UserError(
            f"Token id {highest} is beyond the vocabulary of {config.vocab_size}. Use the tokenizer that belongs to this "
            "checkpoint."
        )
    if not bool(attention_mask[:, -1].bool().all()):
        raise UserError("Prompts must be padded on the left, so that each ends where generation starts.")
    if audio_input_ids is not None and audio_input_ids.shape[-1] != config.num_codebooks:
        raise UserError(
            f"The prompt's audio has {audio_input_ids.shape[-1]} codebooks, but this model was built for "
            f"{config.num_codebooks}. Use the codec that belongs to the checkpoint."
        )
    if audio_input_ids is not None and audio_input_ids_mask is not None:
        mask = audio_input_ids_mask.bool()
        if mask.shape != audio_input_ids.shape[:2]:
            raise UserError(
                f"audio_input_ids_mask must be {list(audio_input_ids.shape[:2])}, but is {list(mask.shape)}."
            )
    longest = int(attention_mask.sum(dim=1).max())
    room = config.max_position_embeddings - longest
    if room < 1:
        raise UserError(
            f"The prompt is {longest} tokens long, but the model has {config.max_position_embeddings} positions. Shorten "
            "the text or the reference audio (25 frames per second), or split the text."
        )
    if max_new_tokens is not None and max_new_tokens > room:
        raise UserError(
            f"max_new_tokens={max_new_tokens} does not fit: the prompt takes {longest} of {config.max_position_embeddings} "
            f"positions. Ask for at most {room}."
        )
    if not has_text_head and not bool(open_audio(config, input_ids)[1].all()):
        raise UserError(
            "A prompt does not end by opening audio, and without a text head the model cannot write text. Build prompts "
            "with add_generation_prompt=True, or load the model with use_text_head=True."
        )
    return room if max_new_tokens is None else max_new_tokens
