"""Files with a record of their size and SHA-256, so that one that was cut off or altered is found out."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


def mark_of(path: Path) -> dict[str, Any]:
    """The record of a file as it is now: `size` in bytes and `sha256`."""
    status = path.stat()
    return {"size": status.st_size, "sha256": file_digest(path.absolute(), status.st_size, status.st_mtime_ns)}


def fault(path: Path, mark: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that should have this size and SHA-256; None if nothing is."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != mark["size"]:
        return f"has {size} bytes instead of {mark['size']}"
    return None if mark_of(path)["sha256"] == mark["sha256"] else "was altered: its checksum differs"


@lru_cache(maxsize=2**16)
def file_digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file. Its size and the time of its last change (in ns) stand for its content, so that a folder which
    several parts of a run open is read once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: str | Path) -> str:
    """The SHA-256 of a file, or of the names and contents of all files in a folder."""
    path = Path(path)
    if path.is_file():
        return mark_of(path)["sha256"]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    marks = {file.relative_to(path).as_posix(): mark_of(file)["sha256"] for file in files}
    return hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()
