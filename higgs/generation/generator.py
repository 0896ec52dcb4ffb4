"""Cached autoregressive generation: `prefill`, then `decode_one_frame` and `choose` in turn.

    prompt --prefill--> hidden --heads--> logits --choose--> codes --decode_one_frame--> hidden --heads--> ...

Everything that a step needs is in the cache and in `DecodeState`, as batched tensors; no step waits for the device.
`higgs.generation.reference` does the same slowly and obviously, and the tests hold the two equal.

Shapes: B batch, T prompt tokens, N steps, F frames, K codebooks, V rows per codebook, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from higgs.errors import UserError
from higgs.generation.config import GenerationConfig
from higgs.generation.sampling import NEVER, draw, force_delay, repeats, warp
from higgs.generation.skinny import SkinnyDecoder
from higgs.generation.state import DecodeState, check_prompt, initial_state
from higgs.model.cache import StaticKVCache
from higgs.model.config import HiggsAudioV2Config
from higgs.model.decoder import DualFFNDecoder, embed_step
from higgs.model.dual_ffn import Routing

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
StoppingCriterion = Callable[[Tensor, "tuple[Tensor, ...] | None"], "Tensor | bool"]

# On a GPU, asking whether all rows have finished makes the host wait; ask now and then and cut what came too much.
GPU_CHECK_EVERY = 16


@dataclass
class GenerationOutput:
    """What `generate` returns with `return_dict_in_generate=True`.

    `sequences` [B, T+N]: text ids, a placeholder for each audio frame. `audio_sequences` [B, F, K]: the prompt's frames
    (padded with EOS), then the generated ones; `audio_sequences_mask` [B, F] is True at frames of the row itself.
    `scores` and `logits`: per step, processed [B, K, V] and raw [B, K*V]. `text_scores`: per step [B, vocab] where the
    batch writes text.
    """

    sequences: Tensor
    audio_sequences: Tensor
    audio_sequences_mask: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    text_scores: tuple[Tensor, ...] | None = None
    past_key_values: StaticKVCache | None = None

    def __getitem__(self, name: str) -> object:
        return getattr(self, name)


@dataclass
class Choice:
    """One step's outcome: the state after it, what was chosen, and the scores it was chosen from."""

    state: DecodeState
    scores: Tensor
    logits: Tensor
    text_scores: Tensor | None


def prefill(
    model: DualFFNDecoder,
    cache: StaticKVCache,
    input_ids: Tensor,
    attention_mask: Tensor,
    audio_input_ids: Tensor | None = None,
    audio_input_ids_mask: Tensor | None = None,
) -> Tensor:
    """Runs left-padded prompts [B, T] into an empty cache; returns the last hidden state [B, C]."""
    position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    out = model.model(
        input_ids=input_ids,
        audio_input_ids=audio_input_ids,
        attention_mask=attention_mask,
        audio_input_ids_mask=audio_input_ids_mask,
        position_ids=position_ids,
        past_key_values=cache,
    )
    return out.last_hidden_state[:, -1]


def decode_one_frame(model: DualFFNDecoder, cache: StaticKVCache, state: DecodeState, mixed: bool = False) -> Tensor:
    """Feeds each row's last position and returns its hidden state [B, C].

    With `mixed` a row's last position may be text; without, every row's is audio and only audio weights are read.
    """
    net = model.model
    if mixed:
        x = embed_step(net, state.token, state.frame, state.is_audio)
        routing = Routing.everywhere(state.is_audio[:, None])
    else:
        x, routing = net.embed_audio_tokens(state.frame)[:, None], Routing.all_audio()
    mask = cache.begin(1)
    hidden = net.transform(x, routing, state.position[:, None], mask, cache)
    cache.end()
    return hidden[:, -1]


def choose(
    config: HiggsAudioV2Config,
    logits: Tensor,
    state: DecodeState,
    step: int | Tensor,
    how: GenerationConfig,
    text_logits: Tensor | None = None,
    processors: Sequence[LogitsProcessor] = (),
    input_ids: Tensor | None = None,
) -> Choice:
    """Picks every row's next frame from audio logits [B, K, V] (or text token from [B, vocab]); moves the state on.

    Order of processing: the delay pattern, the caller's processors (on [B*K, V]), temperature, top-k, top-p; then
    repetition-aware redrawing from the raw logits. The rules are SPEC section 5, those of transformers 5.6.2.
    """
    c = config
    bos, eos = c.audio_stream_bos_id, c.audio_stream_eos_id
    logits = logits.float()
    scores = force_delay(logits, state.audio_step, state.delay_step, bos, eos)
    for process in processors:
        scores = process(input_ids, scores.flatten(0, 1)).view_as(scores)
    if how.do_sample:
        scores = warp(scores, how.temperature, how.top_k, how.top_p)
    codes = draw(scores, state.seeds, step, stream=0) if how.do_sample else scores.argmax(dim=-1)
    if how.ras_win_len is not None:
        again = repeats(codes, state.window[:, -how.ras_win_len :], how.ras_win_max_num_repeat, bos, eos)
        codes = torch.where(again, draw(logits, state.seeds, step, stream=1), codes)
    codes = codes.masked_fill(state.finished[:, None], eos)

    ended = (codes == eos).all(dim=-1)
    delayed = (codes == eos).any(dim=-1) | (state.token == c.audio_delay_token_id)
    token = torch.where(delayed, c.audio_delay_token_id, c.audio_token_id)
    done = ended & ~state.to_text
    stops = how.eos_token_ids or c.eos_token_ids
    if stops:
        token = token.masked_fill(done, stops[0])
    speaking, finished, text_scores = state.speaking, state.finished | done, None
    if text_logits is not None:
        text_scores = text_logits.float()
        # Placeholders stand for frames; the text head must not write them.
        for placeholder in (c.audio_token_id, c.audio_delay_token_id):
            text_scores[:, placeholder].fill_(NEVER)
        if how.do_sample:
            text_scores = warp(text_scores, how.temperature, how.top_k, how.top_p)
        text = draw(text_scores, state.seeds, step, stream=2) if how.do_sample else text_scores.argmax(dim=-1)
        token = torch.where(speaking, token, text)
        if stops:
            # A row that was stopped from outside writes no placeholder for a frame that is not kept.
            token = token.masked_fill(state.finished, stops[0])
        turn_over = torch.zeros_like(finished)
        for end in stops:
            turn_over = turn_over | (text == end)
        finished = state.finished | torch.where(speaking, done, turn_over)
    window = state.window
    if how.ras_win_len is not None:
        shifted = torch.cat((window[:, 1:], codes[:, None]), dim=1)
        window = torch.where(speaking[:, None, None], shifted, window)
    return Choice(
        replace(
            state,
            token=token,
            frame=codes,
            is_audio=speaking,
            # A finished row goes on with frames of EOS.
            speaking=torch.where(speaking, ~(ended & state.to_text), token == c.audio_bos_token_id),
            audio_step=torch.where(speaking, state.audio_step + 1, 0),
            delay_step=torch.where(speaking, state.delay_step + (token == c.audio_delay_token_id), 0),
            finished=finished,
            window=window,
        ),
        scores,
        logits,
        text_scores,
    )


@torch.no_grad()
def generate(
    model: DualFFNDecoder,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    audio_input_ids: Tensor | None = None,
    audio_input_ids_mask: Tensor | None = None,
    how: GenerationConfig | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
    streamer: object | None = None,
    use_cache: bool = True,
) -> GenerationOutput:
    """Continues left-padded prompts [B, T] with their audio frames [B, F, K] until every row has finished.

    A row that ends early is padded with EOS and does not change the others. A prompt that does not end by opening
    audio is continued by the text head, which may open audio itself and is asked again when that audio ends. Without
    `use_cache` every step runs the whole sequence again. Raises UserError for prompts that cannot be continued.
    """
    how = how or GenerationConfig()
    c = model.config
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    steps = check_prompt(
        c,
        input_ids,
        attention_mask,
        audio_input_ids,
        audio_input_ids_mask,
        how.max_new_tokens,
        model.text_lm_head is not None,
    )
    batch, length = input_ids.shape
    device = input_ids.device
    seeds = row_seeds(how.seed, batch, device)
    state = initial_state(
        c, input_ids, attention_mask, audio_input_ids, audio_input_ids_mask, seeds, how.ras_win_len or 0
    )
    mixed = bool(state.to_text.any())
    cache = StaticKVCache(c, batch, length + steps, device, model.dtype)
    hidden = prefill(model, cache, input_ids, attention_mask, audio_input_ids, audio_input_ids_mask)
    skinny = SkinnyDecoder(model, batch) if SkinnyDecoder.serves(model, batch) and use_cache and not mixed else None

    sequences = torch.cat((input_ids, input_ids.new_zeros(batch, steps)), dim=1)
    frames = input_ids.new_full((batch, steps, c.num_codebooks), c.audio_stream_eos_id)
    is_frame = torch.zeros(batch, steps, dtype=torch.bool, device=device)
    running = torch.zeros(batch, steps, dtype=torch.bool, device=device)
    scores, logits, text_scores = [], [], []
    watched = stopping_criteria or streamer is not None
    check_every = 1 if device.type == "cpu" or watched else GPU_CHECK_EVERY
    if streamer is not None:
        streamer.put(input_ids.cpu())
    done = 0
    for step in range(steps):
        if step:
            if not use_cache:
                new = sequences[:, length : length + step]
                cache = StaticKVCache(c, batch, length + step, device, model.dtype)
                hidden = prefill(
                    model,
                    cache,
                    sequences[:, : length + step],
                    torch.cat((attention_mask, torch.ones_like(new)), dim=1),
                    *join_frames(
                        audio_input_ids, audio_input_ids_mask, frames[:, :step], model.model.audio_placeholders(new)
                    ),
                )
            elif skinny:
                hidden = skinny.decode_one_frame(cache, state)
            else:
                hidden = decode_one_frame(model, cache, state, mixed)
            state = replace(state, position=state.position + 1)
        running[:, step] = ~state.finished
        is_frame[:, step] = state.speaking & ~state.finished
        audio_logits = (skinny or model).audio_logits(hidden)
        text_logits = model.text_lm_head(hidden) if mixed else None
        so_far = sequences[:, : length + step]
        choice = choose(c, audio_logits, state, step, how, text_logits, logits_processor, so_far)
        state = choice.state
        sequences[:, length + step] = state.token
        frames[:, step] = torch.where(is_frame[:, step, None], state.frame, c.audio_stream_eos_id)
        done = step + 1
        if how.output_scores:
            scores.append(choice.scores)
            text_scores.append(choice.text_scores)
        if how.output_logits:
            logits.append(choice.logits.flatten(1))
        if streamer is not None:
            streamer.put(state.token.cpu())
            if hasattr(streamer, "put_frames"):
                streamer.put_frames(frames[:, step].cpu(), is_frame[:, step].cpu())
        for stops in stopping_criteria:
            state = replace(
                state, finished=state.finished | stops(sequences[:, : length + done], tuple(scores) or None)
            )
        if done % check_every == 0 and bool(state.finished.all()):
            break
    if streamer is not None:
        streamer.end()

    done = int(running[:, :done].any(dim=0).sum())
    sequences, frames, is_frame = sequences[:, : length + done], frames[:, :done], is_frame[:, :done]
    if mixed:
        frames, is_frame = left_align(frames, is_frame, c.audio_stream_eos_id)
    frames, is_frame = join_frames(audio_input_ids, audio_input_ids_mask, frames, is_frame)
    return GenerationOutput(
        sequences=sequences,
        audio_sequences=frames,
        audio_sequences_mask=is_frame,
        scores=tuple(scores[:done]) if how.output_scores else None,
        logits=tuple(logits[:done]) if how.output_logits else None,
        text_scores=tuple(text_scores[:done]) if how.output_scores and mixed else None,
        past_key_values=cache,
    )


def join_frames(
    prompt: Tensor | None, prompt_mask: Tensor | None, frames: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The prompt's frames, if any, then the generated ones, [B, F, K], and which of them are a row's own [B, F]."""
    if prompt is None:
        return frames, mask
    own = torch.ones_like(prompt[..., 0]) if prompt_mask is None else prompt_mask
    return torch.cat((prompt, frames), dim=1), torch.cat((own.bool(), mask), dim=1)


def row_seeds(seed: int | None, batch: int, device: torch.device) -> Tensor:
    """Row i draws with seed + i; without a seed one comes from torch's global generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if not 0 <= seed < 2**62:
        raise UserError(f"seed is {seed}; it must lie between 0 and 2^62.")
    return seed + torch.arange(batch, device=device)


def left_align(frames: Tensor, mask: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Moves each row's valid frames to the front, EOS behind them: [B, N, K], [B, N] -> the same, as short as can be."""
    count = mask.sum(dim=1)
    order = torch.argsort(mask.long(), dim=1, descending=True, stable=True)[:, : int(count.max())]
    aligned = torch.arange(order.shape[1], device=mask.device) < count[:, None]
    moved = frames.gather(1, order[..., None].expand(-1, -1, frames.shape[2]))
    return moved.masked_fill(~aligned[..., None], eos), aligned
