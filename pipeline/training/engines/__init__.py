"""How a job's base lies on its processes, and nothing more: `accelerate launch --config_file accelerate_configs/X.yaml` decides.

In: what the launcher put into the environment. Out: an `Engine`, whose `place` splits a base (or None: every process has all of it). Prefixes, their
optimisers and their schedules are outside: whole on each process, their gradients summed once a step by `pipeline.training.mixed`.

Accelerate itself ignores the settings of FSDP and DeepSpeed on processors without a GPU, and wants an optimiser's parameters inside the sharded
model. So engines read the settings where Accelerate's launcher leaves them, and split the frozen base themselves.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from pipeline.errors import ConfigError
from pipeline.prefix.placing import Place

_PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"


@dataclass(frozen=True)
class Engine:
    """How the base lies on the processes of a job.

    Attributes:
        name: `none` (one process), `ddp` (each has the whole base), `zero3`, `fsdp2` or `tp` (see the modules of these names).
        place: puts the base there; None leaves it whole.
        equal_passes: whether each pass through the base is an exchange, so that all processes must make equally many of them.
        parts: how many processes, neighbours in rank, make one pass together, of the same rows.
        offload: whether a process's part of the base waits off its device, in the machine's memory or on a disk.
    """

    name: str
    place: Place | None = None
    equal_passes: bool = False
    parts: int = 1
    offload: bool = False


def processes(patience: timedelta | None = None) -> Accelerator:
    """The processes that the launcher started, each with its device: the GPU of its number, or the processor where there is none.

    Args:
        patience: how long one waits for the others in an exchange; by default as long as PyTorch does.
    """
    # Accelerate (1.15) would otherwise look for a GPU when the launcher's config names several processes; and it takes tensor parallelism for a part
    # of FSDP of its own, on GPUs only.
    asked = os.environ.pop(_PARALLELISM, None)
    try:
        handlers = [] if patience is None else [InitProcessGroupKwargs(timeout=patience)]
        return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)
    finally:
        if asked is not None:
            os.environ[_PARALLELISM] = asked


def chosen(accelerator: Accelerator, dtype: torch.dtype, environment: Mapping[str, str] = os.environ) -> Engine:
    """The engine that the launcher's config asks for.

    Args:
        accelerator: the processes and their devices.
        dtype: what the base computes in.
        environment: as `accelerate launch` set it.

    Raises:
        ConfigError: it asks for what no engine does.
    """
    _refuse_what_is_decided_elsewhere(dtype, environment)
    count = accelerator.num_processes
    together = int(environment.get("PARALLELISM_CONFIG_TP_SIZE", "1")) if _is_set(environment, _PARALLELISM) else 1
    if together > 1 and (_is_set(environment, "ACCELERATE_USE_FSDP") or _is_set(environment, "ACCELERATE_USE_DEEPSPEED")):
        raise ConfigError(
            f"parallelism_config_tp_size is {together} beside FSDP or DeepSpeed: a base is split in one way. Remove it, or set "
            "distributed_type: MULTI_GPU as accelerate_configs/tp.yaml does."
        )
    if together > 1 and count > 1:
        parts = min(together, count)
        if count % parts:
            raise ConfigError(
                f"{count} processes cannot form runs of {parts} that share the base out. Make num_processes a multiple of "
                "parallelism_config_tp_size."
            )
        from pipeline.training.engines.tp import tp

        return Engine("tp", lambda model: tp(model, accelerator.device, dtype, parts), parts=parts)
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        from pipeline.training.engines.zero3 import settings_of, zero3

        settings = settings_of(environment, lambda line: _warn(accelerator, line))
        offload = dict(settings["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"
        return Engine(
            "zero3", lambda model: zero3(model, accelerator.device, dtype, settings), equal_passes=True, offload=offload
        )
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "the accelerate config asks for FSDP of version 1, which wants all parameters of a unit trained alike. Set fsdp_version: 2."
            )
        from pipeline.training.engines.fsdp2 import fsdp2

        reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true") not in ("false", "False")
        offload = _is_set(environment, "FSDP_OFFLOAD_PARAMS")
        return Engine(
            "fsdp2", lambda model: fsdp2(model, accelerator.device, dtype, reshard, offload), equal_passes=True, offload=offload
        )
    return Engine("none" if count == 1 else "ddp")


def _refuse_what_is_decided_elsewhere(dtype: torch.dtype, environment: Mapping[str, str]) -> None:
    """Settings of Accelerate's that no engine looks at must not seem to do something.

    Raises:
        ConfigError: one of them is set.
    """
    name = str(dtype).removeprefix("torch.")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower() or "no"
    if precision not in ("no", {"bfloat16": "bf16", "float16": "fp16"}.get(name, "no")):
        raise ConfigError(
            f"mixed_precision is {precision} in the accelerate config, but the base computes in {name}, which base_model.dtype of the fleet file "
            f'decides. Set mixed_precision: "no", and base_model.dtype to what you want.'
        )
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        return
    for setting in ("activation_checkpointing", "activation_checkpointing_offload"):
        if _is_set(environment, f"FSDP_{setting.upper()}"):
            raise ConfigError(
                f"fsdp_{setting} is set in the accelerate config, which does nothing here. Remove it; `launch.gradient_checkpointing: true` in the "
                "fleet file checkpoints whichever engine splits the base."
            )
    if environment.get("FSDP_IGNORED_MODULES", "None") not in ("", "None"):
        raise ConfigError(
            "fsdp_ignored_modules is set in the accelerate config, but every weight of the base is split. Remove it."
        )


def _warn(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")
