"""The codec gives transformers' codes and waveforms, and both read each other's checkpoints."""

import copy
import json

import pytest
import torch
from codec_cases import ACOUSTIC_320, SHAPES, TEACHER, make_codec

from higgs.codec import Codec, HiggsAudioV2TokenizerConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest):
    """Our codec, and transformers' with the same weights, read from a strict copy of our state dict."""
    ours = make_codec(request.param)
    config = transformers.HiggsAudioV2TokenizerConfig(**copy.deepcopy(SHAPES[request.param]))
    theirs = transformers.HiggsAudioV2TokenizerModel(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("samples", [24000, 12345, 9599, 8161, 480])
@torch.no_grad()
def test_codes_and_waveform_equal_the_reference(pair, samples: int):
    ours, theirs = pair
    generator = torch.Generator().manual_seed(samples)
    clips = 0.3 * torch.randn(2, 1, samples, generator=generator)
    for bandwidth in (None, *ours.config.target_bandwidths):
        codes = ours.encode(clips, bandwidth).audio_codes
        assert torch.equal(codes, theirs.encode(clips, bandwidth).audio_codes)
    assert codes.shape == (2, ours.num_codebooks, ours.code_length(samples))
    if samples > 2000:
        assert codes.unique().numel() > ours.config.codebook_size // 16  # the test means little if codes hardly vary
    expected = theirs.decode(codes).audio_values
    decoded = ours.decode(codes)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(decoded.audio_values, expected, atol=1e-5, rtol=0)
    assert decoded.lengths.tolist() == [codes.shape[-1] * ours.config.hop_length] * 2

    full = ours(clips)
    reference = theirs(clips)
    assert torch.equal(full.audio_codes, reference.audio_codes)
    torch.testing.assert_close(full.audio_values, reference.audio_values, atol=1e-5, rtol=0)


@torch.no_grad()
def test_semantic_decoder_equals_the_reference(pair):
    from higgs.codec.ragged import Ragged

    ours, theirs = pair
    features = torch.randn(2, ours.config.semantic_hidden_size, 11)
    result = ours.decoder_semantic(Ragged(features)).values
    torch.testing.assert_close(result, theirs.decoder_semantic(features), atol=1e-5, rtol=1e-5)


def test_strided_semantic_branch_equals_the_reference():
    shape = {**SHAPES["odd"], "strides": [2, 3], "channel_ratios": [1, 1], "semantic_model_config": TEACHER}
    ours = make_codec(shape)
    theirs = transformers.HiggsAudioV2TokenizerModel(transformers.HiggsAudioV2TokenizerConfig(**copy.deepcopy(shape)))
    theirs.load_state_dict(ours.state_dict())
    from higgs.codec.ragged import Ragged

    features = torch.randn(2, 32, 24)
    with torch.no_grad():
        encoded = ours.encoder_semantic(Ragged(features))
        torch.testing.assert_close(encoded.values, theirs.encoder_semantic(features), atol=1e-5, rtol=1e-5)
        decoded = ours.decoder_semantic(encoded).values
        torch.testing.assert_close(decoded, theirs.decoder_semantic(encoded.values), atol=1e-5, rtol=1e-5)


CONFIGS = {
    "defaults": {},
    **SHAPES,
    "partial dicts": {
        "acoustic_model_config": {"encoder_hidden_size": 8, "downsampling_ratios": [8, 5, 4, 2]},
        "semantic_model_config": {"num_hidden_layers": 1},
    },
    "no latent size": {"acoustic_model_config": {**ACOUSTIC_320, "decoder_hidden_size": 512}, "codebook_dim": 48},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip_through_saved_files(name: str, tmp_path):
    reference = transformers.HiggsAudioV2TokenizerConfig(**copy.deepcopy(CONFIGS[name]))
    reference.save_pretrained(tmp_path)
    config = HiggsAudioV2TokenizerConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    back = transformers.HiggsAudioV2TokenizerConfig(**json.loads(json.dumps(config.to_dict())))
    assert HiggsAudioV2TokenizerConfig.from_dict(config.to_dict()) == config
    for their in (reference, back):
        for field in ("hop_length", "frame_rate", "num_quantizers", "hidden_size", "semantic_downsample_factor"):
            assert getattr(config, field) == getattr(their, field), field
        for field in ("sample_rate", "codebook_size", "codebook_dim", "kernel_size", "unit_kernel_size"):
            assert getattr(config, field) == getattr(their, field), field
        for nested in ("acoustic_model_config", "semantic_model_config"):
            for field, value in vars(getattr(config, nested)).items():
                theirs = getattr(getattr(their, nested), field)
                assert value == (tuple(theirs) if isinstance(theirs, list) else theirs), field


def test_partial_dict_given_directly_means_what_the_reference_means():
    shape = CONFIGS["partial dicts"]
    reference = transformers.HiggsAudioV2TokenizerConfig(**copy.deepcopy(shape))
    config = HiggsAudioV2TokenizerConfig.from_dict(shape)
    assert config.semantic_model_config.mask_time_prob == reference.semantic_model_config.mask_time_prob == 0.0
    assert list(config.acoustic_model_config.upsampling_ratios) == reference.acoustic_model_config.upsampling_ratios
    assert HiggsAudioV2TokenizerConfig().semantic_model_config.has_mask_embedding
    assert hasattr(transformers.HubertConfig(), "mask_time_prob")


def test_reference_checkpoint_survives_a_round_trip(pair, tmp_path):
    _, theirs = pair
    config = HiggsAudioV2TokenizerConfig.from_dict(theirs.config.to_dict())
    with torch.device("meta"):
        ours = Codec(config)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    again = transformers.HiggsAudioV2TokenizerModel(transformers.HiggsAudioV2TokenizerConfig(**config.to_dict()))
    again.load_state_dict(ours.state_dict(), strict=True)
    assert all(
        torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), again.state_dict().values(), strict=True)
    )
