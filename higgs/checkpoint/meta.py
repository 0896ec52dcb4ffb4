"""Networks as shapes alone, to be filled from files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoInit(TorchFunctionMode):
    """Leaves out what gives weights their first values. On the meta device nothing would be filled, but PyTorch would
    import its compiler for it, which takes a second or two: longer than all else in loading a small network."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function is torch.norm_except_dim:  # weight norm splits its weight as it is built
            weight, _, dim = args
            return weight.new_empty([size if axis == dim else 1 for axis, size in enumerate(weight.shape)])
        return function(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage."""
    with torch.device("meta"), _NoInit():
        yield
