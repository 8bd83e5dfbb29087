"""The parts of a base that are split, gathered and given back as one: its blocks."""

import ctypes
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks(model: Any) -> list[nn.Module]:
    """The transformer blocks of a model, in order, none inside another."""
    names = set(model._no_split_modules or ())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module is model or module in inside:
            continue
        if type(module).__name__ in names or isinstance(module, GradientCheckpointingLayer):
            found.append(module)
            inside.update(module.modules())
    return found


def cast(module: nn.Module, dtype: torch.dtype, model: Any) -> None:
    """Bring the floating-point weights of a part to the type that the base computes in; those that transformers keeps in float32 to that.

    Weights that are of that type already stay where they are, be it in a mapped file.
    """
    kept = tuple(model._get_dtype_plan(dtype))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in module.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            wide = any(part in names[id(parameter)].split(".") for part in kept)
            wanted = torch.float32 if wide else dtype
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)


_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def give_memory_back() -> None:
    """Have this process give the memory of large tensors back to the system as soon as they are gone.

    glibc's malloc otherwise raises, with every such tensor, the size up to which it keeps memory for itself; of weights that come and go with every
    block it then keeps more than the whole base (measured: 1,080 MB instead of 576 MB per process, half of a base of 537 MB on each).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another libc
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
