"""Networks from and to checkpoint folders: lean and strict.

Loading builds the network on the meta device and copies tensor by tensor from memory-mapped files, so that peak memory
stays near the size of the weights in the requested dtype. Saving streams shards to a folder aside, renamed when whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from higgs.checkpoint.codec import boson_codec_to_hf
from higgs.checkpoint.decoder import KeyMap
from higgs.checkpoint.files import SHARD_BYTES, StoredTensor, staged_folder, stored_tensors, write_weights
from higgs.checkpoint.meta import on_meta
from higgs.codec import Codec, HiggsAudioV2TokenizerConfig
from higgs.errors import UserError
from higgs.folders import CONFIG, read_json, resolve_folder, write_json

# Memory-mapped pages count as resident until their file is closed; reopening every so often keeps the peak flat.
REMAP_BYTES = 32 * 2**20


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
        raise UserError(
            f"Device {device} was asked for, but PyTorch sees no CUDA GPU here. Use device=cpu or device=auto."
        )
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
            raise UserError(
                f"Unexpected tensor {name} in {tensor.file}: the model of config.json has none of that name."
            )
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
        if joined != tuple(target.shape) or any(shape[1:] != shapes[0][1:] for shape in shapes):
            found = " and ".join(str(list(shape)) for shape in shapes)
            raise UserError(
                f"The tensor {key} has shape {found} in {where}, but config.json asks for {list(target.shape)}."
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
    reset_buffers(module, device)


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


def reset_buffers(module: nn.Module, device: torch.device) -> None:
    """Recomputes buffers that are derived from the config and so never stored, on the device of the weights."""
    for child in module.modules():
        if hasattr(child, "reset_buffers"):
            child.reset_buffers(device)


def load_codec(
    path: str | Path,
    device_map: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    kind: type[Codec] = Codec,
) -> Codec:
    """A codec from a folder of the Hugging Face format, or of the original release (`config.json` and `model.pth`)."""
    folder = resolve_folder(path)
    values = read_json(folder / CONFIG)
    device, dtype = pick_device(device_map), pick_dtype(dtype, values)
    if (folder / "model.pth").is_file() and not any(folder.glob("*.safetensors")):
        return _load_boson_codec(folder, values, device, dtype, kind)
    if "acoustic_model_config" not in values:
        raise UserError(
            f"{folder / CONFIG} describes no codec (it lacks acoustic_model_config). Is this the decoder's folder?"
        )
    with on_meta():
        codec = kind(HiggsAudioV2TokenizerConfig.from_dict(values))
    wanted = codec.state_dict().keys()
    tensors = stored_tensors(folder)
    for optional in codec.optional_keys:
        # The teacher's mask embedding takes part in no computation; a checkpoint may hold it or not.
        if optional not in wanted:
            tensors.pop(optional, None)
    fill_module(codec, tensors, lambda name: (name, 0), dtype, device)
    return codec.eval()


def _load_boson_codec(
    folder: Path, values: dict, device: torch.device, dtype: torch.dtype | None, kind: type[Codec]
) -> Codec:
    file = folder / "model.pth"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as plain tensors ({error}). It may be cut off: copy it again."
        ) from error
    config, state = boson_codec_to_hf(state, values)
    with on_meta():
        codec = kind(config)
    state = {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in state.items()}
    # Strict: `boson_codec_to_hf` has named what is missing, unexpected or of another shape.
    codec.load_state_dict(state, strict=True, assign=True)
    reset_buffers(codec, device)
    return codec.eval()


def save_module(
    module: nn.Module,
    folder: str | Path,
    config: Mapping[str, Any],
    max_shard_bytes: int = SHARD_BYTES,
    more_json: Mapping[str, Mapping] | None = None,
) -> None:
    """Writes weights, `config.json` (with the dtype) and further JSON files into `folder`, aside first."""
    floating = next(p.dtype for p in module.parameters() if p.is_floating_point())
    with staged_folder(folder) as aside:
        write_weights(module, aside, max_shard_bytes)
        write_json(aside / CONFIG, {**config, "dtype": str(floating).removeprefix("torch.")})
        for name, value in (more_json or {}).items():
            write_json(aside / name, value)


def save_codec(codec: Codec, folder: str | Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a codec that `load_codec` and transformers' class read."""
    config = {**codec.config.to_dict(), "architectures": ["HiggsAudioV2TokenizerModel"]}
    save_module(codec, folder, config, max_shard_bytes)
