"""What is frozen stays to the last bit, and the rest learns. (With sharded tables: test_parallel.py.)"""

import pytest
import torch
from decoder_cases import make_ours
from parallel_cases import Sums, labelled_batch, mean_loss
from torch import Tensor

from higgs import UserError
from higgs.train.freeze import FreezeConfig, apply_freeze, is_audio_part, text_tables
from higgs.train.parallel import clip_gradients

TABLES = {"model.embed_tokens.weight", "text_lm_head.weight"}


def changes(config: FreezeConfig, **model: object) -> dict[str, Tensor]:
    """Which entries of each weight three steps of AdamW with weight decay change."""
    decoder = make_ours(use_text_head=True, **model).train()
    frozen = apply_freeze(decoder, config)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    learnt = [p for p in decoder.parameters() if p.requires_grad]
    partly = {id(table) for table in frozen.partly}
    groups = [
        {"params": [p for p in learnt if id(p) not in partly], "weight_decay": 0.1},
        {"params": [p for p in learnt if id(p) in partly], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    module, batch = Sums(decoder), labelled_batch(decoder)
    for _ in range(3):
        optimizer.zero_grad()
        mean_loss(module(batch), batch).backward()
        frozen.mask_gradients()
        clip_gradients(learnt, 1.0)
        optimizer.step()
    return {name: parameter.detach() != before[name] for name, parameter in decoder.named_parameters()}


def test_nothing_is_frozen_by_default():
    assert all(changed.any() for changed in changes(FreezeConfig()).values())


@pytest.mark.parametrize("model", [{}, {"audio_attention": True, "audio_embed_projector": True}])
def test_backbone(model: dict):
    changed = changes(FreezeConfig(backbone=True), **model)
    learnt = {name for name, entries in changed.items() if entries.any()}
    assert learnt == {name for name in changed if is_audio_part(name)}
    kinds = {name.rpartition("layers.0.")[2].partition(".")[0] for name in learnt if "layers.0." in name}
    expected = {"audio_mlp", "audio_input_layernorm", "audio_post_attention_layernorm"}
    if model:
        expected |= {"audio_self_attn", "audio_self_attn_layernorm"}
    assert kinds == expected
    assert "audio_lm_head.weight" in learnt and "model.embed_audio_tokens.embed_audio_tokens.weight" in learnt
    assert ("model.embed_audio_tokens.projector.weight" in learnt) == bool(model)
    assert not learnt & {*TABLES, "model.norm.weight"}


def test_text_rows():
    changed = changes(FreezeConfig(text_rows=True))
    assert {name for name, entries in changed.items() if not entries.any()} == TABLES


def test_the_first_rows():
    changed = changes(FreezeConfig(embedding_rows=61))
    for name, entries in changed.items():
        assert entries.any()
        if name in TABLES:
            assert not entries[:61].any() and entries[61:].any()


def test_a_tied_table_is_one():
    decoder = make_ours(use_text_head=True, tie_word_embeddings=True)
    assert len(text_tables(decoder)) == 1
    changed = changes(FreezeConfig(embedding_rows=61), tie_word_embeddings=True)["model.embed_tokens.weight"]
    assert not changed[:61].any() and changed[61:].any()


def test_a_model_without_a_text_head():
    frozen = apply_freeze(make_ours(), FreezeConfig(embedding_rows=3))
    assert len(frozen.partly) == 1
    frozen.mask_gradients()  # nothing to mask yet


def test_frozen_tables_need_no_mask():
    assert apply_freeze(make_ours(use_text_head=True), FreezeConfig(text_rows=True, embedding_rows=3)).partly == []
    assert apply_freeze(make_ours(use_text_head=True), FreezeConfig()).partly == []


@pytest.mark.parametrize("rows", [-1, 96, 1000])
def test_more_rows_than_there_are(rows: int):
    with pytest.raises(UserError, match=r"freeze.embedding_rows.*95"):
        apply_freeze(make_ours(), FreezeConfig(embedding_rows=rows))
