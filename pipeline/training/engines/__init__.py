"""How a job's base lies on its processes, and nothing more: `accelerate launch --config_file accelerate_configs/X.yaml` decides.

In: what the launcher put into the environment. Out: an `Engine`, whose `place` splits a base (or None: every process has all of it). Prefixes, their
optimisers and their schedules are outside: whole on each process, their gradients summed once a step by `pipeline.training.mixed`.

Accelerate itself ignores the settings of FSDP and DeepSpeed on processors without a GPU, and wants an optimiser's parameters inside the sharded
model. So engines read the settings where Accelerate's launcher leaves them, and split the frozen base themselves.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from pipeline.errors import ConfigError
from pipeline.prefix.placing import Place


@dataclass(frozen=True)
class Engine:
    """How the base lies on the processes of a job.

    Attributes:
        name: `none` (one process), `ddp` (each has the whole base), `zero3`, `fsdp2` or `tp`.
        place: puts the base there; None leaves it whole.
        equal_passes: whether each pass through the base is an exchange, so that all processes must make equally many of them.
        parts: over how many processes one pass of the base is split; those process the same rows.
    """

    name: str
    place: Place | None = None
    equal_passes: bool = False
    parts: int = 1


def chosen(accelerator: Accelerator, dtype: torch.dtype, environment: Mapping[str, str] = os.environ) -> Engine:
    """The engine that the launcher's config asks for.

    Args:
        accelerator: the processes and their devices.
        dtype: what the base computes in.
        environment: as `accelerate launch` set it.

    Raises:
        ConfigError: it asks for what no engine does.
    """
    processes = accelerator.num_processes
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        from pipeline.training.engines.zero3 import settings_of, zero3

        settings = settings_of(environment)
        return Engine("zero3", lambda model: zero3(model, accelerator.device, dtype, settings), equal_passes=True)
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        parts = int(environment.get("PARALLELISM_CONFIG_TP_SIZE", "1"))
        if parts > 1:
            raise ConfigError(
                f"parallelism_config_tp_size is {parts}: tensor parallelism is not available. Split the base with fsdp2 or zero3."
            )
        if environment.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "the accelerate config asks for FSDP of version 1, which wants all parameters of a unit trained alike. Set fsdp_version: 2."
            )
        from pipeline.training.engines.fsdp2 import fsdp2

        reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true") not in ("false", "False")
        offload = _is_set(environment, "FSDP_OFFLOAD_PARAMS")
        return Engine("fsdp2", lambda model: fsdp2(model, accelerator.device, dtype, reshard, offload), equal_passes=True)
    return Engine("none" if processes == 1 else "ddp")


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")
