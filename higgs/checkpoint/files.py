"""The files of a checkpoint folder: found, read by header, written aside and renamed.

A folder holds `config.json` and either `model.safetensors` or shards with `model.safetensors.index.json` (the Hugging
Face layout, which this project also writes).
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from higgs.errors import UserError
from higgs.folders import CONFIG, read_json, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: the file, its name there, and the shape that the file's header declares."""

    file: Path
    name: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by name, read from the headers alone."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} holds no weight_map, which says where each tensor lies. Copy it again.")
        files = sorted({folder / name for name in weight_map.values()})
    elif (folder / WEIGHTS).is_file():
        weight_map = None
        files = [folder / WEIGHTS]
    else:
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}. Point to a folder with the model's weights.")
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            lost = sorted(name for name, shard in weight_map.items() if folder / shard == file)
            raise UserError(f"Shard {file} is missing; it should hold {lost[0]} and {len(lost) - 1} more tensors.")
        with open_safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
                found[name] = StoredTensor(file, name, tuple(handle.get_slice(name).get_shape()))
    for name in weight_map or ():
        if name not in found:
            raise UserError(f"{folder / INDEX} promises the tensor {name}, but {folder / weight_map[name]} lacks it.")
    return found


@contextmanager
def open_safetensors(file: Path) -> Iterator:
    """`safe_open` whose failure names the file."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file ({error}). It may be cut off: copy it again."
        ) from error
    with handle as opened:
        yield opened


@contextmanager
def staged_folder(folder: str | Path) -> Iterator[Path]:
    """A folder aside that takes the place of `folder` on success: renamed whole, or file by file into an existing one."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield aside
        aside.chmod(0o755)
        if not folder.exists():
            aside.rename(folder)
            return
        if any((aside / name).exists() for name in (WEIGHTS, INDEX)):
            # Shards of an earlier save under other names would be read along with the new ones.
            written = {path.name for path in aside.iterdir()}
            stale = [p for p in folder.glob("model*.safetensors*") if p.name not in written]
        else:
            stale = []
        # config.json goes last: what it describes is then already in place.
        for path in sorted(aside.iterdir(), key=lambda p: p.name == CONFIG):
            target = folder / path.name
            if path.is_dir() and target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        for path in stale:
            path.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_weights(module: nn.Module, folder: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the state dict as one safetensors file, or as shards with an index when it is larger than one shard."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    stored: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() in stored:
            tensor = tensor.clone()  # tied weights: the format keeps no two names for one piece of memory
        stored.add(tensor.data_ptr())
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file({k: v.contiguous() for k, v in shards[0].items()}, folder / WEIGHTS, metadata)
        return
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({k: v.contiguous() for k, v in shard.items()}, folder / file, metadata)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(t.numel() * t.element_size() for t in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
