"""A decoder started from a Llama writes what the Llama writes; its audio parts start as copies or stay."""

import pytest
import torch
import transformers
from decoder_cases import SMALL, make_ours, randomize

from higgs import UserError
from higgs.checkpoint.text_model import start_from_text_model

WORDS = 70  # the decoder's vocabulary is larger: audio's control tokens are new


def write_llama(folder, **changes) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        **{
            "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "rope_parameters": SMALL["rope_parameters"], "tie_word_embeddings": False, **changes,
        }
    )  # fmt: skip
    llama = randomize(transformers.LlamaForCausalLM(config), seed=5).eval()
    llama.save_pretrained(folder)
    return llama


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", ["all", "none"])
def test_it_writes_what_the_llama_writes(tmp_path, layers: str, tied: bool):
    llama = write_llama(tmp_path, tie_word_embeddings=tied)
    ours = make_ours(use_text_head=True, num_key_value_heads=2, audio_ffn_layers=layers)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    stayed = start_from_text_model(ours, tmp_path)
    assert set(stayed) == {"audio_lm_head.weight", "model.embed_audio_tokens.embed_audio_tokens.weight"}
    ids = torch.randint(0, WORDS, (2, 12))
    with torch.no_grad():
        assert torch.allclose(ours(ids).text_logits[..., :WORDS], llama(ids).logits, atol=1e-5)
    assert all(torch.equal(before[name], dict(ours.named_parameters())[name]) for name in stayed)
    assert torch.equal(ours.model.embed_tokens.weight[WORDS:], before["model.embed_tokens.weight"][WORDS:])
    if layers == "all":
        layer = ours.model.layers[1]
        assert torch.equal(layer.audio_mlp.up_proj.weight, llama.model.layers[1].mlp.up_proj.weight)
        assert torch.equal(layer.audio_input_layernorm.weight, llama.model.layers[1].input_layernorm.weight)


def test_audios_own_attention_and_projector_stay(tmp_path):
    write_llama(tmp_path)
    ours = make_ours(num_key_value_heads=2, audio_attention=True, audio_embed_projector=True)
    stayed = start_from_text_model(ours, tmp_path)
    assert {name.split(".")[-3] for name in stayed if "layers.0" in name} == {"audio_self_attn", "0"}
    assert "model.embed_audio_tokens.projector.weight" in stayed


def test_what_does_not_fit_is_told(tmp_path):
    write_llama(tmp_path / "wide", intermediate_size=64)
    write_llama(tmp_path / "short", num_hidden_layers=1)
    write_llama(tmp_path / "wordy", vocab_size=97)
    write_llama(tmp_path / "deep", num_hidden_layers=3)
    write_llama(tmp_path / "heads", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    write_llama(tmp_path / "turning", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    make_ours().save_pretrained(tmp_path / "speech")
    for folder, complaint in (
        ("wide", r"mlp.*\[64, 32\].*text model's sizes"),
        ("short", r"layers.1.*missing"),
        ("deep", r"layers.2.*has no place"),
        ("heads", "num_attention_heads is 2 in"),
        ("turning", "rope_parameters is"),
        ("wordy", r"embed_tokens.*\[97, 32\]"),
        ("speech", "no model of type llama"),
    ):
        ours = make_ours(num_key_value_heads=2)
        before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
        with pytest.raises(UserError, match=complaint):
            start_from_text_model(ours, tmp_path / folder)
        assert all(torch.equal(before[name], parameter) for name, parameter in ours.named_parameters())
