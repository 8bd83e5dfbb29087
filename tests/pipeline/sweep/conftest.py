"""A customer with dev and test rows, variants of it with prefix folders, and an engine that answers as the test says."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.records import Record, write_split
from pipeline.evaluation.run import Engine
from pipeline.files import read_json, write_json
from pipeline.training.job import Job, JobCustomer

from ..evaluation.conftest import FakeEngine, engine, make_job

__all__ = ["engine", "make_job"]

DEV = [Record([i], [1], f"dev {i}", [f"number {i} is a quiet house by the river"]) for i in range(10)]
TEST = [Record([100 + i], [1], f"test {i}", [f"number {100 + i} is a quiet house by the river"]) for i in range(10)]


class Swept:
    """A sweep that is about to be judged: `add(length, seed, …)` makes variants, `score()` judges them."""

    def __init__(self, job: Job, folder: Path, engine: FakeEngine) -> None:
        self.job, self.folder, self.engine = job, folder, engine
        (self.customer,) = job.customers
        self.members: list[JobCustomer] = []
        self.variants: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        prepared = Path(self.customer.prepared)
        write_split(prepared, "dev", DEV)
        write_split(prepared, "test", TEST)
        card = prepared / "card.json"
        write_json(card, {**read_json(card, 1), "train_fingerprint": "a" * 64})

    def add(
        self,
        length: int,
        answer: Callable[[int], str],
        *,
        lr: float = 0.1,
        seed: int = 0,
        current: bool = False,
        dev_loss: float = 1.0,
    ) -> str:
        """One more trained variant, which answers a prompt with `answer` of its number."""
        name = f"p{length}-lr{str(lr).replace('.', '_')}-r{seed}"
        folder = self.folder / "prefixes" / name
        source = read_json(Path(self.customer.prefix_dir) / "prefix.json", 1)
        config = {**source, "weights_sha256": name, "training": {**source["training"], "best_dev_loss": dev_loss}}
        write_json(folder / "prefix.json", config)
        (folder / "prefix.safetensors").write_bytes(b"0" * 1024 * length)
        self.members.append(dataclasses.replace(self.customer, task=name, prefix_dir=str(folder)))
        settings = {"length": length, "lr": lr, "batch_size": 10, "steps": 400, "init": "text", "seed": seed}
        self.variants.append({"name": name, "settings": settings, "current": current})
        self.engine.answers[str(folder)] = lambda prompt: answer(prompt[0])
        return name

    def fail(self, length: int, why: str) -> None:
        """One more variant, which could not be trained."""
        self.add(length, str)
        self.members.pop()
        self.failed[self.variants[-1]["name"]] = why

    def task(self, metric: str = "bleu") -> dict[str, Any]:
        axes = {axis: list(dict.fromkeys(v["settings"][axis] for v in self.variants)) for axis in self.variants[0]["settings"]}
        return {
            "customer": "acme", "task": "default", "axes": axes, "variants": self.variants, "failed": self.failed, "metric": metric,
            "digest": "d" * 64, "outputs": str(self.folder / "outputs.jsonl"), "evaluations": str(self.folder / "evaluations"),
        }  # fmt: skip

    def score(self, metric: str = "bleu") -> dict[str, Any]:
        """What sweep.json would hold, read back from it."""
        from pipeline.sweep.report import write_sweep
        from pipeline.sweep.score import score_sweep

        def load(_: Any) -> Engine:
            return self.engine

        job = dataclasses.replace(self.job, customers=self.members)
        write_sweep(score_sweep(job, self.task(metric), load), self.folder / "report")
        found: dict[str, Any] = json.loads((self.folder / "report" / "sweep.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture
def swept(make_job: Callable[..., Job], engine: FakeEngine, tmp_path: Path) -> Swept:
    return Swept(make_job("acme", records=[]), tmp_path / "sweep", engine)
