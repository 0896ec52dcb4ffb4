"""Checkpoint folders as paths, JSON and JSONL: finding them, reading and writing `config.json` and logs."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from higgs.errors import UserError

CONFIG = "config.json"


def resolve_folder(path: str | Path) -> Path:
    """The local folder of a checkpoint: a folder as it is, or a hub id `owner/name` downloaded to the local cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    looks_local = folder.is_absolute() or str(path).startswith(".") or folder.parent.is_dir()
    if looks_local or str(path).count("/") != 1:
        raise UserError(
            f"There is no checkpoint folder at {path}. Check the path; it must be a folder with config.json."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.pth"])
        )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"There is no folder {path} here, and the hub did not give a repository of that name ({reason}). Give the path "
            "of a downloaded checkpoint folder."
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object from `path`; a missing or malformed file is a UserError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Is {path.parent} a complete checkpoint folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Download or export the checkpoint again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def write_json(path: Path, value: Mapping) -> None:
    write_aside(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_aside(path: Path, data: bytes | str) -> None:
    """Writes a file under another name and renames it: it is whole, or as it was before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = data.encode() if isinstance(data, str) else data
    aside.write_bytes(data)
    try:
        aside.replace(path)
    except FileNotFoundError:
        # Another rank, that wrote the same, has cleaned up.
        if not path.is_file() or path.read_bytes() != data:
            raise


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL log; a last line that a kill cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not valid JSON ({error}). Repair or delete it.") from error
    return rows


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSONL, aside and renamed."""
    write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ConfigFile:
    """Gives a config that has `from_dict` and `to_dict` the documented `from_pretrained` and `save_pretrained`."""

    @classmethod
    def from_pretrained(cls, path: str | Path, device_map: Any = None, dtype: Any = None) -> Self:
        """Reads `config.json` of a folder or hub id. A config has no device and no dtype: the two change nothing."""
        return cls.from_dict(read_json(resolve_folder(path) / CONFIG))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` into `folder`, aside first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, self.to_dict())
