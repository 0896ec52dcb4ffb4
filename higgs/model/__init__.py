"""The DualFFN decoder: configuration, layers, transformer, heads, cache and loss."""

from higgs.model.cache import StaticKVCache
from higgs.model.config import HiggsAudioV2Config
from higgs.model.decoder import DualFFNDecoder, DualFFNTransformer
from higgs.model.loss import LossSums, decoder_loss

__all__ = [
    "DualFFNDecoder",
    "DualFFNTransformer",
    "HiggsAudioV2Config",
    "LossSums",
    "StaticKVCache",
    "decoder_loss",
]
