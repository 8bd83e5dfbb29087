"""What a job takes, before it is loaded."""

import importlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from flows import cli
from pipeline.errors import BaseModelError, ConfigError
from pipeline.sizes import parse_bytes
from pipeline.training.engines import chosen
from pipeline.training.fit import fit
from pipeline.training.job import Job
from pipeline.training.plan import Plan, plan, refuse_what_cannot_fit
from pipeline.training.run import _refuse_too_small_devices

from . import crowd, split_worker
from .launching import Group, environment_of

MakeJob = Callable[..., tuple[Job, Path]]
GIB = 2**30
SEVENTY_TWO = LlamaConfig(
    hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=152064,
    tie_word_embeddings=False,
)  # fmt: skip


def in_bfloat16(job: Job) -> Job:
    return replace(job, base=replace(job.base, dtype="bfloat16"))


def totals(found: Plan) -> dict[tuple[str, bool], int]:
    return {(need.engine, need.checkpointing): need.total for need in found.needs}


def test_72b_fits_on_eight_cards_of_80_gib_split_and_with_checkpointing_only(make_job: MakeJob) -> None:
    job, _ = make_job(customers=2)
    prompt = replace(job.customers[0].prompt, max_input_tokens=384, max_target_tokens=128)
    job = in_bfloat16(
        replace(job, customers=[replace(c, prompt=prompt, training=replace(c.training, batch_size=128)) for c in job.customers])
    )
    found = plan(job, 8, 80 * GIB, config=SEVENTY_TWO)
    assert found.weights == sum(
        n * 2 for n in (2 * 152064 * 8192, 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 29568 + 2 * 8192), 8192)
    )
    assert found.best is not None and (found.best.engine, found.best.checkpointing) == ("fsdp2", True)
    of = totals(found)
    assert of["ddp", True] > 80 * GIB and of["fsdp2", False] > 80 * GIB
    weights = {need.engine: need.weights for need in found.needs}
    assert weights["fsdp2"] == -(-found.weights // 8) and weights["zero3_offload"] == 0
    assert plan(job, 1, 80 * GIB, config=SEVENTY_TWO).best == next(
        need
        for need in plan(job, 1, 80 * GIB, config=SEVENTY_TWO).needs
        if need.engine == "zero3_offload" and need.total <= 80 * GIB
    )


def test_layers_are_shared_out_where_rows_are_few_and_weights_split_where_they_are_many(make_job: MakeJob) -> None:
    job, _ = make_job()
    prompt = replace(job.customers[0].prompt, max_input_tokens=384, max_target_tokens=128)

    def planned(rows: int, devices: int = 8) -> Plan:
        customer = replace(job.customers[0], prompt=prompt, training=replace(job.customers[0].training, batch_size=rows))
        eight_layers = LlamaConfig(**{**SEVENTY_TWO.to_dict(), "num_hidden_layers": 8})
        return plan(in_bfloat16(replace(job, customers=[customer])), devices, 16 * GIB, config=eight_layers)

    few, many = planned(8), planned(800)
    assert few.best is not None and few.best.engine == "tp"
    assert many.best is not None and many.best.engine == "fsdp2"
    # Everything but the norms is an eighth.
    norms = 2 * 8192 * (2 * 8 + 1)
    assert few.best.weights == (few.weights - norms) // 8 + norms
    assert not any(need.engine == "tp" for need in planned(8, devices=6).needs), "six processes cannot share eight heads"
    a, b = (next(n for n in p.needs if n.engine == "tp" and not n.checkpointing) for p in (few, planned(8, devices=2)))
    assert b.activations > 1.5 * a.activations, "heads and columns of a layer are fewer, the tokens the same"


def test_what_crosses_the_wire_is_what_processes_send(make_job: MakeJob, tmp_path: Path) -> None:
    names = ["cpu_2proc", "fsdp2_2proc_cpu", "tp_2proc_cpu"]
    environments = {name: environment_of(name) for name in names} | {"tp, checkpointing": environment_of("tp_2proc_cpu")}
    group = Group("cpu_2proc", split_worker.exchanged, str(tmp_path / "out.json"), environments, folder=tmp_path)
    assert group.wait(200) == [0, 0], group.said()
    sent = json.loads((tmp_path / "out.json").read_text())
    config = crowd.llama().config
    job, _ = make_job()
    customer = replace(
        job.customers[0],
        prompt=replace(job.customers[0].prompt, max_input_tokens=20, max_target_tokens=4),
        training=replace(job.customers[0].training, batch_size=16),
    )
    job = replace(job, customers=[customer])

    def planned(engine: str, checkpointing: bool = False) -> int:
        found = plan(job, 2, GIB, gpu=False, config=config)
        return next(n.exchanged for n in found.needs if (n.engine, n.checkpointing) == (engine, checkpointing))

    facts = 2 * 6 * 4 // 2  # flags and losses go with the gradients, and are on no account of the planner's
    assert sent["cpu_2proc"] == planned("ddp") + facts
    assert sent["fsdp2_2proc_cpu"] == planned("fsdp2") + facts
    assert sent["tp_2proc_cpu"] == planned("tp") + facts
    # PyTorch does not compute again what stands behind the last tensor that a block's backward pass needs.
    assert sent["tp, checkpointing"] <= planned("tp", True) + facts < 1.15 * sent["tp, checkpointing"]


def test_needs_grow_with_what_is_asked(make_job: MakeJob, tiny_base: Path) -> None:
    small, _ = make_job(customers=1)
    many, _ = make_job(customers=3, name="many", length=6)
    a, b = plan(small, 1, GIB, gpu=False).needs[0], plan(many, 1, GIB, gpu=False).needs[0]
    sites, heads_kv, head_dim = 2, 2, 8
    assert a.optimiser == 4 * 4 * sites * 2 * heads_kv * 3 * head_dim, "parameters, gradient and two moments in float32"
    assert b.optimiser == 3 * 2 * a.optimiser and b.prefixes == 3 * 2 * a.prefixes
    assert b.activations > a.activations and b.weights == a.weights
    checkpointed = plan(small, 1, GIB, gpu=False).needs[1]
    assert checkpointed.activations < a.activations


def test_encoder_decoders_are_planned_too(make_job: MakeJob, tiny_encoder_decoder: Path) -> None:
    job, _ = make_job(base=tiny_encoder_decoder)
    found = plan(job, 2, GIB, gpu=False)
    assert found.best is not None and found.best.engine == "ddp"
    assert found.needs[0].prefixes > 0
    assert not any(need.engine == "tp" for need in found.needs), "there is no plan for T5"


def test_command_names_the_engine_and_refuses_what_cannot_fit(make_job: MakeJob, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = make_job()
    assert cli.main(["plan", str(path), "--devices", "2", "--memory", "16GiB"]) == 0
    output = capsys.readouterr().out
    assert "recommended: launch: {accelerate_config: multi_gpu_ddp, num_processes: 2}" in output
    assert cli.main(["plan", str(path), "--devices", "1", "--memory", "600MiB", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["best"] is None and "nothing fits in" in captured.err
    assert cli.main(["plan", str(path), "--devices", "0", "--memory", "16GiB"]) == 2
    assert cli.main(["plan", str(path), "--devices", "1", "--memory", "plenty"]) == 2
    fleet = Path(__file__).resolve().parents[3] / "examples" / "fleet.yaml"
    assert cli.main(["plan", str(fleet), "--devices", "1", "--memory", "16GiB"]) == 2
    assert "is a fleet file, not a job file. `prefixfleet train" in capsys.readouterr().err


def test_training_refuses_weights_larger_than_the_device_before_loading(tiny_base: Path) -> None:
    size = sum(file.stat().st_size for file in tiny_base.glob("*.safetensors"))
    refuse_what_cannot_fit(tiny_base, torch.float32, "ddp", 2, size + 1)
    refuse_what_cannot_fit(tiny_base, torch.bfloat16, "ddp", 2, size // 2 + 1)
    refuse_what_cannot_fit(tiny_base, torch.float32, "fsdp2", 2, size // 2 + 1)
    with pytest.raises(ConfigError, match=re.escape("accelerate_config: fsdp2 or zero3, num_processes: 3")):
        refuse_what_cannot_fit(tiny_base, torch.float32, "ddp", 2, size // 2)


def test_base_that_waits_off_the_device_is_not_refused_for_its_size(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = make_job()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
    gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), num_processes=2, is_main_process=True)

    def check(environment: dict[str, str]) -> None:
        _refuse_too_small_devices(job, chosen(gpu, torch.float32, environment), gpu, torch.float32)

    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    check({**fsdp2, "FSDP_OFFLOAD_PARAMS": "true"})
    with pytest.raises(ConfigError, match="zero3_offload"):
        check(fsdp2)
    if importlib.util.find_spec("deepspeed") is not None:
        check(environment_of("zero3_offload"))
        with pytest.raises(ConfigError, match="with zero3 each would keep"):
            check(environment_of("zero3"))


@pytest.mark.parametrize("parts", [False, True])
def test_weights_that_a_folder_holds_twice_count_once(tiny_base: Path, tmp_path: Path, parts: bool) -> None:
    size = (tiny_base / "model.safetensors").stat().st_size
    shutil.copy(tiny_base / "model.safetensors", tmp_path / "consolidated.safetensors")
    name = "model-00001-of-00001.safetensors" if parts else "model.safetensors"
    shutil.copy(tiny_base / "model.safetensors", tmp_path / name)
    if parts:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name, "b": name}}))
    refuse_what_cannot_fit(tmp_path, torch.float32, "ddp", 2, size)
    with pytest.raises(ConfigError, match="Split the base"):
        refuse_what_cannot_fit(tmp_path, torch.float32, "ddp", 2, size - 1)
    if parts:
        (tmp_path / name).unlink()
        with pytest.raises(BaseModelError, match=f"names {name}, which are not there"):
            refuse_what_cannot_fit(tmp_path, torch.float32, "ddp", 2, size)


@pytest.mark.parametrize("devices", [1, 2])
def test_engines_that_training_refuses_for_a_quantised_base_are_not_planned(make_job: MakeJob, devices: int) -> None:
    job, _ = make_job()
    found = plan(replace(job, base=replace(job.base, quantization="int4")), devices, GIB, gpu=False)
    assert {need.engine for need in found.needs} == {"none" if devices == 1 else "ddp"}
    assert {"zero3_offload"} < {need.engine for need in plan(job, devices, GIB, gpu=False).needs}


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * GIB // 2), ("512MiB", 2**29), ("1000", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "3 elephants", "nan", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


def test_table_of_the_docs_is_the_planners(root: Path) -> None:
    """Two rows of it: the cheapest, and one whose engine is counted in a way of its own."""
    table = importlib.import_module("benchmarks.plan_table")
    for row in (table.row("7B", 8), table.row("72B", 8, customers=1)):
        assert f"{row}\n" in (root / "docs" / "distributed.md").read_text(), "run `python benchmarks/plan_table.py`"


@pytest.mark.slow
def test_plan_is_within_15_percent_of_float32_runs_on_the_processor_and_not_below_those_of_bfloat16(root: Path) -> None:
    """In bfloat16 norms and attention keep less there than the planner knows of."""
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "benchmarks/memory.py", "--shapes", "plan", "--cpu", "--steps", "1"], cwd=root, capture_output=True, text=True, timeout=900,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 12
    for line in lines:
        most = 1.15 if line["dtype"] == "float32" else 1.4
        assert 0.85 <= line["planned_over_measured"] <= most, line


def test_a_job_is_lowered_until_it_fits_and_a_customer_that_does_not_fit_alone_is_refused_with_the_figure(
    make_job: MakeJob,
) -> None:
    job, _ = make_job(customers=3, mixing={"max_tokens_per_micro_batch": 2**14, "slots": 3}, batch_size=64)

    def takes(of: Job) -> int:
        return plan(of, 1, 2**40, gpu=False).needs[0].total

    def with_budget(tokens: int, slots: int) -> Job:
        return replace(job, mixing=replace(job.mixing, max_tokens_per_micro_batch=tokens, slots=slots))

    assert fit(job, "none", 1, takes(job), gpu=False) == (job, {})
    # The largest of the halvings that fits, and no smaller one.
    quarter = takes(with_budget(2**12, 3))
    fitted, refused = fit(job, "none", 1, quarter, gpu=False)
    assert (fitted.mixing.max_tokens_per_micro_batch, fitted.mixing.slots, refused) == (2**12, 3, {})
    assert takes(with_budget(2**13, 3)) > quarter
    # A prefix of thousands of columns leaves no room, whatever the batch; the others train.
    wide = replace(job.customers[1], prefix=replace(job.customers[1].prefix, length=4096))
    little = takes(with_budget(1, 3))
    fitted, refused = fit(replace(job, customers=[job.customers[0], wide, job.customers[2]]), "none", 1, little, gpu=False)
    assert [c.customer for c in fitted.customers] == ["c0", "c2"] and takes(fitted) <= little
    assert set(refused) == {wide.key} and re.search(
        r"alone, a row of .* it takes \d+ MiB of \d+ MiB .*gradient_checkpointing", refused[wide.key]
    )
    none, refused = fit(job, "none", 1, 2**10, gpu=False)
    assert none.customers == [] and len(refused) == 3
