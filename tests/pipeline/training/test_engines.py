"""The same prefixes whichever engine splits the base, on two processes of the processor; and what each process keeps.

What takes longer (four processes, memory of a base of 350 MB, two machines) is in test_engines_slow.py.
"""

import importlib.util
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ConfigError
from pipeline.training.checkpoint import note_budget, read_checkpoint
from pipeline.training.engines import chosen
from pipeline.training.job import Job
from pipeline.training.run import Paused, run_job

from . import split_worker
from .launching import Launch, ranks, wait_for_steps, weights

MakeJob = Callable[..., tuple[Job, Path]]

WITH_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
CASES = ("llama:float64:plain", "llama:float32:plain", "llama:float64:lonely", "llama:float64:nan", "t5:float64:checkpointing")
# A prefix has values of about 1. In float64 what remains is the order in which numbers are added up.
TOLERANCE = {"float64": 1e-12, "float32": 2e-3}


def outcome(launch: Launch, config: str, out: Path, cases: tuple[str, ...], *options: str) -> dict[str, torch.Tensor]:
    child = launch(config, *options, "-m", "tests.pipeline.training.split_worker", str(out), *cases)
    output, _ = child.communicate(timeout=420)
    assert child.returncode == 0, output
    return load_file(out)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        case, what = name.split("/", 1)
        if what == "share":
            assert float(tensor) <= share, f"{case}: a process kept {float(tensor):.3f} of the base"
        else:
            allowed = TOLERANCE[case.split(":")[1]] * max(1.0, float(expected[name].abs().max()))
            assert torch.allclose(tensor, expected[name], rtol=0, atol=allowed, equal_nan=True), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one process with the whole base comes to."""
    out = tmp_path_factory.mktemp("alone") / "alone.safetensors"
    split_worker.run(str(out), CASES)
    return load_file(out)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        pytest.param("cpu_2proc", 1.0, marks=pytest.mark.slow),
        ("fsdp2_2proc_cpu", 0.5),
        pytest.param("zero3_2proc_cpu", 0.5, marks=WITH_DEEPSPEED),
    ],
)
def test_prefixes_are_those_of_one_process_and_each_keeps_its_part(
    launch: Launch, tmp_path: Path, alone: dict[str, torch.Tensor], config: str, share: float
) -> None:
    """Customers of unequal sizes, steps in which a process has no rows, a customer that is NaN, checkpointing, an encoder-decoder."""
    assert_equal(outcome(launch, config, tmp_path / "out.safetensors", CASES), alone, share)


@pytest.mark.parametrize("config", ["fsdp2_2proc_cpu", pytest.param("zero3_2proc_cpu", marks=[WITH_DEEPSPEED, pytest.mark.slow])])
def test_job_on_two_processes_is_stopped_and_goes_on_with_one(make_job: MakeJob, launch: Launch, config: str) -> None:
    """Text initialisation, embedding-only and dev losses run the base on all; what one is asked to stop, all stop at one checkpoint."""
    settings: dict[str, Any] = {"customers": 2, "max_steps": 24, "eval_every": 8, "prefix": {"reparam": "embedding"}}
    job, path = make_job(**settings, mixing={"gradient_checkpointing": True})
    undisturbed, _ = make_job(**settings, name="undisturbed")
    assert run_job(undisturbed) == 0
    child = launch(config, "-m", "pipeline.training", str(path))
    wait_for_steps(child, job, 3)
    ranks(child)[1].send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=60)
    assert re.search(r"exitcode\s*:\s*75", output), output
    checkpoint = read_checkpoint(Path(job.folder))
    assert checkpoint is not None and 3 <= checkpoint.tick < 24
    assert {plain["step"] for _, plain in checkpoint.states.values()} == {checkpoint.tick}
    assert run_job(job) == 0
    for i in range(2):
        a, b = weights(job, i), weights(undisturbed, i)
        assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def test_killed_process_ends_the_job_and_the_next_run_goes_on(make_job: MakeJob, launch: Launch) -> None:
    job, path = make_job(customers=2, max_steps=100_000, eval_every=50_000, mixing={"checkpoint_every_seconds": 0.0})
    child = launch("fsdp2_2proc_cpu", "-m", "pipeline.training", str(path))
    wait_for_steps(child, job, 3)
    ranks(child)[1].kill()
    killed = time.monotonic()
    output, _ = child.communicate(timeout=90)
    assert time.monotonic() - killed < 45
    assert child.returncode != 0
    assert "error: another process of this job ended" in output and "Run the same command again" in output, output
    causes = re.findall(r"exitcode\s*:\s*(-?\d+)", output)
    assert causes[-1] == "-9", "the launcher names the killed one as the root cause"
    checkpoint = read_checkpoint(Path(job.folder))
    assert checkpoint is not None and checkpoint.tick >= 2
    stopped: list[int] = []

    def after_three() -> bool:
        stopped.append(1)
        return len(stopped) > 3

    with pytest.raises(Paused):
        run_job(job, after_three)
    later = read_checkpoint(Path(job.folder))
    assert later is not None and later.tick > checkpoint.tick


class Fake:
    num_processes = 2
    device = torch.device("cpu")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        pytest.param({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero_stage: 3", marks=WITH_DEEPSPEED),
        pytest.param(
            {
                "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
            },
            "deepspeed_config_file",
            marks=WITH_DEEPSPEED,
        ),
        pytest.param(
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, "/nowhere.json", marks=WITH_DEEPSPEED
        ),
    ],
)  # fmt: skip
def test_what_no_engine_does_is_refused_with_the_remedy(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        chosen(Fake(), torch.float32, environment)  # type: ignore[arg-type]


@WITH_DEEPSPEED
def test_deepspeed_file_says_where_the_parts_wait(tmp_path: Path) -> None:
    from pipeline.training.engines.zero3 import settings_of

    file = tmp_path / "ds.json"
    offload = {"device": "nvme", "nvme_path": "/local/nvme"}
    section = {
        "stage": 3,
        "offload_param": offload,
        "offload_optimizer": {"device": "cpu"},
        "stage3_prefetch_bucket_size": "auto",
    }
    file.write_text(json.dumps({"zero_optimization": section}))
    found = settings_of({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert found["offload_param"] == offload and found["stage"] == 3
    assert "offload_optimizer" not in found and "stage3_prefetch_bucket_size" not in found


def test_budget_noted_by_a_process_that_ran_out_of_memory_holds_for_the_next_run(make_job: MakeJob) -> None:
    job, _ = make_job(mixing={"max_tokens_per_micro_batch": 400})
    note_budget(Path(job.folder), 400, 24)
    from pipeline.training import mixed

    budgets: set[int] = set()
    real = mixed.pack

    def noting(rows: Any, budget: int, *rest: Any) -> Any:
        budgets.add(budget)
        return real(rows, budget, *rest)

    mixed.pack = noting
    try:
        assert run_job(job) == 0
    finally:
        mixed.pack = real
    assert budgets == {24}
    assert not (Path(job.folder) / "budget.json").exists()
