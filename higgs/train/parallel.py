"""How a module is spread over processes and fitted into memory, from outside: the model's files know nothing of it.

    recompute in backward (per layer)  ->  compile (per layer)  ->  DDP, or FSDP2 per layer and for the rest

Nothing here renames a parameter, so what is saved has the plain module's names under every strategy. With n copies
(`replicate`) of a sharded model the ranks are n rows of neighbours that share one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from higgs.errors import UserError
from higgs.train.distributed import World

STRATEGIES = ("none", "ddp", "fsdp")
CHECKPOINTING = ("none", "selective", "full")
PRECISIONS = ("fp32", "bf16")

# What selective checkpointing keeps: the results that cost most to make again. The rest is norms, activations, sums.
KEPT = frozenset(
    [
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_attention_math.default,
    ]
)


@dataclass
class ParallelConfig:
    """How the model is spread over ranks and what is computed twice to save memory.

    `strategy`: none (one process), ddp (every rank holds everything) or fsdp (FSDP2: every rank holds its share of
    weights, gradients and optimiser state). `replicate` above 1 keeps that many sharded copies (HSDP), say one per
    node. `activation_checkpointing`: full recomputes each layer in backward, selective all but products and attention.
    `compile` compiles each layer. Raises UserError for a value that does not exist.
    """

    strategy: str = "none"
    replicate: int = 1
    activation_checkpointing: str = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        _check("parallel.strategy", self.strategy, STRATEGIES)
        _check("parallel.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        if self.replicate < 1 or (self.replicate > 1 and self.strategy != "fsdp"):
            raise UserError(
                f"parallel.replicate={self.replicate} counts the sharded copies of fsdp; use 1 with {self.strategy}."
            )


def parallelize(
    module: nn.Module, layers: Sequence[nn.Module], config: ParallelConfig, precision: str, world: World
) -> nn.Module:
    """Moves `module` to the device and returns what to call in its place; `module` itself keeps its names.

    `layers` are the repeated blocks inside it. Under fsdp `module` is changed in place, and an optimiser must be made
    afterwards; under ddp a wrapper around it is returned. Both average gradients over the ranks.
    """
    _check("precision", precision, PRECISIONS)
    for layer in layers:
        wrap_forward(layer, config)
    if config.strategy == "none":
        return module.to(world.device)
    if config.strategy == "ddp":
        module.to(world.device)
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = make_mesh(config, world)
    wide = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = wide if precision == "bf16" else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def make_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """The ranks in one row, or, with replicas, in a table of replicas x shards; neighbours hold shards of one copy."""
    if world.size % config.replicate:
        raise UserError(
            f"parallel.replicate={config.replicate} does not divide the {world.size} processes; choose a divisor."
        )
    if config.replicate == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (config.replicate, world.size // config.replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def wrap_forward(layer: nn.Module, config: ParallelConfig) -> None:
    """Puts recomputation and compilation around a layer's forward, in place: the layer stays the module it was.

    Compilation comes last, around the recomputation, and inside the hooks by which FSDP2 gathers the weights. Without
    gradients (validation, generation with its growing cache) the plain forward runs.
    """
    plain: Callable[..., Any] = layer.forward
    forward = plain
    if config.activation_checkpointing != "none":
        recompute = partial(checkpoint, forward, use_reentrant=False)
        if config.activation_checkpointing == "selective":
            recompute.keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        forward = recompute
    if config.compile:
        # The number of text and audio rows changes with every batch: sizes that were seen to change become symbols.
        forward = torch.compile(forward)
    if forward is not plain:
        layer.forward = lambda *args: (forward if torch.is_grad_enabled() else plain)(*args)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic over float32 weights, for none and ddp. (FSDP2 casts the weights themselves, so it needs none.)"""
    _check("precision", precision, PRECISIONS)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def sync_gradients(module: nn.Module, on: bool) -> None:
    """Whether the next backward exchanges gradients; off for all micro-batches of a step but the last.

    `module` is what `parallelize` returned; one that is not spread is left as it is.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = on


def forget_gathered(module: nn.Module) -> None:
    """Drops weights that FSDP2 gathered for a forward pass and kept (it keeps the outermost ones, for the backward pass
    that follows in training), so that a change to the shards is seen by the next pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients so that their norm over all parameters and ranks is at most `max_norm`; returns the norm before.

    `max_norm=inf` only measures. The norm of sharded gradients is reduced over the ranks that share them.
    """
    norm = nn.utils.clip_grad_norm_(list(parameters), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is '{value}'; choose one of {', '.join(known)}.")
