"""Fixtures shared by all tests: where real audio lies, a tiny text tokenizer, a tiny codec of transformers."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, settings
from tiny import build_hf_codec, build_tokenizer

from higgs.chat_template import own_template
from higgs.checkpoint.io import load_codec
from higgs.processor import HiggsAudioV2Processor
from higgs.text import HFTokenizer

PROJECT = Path(__file__).resolve().parent.parent

# Property tests run on two shared cores: no deadline per example, and the same examples every time.
settings.register_profile(
    "higgs", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("higgs")

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)


def shared_data_folder() -> Path:
    """`$HIGGS_SHARED_DATA`, or `../shared/data` from the project's root. Skips the calling test where it is absent."""
    folder = Path(os.environ.get("HIGGS_SHARED_DATA") or PROJECT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the real audio at {folder}; set HIGGS_SHARED_DATA to where it lies")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return shared_data_folder()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama-3-like `tokenizer.json` and its `tokenizer_config.json`."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def hf_codec():
    """transformers' codec, random, tiny, 8 codebooks of 1024 codes, hop 960. Do not change it."""
    pytest.importorskip("transformers")
    return build_hf_codec()


@pytest.fixture(scope="session")
def codec_folder(hf_codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf_codec` as transformers saves it."""
    folder = tmp_path_factory.mktemp("codec")
    hf_codec.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(tokenizer_folder, codec_folder) -> HiggsAudioV2Processor:
    """Of the tiny tokenizer and the tiny codec. Do not change it."""
    return HiggsAudioV2Processor(
        tokenizer=HFTokenizer.from_folder(tokenizer_folder), audio_tokenizer=load_codec(codec_folder)
    )


@pytest.fixture(scope="session")
def hf_processor(tokenizer_folder, codec_folder):
    """transformers' processor, its codec loaded as a checkpoint has it."""
    transformers = pytest.importorskip("transformers")
    return transformers.HiggsAudioV2Processor(
        transformers.DacFeatureExtractor(feature_size=1, sampling_rate=24000, hop_length=1),
        transformers.AutoTokenizer.from_pretrained(tokenizer_folder),
        transformers.HiggsAudioV2TokenizerModel.from_pretrained(codec_folder),
        chat_template=own_template(),
    )


@pytest.fixture(scope="session")
def waveforms() -> list[np.ndarray]:
    """Noise at 24 kHz; two of the three lengths are no multiple of the hop."""
    generator = np.random.default_rng(0)
    return [generator.normal(scale=0.1, size=length).astype(np.float32) for length in (1920, 2897, 4799)]


@pytest.fixture(scope="session")
def clip_files(waveforms, tmp_path_factory) -> list[str]:
    """`waveforms` as files."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [str(folder / f"{place}.wav") for place in range(len(waveforms))]
    for path, waveform in zip(paths, waveforms, strict=True):
        soundfile.write(path, waveform, 24000, subtype="FLOAT")
    return paths


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A manifest of conversations that carry codes, and a codec, for tiny training runs. Do not change them."""
    import train_cases

    folder = tmp_path_factory.mktemp("parts")
    return train_cases.write_manifest(folder / "manifest.jsonl"), train_cases.write_codec(folder / "codec")
