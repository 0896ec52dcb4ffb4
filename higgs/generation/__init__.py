"""Sampling and generation."""

from higgs.generation.config import GenerationConfig
from higgs.generation.generator import GenerationOutput, choose, decode_one_frame, generate, prefill
from higgs.generation.reference import reference_generate

__all__ = [
    "GenerationConfig",
    "GenerationOutput",
    "choose",
    "decode_one_frame",
    "generate",
    "prefill",
    "reference_generate",
]
