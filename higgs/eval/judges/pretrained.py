"""What judges from transformers share: reading a model from a folder or the hub, and telling which one it is."""

from pathlib import Path
from typing import Any

from higgs.checksums import digest_of
from higgs.errors import UserError


def from_pretrained(loader: Any, path: str) -> Any:
    """`loader.from_pretrained` of a folder or hub id, without code of the repository. UserError where that fails."""
    try:
        return loader.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{path} cannot be loaded as {loader.__name__} ({reason}). Give a folder of the Hugging Face format, or a hub "
            "id where there is a network."
        ) from error


def identity(name: str, path: str) -> dict[str, Any]:
    """The name of a judge and of its model: the folder's own name and digest, or the hub id."""
    folder = Path(path)
    if folder.is_dir():
        return {"name": name, "model": folder.resolve().name, "sha256": digest_of(folder)}
    return {"name": name, "model": path}
