"""The semantic teacher from public files: our HuBERT against transformers' and torchaudio's, and what is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from codec_cases import SHAPES, TEACHER, make_codec
from safetensors.torch import save_file
from torch import Tensor, nn

from higgs.checkpoint.teacher import (
    config_with_teacher,
    from_public,
    give_teacher,
    load_teacher,
    to_torchaudio,
)
from higgs.codec import Codec, HiggsAudioV2TokenizerConfig
from higgs.codec.hubert import Hubert
from higgs.codec.ragged import Ragged
from higgs.errors import UserError


def tiny_torchaudio(large: bool = False, seed: int = 0) -> nn.Module:
    """torchaudio's HuBERT with random weights, two heads of 64; `large` has the layer norms of HuBERT large."""
    models = pytest.importorskip("torchaudio.models")
    torch.manual_seed(seed)
    return models.wav2vec2_model(
        extractor_mode="layer_norm" if large else "group_norm",
        extractor_conv_layer_config=[(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2],
        extractor_conv_bias=large,
        encoder_embed_dim=128,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=3,
        encoder_num_heads=2,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=96,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=large,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    ).eval()


def waves() -> Tensor:
    return 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(3))


def heard_by(teacher_file: Path) -> Tensor:
    teacher = load_teacher(teacher_file)
    hubert = Hubert(teacher.config)
    hubert.load_state_dict(teacher.tensors, strict=True)
    return hubert(Ragged(waves()[:, None])).values.transpose(1, 2)


@pytest.mark.parametrize("large", [False, True])
def test_torchaudios_file_makes_the_same_features(large: bool, tmp_path: Path):
    theirs = tiny_torchaudio(large)
    torch.save(theirs.state_dict(), tmp_path / "hubert.pth")
    found = heard_by(tmp_path / "hubert.pth")
    with torch.no_grad():
        features, _ = theirs.feature_extractor(waves(), None)
        transformer = theirs.encoder.transformer
        first = transformer._preprocess(theirs.encoder.feature_projection(features))
        # torchaudio norms before the layers where the others norm after them: by name, and so by computation.
        states = [first, *transformer.get_intermediate_outputs(theirs.encoder.feature_projection(features))]
        if large:
            states[-1] = transformer(theirs.encoder.feature_projection(features))
        else:
            states[0] = transformer.layer_norm(first) if not transformer.layer_norm_first else first
    torch.testing.assert_close(found, torch.stack(states).mean(0), atol=1e-5, rtol=1e-4)


def test_the_names_go_there_and_back(tmp_path: Path):
    state = tiny_torchaudio().state_dict()
    back = to_torchaudio(from_public(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_older_files_spell_weight_norm_otherwise(tmp_path: Path):
    state = tiny_torchaudio().state_dict()
    old = {
        f"wav2vec2.{name}".replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }
    old |= {"aux.weight": torch.zeros(2), "mask_generator.mask_embedding": torch.zeros(3)}
    torch.save(state, tmp_path / "new.pth")
    torch.save(old, tmp_path / "old.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "new.safetensors")
    expected = heard_by(tmp_path / "new.pth")
    assert torch.equal(heard_by(tmp_path / "old.pth"), expected)
    assert torch.equal(heard_by(tmp_path / "new.safetensors"), expected)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_transformers_makes_the_same_features(safe: bool, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.HubertModel(transformers.HubertConfig(**TEACHER)).eval()
    theirs.save_pretrained(tmp_path)
    if not safe:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    found = heard_by(tmp_path)
    with torch.no_grad():
        states = theirs(waves(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, torch.stack(states).mean(0), atol=1e-5, rtol=1e-4)


def test_the_codec_takes_the_teachers_sizes(tmp_path: Path):
    torch.save(tiny_torchaudio().state_dict(), tmp_path / "hubert.pth")
    teacher = load_teacher(tmp_path / "hubert.pth")
    config = config_with_teacher(HiggsAudioV2TokenizerConfig.from_dict(SHAPES["release-like"]), teacher.config)
    assert config.semantic_hidden_size == 128 and config.hidden_size == 16 + 128
    codec = Codec(config)
    give_teacher(codec, teacher)
    assert not any(p.requires_grad for p in codec.semantic_model.parameters())
    made = codec.reconstruct(torch.randn(1, 1, 4800), quantize=False)
    assert made.teacher.shape == made.semantic.shape == (1, 128, 5)


def test_frames_must_fit_the_codecs():
    config = HiggsAudioV2TokenizerConfig.from_dict({**SHAPES["release-like"], "semantic_sample_rate": 16000})
    from dataclasses import replace

    other = replace(make_codec("release-like").config.semantic_model_config, conv_stride=(5, 2, 2, 2, 2, 2, 3))
    with pytest.raises(UserError, match="no multiple of the codec's 25"):
        config_with_teacher(config, other)


class Anything:
    pass


def test_what_is_no_teacher_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no semantic teacher at"):
        load_teacher(tmp_path / "nowhere")
    (tmp_path / "pickled.pth").write_bytes(pickle.dumps(Anything()))
    with pytest.raises(UserError, match="plain tensors"):
        load_teacher(tmp_path / "pickled.pth")
    torch.save({"model": {"weight": torch.zeros(1)}, "cfg": 3}, tmp_path / "nested.pth")
    with pytest.raises(UserError, match="no state dict"):
        load_teacher(tmp_path / "nested.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="lacks the tensor feature_extractor"):
        load_teacher(tmp_path / "other.pth")
    state = tiny_torchaudio().state_dict()
    state.pop("encoder.transformer.layers.1.attention.q_proj.bias")
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"missing: encoder\.layers\.1\.attention\.q_proj\.bias"):
        load_teacher(tmp_path / "less.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "wavlm"}))
    with pytest.raises(UserError, match="wavlm"):
        load_teacher(tmp_path / "folder")
