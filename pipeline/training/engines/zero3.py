"""DeepSpeed ZeRO stage 3: every process keeps one N-th of each weight, and gathers a module's weights while it runs.

The parts wait on the device, in the machine's memory or on an NVMe disk.

In: a model whose weights are views of their files, and the sections `zero_optimization` and `aio` of a DeepSpeed config. Out: the same model with its
share of them. `deepspeed.initialize` is not used: without an optimiser of its own its engine adds to the hooks below only a call that refuses
`backward` (DeepSpeed 0.19.8), and it has no float64.
"""

import gc
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.prefix.placing import Placed
from pipeline.training.engines.units import blocks, cast, give_memory_back

# Weights no larger than so many numbers stay whole on every process: gathering a bias costs more than it is worth.
PERSISTENT = 10_000


def settings_of(environment: Mapping[str, str] = os.environ, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The sections of a DeepSpeed config that the launcher's config means: `zero_optimization`, and `aio` where there is one.

    Args:
        environment: as `accelerate launch` set it, from `deepspeed_config` of the file.
        say: told of what is asked for there and not done here.

    Raises:
        ConfigError: DeepSpeed is not installed, its config cannot be read, or it is not of stage 3.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "the accelerate config asks for DeepSpeed, which is not installed: `pip install 'prefixfleet[deepspeed]'`, or use fsdp2."
        )
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        try:
            content = dict(json.loads(Path(file).read_text(encoding="utf-8")))
            section, reading = dict(content.pop("zero_optimization")), content.pop("aio", None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}: cannot be read as a DeepSpeed config with a section zero_optimization ({error!r})."
            ) from error
        unused = [name for name, value in content.items() if _asks(value)]
        unused += ["zero_optimization.offload_optimizer"] if _asks(section.get("offload_optimizer")) else []
    else:
        reading, unused = None, [name for name, variable, default in _UNUSED if environment.get(variable, default) != default]
        section = {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        device = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        if device != "none":
            section["offload_param"] = {"device": device, "pin_memory": torch.cuda.is_available()}
        if device == "nvme":
            path = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", "none")
            if path == "none":
                raise ConfigError(
                    "offload_param_device is nvme, but Accelerate's launcher passes no path on. Name a DeepSpeed file with `deepspeed_config_file`; "
                    "its zero_optimization.offload_param has device and nvme_path."
                )
            section["offload_param"]["nvme_path"] = path
    if dict(section.get("offload_param") or {}).get("device") == "nvme":
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                "offload_param.device is nvme, but DeepSpeed cannot build what reads and writes the disk (async_io) here: it needs libaio with its "
                "headers (apt install libaio-dev) and a compiler. Or keep the parts in memory: device: cpu."
            )
    if section.get("stage") != 3:
        raise ConfigError(
            f"zero_stage is {section.get('stage')}: stages below 3 split gradients and optimiser states, which a frozen base has not. "
            "Set zero_stage: 3."
        )
    if unused:
        where = "the accelerate config" if file == "none" else file
        say(
            f"{where}: does nothing here: {', '.join(unused)}. Prefixes and their optimisers are outside DeepSpeed: the fleet file's "
            "training and launch settings and its base_model.dtype decide."
        )
    # "auto" is a word of Accelerate's; what it stands for here is DeepSpeed's own default.
    section = {name: value for name, value in section.items() if value != "auto" and name != "offload_optimizer"}
    section = {"stage3_param_persistence_threshold": PERSISTENT, "stage3_max_reuse_distance": 0, **section}
    return {"zero_optimization": section, **({} if reading is None else {"aio": reading})}


# Settings of `deepspeed_config` in an accelerate config, where its launcher leaves them, and what they are if nobody asks.
_UNUSED = (
    ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
    ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING", "none"),
    ("offload_optimizer_device", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
)


def _asks(value: Any) -> bool:
    """Whether a setting says more than "as Accelerate likes" or "not at all"."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled") not in (False, "auto") and value.get("device") != "none"
    return value not in (None, False, "auto")


def zero3(model: Any, device: torch.device, dtype: torch.dtype, settings: dict[str, Any]) -> Placed:
    """Split a model over all processes, block by block, so that no process holds more than one block whole.

    Args:
        model: frozen, its hooks in place. Hooks that are there before DeepSpeed's still see a module's weights behind its forward pass.
        device: where this process computes.
        dtype: what the base computes in.
        settings: see `settings_of`.
    """
    section = settings["zero_optimization"]
    if device.type == "cpu" or section.get("offload_param"):
        give_memory_back()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init
    from deepspeed.utils.timer import NoopTimer

    # On a processor DeepSpeed (0.19.8) would compile an exchange through shared memory, whose flags a killed process leaves the others spinning on.
    # Gloo needs no compiler, and notices.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(auto_mpi_discovery=False)  # takes over the process group that Accelerate made
    world = torch.distributed.get_world_size()
    # How much DeepSpeed fetches ahead, and has together: its own defaults are 50 million numbers and a billion. Two blocks do, as with FSDP2
    # (measured: 827 instead of 1,136 MB at most per process, half of a base of 537 MB on each).
    block = max(sum(parameter.numel() for parameter in unit.parameters()) for unit in blocks(model))
    section = {"stage3_prefetch_bucket_size": min(block, 50_000_000), "stage3_max_live_parameters": 2 * block, **section}
    whole_config = {"train_batch_size": world, "train_micro_batch_size_per_gpu": 1, **settings, "zero_optimization": section}
    zero = DeepSpeedConfig(whole_config).zero_config
    for unit in [*blocks(model), model]:
        cast(unit, dtype, model)
        for parameter in unit.parameters():
            if not hasattr(parameter, "ds_id"):
                # Copied even if it is here already: DeepSpeed broadcasts into it, which would make the pages of a mapped file memory of ours.
                parameter.data = parameter.data.to(device, copy=True)
        # No dtype: it is that of weights still to be made, and on a processor with float16 DeepSpeed (0.19.8) refuses float64 there.
        Init(module=unit, config_dict_or_path=whole_config)
    model.to(device)  # its buffers
    gc.collect()
    offload = DeepSpeedZeRoOffload(
        model,
        timers=NoopTimer(),
        ds_config=whole_config,
        overlap_comm=bool(zero.overlap_comm),
        prefetch_bucket_size=zero.prefetch_bucket_size,
        max_reuse_distance=zero.max_reuse_distance,
        max_live_parameters=zero.max_live_parameters,
        param_persistence_threshold=zero.param_persistence_threshold,
        model_persistence_threshold=zero.model_persistence_threshold,
        offload_param_config=zero.offload_param,
    )

    def whole(parameter: nn.Parameter) -> torch.Tensor:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    return Placed(
        device=device,
        kept=lambda: [parameter.ds_tensor for parameter in model.parameters()],
        whole=whole,
        # Blocks whose input needs no gradient are not told when their backward pass is over.
        settle=lambda: offload.get_param_coordinator().release_and_reset_all(model),
    )
