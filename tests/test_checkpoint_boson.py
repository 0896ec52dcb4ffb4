"""The original release's decoder: files built from the tables of names load with the same logits."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_cases import load_hf, same_tensors
from decoder_cases import make_batch, make_ours
from safetensors.torch import load_file, save_file

from higgs import HiggsAudioV2ForConditionalGeneration as Model
from higgs import HiggsAudioV2Model, UserError
from higgs.checkpoint.decoder import from_boson, to_boson


def boson_folder(folder: Path, split: bool = True, **shape: object) -> Model:
    """A checkpoint as the original release lays it out, from the tables of the design notes; returns its content."""
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 0.125, "high_freq_factor": 0.5,
        "original_max_position_embeddings": 1024,
    }  # fmt: skip
    rope = {"rope_theta": 500000.0, **scaling}
    model = make_ours(seed=3, use_text_head=True, rope_parameters=rope, num_key_value_heads=2, bos_token_id=1, **shape)
    config = model.config
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "model.embed_audio_tokens.embed_audio_tokens.weight":
            tensors["audio_codebook_embeddings.weight"] = tensor
        elif name.endswith("_lm_head.weight"):
            head = "audio_decoder_proj." + name.removesuffix(".weight")
            if split:
                tensors[head + ".linear_frozen.weight"] = tensor[:70].clone()
                tensors[head + ".linear_trainable.weight"] = tensor[70:].clone()
            else:
                tensors[head + ".weight"] = tensor
        elif name == "model.embed_tokens.weight" and split:
            tensors["embed_tokens.embedding_frozen.weight"] = tensor[:90].clone()
            tensors["embed_tokens.embedding_trainable.weight"] = tensor[90:].clone()
        else:
            tensors[name.removeprefix("model.")] = tensor
    tensors["audio_codebook_weights"] = torch.ones(config.num_codebooks)
    tensors["rotary_emb.inv_freq"] = torch.ones(4)
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
        )
    }  # fmt: skip
    written = {
        "architectures": ["HiggsAudioModel"],
        "model_type": "higgs_audio",
        "text_config": {**text, "model_type": "llama", "rope_theta": 500000.0, "rope_scaling": scaling,
                        "tie_word_embeddings": True, "eos_token_id": [1, 2], "torch_dtype": "bfloat16"},
        "audio_num_codebooks": config.num_codebooks,
        "audio_codebook_size": config.codebook_size - 2,
        "audio_out_token_idx": config.audio_token_id,
        "audio_out_bos_token_id": config.audio_bos_token_id,
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "audio_in_token_idx": 86,
        "audio_eos_token_id": 87,
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": [0, 1],
        "encode_whisper_embed": False,
        "use_delay_pattern": True,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return model


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("text_head", [False, True])
@torch.no_grad()
def test_a_decoder_of_the_original_release(split: bool, text_head: bool, tmp_path):
    # The release's ids of the end of a turn and of the delay, where no tokenizer says otherwise.
    model = boson_folder(tmp_path, split)
    loaded = Model.from_pretrained(tmp_path, use_text_head=text_head)
    expected = {name: t for name, t in model.state_dict().items() if text_head or not name.startswith("text")}
    same_tensors(loaded.state_dict(), expected)
    assert loaded.config.eos_token_id == 128009
    assert loaded.config.audio_delay_token_id == 128014
    loaded.config.audio_delay_token_id = model.config.audio_delay_token_id
    batch = make_batch(model.config, [[5, 3, 4], [9, 1, 6]])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    same_tensors(HiggsAudioV2Model.from_pretrained(tmp_path).state_dict(), model.model.state_dict())


@torch.no_grad()
def test_a_decoder_of_the_original_release_with_its_tokenizer(processor, tmp_path):
    processor.tokenizer.save(tmp_path)
    boson_folder(tmp_path, vocab_size=processor.tokenizer.vocab_size)
    loaded = Model.from_pretrained(tmp_path)
    assert loaded.config.eos_token_id == processor.tokenizer.token_to_id("<|eot_id|>")
    assert loaded.config.audio_delay_token_id == processor.audio_delay_token_id
    # Saved again it is a checkpoint of the Hugging Face format.
    loaded.save_pretrained(tmp_path / "hf")
    back = load_hf("HiggsAudioV2ForConditionalGeneration", tmp_path / "hf")
    same_tensors(back.state_dict(), loaded.state_dict())


@torch.no_grad()
def test_heads_kept_twice_are_read_once(tmp_path):
    model = make_ours(use_text_head=True)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for head in ("audio_lm_head.weight", "text_lm_head.weight"):
        stored[f"audio_decoder_proj.{head}"] = stored[head].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    for text_head in (False, True):
        loaded = Model.from_pretrained(tmp_path, use_text_head=text_head)
        assert torch.equal(loaded.audio_lm_head.weight, model.audio_lm_head.weight)


def test_the_tables_of_names_are_each_others_inverse():
    for name in make_ours(use_text_head=True, attention_bias=True, audio_embed_projector=True).state_dict():
        assert from_boson(to_boson(name)) == (name, 0)
        assert from_boson(name) == (name, 0)


def test_split_parts_must_fit_together(tmp_path):
    boson_folder(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for change in (
        {"embed_tokens.embedding_trainable.weight": torch.zeros(6, 31)},
        {"embed_tokens.embedding_frozen.weight": None},
    ):
        altered = {name: t for name, t in (stored | change).items() if t is not None}
        save_file(altered, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"model\.embed_tokens\.weight"):
            Model.from_pretrained(tmp_path)


ORIGINAL_ABLATIONS = {
    "stack": ({"audio_ffn_layers": []}, {"audio_adapter_type": "stack", "audio_dual_ffn_layers": None}),
    "some layers": (
        {"audio_ffn_layers": [1]},
        {"audio_adapter_type": "dual_ffn", "audio_dual_ffn_layers": [1]},
    ),
    "fast-forward": (
        {"audio_ffn_layers": [0], "audio_fast_forward": True},
        {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [0]},
    ),
    "embedding": (
        {"audio_embed_mean": True, "audio_embed_projector": True},
        {"audio_embed_avg": True, "use_audio_out_embed_projector": True},
    ),
}


@pytest.mark.parametrize("name", ORIGINAL_ABLATIONS)
@torch.no_grad()
def test_the_originals_ablations_are_read(name: str, tmp_path):
    ours, switches = ORIGINAL_ABLATIONS[name]
    model = boson_folder(tmp_path, **ours)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | switches))
    stored = load_file(tmp_path / "model.safetensors")
    for key in [key for key in stored if "projector" in key]:
        stored["audio_out_embed_projector.weight"] = stored.pop(key)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = Model.from_pretrained(tmp_path, use_text_head=True)
    assert {key: getattr(loaded.config, key) for key in ours} == ours
    assert not loaded.config.is_released_architecture
    loaded.config.audio_delay_token_id = model.config.audio_delay_token_id
    batch = make_batch(model.config, [[5, 3, 4], [9, 1, 6]])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_the_originals_audio_attention_is_refused(tmp_path):
    boson_folder(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"use_audio_out_self_attention": True}))
    with pytest.raises(UserError, match="use_audio_out_self_attention"):
        Model.from_pretrained(tmp_path)
