"""What judges from transformers share: reading a model from a folder or the hub, and telling which one it is."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from higgs.checkpoint.io import pick_device
from higgs.checksums import digest_of
from higgs.errors import UserError

LEAST = 400  # samples under the first frame of wav2vec2, HuBERT and WavLM: 25 ms; in less nothing can be heard


def library() -> ModuleType:
    """transformers, which only these judges need."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"This judge needs transformers ({error}): pip install -e '.[judges]'.") from error


def from_pretrained(kind: str, path: str) -> Any:
    """An object of transformers' class `kind` from a folder or hub id, without code of the repository.

    Raises:
        UserError: where transformers is absent or the folder, or what the hub gives, holds no such thing.
    """
    loader = getattr(library(), kind)
    try:
        return loader.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(path, kind, error) from error


def network(kind: str, path: str, device: str) -> Any:
    """A network ready to judge, in float32 whatever its file holds, so that figures do not depend on the device's dtype."""
    return from_pretrained(kind, path).float().eval().to(pick_device(device))


def identity(name: str, path: str) -> dict[str, Any]:
    """The name of a judge and of its model: the folder's own name and digest, or the hub id and its commit."""
    folder = Path(path)
    if folder.is_dir():
        return {"name": name, "model": folder.resolve().name, "sha256": digest_of(folder)}
    library()
    from transformers.utils import cached_file

    try:
        config = Path(cached_file(path, "config.json"))
    except Exception as error:
        raise _unreadable(path, name, error) from error
    return {"name": name, "model": path, "revision": config.parent.name}  # …/snapshots/COMMIT/config.json


def _unreadable(path: str, kind: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(
        f"{path} cannot be loaded as {kind} ({reason}). Give a folder of the Hugging Face format, or a hub id where there "
        "is a network."
    )
