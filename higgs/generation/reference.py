"""The slow, obvious way to generate: one row, no cache, everything recomputed, rules in plain Python.

It exists to be read and to be compared with; `higgs.generation.generator` must give the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from higgs.generation.config import GenerationConfig
from higgs.generation.generator import row_seeds
from higgs.generation.sampling import draw, warp
from higgs.model.decoder import DualFFNDecoder


@torch.no_grad()
def reference_generate(
    model: DualFFNDecoder,
    input_ids: Tensor,
    audio_input_ids: Tensor | None = None,
    how: GenerationConfig | None = None,
    max_new_tokens: int = 64,
) -> tuple[list[int], list[list[int]]]:
    """One prompt without padding [T] and its frames [F, K] -> generated text tokens and generated frames.

    A prompt that ends by opening audio ends with that audio; any other is text for the text head, and goes back to text
    (here, unlike in `generate`, also one that breaks off inside a clip).
    """
    how = how or GenerationConfig()
    c = model.config
    bos, eos, delay = c.audio_stream_bos_id, c.audio_stream_eos_id, c.audio_delay_token_id
    seeds = row_seeds(how.seed, 1, input_ids.device)
    tokens: list[int] = input_ids.tolist()
    frames: list[list[int]] = [] if audio_input_ids is None else audio_input_ids.tolist()
    start, first_frame = len(tokens), len(frames)
    # Frames since the stream opened, or None while the row is writing text.
    spoken: int | None = 0 if tokens[-1] == c.audio_bos_token_id else None
    back_to_text = spoken is None
    tail = 0  # delay tokens since the first EOS of the stream

    for step in range(how.max_new_tokens or max_new_tokens):
        hidden = model.model(
            input_ids=torch.tensor([tokens], device=input_ids.device),
            audio_input_ids=torch.tensor([frames], device=input_ids.device) if frames else None,
        ).last_hidden_state[:, -1]

        if spoken is None:
            scores = model.text_lm_head(hidden).float()
            scores[:, [c.audio_token_id, delay]] = float("-inf")
            scores = warp(scores, how.temperature, how.top_k, how.top_p) if how.do_sample else scores
            token = int(draw(scores, seeds, step, 2) if how.do_sample else scores.argmax())
            tokens.append(token)
            if token in c.eos_token_ids:
                break
            if token == c.audio_bos_token_id:
                spoken, tail = 0, 0
            continue

        raw = model.audio_logits(hidden).float()
        scores = raw.clone()
        for k in range(c.num_codebooks):
            forced = bos if spoken <= k else eos if k < tail else None
            if forced is not None:
                keep = scores[0, k, forced].clone()
                scores[0, k] = float("-inf")
                scores[0, k, forced] = keep
        scores = warp(scores, how.temperature, how.top_k, how.top_p) if how.do_sample else scores
        frame = (draw(scores, seeds, step, 0) if how.do_sample else scores.argmax(-1))[0].tolist()
        if how.ras_win_len is not None:
            redrawn = draw(raw, seeds, step, 1)[0].tolist()
            for k, code in enumerate(frame):
                seen = [past[k] for past in frames[-how.ras_win_len :]]
                if code not in (bos, eos) and seen.count(code) >= how.ras_win_max_num_repeat:
                    frame[k] = redrawn[k]
        frames.append(frame)
        spoken += 1
        if all(code == eos for code in frame):
            if not back_to_text:
                tokens.append(c.eos_token_ids[0])
                break
            tokens.append(delay)
            spoken = None
        elif eos in frame or tokens[-1] == delay:
            tokens.append(delay)
            tail += 1
        else:
            tokens.append(c.audio_token_id)
    return tokens[start:], frames[first_frame:]
