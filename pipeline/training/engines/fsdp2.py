"""FSDP2 (`fully_shard`, torch.distributed.fsdp): every process keeps one N-th of each weight, and gathers a block's weights while it runs.

In: a model whose weights are views of their files. Out: the same model with its share of them on the device. Knows nothing of prefixes: those are
plain tensors outside the model, which FSDP2, unlike FSDP of version 1, does not mind.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from pipeline.prefix.placing import Placed
from pipeline.training.engines.units import blocks, cast, give_memory_back, kept_here, whole


def fsdp2(model: Any, device: torch.device, dtype: torch.dtype, reshard: bool, offload: bool) -> Placed:
    """Split a model over all processes, block by block, so that no process holds more than one block whole.

    Args:
        model: frozen, its hooks in place.
        device: where this process computes.
        dtype: what the base computes in.
        reshard: give a block's weights back after its forward pass and gather them again for the backward pass.
        offload: keep this process's parts in the machine's memory instead of the device's.
    """
    if device.type == "cpu" or offload:
        give_memory_back()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy(),
    }
    # T5 (transformers 5.23) has the table of relative positions in its first block, and the prefix's part of the bias is looked up in it from
    # every block: so it is a unit of its own.
    tables = [
        table for module in model.modules() if isinstance(table := getattr(module, "relative_attention_bias", None), nn.Module)
    ]
    for unit in [*tables, *blocks(model)]:
        cast(unit, dtype, model)
        fully_shard(unit, reshard_after_forward=reshard, **options)
    cast(model, dtype, model)
    # What is left, embeddings and head, is given back too: kept, the vocabulary matrix would lie whole on every process.
    fully_shard(model, reshard_after_forward=reshard, **options)

    return Placed(
        device=device,
        kept=lambda: kept_here(model),
        whole=whole,
        settle=lambda: None,
    )
