"""Fixtures shared by all tests: where real audio lies, a tiny text tokenizer, a tiny codec of transformers."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import build_hf_codec, build_tokenizer

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
    """transformers' `HiggsAudioV2TokenizerModel`, random, tiny, 8 codebooks of 1024 codes, hop 960. Do not change it."""
    pytest.importorskip("transformers")
    return build_hf_codec()


@pytest.fixture(scope="session")
def codec_folder(hf_codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf_codec` as transformers saves it."""
    folder = tmp_path_factory.mktemp("codec")
    hf_codec.save_pretrained(folder)
    return folder
