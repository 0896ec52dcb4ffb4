"""Higgs Audio V2 in plain PyTorch: the documented classes; everything else is in the subpackages."""

from higgs.api import HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Model, HiggsAudioV2TokenizerModel
from higgs.codec import HiggsAudioV2TokenizerConfig
from higgs.errors import UserError
from higgs.generation import GenerationConfig
from higgs.model import HiggsAudioV2Config
from higgs.processor import BatchFeature, HiggsAudioV2Processor

# The documentation's snippets build the processor through this name.
AutoProcessor = HiggsAudioV2Processor

__all__ = [
    "AutoProcessor",
    "BatchFeature",
    "GenerationConfig",
    "HiggsAudioV2Config",
    "HiggsAudioV2ForConditionalGeneration",
    "HiggsAudioV2Model",
    "HiggsAudioV2Processor",
    "HiggsAudioV2TokenizerConfig",
    "HiggsAudioV2TokenizerModel",
    "UserError",
]
