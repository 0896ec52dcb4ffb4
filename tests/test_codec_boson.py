"""The original release's codec: its file, built from a random codec, loads with the same codes and waveforms."""

import pytest
import torch
from codec_cases import SHAPES, make_codec

from higgs.checkpoint.codec import boson_codec_to_hf, from_boson, key_map, to_boson
from higgs.codec import Codec
from higgs.errors import UserError

SHAPE = {
    **SHAPES["release-like"],
    # The release's file says nothing of its teacher's heads, which are 64 wide.
    "semantic_model_config": {
        **SHAPES["release-like"]["semantic_model_config"],
        "hidden_size": 64,
        "num_attention_heads": 1,
    },
    "acoustic_model_config": {**SHAPES["release-like"]["acoustic_model_config"], "encoder_hidden_size": 6},
}
BOSON_CONFIG = {
    "n_filters": 32,
    "D": 16,
    "codebook_dim": 16,
    "target_bandwidths": [0.5, 1, 1.5, 2, 4],
    "ratios": [8, 5, 4, 2, 3],
    "sample_rate": 24000,
    "bins": 1024,
    "n_q": 8,
    "semantic_techer": "hubert_base_general",
}


@pytest.fixture(scope="module")
def codec() -> Codec:
    return make_codec(SHAPE)


@pytest.fixture
def boson(codec: Codec) -> dict[str, torch.Tensor]:
    return to_boson(codec.state_dict(), codec.config)


def test_file_of_the_release_gives_the_same_codes(codec: Codec, boson: dict, tmp_path):
    boson["fc1.weight"] = torch.zeros(3)  # the release's file carries both of these; nothing uses them
    boson["semantic_model.masked_spec_embed"] = torch.zeros(64)
    torch.save(boson, tmp_path / "model.pth")
    config, state = boson_codec_to_hf(torch.load(tmp_path / "model.pth", weights_only=True), BOSON_CONFIG)
    assert config == codec.config
    loaded = Codec(config).eval()
    loaded.load_state_dict(state, strict=True)
    clips = 0.3 * torch.randn(2, 1, 9999, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = codec.encode(clips), loaded.encode(clips)
        assert torch.equal(found.audio_codes, expected.audio_codes)
        audio = codec.decode(expected.audio_codes).audio_values
        assert torch.equal(loaded.decode(found.audio_codes).audio_values, audio)


def test_keys_are_the_ones_of_the_release(boson: dict):
    for key in (
        "encoder.block.0.weight_v",
        "encoder.block.1.block.0.block.0.alpha",
        "encoder.block.5.block.2.block.3.weight_g",
        "encoder.block.3.block.4.bias",
        "encoder.block.6.alpha",
        "encoder.block.7.bias",
        "decoder_2.model.0.weight_v",
        "decoder_2.model.5.block.0.alpha",
        "decoder_2.model.5.block.1.weight_g",
        "decoder_2.model.5.block.4.block.1.weight_v",
        "decoder_2.model.7.weight_g",
        "encoder_semantic.conv.conv.weight",
        "encoder_semantic.conv_blocks.1.conv.conv.bias",
        "encoder_semantic.conv_blocks.0.res_units.1.conv1.conv.weight",
        "encoder_semantic.conv_blocks.0.res_units.1.conv2.weight",
        "decoder_semantic.conv1.conv.weight",
        "decoder_semantic.conv2.conv.weight",
        "quantizer.vq.layers.7._codebook.embed",
        "quantizer.vq.layers.0._codebook.inited",
        "quantizer.vq.layers.0.project_in.weight",
        "fc_prior.weight",
        "fc_post1.bias",
        "fc_post2.bias",
        "semantic_model.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    ):
        assert key in boson
    assert not any(key.startswith(("acoustic_", "fc.", "quantizer.quantizers")) for key in boson)


def test_round_trip_is_exact_and_the_map_is_one_to_one(codec: Codec, boson: dict):
    prefixes = key_map(codec.config)
    assert len(set(prefixes.values())) == len(prefixes)
    again = from_boson(boson, codec.config)
    assert again.keys() == codec.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in codec.state_dict().items())


def test_weight_norm_is_multiplied_out(codec: Codec, boson: dict):
    key = "encoder.block.0"
    boson[f"{key}.weight_g"] = boson[f"{key}.weight_g"] * 2
    boson[f"{key}.weight_v"] = boson[f"{key}.weight_v"] * 5
    weight = from_boson(boson, codec.config)["acoustic_encoder.conv1.weight"]
    torch.testing.assert_close(weight, 2 * codec.acoustic_encoder.conv1.weight)


def test_damaged_files_name_the_tensor(boson: dict):
    def check(message: str, change: dict, config: dict | None = None) -> None:
        tensors = {key: tensor for key, tensor in {**boson, **change}.items() if tensor is not None}
        with pytest.raises(UserError, match=message):
            boson_codec_to_hf(tensors, config or BOSON_CONFIG)

    check(r"missing: fc2\.bias; unexpected: none", {"fc_post2.bias": None})
    check(r"no place for: stray\.weight", {"stray.weight": torch.zeros(1)})
    check(r"Tensor fc2\.bias .* shape \(3,\) .* \(16,\)", {"fc_post2.bias": torch.zeros(3)})
    check(r"has encoder\.block\.7\.weight_g but not encoder\.block\.7\.weight_v", {"encoder.block.7.weight_v": None})
    check(r"lacks tensor encoder\.block\.0\.weight_v", {"encoder.block.0.weight_v": None})
    check("no place for: quantizer.vq.layers.4", {}, {**BOSON_CONFIG, "n_q": 4})
    check("missing: quantizer.quantizers.8", {}, {**BOSON_CONFIG, "n_q": 9})
    check("downsample_mode='avg'", {}, {**BOSON_CONFIG, "downsample_mode": "avg"})
    check("list of bins", {}, {**BOSON_CONFIG, "bins": [8, 5, 5, 5]})
