"""What judges from transformers share: reading a model from a folder or the hub, and telling which one it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from higgs.checkpoint.io import pick_device
from higgs.checksums import digest_of
from higgs.errors import UserError

LEAST = 400  # samples under the first frame of wav2vec2, HuBERT and WavLM: 25 ms; in less nothing can be heard


@contextmanager
def packages() -> Iterator[None]:
    """Around imports of what only these judges need: a UserError that says how to install what is absent."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"This judge lacks a package ({error}): pip install -e '.[eval,judges]'.") from error


def from_pretrained(kind: str, path: str) -> Any:
    """An object of transformers' class `kind` from a folder or hub id, without code of the repository.

    Raises:
        UserError: where transformers is absent or the folder, or what the hub gives, holds no such thing.
    """
    with packages():
        import transformers

    try:
        return getattr(transformers, kind).from_pretrained(path, trust_remote_code=False)
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
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(path, "config.json"))
    except Exception as error:
        raise _unreadable(path, name, error) from error
    return {"name": name, "model": path, "revision": config.parent.name}  # …/snapshots/COMMIT/config.json


def _unreadable(path: str, kind: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(
        f"{path} cannot be loaded as {kind} ({reason}). Give a folder of the Hugging Face format, or a hub id where there "
        "is a network."
    )
