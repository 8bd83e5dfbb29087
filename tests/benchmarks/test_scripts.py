"""Every benchmark on a tiny base, in this process where that is enough: that it runs, and that its figures follow from what it measured."""

import gc
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation, common, cost, fleet, generation, memory, peers, registry, roofline, sharding, startup, training


@pytest.fixture(scope="module")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the example base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(root / "examples" / "base")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    gc.freeze()  # the Trainer collects garbage every time, and would look through all libraries
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two customers of 30 rows."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("acme", "bistro"):
        (folder / name).mkdir()
        rows = [{"input": f"name : {name} {i}", "target": f"{name} serves {i} guests."} for i in range(30)]
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_training_reports_every_kind_with_its_rate_and_its_share_of_the_peak(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, peak = tmp_path / "rows.jsonl", roofline.matmul_peak
    monkeypatch.setattr(
        roofline, "matmul_peak", lambda device, dtype, _: peak(device, dtype, [64], 0.01)
    )  # the real one takes seconds
    training.main(
        ["--base", str(base), "--data", str(data), "--sizes", "2x3", "--dtype", "float32", "--steps", "1", "--rounds", "2",
         "--shard-rows", "15", "--in-turn", "1", "--json", str(out)]
    )  # fmt: skip
    rows = {row["kind"]: row for row in rows_in(out)}
    kinds = ("mixed", "mixed-shuffled", "one-by-one", "lean", "lean-shuffled", "trainer")
    assert {kind: row["measured_customers"] for kind, row in rows.items()} == dict(zip(kinds, (2, 2, 1, 1, 1, 1), strict=True))
    lean = rows["lean"]
    least, most = lean["tokens_per_second_range"]
    assert least <= lean["tokens_per_second"] <= most
    assert lean["mixed_over_wall"] == pytest.approx(rows["mixed"]["tokens_per_second"] / lean["tokens_per_second"])
    assert lean["share_of_peak"] == pytest.approx(
        lean["tokens_per_second"] * lean["flops_per_token"] / lean["peak_tflops"] / 1e12
    )
    assert lean["machine"]["cores"] and lean["versions"]["torch"] and lean["seed"] == 0 and lean["rounds"] == 2


def test_work_of_a_token_is_that_of_the_matrices_it_passes_and_of_the_keys_it_sees() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    matrices = [m for m in LlamaForCausalLM(config).modules() if type(m).__name__ == "Linear"]
    head = 32 * 50
    size = roofline.Size.of(config)
    assert (size.blocks, size.head) == (sum(m.weight.numel() for m in matrices) - head, head)
    # Two tokens, one of them a target, behind a prefix of 5: 6 and 7 keys, of 32 numbers in each of 3 layers; 2 products of 2 FLOPs, 3 times.
    assert size.training_flops([(2, 1)], 5) == 2 * 4 * size.blocks + 4 * head + 3 * 4 * (6 + 7) * 32 * 3


def test_the_lean_loop_sees_each_row_once_an_epoch_and_puts_those_of_like_length_together() -> None:
    import torch

    rows = [peers.Row([5] * (1 + 7 * i % 23), [6]) for i in range(23)]
    padding = {}
    for grouped in (True, False):
        batches = peers.drawn(rows, 4, grouped, torch.Generator().manual_seed(0))
        assert [len(batch) for batch in batches] == [4] * 5
        assert len({i for batch in batches for i in batch}) == 20
        lengths = [[len(rows[i].prompt_ids) for i in batch] for batch in batches]
        padding[grouped] = sum(len(batch) * max(batch) - sum(batch) for batch in lengths)
        assert lengths != sorted(lengths), "batches come in random order"
    # Lengths are 1 to 23, three of them left out: three of four rows lack 1, 2 and 3 tokens, and some one more.
    assert padding[True] <= 5 * (1 + 2 + 3) + 3 * 3 < padding[False]


def test_shards_are_as_large_as_gives_so_many_customers() -> None:
    everybody = [[peers.Row([5], [6])] * 7, [peers.Row([5], [6])] * 10]
    assert [len(shard) for shard in training.shards_of(everybody, 3)] == [5, 5, 5]
    assert [len(shard) for shard in training.shards_of(everybody, 1)] == [10]
    assert [len(shard) for shard in training.shards_of(everybody, 2, 4)] == [4, 4]
    with pytest.raises(SystemExit, match="gives 1 customers of 9 rows, 2 are asked for"):
        training.shards_of(everybody, 2, 9)


def test_trainer_and_lean_loop_count_the_real_tokens_of_the_same_rows(base: Path, tmp_path: Path) -> None:
    model = training.load(str(base), "float32")
    rows = [peers.Row([5] * n, [6, 7]) for n in range(1, 7)]
    _, real, padded = peers.lean(model, rows, 2, 3, 0)  # six rows once each
    _, again, _ = peers.trainer_of(model, rows, 2, 3, 0, tmp_path).train()
    assert real == again == sum(n + 2 for n in range(1, 7)) < padded
    # Stopped within an epoch, the Trainer has made a batch that it does not train on.
    _, real, padded = peers.trainer_of(model, [peers.Row([5], [6, 7])] * 9, 1, 3, 0, tmp_path).train()
    assert real == padded == 9


def test_a_customers_cost_with_peft_is_measured_to_its_registered_version(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, as those that the benchmark starts do it; the fleet's own run is what the tests of flows show."""
    import mlflow

    folders = cost.write_customers(data, tmp_path / "customers", 2, 12, 4)
    texts = [(folder / f"{part}.jsonl").read_text().splitlines() for folder in folders for part in ("train", "dev", "test")]
    assert [len(lines) for lines in texts] == [12, 10, 4] * 2
    assert len({line for lines in texts for line in lines}) == 52, "no row is in two splits"
    job = {
        "base": str(base), "dtype": "float32", "how": "lean", "customers": [str(folders[0])], "steps": 1, "batch_size": 2, "new_tokens": 3,
        "answer_batch": 4, "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "out": str(tmp_path / "out"),
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    # Both stay for the whole process otherwise, before what later tests say in the environment.
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    (row,) = peers.customers(job)
    assert set(row) == {"prepare", "train", "evaluate", "register", "bleu", "cpu"}
    version = mlflow.MlflowClient().get_model_version_by_alias(f"peers.{folders[0].name}", "champion")
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(version.run_id, "adapter")}
    assert "adapter/adapter_model.safetensors" in names

    # Of the lean loop one start is shared by all, of a process each everybody has its own.
    job_seconds = {"prepare": 0.0, "train": 2.0, "evaluate": 0.5, "register": 0.5, "cpu": 4.0}
    said = {"seconds": 13.0, "cpu_seconds": 10.0, "stdout": json.dumps([job_seconds])}
    monkeypatch.setattr(cost, "started", lambda *_: dict(said))
    arguments = Namespace(peer_customers=1, base=base, dtype="float32", steps=1, batch_size=2, new_tokens=3, answer_batch=4)
    for kind, seconds, cpu in (("lean", 3.0 + 10.0 / 100, 4.0 + 6.0 / 100), ("process", 13.0, 10.0)):
        home = tmp_path / kind
        home.mkdir()
        found = cost.cost(kind, 100, folders, home, arguments)
        assert (found["seconds"], found["cpu_seconds"], found["measured"]) == (pytest.approx(seconds), pytest.approx(cpu), 1.0)


def test_each_part_of_training_is_there_and_is_what_is_taken_out(base: Path) -> None:
    """By what runs: a part that has another name one day would give +0 % without a word."""
    import torch
    from transformers import AutoTokenizer

    from pipeline.prefix.base import attach

    pad = AutoTokenizer.from_pretrained(base).pad_token_id
    customers = [[peers.Row([5] * n, [6, 7]) for n in lengths] for lengths in ((3, 60), (4, 61))]

    def events(part: str) -> dict[str, Any]:
        fed: list[int] = []
        with ablation.without(part):
            attached = attach(training.load(str(base), "bfloat16"))
            attached.model.lm_head.register_forward_hook(lambda _, inputs, output: fed.append(output.shape[1]))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                _, padded = training.ours(attached, customers, 1, 2, pad, 2, 4096, grouped=False)
        counts = {event.key: event.count for event in profile.key_averages()}
        names = {
            "products": "_ByProductsBackward",
            "norms": "_RMSNormBackward",
            "loss": "_CrossEntropyBackward",
            "forward": "aten::_scaled_dot_product_flash_attention_for_cpu",
        }
        return {name: counts.get(key, 0) for name, key in names.items()} | {"padded": padded, "fed": sum(fed)}

    whole = events("nothing")
    assert min(whole["products"], whole["norms"], whole["loss"]) > 0
    by_torch = events("attention")
    assert by_torch["products"] == 0 and by_torch["norms"] == whole["norms"]
    assert events("kept shares")["forward"] > whole["forward"]
    assert events("norms") == whole | {"norms": 0}
    without_loss = events("loss")
    assert without_loss["loss"] == 0 and without_loss["norms"] == whole["norms"]
    assert events("grouping")["padded"] > whole["padded"]
    assert events("targets only")["fed"] > whole["fed"]


def test_a_start_is_the_whole_process_and_a_failed_one_is_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = startup.took(("--help",), tmp_path)
    assert min(found["cpu_seconds"], found["seconds"]) > 0
    with pytest.raises(SystemExit, match="prefixfleet nothing ended with 2"):
        startup.took(("nothing",), tmp_path)
    with pytest.raises(SystemExit):
        startup.main(["--home", str(tmp_path)])
    assert "has no registry; `make run` makes one" in capsys.readouterr().err


def test_readme_gets_the_table_and_the_picture_of_what_was_measured(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {("ours", 1): 40.0, ("ours", 100): 2.0, ("process", 1): 16.0, ("process", 100): 16.0}
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(cost, "write_customers", lambda *_: [])
    monkeypatch.setattr(cost, "empty_stores", lambda folder: folder.mkdir() or folder)
    monkeypatch.setattr(
        cost,
        "cost",
        lambda kind, count, _, home, __: home.rmdir() or {"seconds": seconds[kind, count], "cpu_seconds": 1.0, "measured": 1.0},
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- benchmarks/cost.py -->\nold\n<!-- end -->\nafter\n")
    cost.main(["--readme", "--base", str(base), "--customers", "1", "100", "--kinds", "ours", "process"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(
        "before\n<!-- benchmarks/cost.py -->\n| seconds per customer | 1 customer | 100 customers | times ours at 100 |\n"
    )
    assert text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert "| 16.0 s, CPU 1.0 s | 16.0 s, CPU 1.0 s | 8.0, CPU 1.0 |" in text
    picture = (tmp_path / "docs" / "cost.svg").read_text()
    assert "PrefixFleet, one run" in picture and ">2.0 s<" in picture and "prefers-color-scheme:dark" in picture
    assert not [colour for colour in cost._COLOURS if colour in picture]


def test_generation_gives_the_same_answers_on_both_sides(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    generation.main(
        ["--base", str(base), "--customers", "2", "--tokens", "3", "--rounds", "1", "--prefixes-held", "2", "--json", str(out)]
    )
    (row,) = rows_in(out)
    assert row["equal_answers"] == 2
    assert row["ratio_wall"] == pytest.approx(row["ours_tokens_per_second"] / row["peft_tokens_per_second"])


def test_memory_measures_ours_and_pefts_beside_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    memory.main(["--smoke", "--steps", "1", "--dtype", "float32", "--json", str(out)])
    rows = rows_in(out)
    assert [(row["shapes"], row["kind"]) for row in rows] == [
        *(("plan", kind) for kind in ("plain", "checkpointing")), *(("equal", kind) for kind in ("plain", "checkpointing", "peft")),
    ]  # fmt: skip
    assert rows[1]["planned_mib"] < rows[0]["planned_mib"] and "planned_mib" not in rows[4]


def test_sharding_on_one_process_keeps_the_whole_base_and_sends_nothing(base: Path, tmp_path: Path) -> None:
    """Processes that split a base and what they send are what tests/pipeline/training/test_plan.py shows."""
    sharding.main(["--base", str(base), "--dtype", "float32", "--steps", "1", "--worker", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    weights = sum(p.nbytes for p in training.load(str(base), "float32").parameters())
    assert (
        found["kept_mib"] == pytest.approx(weights / 2**20, rel=1e-5)
        and found["sent_mib_per_step"] == 0 < found["tokens_per_second"]
    )


def test_planning_is_timed_for_a_fleet_that_is_new_and_one_that_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    asked = []
    monkeypatch.setattr(
        fleet, "plan", lambda count: asked.append(count) or [{"customers": count, "state": "nobody done", "whole_s": 0.5}]
    )
    fleet.main(["--plan", "3", "--json", str(out)])
    (row,) = rows_in(out)
    assert asked == [3] and row["whole_s"] == 0.5 and row["versions"]["prefect"]


def test_registry_figures_are_medians_of_what_was_timed() -> None:
    assert common.spread([{"wall_ms": v} for v in (3.0, 1.0, 9.0)]) == {"wall_ms": 3.0, "wall_ms_range": [1.0, 9.0]}
    wall, cpu = registry.timed(sum, [1, 2])
    assert wall > 0 <= cpu


def test_alternatives_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    kinds = {name: lambda name=name: order.append(name) or {"seconds": 1.0} for name in "ab"}
    found = common.in_turn(kinds, 3)  # type: ignore[arg-type]
    assert "".join(order) == "ababab" and {name: len(runs) for name, runs in found.items()} == {"a": 3, "b": 3}


def test_a_page_without_a_place_for_the_figures_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("no place\n")
    with pytest.raises(SystemExit, match=r"README\.md: has no lines <!-- x -->"):
        common.write_between(page, "x", "text\n")
    assert page.read_text() == "no place\n"


def test_every_benchmark_says_how_it_is_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (ablation, cost, fleet, generation, memory, registry, sharding, startup, training):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script.__name__.rpartition('.')[2]}.py"])
        with pytest.raises(SystemExit) as stopped:
            script.main(["--help"])
        assert stopped.value.code == 0
        assert "--json" in capsys.readouterr().out
