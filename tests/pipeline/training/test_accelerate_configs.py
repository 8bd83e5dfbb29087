"""Every file of accelerate_configs/ through Accelerate's own launcher, up to the moment at which it would start processes."""

from typing import Any

import pytest
import torch
import yaml
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from pipeline.training.engines import chosen

from .launching import CONFIGS, environment_of, parsed
from .test_engines import WITH_DEEPSPEED

# The engine of each, and how many processes it starts unless told otherwise.
EXPECTED = {
    "cpu": ("none", 1),
    "cpu_2proc": ("ddp", 2),
    "single_gpu": ("none", 1),
    "multi_gpu_ddp": ("ddp", 2),
    "fsdp2": ("fsdp2", 8),
    "fsdp2_2proc_cpu": ("fsdp2", 2),
    "multi_node_fsdp2": ("fsdp2", 16),
    "zero3": ("zero3", 8),
    "zero3_2proc_cpu": ("zero3", 2),
    "zero3_offload": ("zero3", 2),
    "multi_node_zero3": ("zero3", 16),
    "tp": ("tp", 8),
    "tp_2proc_cpu": ("tp", 2),
}


class Processes:
    """What engines ask of an Accelerator before they do anything."""

    device = torch.device("cpu")

    def __init__(self, count: int) -> None:
        self.num_processes = count


def test_every_config_is_known_here_and_says_what_it_is_for() -> None:
    files = {file.stem: file.read_text() for file in CONFIGS.glob("*.yaml")}
    assert files.keys() == EXPECTED.keys()
    for name, text in files.items():
        assert text.startswith("# "), name
        content = yaml.safe_load(text)
        assert content["mixed_precision"] == "no", "base_model.dtype decides"
        if content["distributed_type"] not in ("NO",) and not name.endswith("cpu") and name != "cpu_2proc":
            assert "Needs: " in text or name == "multi_gpu_ddp", f"{name} says what it needs"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=WITH_DEEPSPEED if e == "zero3" else ()) for n, (e, _) in EXPECTED.items()]
)
def test_launcher_hands_on_what_the_engine_reads(name: str) -> None:
    engine, processes = EXPECTED[name]
    assert int(parsed(name).num_processes) == processes
    found = chosen(Processes(processes), torch.float32, environment_of(name))  # type: ignore[arg-type]
    assert found.name == engine
    assert (found.place is not None) == (engine in ("zero3", "fsdp2", "tp"))
    assert found.equal_passes == (engine in ("zero3", "fsdp2"))
    assert found.parts == (processes if engine == "tp" else 1)


@pytest.mark.parametrize("name", ["multi_node_fsdp2", pytest.param("multi_node_zero3", marks=WITH_DEEPSPEED)])
def test_machines_are_numbered_on_the_command_line(name: str) -> None:
    where = ["--num_machines", "3", "--machine_rank", "2", "--main_process_ip", "10.0.0.1", "--main_process_port", "29511"]
    arguments = parsed(name, *where, "--num_processes", "24")
    prepare: Any = prepare_deepspeed_cmd_env if name.endswith("zero3") else prepare_multi_gpu_env
    prepare(arguments)
    assert (str(arguments.nnodes), str(arguments.nproc_per_node), str(arguments.node_rank)) == ("3", "8", "2")
    assert arguments.rdzv_endpoint == "10.0.0.1:29511"


@WITH_DEEPSPEED
def test_offload_is_handed_on() -> None:
    from pipeline.training.engines.zero3 import settings_of

    assert settings_of(environment_of("zero3_offload"))["zero_optimization"]["offload_param"]["device"] == "cpu"
