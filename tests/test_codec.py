"""Codec: errors, codebooks fitted to real speech, configs, building on the meta device."""

from pathlib import Path

import pytest
import torch
from codec_cases import ACOUSTIC_960, SHAPES, make_codec
from hydra.utils import instantiate
from omegaconf import OmegaConf

from higgs.audio import load_audio
from higgs.codec import AcousticConfig, Codec, HiggsAudioV2TokenizerConfig, SemanticConfig
from higgs.codec.quantizer import kmeans, nearest
from higgs.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "codec"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return make_codec("release-like")


@pytest.fixture(scope="module")
def debug_codec() -> Codec:
    codec = instantiate(OmegaConf.load(CONFIGS / "debug.yaml"))
    codec.init_weights(torch.Generator().manual_seed(0))
    return codec


def test_errors_say_what_to_do(codec: Codec):
    with pytest.raises(UserError, match="mono"):
        codec.encode(torch.zeros(1, 2, 24000))
    with pytest.raises(UserError, match="Clip 1 of the batch has 60 samples; a clip must have at least 119"):
        codec.encode(torch.zeros(2, 1, 24000), lengths=torch.tensor([24000, 60]))
    with pytest.raises(UserError, match=r"bandwidth 3 is not one of \(0.5, 1, 1.5, 2\)"):
        codec.encode(torch.zeros(1, 1, 24000), bandwidth=3)
    with pytest.raises(UserError, match="`lengths` must be 2 numbers from 1 to 24000"):
        codec.encode(torch.zeros(2, 1, 24000), lengths=torch.tensor([24001, 10]))
    with pytest.raises(UserError, match="revert the delay pattern"):
        codec.decode(torch.full((1, 8, 3), 1024))
    with pytest.raises(UserError, match="codebooks, frames"):
        codec.decode(torch.zeros(1, 9, 3, dtype=torch.long))
    with pytest.raises(UserError, match="codebooks, frames"):
        codec.decode(torch.zeros(1, 8, 0, dtype=torch.long))


def test_fewer_codebooks_decode_coarsely(codec: Codec):
    codes = torch.randint(1024, (1, 8, 4), generator=torch.Generator().manual_seed(0))
    assert codec.decode(codes[:, :2]).audio_values.shape == (1, 1, 4 * 960)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acoustic_model_config": {"downsampling_ratios": (8, 5)}}, "same product"),
        ({"acoustic_model_config": {**ACOUSTIC_960, "decoder_hidden_size": 100}}, "multiple of 32"),
        ({"semantic_model_config": {"feat_extract_norm": "batch"}}, "feat_extract_norm"),
        ({"semantic_model_config": {"hidden_act": "swish"}}, "hidden_act"),
        ({"semantic_model_config": {"conv_stride": (5, 2)}}, "differ in length"),
        ({"semantic_model_config": {"hidden_size": 100, "num_attention_heads": 3}}, "multiple of num_attention_heads"),
        ({"semantic_model_config": {"model_type": "wavlm"}}, "wavlm"),
        ({"target_bandwidths": ()}, "empty"),
        ({"target_bandwidths": (0.1,)}, "less than one codebook"),
        ({"strides": (1,)}, "differ in length"),
        ({"model_type": "xcodec"}, "codec's folder"),
    ],
)
def test_unusable_configs_are_refused(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        HiggsAudioV2TokenizerConfig.from_dict(change)


def test_a_misspelt_field_is_an_error_when_constructed_but_foreign_keys_of_a_file_are_skipped():
    with pytest.raises(TypeError, match="codebok_size"):
        HiggsAudioV2TokenizerConfig(codebok_size=3)
    with pytest.raises(TypeError, match="hiden_size"):
        HiggsAudioV2TokenizerConfig(acoustic_model_config={"hiden_size": 3})
    config = HiggsAudioV2TokenizerConfig.from_dict({"transformers_version": "5", "codebook_size": 512})
    assert config.codebook_size == 512


@pytest.mark.parametrize("name", ["debug", "mini", "release"])
def test_configs_compose(name: str):
    with torch.device("meta"):
        codec = instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    config = codec.config
    assert type(config.acoustic_model_config) is AcousticConfig and type(config.semantic_model_config) is SemanticConfig
    assert type(config.acoustic_model_config.downsampling_ratios) is tuple
    assert (config.hop_length, config.frame_rate, codec.num_codebooks) == (960, 25, 8)
    assert [config.num_codebooks_at(b) for b in config.target_bandwidths] == [2, 4, 6, 8]
    parameters = sum(p.numel() for p in codec.parameters())
    assert parameters < {"debug": 1e6, "mini": 2e7, "release": 3e8}[name]


def test_fresh_weights_are_reproducible_and_the_teacher_stays_frozen(debug_codec: Codec):
    again = Codec(debug_codec.config)
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(
        torch.equal(a, b) for a, b in zip(debug_codec.state_dict().values(), again.state_dict().values(), strict=True)
    )
    again.train()
    assert not again.semantic_model.training and again.acoustic_encoder.training
    assert not any(p.requires_grad for p in again.semantic_model.parameters())
    again.embed(torch.randn(1, 1, 4000)).values.sum().backward()
    assert again.acoustic_encoder.conv1.weight.grad.abs().sum() > 0


def test_fitted_codebooks_are_used_on_real_speech(debug_codec: Codec, shared_data):
    clips = [load_audio(file, 24000)[:72000] for file in sorted((shared_data / "ljspeech").glob("*.flac"))[:4]]
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)[:, None]
    used = debug_codec.fit_codebooks(batch, lengths, generator=torch.Generator().manual_seed(0))
    encoded = debug_codec.encode(batch, lengths=lengths)
    frames = int(encoded.lengths.sum())
    can_fill = min(debug_codec.config.codebook_size, frames)
    for k in range(debug_codec.num_codebooks):
        codes = torch.cat([row[k, :n] for row, n in zip(encoded.audio_codes, encoded.lengths.tolist(), strict=True)])
        assert codes.unique().numel() == used[k] >= 0.25 * can_fill
        assert debug_codec.quantizer.quantizers[k].codebook.cluster_size.sum() == frames
    # The stages together must describe the features, or the codes mean nothing.
    features = debug_codec.embed(batch, lengths)
    valid = features.valid()
    target = features.values.transpose(1, 2)[valid]
    errors = [
        (debug_codec.quantizer.decode(encoded.audio_codes[:, : k + 1])[valid] - target).square().mean()
        for k in range(8)
    ]
    assert errors[-1] < 0.5 * target.var(dim=0).mean()
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_kmeans_fills_every_centroid_it_can():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.cat([torch.randn(100, 3, generator=generator) * 0.01 + 10 * i for i in range(5)])
    centroids = kmeans(vectors, 32, 10, torch.Generator().manual_seed(1))
    assert torch.equal(centroids, kmeans(vectors, 32, 10, torch.Generator().manual_seed(1)))
    codes = nearest(vectors, centroids)
    assert codes.unique().numel() >= 24
    assert (vectors - centroids[codes]).norm(dim=1).max() < 0.1
    few = kmeans(vectors[:4], 32, 10)
    assert few.shape == (32, 3) and nearest(vectors[:4], few).unique().numel() == 4


def test_state_dict_loads_into_a_meta_codec(codec: Codec):
    with torch.device("meta"):
        empty = Codec(codec.config)
    empty.load_state_dict(codec.state_dict(), assign=True)
    clips = torch.randn(1, 1, 5000)
    with torch.no_grad():
        assert torch.equal(empty.eval().encode(clips).audio_codes, codec.encode(clips).audio_codes)
    buffers = {name for module in empty.modules() for name in module._non_persistent_buffers_set}
    assert not buffers and set(SHAPES) >= {"release-like"}
