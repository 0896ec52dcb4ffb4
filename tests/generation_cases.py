"""Prompts and settings that the tests of generation share, and the comparison with the slow reference.

Shapes: B batch, T tokens, F frames, K codebooks, V rows per codebook.
"""

from dataclasses import replace

import torch
from torch import Tensor

from higgs import GenerationConfig
from higgs.generation import generate, reference_generate

CODES = {"codebook_size": 66, "audio_stream_bos_id": 64, "audio_stream_eos_id": 65}
SETTINGS = {
    "greedy": GenerationConfig(max_new_tokens=24),
    "sampling": GenerationConfig(max_new_tokens=24, do_sample=True, temperature=0.8, top_k=20, top_p=0.9, seed=11),
    "greedy, redrawing": GenerationConfig(max_new_tokens=24, ras_win_len=5, ras_win_max_num_repeat=1, seed=4),
    "sampling, redrawing": GenerationConfig(
        max_new_tokens=24, do_sample=True, top_k=4, seed=2**61, ras_win_len=3, ras_win_max_num_repeat=1
    ),
}
PROMPTS = [[5, 3, 4], [9, 1, 2, 6, 3], [12], [3, 2, 1]]


def check_against_reference(model, batch: dict[str, Tensor], how: GenerationConfig) -> list[tuple[int, int]]:
    """Every row of a batch is what the slow reference makes of it alone; returns each row's (tokens, frames)."""
    out = generate(model, **batch, how=how)
    prompt, first = batch["input_ids"].shape[1], batch["audio_input_ids"].shape[1] if "audio_input_ids" in batch else 0
    counts = []
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        frames = None
        if first:
            frames = batch["audio_input_ids"][row][batch["audio_input_ids_mask"][row]]
        alone = replace(how, seed=None if how.seed is None else how.seed + row)
        tokens, spoken = reference_generate(model, ids[mask.bool()], frames, alone)
        written = out.sequences[row, prompt:].tolist()
        assert written[: len(tokens)] == tokens
        assert all(token == model.config.eos_token_ids[0] for token in written[len(tokens) :])
        generated, valid = out.audio_sequences[row, first:], out.audio_sequences_mask[row, first:]
        assert valid.tolist() == [True] * len(spoken) + [False] * (len(valid) - len(spoken))
        assert generated[valid].tolist() == spoken
        assert (generated[~valid] == model.config.audio_stream_eos_id).all()
        if first:
            assert torch.equal(out.audio_sequences[row, :first], batch["audio_input_ids"][row])
        counts.append((len(tokens), len(spoken)))
    assert out.sequences.shape[1] - prompt == max(count for count, _ in counts), (
        "no step more than the longest row needs"
    )
    return counts
