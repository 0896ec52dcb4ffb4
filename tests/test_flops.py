"""Operations counted by hand, and by PyTorch's own counter, agree with the formula; peaks are found by a GPU's name."""

import pytest
import torch
from decoder_cases import SMALL, make_batch, make_ours
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from higgs import HiggsAudioV2Config
from higgs.model import decoder_loss
from higgs.train.flops import PEAKS, TokenCounts, peak_flops, published_peak, training_flops

# Wide and long enough that products decide, as they do in earnest.
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4}
SHAPES = {
    "released": {},
    "dense": {"audio_ffn_layers": "none"},
    "half": {"audio_ffn_layers": "last_half"},
    "projector": {"audio_embed_projector": True},
}


def labelled(config: HiggsAudioV2Config, rows: list[list[int]]) -> dict[str, Tensor]:
    batch = make_batch(config, rows, side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["audio_labels"] = batch["audio_input_ids"].masked_fill(~batch["audio_input_ids_mask"][..., None], -100)
    return batch


def test_by_hand():
    config = HiggsAudioV2Config(**{**SMALL, "num_key_value_heads": 2})
    counts = TokenCounts(text=3, audio=5, text_labels=2, audio_labels=4, pairs=36, text_pairs=6, audio_pairs=15)
    attention = 32 * (32 + 16 + 16 + 32)  # queries, keys, values, output
    feed_forward = 3 * 32 * 48
    layer = 8 * (attention + feed_forward)
    heads = 4 * 32 * 8 * 18 + 2 * 32 * 96
    scores = 36 * 4 * 8 * 2 * 2  # pairs, heads, head dim, a product for the score and one for the sum, 2 each
    assert training_flops(config, counts) == 6 * (2 * layer + heads) + 3 * 2 * scores
    assert training_flops(config, counts, use_text_head=False) == 6 * (2 * layer + heads - 2 * 32 * 96) + 3 * 2 * scores


def test_ablations_by_hand():
    counts = TokenCounts(text=3, audio=5, text_labels=2, audio_labels=4, pairs=36, text_pairs=6, audio_pairs=15)

    def flops(**changes: object) -> float:
        return training_flops(HiggsAudioV2Config(**SMALL, **changes), counts)

    attention, feed_forward, pair = 4 * 32 * 32, 3 * 32 * 48, 12 * 32
    # A dense layer, or one without its own audio part, costs each token the same.
    assert flops() == flops(audio_ffn_layers="none") == flops(audio_ffn_layers=[1]) == flops(audio_embed_mean=True)
    skipped = 6 * 5 * (attention + feed_forward) + pair * (36 - 6)
    assert flops(audio_ffn_layers=[1], audio_fast_forward=True) == flops() - skipped
    assert flops(audio_ffn_layers=[1], audio_attention=True) == flops() + 6 * 5 * attention + pair * 15
    assert flops(audio_embed_projector=True) == flops() + 6 * 5 * 32 * 32


@pytest.mark.parametrize("name", SHAPES)
def test_pytorchs_counter_agrees(name: str):
    """One row without padding. PyTorch counts the whole square of attention scores; the formula its causal half."""
    model = make_ours(use_text_head=True, **WIDE, **SHAPES[name]).train()
    batch = labelled(model.config, [[40, 60, 20]])
    with FlopCounterMode(display=False) as counter:
        inputs = {key: value for key, value in batch.items() if "labels" not in key}
        hidden = model.model(**inputs).last_hidden_state
        sums = decoder_loss(
            model,
            hidden,
            model.model.audio_placeholders(batch["input_ids"]),
            batch["labels"],
            batch["audio_labels"],
            batch["audio_input_ids_mask"],
        )
        (sums.codebook_sum.sum() + sums.text_sum).backward()
    counts = TokenCounts.of(batch, model.config)
    square = TokenCounts(**{**vars(counts), "pairs": counts.tokens**2})
    found = counter.get_total_flops()
    seen = {str(op) for ops in counter.get_flop_counts().values() for op in ops}
    if not any("attention" in op for op in seen):  # the CPU's fused attention has no formula there
        found += 12 * counts.tokens**2 * model.config.num_attention_heads * model.config.head_dim * 4
    # Nothing is counted for the embedding's gradient; the first layer's input needs it all the same.
    assert training_flops(model.config, square) == pytest.approx(found, rel=0.03)
    assert training_flops(model.config, counts) < training_flops(model.config, square)


def test_counts_of_a_padded_batch():
    config = HiggsAudioV2Config(**SMALL)
    batch = labelled(config, [[5, 3, 4], [12]])
    # 5 words and the opener, 3 frames with their delay of 7, begin and end, 4 words; then a row of text alone.
    counts = TokenCounts.of(batch, config)
    assert (counts.text, counts.audio) == (5 + 1 + 4 + 12, 3 + 2 + 7)
    assert counts.text_labels == 5 + 1 + 12 + 4 + 12 - 2, "the first of each row has nothing before it"
    assert counts.audio_labels == 12
    assert counts.pairs == 22 * 23 // 2 + 12 * 13 // 2
    assert counts.text_pairs == 10 * 11 // 2 + 12 * 13 // 2 and counts.audio_pairs == 12 * 13 // 2
    assert counts + counts == TokenCounts(**{name: 2 * value for name, value in vars(counts).items()})


def test_counts_of_packed_rows_are_those_of_the_samples():
    config = HiggsAudioV2Config(**SMALL)
    rows = [[5, 3, 4], [9, 1, 2, 6, 3]]
    alone = [labelled(config, [row]) for row in rows]
    for batch in alone:
        batch["labels"][:, 0] = -100
    padding = torch.full((1, 6), config.pad_token_id)
    positions = [torch.arange(batch["input_ids"].shape[1])[None] for batch in alone]
    packed = {
        "input_ids": torch.cat([*(b["input_ids"] for b in alone), padding], dim=1),
        "labels": torch.cat([*(b["labels"] for b in alone), torch.full_like(padding, -100)], dim=1),
        "position_ids": torch.cat([*positions, torch.arange(6)[None]], dim=1),
        "audio_labels": torch.cat([b["audio_labels"] for b in alone], dim=1),
    }
    assert TokenCounts.of(packed, config) == sum((TokenCounts.of(b, config) for b in alone), TokenCounts())


def test_peaks():
    assert published_peak("NVIDIA H200", torch.bfloat16) == 989e12
    assert published_peak("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert published_peak("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert published_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert published_peak("NVIDIA L40S", torch.bfloat16) == 362e12
    assert published_peak("NVIDIA GeForce RTX 4090", torch.bfloat16) == 165.2e12
    assert published_peak("NVIDIA A1000", torch.bfloat16) is None, "a longer number is another card"
    assert published_peak("Some Other Card", torch.bfloat16) is None
    assert published_peak("NVIDIA H200", torch.float64) is None
    assert all(peaks[torch.float32] < peaks[torch.bfloat16] for peaks in PEAKS.values())
    assert 1e9 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32) == peak_flops(torch.device("cpu"), torch.float32)
    assert peak_flops(torch.device("mps"), torch.float32) is None
