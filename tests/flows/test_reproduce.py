"""`prefixfleet reproduce`: which trainings a name takes, what is kept after a kill, what is said where data is missing."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import cli, compare, launch
from flows.reproduce import Asked, rates_of, run_reproduction
from pipeline.config import load_fleet
from pipeline.errors import EvaluationError, TrainingError
from pipeline.files import read_json, write_json
from pipeline.home import Home
from pipeline.paper.claims import NAMES, reproduction
from pipeline.training.job import read_job
from pipeline.training.results import write_result

from ..pipeline.evaluation.conftest import FakeEngine
from .fake_stage import write_prefix


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as the small scale wants it, with E2E alone."""
    folder = tmp_path / "data"
    (folder / "e2e").mkdir(parents=True)
    for split, count in (("train", 500), ("dev", 50), ("test", 12)):
        rows = [{"input": f"name : {split} {i} | food : soup", "target": f"{split} {i} serves soup."} for i in range(count)]
        (folder / "e2e" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


class Children:
    """The children, in this process: what was trained, answered and compared, and an exception to raise at the nth of them."""

    def __init__(self) -> None:
        self.trained: list[list[Any]] = []
        self.rows: list[int] = []
        self.methods: list[tuple[str, tuple[float, ...], int, int]] = []
        self.kill_at: int | None = None
        self.calls = 0

    def count(self) -> None:
        self.calls += 1
        if self.kill_at == self.calls:
            raise KeyboardInterrupt

    def module(self, module: str, path: Path, *_: Any) -> None:
        self.count()
        if module == "pipeline.training":
            job = read_job(path)
            self.trained.append(job.customers)
            for customer in job.customers:
                write_prefix(job, customer)
                # The highest rate has the lowest dev loss.
                file = Path(customer.prefix_dir) / "prefix.json"
                config = read_json(file, 1)
                write_json(file, {**config, "training": {**config["training"], "best_dev_loss": 1 - customer.training.lr}})
                write_result(job, customer, "train", 0.0)
            return
        from pipeline.paper.__main__ import answer

        task = json.loads(path.read_text(encoding="utf-8"))
        job, engine = read_job(Path(task["job"])), FakeEngine()
        for customer in job.customers:
            good = customer.prefix.length == 10
            engine.answers[customer.prefix_dir] = lambda prompt, good=good: "test 3 serves soup." if good else "soup"
        answers = answer(job, Path(task["outputs"]), engine)
        write_json(path.parent / "answers.json", {"format": 1, "answers": answers})
        self.rows.append(sum(rows for rows, _, _ in engine.calls))

    def method(self, job: Path, task: Path, name: str) -> None:
        self.count()
        (customer,) = read_job(job).customers
        asked = read_json(task, 1)
        self.methods.append((name, tuple(asked["rates"]), customer.training.seed, customer.training.max_steps))
        seconds, memory = (9.0, 900 << 20) if name == "full" else (3.0, 300 << 20)
        result = {"lr": max(asked["rates"], default=None), "outputs": ["test 3 serves soup."] * 12, "trained": 7, "tries": []}
        cost = {"cpu_seconds": seconds + customer.training.seed / 10, "peak_memory_bytes": memory}
        write_json(task.parent / f"{name}.json", {"format": 1, "method": name, **result, **cost})


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    made = Children()
    monkeypatch.setattr(launch, "run_module", made.module)
    monkeypatch.setattr(compare, "run_method", made.method)
    yield made


def reproduce(name: str, data: Path, out: Path, **more: Any) -> tuple[dict[str, Any], Path]:
    return run_reproduction(name, Asked("small", data, out, **more), logging.getLogger("test"), lambda text: None)


def test_lengths_are_slots_of_one_job_with_three_rates_on_the_first_seed_and_the_best_on_the_others(
    home: Home, data: Path, tmp_path: Path, children: Children
) -> None:
    content, folder = reproduce("length", data, tmp_path / "out", steps=7)
    tried, alone, repeated = children.trained  # the rates, one of them by itself for its seconds, the other seeds
    assert len(tried) == 15 and len(alone) == 1 and len(repeated) == 10
    assert {(c.prefix.length, round(c.training.lr, 4), c.training.seed) for c in tried} == {
        (length, lr, 0) for length in (1, 5, 10, 20, 40) for lr in (0.1, 0.0333, 0.3)
    }
    assert {(c.prefix.length, round(c.training.lr, 4), c.training.seed) for c in repeated} == {
        (length, 0.3, seed) for length in (1, 5, 10, 20, 40) for seed in (1, 2)
    }
    assert {c.training.max_steps for c in tried} == {7} and alone[0].prefix_dir != tried[7].prefix_dir
    assert children.rows == [(15 + 1) * 12]  # three seeds of five lengths, and the base
    assert content["slots"]["cells"] == 15 and content["claims"][0]["best"] == 10
    assert (folder / "length.html").is_file() and read_json(folder / "length.json", 1) == content
    # Nothing twice; and a name that shares runs takes them.
    assert reproduce("length", data, tmp_path / "out", steps=7)[0] == content and len(children.trained) == 3
    reproduce("embedding-only", data, tmp_path / "out", steps=7)
    assert not any((c.prefix.length, c.prefix.reparam, c.prefix.placement) == (10, "none", "prefix") for c in children.trained[3])


def test_a_killed_run_goes_on_and_keeps_what_is_finished(home: Home, data: Path, tmp_path: Path, children: Children) -> None:
    children.kill_at = 3
    with pytest.raises(KeyboardInterrupt):
        reproduce("cost", data, tmp_path / "out")
    assert [name for name, *_ in children.methods] == ["full", "full"]
    content, _ = reproduce("cost", data, tmp_path / "out")
    assert [(name, len(rates), seed) for name, rates, seed, _ in children.methods] == [
        ("full", 3, 0), ("full", 1, 1), ("full", 1, 2), ("prefix", 3, 0), ("prefix", 1, 1), ("prefix", 1, 2), ("base", 0, 0),
    ]  # fmt: skip
    assert [claim["verdict"] for claim in content["claims"]] == ["shows", "shows"]
    assert content["claims"][0]["found"]["score"] == 6.0 and content["claims"][1]["found"]["score"] == 600.0


def test_rows_are_drawn_for_every_seed_and_killed_slots_have_no_seconds_to_tell(
    home: Home, data: Path, tmp_path: Path, children: Children
) -> None:
    children.kill_at = 1
    with pytest.raises(KeyboardInterrupt):
        reproduce("initialization", data, tmp_path / "out")
    content, _ = reproduce("initialization", data, tmp_path / "out")
    assert content["slots"] is None and len(children.trained) == 2
    assert {c.customer for c in children.trained[0]} == {"e2e-50-r0", "e2e"}
    assert {c.customer for c in children.trained[1]} == {"e2e-50-r1", "e2e-50-r2", "e2e"}
    written = [(tmp_path / "out" / "small" / "work" / "data" / f"e2e-50-r{seed}" / "train.jsonl").read_text() for seed in (0, 1)]
    assert written[0] != written[1] and all(len(text.splitlines()) == 50 for text in written)


def test_data_sets_of_one_recipe_have_prefixes_of_their_own(home: Home, data: Path, tmp_path: Path, children: Children) -> None:
    """The settings are the same for each number of rows, and so are the names of their tasks."""
    content, _ = reproduce("low-data", data, tmp_path / "out")
    sizes = (50, 100, 200, 500)
    tried, *_, repeated = children.trained
    assert {c.customer for c in tried} == {f"e2e-{size}-r0" for size in sizes} and len(tried) == 3 * len(sizes)
    assert {c.customer for c in repeated} == {f"e2e-{size}-r{seed}" for size in sizes for seed in (1, 2)}
    assert not content["failed"] and not any(claim["verdict"] == "not run" for claim in content["claims"])


def test_missing_data_or_base_skips_a_name_with_a_message_and_the_next_one_is_run(
    home: Home, data: Path, tmp_path: Path, children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["reproduce", "summarization", "cost", "--data", str(data), "--out", str(tmp_path / "out"), "--seeds", "0"])
    printed = capsys.readouterr()
    assert status == 1 and "fine-tuning takes more time" in printed.out and "too few seeds: 1" in printed.out
    assert "warning: 1 seed(s) give figures and no verdict; give 3 or more" in printed.err
    assert (
        "summarization: skipped:" in printed.err
        and "dialogsum/train.jsonl: no such file" in printed.err
        and "--data" in printed.err
    )
    assert cli.main(["reproduce", "cost", "--data", str(data), "--base", str(tmp_path / "none")]) == 1
    assert "--base small-e2e=BASE takes another folder or hub id" in capsys.readouterr().err
    assert cli.main(["reproduce", "length", "--scale", "paper", "--data", str(tmp_path)]) == 1
    assert "has no train split of dart" in capsys.readouterr().err
    assert cli.main(["reproduce", "lengths"]) == cli.main(["reproduce"]) == 2
    printed = capsys.readouterr()
    assert "Did you mean 'length'?" in printed.err and "reproduce takes one of" in printed.err
    assert cli.main(["reproduce", "--list"]) == 0 and len(capsys.readouterr().out.splitlines()) == 8


def test_a_method_that_crashes_is_a_failure_of_its_own_and_is_tried_again(
    home: Home,
    data: Path,
    tmp_path: Path,
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def crashing(job: Path, task: Path, name: str) -> None:
        (customer,) = read_job(job).customers
        if name == "full" and customer.training.seed == 1:
            raise EvaluationError("full: its process ended with status 1.")
        children.method(job, task, name)

    monkeypatch.setattr(compare, "run_method", crashing)
    content, folder = reproduce("cost", data, tmp_path / "out")
    assert content["failed"] == ["e2e/fine-tuning, seed 1: full: its process ended with status 1."]
    assert [claim["verdict"] for claim in content["claims"]] == ["too few seeds: 2"] * 2
    arms = {arm["name"]: arm["seeds"] for arm in content["arms"]}
    assert arms == {"fine-tuning": [0, 2], "prefix": [0, 1, 2]}
    assert "Failed: e2e/fine-tuning, seed 1" in (folder / "cost.md").read_text(encoding="utf-8")
    monkeypatch.setattr(compare, "run_method", children.method)
    content, _ = reproduce("cost", data, tmp_path / "out")
    assert content["failed"] == [] and [claim["verdict"] for claim in content["claims"]] == ["shows", "shows"]

    def never(*_: Any) -> None:
        raise EvaluationError("its process ended with status 1.")

    monkeypatch.setattr(compare, "run_method", never)
    status = cli.main(["reproduce", "cost", "--data", str(data), "--out", str(tmp_path / "other"), "--seeds", "0"])
    assert status == 1 and "cost: failed: cost: no arm has a single run" in capsys.readouterr().err


def test_seconds_of_one_setting_alone_are_measured_anew_if_their_run_was_killed(
    home: Home, data: Path, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0

    def module(name: str, path: Path, *rest: Any) -> None:
        nonlocal clock
        children.module(name, path, *rest)  # whatever it writes is kept
        clock += 100.0
        if children.kill_at is None and len(children.trained) == 2:
            children.kill_at = -1
            raise KeyboardInterrupt  # after the training, before anybody has noted its seconds

    monkeypatch.setattr(launch, "run_module", module)
    monkeypatch.setattr("flows.reproduce._cpu_seconds", lambda: clock)
    with pytest.raises(KeyboardInterrupt):
        reproduce("initialization", data, tmp_path / "out", seeds=(0,))
    content, _ = reproduce("initialization", data, tmp_path / "out", seeds=(0,))
    assert (content["slots"]["cpu_seconds"], content["slots"]["alone_cpu_seconds"]) == (100.0, 100.0)


def test_a_busy_folder_is_an_error_and_nothing_is_written_there(home: Home, data: Path, tmp_path: Path) -> None:
    work = Home(tmp_path / "out" / "small" / "work")
    code = "import sys; from pathlib import Path; from flows import locks; from pipeline.home import Home; from pipeline.keys import CustomerKey\n"
    code += (
        f"with locks.holding(Home(Path({str(work.root)!r})), [CustomerKey('e2e')]): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another run is at work there"):
            reproduce("cost", data, tmp_path / "out")
        assert not (work.root / "data").exists()
        other.communicate("")


def test_a_base_is_given_for_a_recipe_or_for_all_and_the_page_says_so(
    home: Home, data: Path, tmp_path: Path, children: Children, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(root / "examples" / "base")
    content, _ = reproduce("cost", data, tmp_path / "out", bases={"": base}, seeds=(0,))
    assert content["notes"][0] == f"small-e2e: the base is {base}, given with --base, and not the recipe's."
    one = reproduce("initialization", data, tmp_path / "out", bases={"small-e2e": base}, seeds=(0,))[0]
    assert "18.9 million" in one["notes"][0] and one["notes"][1].startswith("small-e2e: the base is")
    for wrong, said in (
        (["xsum=b"], "no recipe 'xsum' is used here, but small-e2e"),
        (["a", "b"], "another base was given for all recipes"),
    ):
        options = [option for base in wrong for option in ("--base", base)]
        assert cli.main(["reproduce", "cost", *options]) == 2 and said in capsys.readouterr().err


def test_rates_at_paper_scale_have_one_ratio_and_are_not_those_of_small_bases(root: Path) -> None:
    middle = {"full": 5e-5, "top2": 5e-5, "adapter": 5e-5, "lora": 2e-4}
    seen = set()
    for name in NAMES:
        plan = reproduction(name, "paper")
        for arm in plan.arms:
            (recipe,) = {one.recipe for one in plan.data if one.name == arm.data}
            (customer,) = load_fleet(root / "examples" / "recipes" / f"{recipe}.yaml").customers
            rates = rates_of(arm, customer, "paper")
            assert rates == pytest.approx((rates[0], rates[0] / 3, rates[0] * 3)), arm.key
            kind = "embedding" if arm.name.startswith("EMB-") else arm.method
            small = rates_of(arm, customer, "small")
            assert kind == "prefix" or (len(small) == len(rates) and max(rates) < small[0])
            assert rates[0] == (customer.training.lr if kind == "prefix" else middle.get(kind, 3e-3))
            seen.add(kind)
    assert seen == {*middle, "prefix", "embedding"}


def test_on_a_gpu_time_is_hours_of_an_epoch_and_memory_a_share_beside_the_papers(
    home: Home, data: Path, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_gpu(job: Path, task: Path, name: str) -> None:
        children.method(job, task, name)
        file = task.parent / f"{name}.json"
        result = read_json(file, 1)
        seconds = {"gpu_seconds": 10.0 * result.pop("cpu_seconds"), "gpu_memory_bytes": 1000 << 20, "steps": 60, "kept": 5}
        write_json(file, {**result, **seconds})

    monkeypatch.setattr(compare, "run_method", on_gpu)
    content, folder = reproduce("cost", data, tmp_path / "out")
    # 90 seconds for 60 steps, and 100 steps of 5 rows are an epoch of 500 rows.
    full = next(arm for arm in content["arms"] if arm["name"] == "fine-tuning")
    assert full["costs"]["hours_per_epoch"]["runs"][0] == pytest.approx(90 / 60 * 100 / 3600, abs=1e-6)
    assert full["costs"]["memory_percent"]["score"] == pytest.approx(90) and full["trained"] == 5
    assert {claim["figure"]: claim["verdict"] for claim in content["claims"]} == {
        "hours_per_epoch": "shows",
        "memory_percent": "shows",
    }
    page = (folder / "cost.md").read_text(encoding="utf-8").replace("\\", "")
    assert (
        "fine-tuning: hours of an epoch (the paper's: 0.3)" in page
        and "prefix: peak memory, % of the GPU's (the paper's: 18)" in page
    )
