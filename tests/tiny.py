"""Tiny stand-ins shared by the tests: a Llama-3-like `tokenizer.json` and a random codec of transformers."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from higgs.text import SPECIAL_TOKENS

# How Llama 3 cuts text before the merges; the detail that matters here: "\n\n" after a header is a piece of its own.
LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
CORPUS = (
    "system\n\nuser\n\nassistant\n\n",
    "Generate audio following instruction. Audio is recorded from a quiet room.",
    "SPEAKER0: feminine\nSPEAKER1: masculine\n[SPEAKER0] The sun rises in the east and sets in the west.",
    "The sun is in the east, the rest is in the audio; the instruction is recorded in a room.",
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "pad_token": "<|end_of_text|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}


def build_tokenizer(folder: Path, merges: int = 80) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json`; the special tokens take the ids after the merges, as in
    Llama 3, and encoding prepends bos unless told not to."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos = TOKENIZER_CONFIG["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2), encoding="utf-8")
    return folder


def build_hf_codec(num_codebooks: int = 8, codebook_size: int = 1024, seed: int = 0):
    """transformers' codec with the release's hop (960 samples at 24 kHz) at tiny width, and random codebooks: fresh
    ones are all zero, so that every clip would get code 0."""
    from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

    bits = (codebook_size - 1).bit_length()
    per_codebook = 25 * bits / 1000  # kbit/s
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[per_codebook * n for n in range(1, num_codebooks + 1)],
        codebook_size=codebook_size,
        codebook_dim=8,
        acoustic_model_config={
            "model_type": "dac",
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 64,
            "hidden_size": 16,
            "downsampling_ratios": [8, 5, 4, 2, 3],
            "upsampling_ratios": [8, 5, 4, 2, 3],
            "hop_length": 960,
        },
        semantic_model_config={
            "model_type": "hubert",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_dim": [8] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    )
    assert config.num_quantizers == num_codebooks, (config.num_quantizers, num_codebooks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = HiggsAudioV2TokenizerModel(config).eval()
        for stage in codec.quantizer.quantizers:
            torch.nn.init.normal_(stage.codebook.embed, std=0.05)
            stage.codebook.embed_avg.copy_(stage.codebook.embed)
            stage.codebook.cluster_size.fill_(1.0)
    return codec
