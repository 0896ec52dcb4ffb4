"""The codec: waveform to codes and back."""

from higgs.codec.config import AcousticConfig, HiggsAudioV2TokenizerConfig, SemanticConfig
from higgs.codec.model import Codec, CodecOutput, DecoderOutput, EncoderOutput, decode_prefix, encode_clips

__all__ = [
    "AcousticConfig",
    "Codec",
    "CodecOutput",
    "DecoderOutput",
    "EncoderOutput",
    "HiggsAudioV2TokenizerConfig",
    "SemanticConfig",
    "decode_prefix",
    "encode_clips",
]
