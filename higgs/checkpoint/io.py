"""Reading and writing checkpoint folders: lean, strict, never half-written.

A folder holds `config.json` and either `model.safetensors` or shards with `model.safetensors.index.json` (the Hugging
Face layout, which this project also writes). Loading builds the network on the meta device and copies tensor by tensor
from the memory-mapped files, so that peak memory stays near the size of the weights in the requested dtype. Saving
goes to a folder aside, which is renamed when complete.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from higgs.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Memory-mapped pages count as resident until their file is closed; reopening every so often keeps the peak flat.
REMAP_BYTES = 128 * 2**20
SHARD_BYTES = 4 * 2**30


def resolve_folder(path: str | Path) -> Path:
    """The local folder of a checkpoint: a folder as it is, or a hub id `owner/name` downloaded to the local cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).count("/") != 1 or str(path).startswith("."):
        raise UserError(f"There is no checkpoint folder at {path}. Check the path; it must be a folder with config.json.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.pth"]))
    except Exception as error:
        raise UserError(
            f"There is no folder {path} here, and the hub did not give a repository of that name "
            f"({type(error).__name__}: {error}). Give the path of a downloaded checkpoint folder."
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


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: the file, its name there, and the shape that the file's header declares."""

    file: Path
    name: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by name, read from the headers alone."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
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
        raise UserError(f"{file} is not a readable safetensors file ({error}). It may be cut off: copy it again.") from error
    with handle as opened:
        yield opened


def pick_device(device: str | torch.device | None) -> torch.device:
    """`auto` means the GPU where there is one; None means the CPU."""
    if device is None:
        return torch.device("cpu")
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"'{device}' names no device. Use auto, cpu, mps, cuda or cuda:N.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"Device {device} was asked for, but PyTorch sees no CUDA GPU here. Use device=cpu or device=auto.")
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, config: Mapping) -> torch.dtype | None:
    """The dtype of loaded weights; `auto` is what config.json records; None keeps what the files hold."""
    if dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    found = getattr(torch, short.get(str(dtype), str(dtype)), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"'{dtype}' is no floating-point dtype. Use float32, bfloat16 or float16.")
    return found


KeyMap = Callable[[str], "tuple[str, int] | None"]
"""Checkpoint name -> (name in this project, part number along rows), or None for a tensor to leave aside."""


def fill_module(
    module: nn.Module,
    tensors: Mapping[str, StoredTensor],
    key_map: KeyMap,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Fills a module that lives on the meta device from files, strictly.

    Parts of one tensor are joined along rows. A missing, unexpected or wrongly shaped tensor is a UserError naming it.
    """
    wanted = {**dict(module.named_parameters(remove_duplicate=False)), **persistent_buffers(module)}
    parts: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in tensors.items():
        target = key_map(name)
        if target is None:
            continue
        key, part = target
        if key not in wanted:
            raise UserError(f"Unexpected tensor {name} in {tensor.file}: the model of config.json has none of that name.")
        # The same tensor under two names (a head kept twice) is read once, from the name that is the target's own.
        if part not in parts.setdefault(key, {}) or name == key:
            parts[key][part] = tensor
    where = next(iter(tensors.values())).file.parent if tensors else "the checkpoint"
    for key, target in wanted.items():
        if key not in parts:
            raise UserError(f"The tensor {key} {list(target.shape)} is missing from {where}.")
        shapes = [parts[key][i].shape for i in sorted(parts[key])]
        rows = sum(shape[0] if shape else 1 for shape in shapes)
        joined = (rows, *shapes[0][1:]) if shapes[0] else ()
        if joined != tuple(target.shape):
            raise UserError(
                f"The tensor {key} has shape {list(joined)} in {where}, but config.json asks for {list(target.shape)}."
            )
    reader = _Reader()
    # File order keeps the disk sequential.
    for key in sorted(parts, key=lambda k: (str(parts[k][0].file), parts[k][0].name)):
        target = wanted[key]
        floating = target.is_floating_point()
        value: Tensor | None = None
        row = 0
        for index in sorted(parts[key]):
            piece = reader.read(parts[key][index])
            if value is None:
                kind = dtype if (dtype is not None and floating) else piece.dtype
                value = torch.empty(target.shape, dtype=kind, device=device)
            if piece.dim():
                value[row : row + piece.shape[0]].copy_(piece)
                row += piece.shape[0]
            else:
                value.copy_(piece)
            del piece
        assign_tensor(module, key, value)
    reader.close()
    reset_buffers(module)


class _Reader:
    """Reads tensors from memory-mapped files and unmaps now and then, so that read pages do not pile up."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._handle = None
        self._bytes = 0

    def read(self, tensor: StoredTensor) -> Tensor:
        if tensor.file != self._file or self._bytes > REMAP_BYTES:
            self.close()
            self._handle = safe_open(tensor.file, framework="pt", device="cpu")
            self._file = tensor.file
        value = self._handle.get_tensor(tensor.name)
        self._bytes += value.numel() * value.element_size()
        return value

    def close(self) -> None:
        self._handle, self._file, self._bytes = None, None, 0


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a state dict."""
    keys = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name in keys}


def assign_tensor(module: nn.Module, key: str, value: Tensor) -> None:
    """Puts `value` in the place of the parameter or buffer `key`, keeping which of the two it is."""
    owner_name, _, name = key.rpartition(".")
    owner = module.get_submodule(owner_name)
    if name in owner._parameters:
        trainable = owner._parameters[name].requires_grad
        owner._parameters[name] = nn.Parameter(value, requires_grad=trainable and value.is_floating_point())
    else:
        owner._buffers[name] = value


def reset_buffers(module: nn.Module) -> None:
    """Recomputes buffers that are derived from the config and so never stored."""
    for child in module.modules():
        if hasattr(child, "reset_buffers"):
            child.reset_buffers()


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
        for path in sorted(aside.iterdir(), key=lambda p: p.name == "config.json"):
            target = folder / path.name
            if path.is_dir() and target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        for path in stale:
            path.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(module: nn.Module, folder: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the state dict as one safetensors file, or as shards with an index when it is larger than one shard."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in module.state_dict().items():
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
