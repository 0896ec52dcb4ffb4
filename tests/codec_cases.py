"""Codec shapes for the tests, and codecs of those shapes with random weights that make varied codes."""

import copy

import torch

from higgs.codec import Codec, HiggsAudioV2TokenizerConfig

ACOUSTIC_960 = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [8, 5, 4, 2, 3],
    "decoder_hidden_size": 64,
    "upsampling_ratios": [8, 5, 4, 2, 3],
    "hidden_size": 16,
}
ACOUSTIC_320 = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [8, 5, 4, 2],
    "decoder_hidden_size": 32,
    "upsampling_ratios": [2, 4, 5, 8],
    "hidden_size": 24,
}
TEACHER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 24, 24, 24, 24, 24, 16],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STABLE_TEACHER = {
    **TEACHER,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "num_conv_pos_embeddings": 15,
    "feat_extract_activation": "gelu_new",
    "hidden_act": "relu",
}

SHAPES = {
    # The release's rates: hop 960 at 24 kHz, every second frame of the teacher, 2/4/6/8 codebooks.
    "release-like": {
        "target_bandwidths": [0.5, 1, 1.5, 2],
        "codebook_dim": 16,
        "acoustic_model_config": ACOUSTIC_960,
        "semantic_model_config": TEACHER,
    },
    # Hop 320 at the teacher's own rate, stable layer norm, a mask embedding, 3 codebooks, a full-width code space.
    "hop-320": {
        "target_bandwidths": [0.3, 0.9],
        "sample_rate": 16000,
        "codebook_size": 64,
        "codebook_dim": 56,
        "acoustic_model_config": ACOUSTIC_320,
        "semantic_model_config": {**STABLE_TEACHER, "mask_time_prob": 0.05},
    },
    # Dilated units, a wider semantic branch, a batch norm before the positions, 5 codebooks of odd size.
    "odd": {
        "target_bandwidths": [0.2, 0.9],
        "codebook_size": 100,
        "codebook_dim": 8,
        "kernel_size": 5,
        "block_dilations": [1, 3],
        "initializer_range": 0.1,
        "acoustic_model_config": {
            **ACOUSTIC_960,
            "downsampling_ratios": [3, 8, 8, 5],
            "upsampling_ratios": [5, 8, 8, 3],
        },
        "semantic_model_config": {**TEACHER, "feat_proj_layer_norm": False, "conv_pos_batch_norm": True},
    },
}


def make_codec(shape: str | dict, seed: int = 0) -> Codec:
    """A codec in evaluation mode with random weights, biases and full codebooks, the same for the same seed."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    generator = torch.Generator().manual_seed(seed)
    codec = Codec(HiggsAudioV2TokenizerConfig.from_dict(copy.deepcopy(shape))).eval()
    codec.init_weights(generator)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("alpha"):
                parameter.mul_(1 + 0.3 * noise.abs())
            elif ".res_unit" in name or "project" in name or name.endswith("bias"):
                parameter.add_(0.1 * noise)
        codec.acoustic_decoder.conv2.weight.mul_(0.3)  # waveforms of about the size of real ones, from random codes
        for stage in codec.quantizer.quantizers:
            stage.codebook.embed.normal_(generator=generator)
            stage.codebook.embed_avg.normal_(generator=generator)
    return codec
