"""A GPU that is not there: tensors are told apart by a mark, and mixing raises as CUDA does.

Everything is computed on the CPU. Inside `elsewhere()` whatever is made on or moved to `cuda` is
marked, results of marked tensors are marked, and an operation that would fail on a GPU because one
of its tensors is on the CPU fails here. Kernels, autocast and rounding are not what a GPU's are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
MARK = "_is_elsewhere"
# What takes tensors of two devices: copies; indices on the CPU into what is elsewhere.
COPIES = {Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_}
# They only read what a module is to be moved to, and whether in place.
ABOUT_DEVICES = {torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type}
# They give memory of this machine.
ON_THE_CPU = {Tensor.numpy, Tensor.__array__}


def is_elsewhere(value: Any) -> bool:
    """Whether a tensor is on the GPU that is not there."""
    return isinstance(value, Tensor) and getattr(value, MARK, False)


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        setattr(value, MARK, True)
    return value


def _device_in(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    for value in [kwargs.get("device"), *args]:
        if isinstance(value, torch.device):
            return value
        if isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu", "meta"):
            return torch.device(value)
    return None


def _on_cpu(value: Any) -> Any:
    is_named = isinstance(value, torch.device) or (isinstance(value, str) and "cuda" in value)
    return torch.device("cpu") if is_named and torch.device(value).type == "cuda" else value


class _Elsewhere(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ABOUT_DEVICES:
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return CUDA if is_elsewhere(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return is_elsewhere(args[0]) or func(*args)
        if func in (Tensor.cpu, Tensor.cuda, Tensor.to):
            return self._moved(func, args, kwargs)
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = [one for one in tensors if is_elsewhere(one)]
        self._check(func, args, tensors, there)
        device = _device_in((), kwargs)
        plain = tree_map(_on_cpu, kwargs)
        found = func(*tree_map(_on_cpu, args), **plain)
        if func == Tensor.data.__set__:
            setattr(args[0], MARK, is_elsewhere(args[1]))
        goes = bool(there) if device is None else device.type == "cuda"
        return tree_map(_mark, found) if goes else found

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        other = next((one for one in rest if isinstance(one, Tensor)), None)
        device = _device_in(rest, kwargs)
        if func is Tensor.cpu:
            device = torch.device("cpu")
        elif func is Tensor.cuda:
            device = CUDA
        goes = is_elsewhere(tensor)
        if other is not None:
            goes = is_elsewhere(other)
        elif device is not None:
            goes = device.type == "cuda"
        if func is not Tensor.to:
            found = tensor
        else:
            found = func(tensor, *map(_on_cpu, rest), **tree_map(_on_cpu, kwargs))
        if goes == is_elsewhere(tensor) and found is tensor:
            return found
        if found is tensor or goes != is_elsewhere(tensor):
            # another memory, so a copy
            found = found.clone()
        return _mark(found) if goes else found

    def _check(self, func: Any, args: Any, tensors: list[Tensor], there: list[Tensor]) -> None:
        if there and func in ON_THE_CPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if not there or func in COPIES:
            return
        if func in INDEXING and not is_elsewhere(args[0]):
            raise RuntimeError("indices should be on the CPU like the indexed tensor")
        here = [one for one in tensors if not is_elsewhere(one) and one.dim()]
        if func in INDEXING:
            values = args[2:] if func is Tensor.__setitem__ else ()
            here = [one for one in here if any(one is value for value in values)]
        if here:
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"{name}: expected all tensors on one device, got cuda:0 and cpu")


@contextmanager
def elsewhere() -> Iterator[None]:
    """Make `cuda` a device that exists, marks and all."""
    make_parameter, make_generator = nn.Parameter.__new__, torch.Generator

    def parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        found = make_parameter(cls, data, requires_grad)
        return _mark(found) if is_elsewhere(data) else found

    with (
        mock.patch.object(nn.Parameter, "__new__", parameter),
        mock.patch.object(torch, "Generator", side_effect=lambda device="cpu": make_generator()),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch.cuda, "get_device_name", return_value="elsewhere"),
        mock.patch.dict("os.environ", {"ACCELERATE_TORCH_DEVICE": "cuda"}),
        _Elsewhere(),
    ):
        yield
