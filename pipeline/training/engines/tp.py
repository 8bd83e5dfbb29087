"""Tensor parallelism (transformers' `tp_plan`): every process keeps some of each layer's heads and columns and runs every layer with them.

In: a model whose weights are views of their files. Out: the same model with its share of them on the device, cut as the plan of its type says.
Processes that share a base out so see the same rows, and add up what each made of them twice a layer. Knows nothing of prefixes, but says which
heads are whose: keys and values of a prefix are cut like the model's own.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers.distributed import DistributedConfig
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.distributed.tensor_parallel import apply_tensor_parallelism, get_kv_heads_per_rank

from pipeline.errors import BaseModelError, ConfigError
from pipeline.prefix.placing import Heads, Placed
from pipeline.training.engines.units import kept_here, wanted_dtypes, whole


def tp(model: Any, device: torch.device, dtype: torch.dtype, parts: int) -> Placed:
    """Share a model out, part by part, among runs of `parts` neighbouring processes; each run has the whole.

    Args:
        model: frozen, its hooks in place.
        device: where this process computes.
        dtype: what the base computes in.
        parts: processes that make one pass together.

    Raises:
        BaseModelError: transformers has no plan for this type of model.
        ConfigError: its heads cannot be shared out evenly among so many.
    """
    plan = plan_of(model, parts)
    runs = torch.distributed.get_world_size() // parts
    mesh = init_device_mesh(device.type, (runs, parts), mesh_dim_names=("rows", "heads"))["heads"]
    wanted = wanted_dtypes(model, dtype)
    # transformers puts placeholders of the parts in place of placeholders of the whole; what is read from the file is this process's part only.
    stored: dict[tuple[nn.Module, str], nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                stored[module, name] = parameter
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    apply_tensor_parallelism(model, mesh, plan)
    made: dict[Any, nn.Parameter] = {}  # weights that are one in the model (a head tied to the embeddings) stay one
    for (module, name), source in stored.items():
        empty: Any = module._parameters[name]
        cut = (id(source), empty.placements if isinstance(empty, DTensor) else None)
        if cut not in made:
            made[cut] = nn.Parameter(_filled(empty, source, device, wanted.get(id(source), source.dtype)), requires_grad=False)
        module._parameters[name] = made[cut]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)

    return Placed(
        device=device,
        kept=lambda: kept_here(model),
        whole=whole,
        settle=lambda: None,
        heads=_heads(mesh) if _cuts_heads(plan) else Heads(),
    )


def plan_of(model: Any, parts: int) -> dict[str, str]:
    """What transformers' plan for a model does to each of its modules and weights: name -> style.

    Raises:
        BaseModelError: there is none.
        ConfigError: heads cannot be shared out evenly among `parts` processes.
    """
    kind = model.config.model_type
    if not model.tp_plan:
        raise BaseModelError(
            f"model type {kind!r}: transformers has no plan (tp_plan) for sharing its layers out, so it cannot be trained with tensor parallelism. "
            "Split this base with accelerate_config: fsdp2 or zero3."
        )
    text = model.config.get_text_config()
    heads_kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if get_kv_heads_per_rank(model.tp_plan, heads_kv, parts) is None:
        raise ConfigError(
            f"the base has {heads_kv} key-value heads, which {parts} processes cannot share evenly. Set parallelism_config_tp_size to one of "
            f"{', '.join(str(n) for n in range(2, heads_kv + 1) if heads_kv % n == 0) or 'none: it cannot be shared'}, "
            "or split the base with fsdp2 or zero3."
        )
    plan: dict[str, str] = model._resolve_parallel_plans(DistributedConfig(tp_size=parts))[0]
    return plan


def _cuts_heads(plan: dict[str, str]) -> bool:
    """Whether each process computes its own heads, or all compute all of them (norms over all heads together: OLMo 2)."""
    return get_kv_heads_per_rank(plan, 2, 2) == 1


def _heads(mesh: DeviceMesh) -> Heads:
    def whole(own: torch.Tensor) -> torch.Tensor:
        together: torch.Tensor = DTensor.from_local(own, mesh, [Shard(1)], run_check=False).full_tensor()
        return together

    return Heads(mesh.get_local_rank(), mesh.size(), whole)


def _filled(empty: torch.Tensor, source: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """This process's part of a weight, in memory of its own."""
    if not isinstance(empty, DTensor):
        return source.detach().to(device, dtype, copy=True)
    part: Any = DtensorShardOperation(empty).shard_tensor(source.detach(), device=device, dtype=dtype)
    if part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        part = part.clone()
    stride = tuple(math.prod(empty.shape[i + 1 :]) for i in range(empty.dim()))
    return DTensor.from_local(part, empty.device_mesh, empty.placements, run_check=False, shape=empty.shape, stride=stride)
