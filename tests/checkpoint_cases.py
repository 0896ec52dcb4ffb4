"""Comparisons that the tests of checkpoints share."""

from pathlib import Path
from typing import Any

import pytest
import torch


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype, name


def load_hf(kind: str, folder: Path, **options: object) -> Any:
    """transformers' class of this name, loaded strictly."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()
