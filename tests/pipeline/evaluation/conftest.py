"""A job with customers whose files are on disk, and an engine that answers without a model."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.records import Record, write_split
from pipeline.files import whole_folder, write_json
from pipeline.keys import CustomerKey
from pipeline.training.job import Job, JobBase, JobCustomer, JobEvaluation, JobGate, JobMixing, JobPrefix, JobPrompt, JobTraining

BASE = JobBase(id="org/base", path="base", revision=None, digest="b" * 64, dtype="float32", quantization=None, attention="auto")


class FakeEngine:
    """Answers from what the tests say: `answers[prefix folder name or None](prompt)`."""

    def __init__(self) -> None:
        self.answers: dict[str | None, Callable[[list[int]], str]] = {None: lambda prompt: "the base says little"}
        self.slots: list[str | None] = [None]
        self.calls: list[tuple[int, int, int]] = []  # rows, max_new_tokens, num_beams
        self.loads = 0

    def load(self, base: JobBase) -> "FakeEngine":
        self.loads += 1
        return self

    def add(self, prefix_dir: Path) -> int:
        self.slots.append(str(prefix_dir))
        return len(self.slots) - 1

    def generate(
        self,
        prompts: Sequence[list[int]],
        slots: Sequence[int],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        self.calls.append((len(prompts), max_new_tokens, num_beams))
        texts = []
        for prompt, slot in zip(prompts, slots, strict=True):
            texts.append(self.answers[self.slots[slot]](prompt))
            if progress is not None:
                progress(1)
        return texts


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """`make_job("acme", "bistro")` writes prepared data (12 test records) and a prefix folder for each and returns the job."""

    def make(*names: str, records: list[Record] | None = None, run_id: str | None = None, max_new_tokens: int = 32) -> Job:
        customers = [_customer(tmp_path, n, records, run_id, max_new_tokens) for n in names]
        return Job(2, "test", str(tmp_path / "job"), "x", BASE, JobMixing(32, 4096, False, 60.0), customers)

    return make


def _customer(home: Path, name: str, records: list[Record] | None, run_id: str | None, max_new_tokens: int) -> JobCustomer:
    key = CustomerKey.parse(name)
    if records is None:
        records = [
            Record([i, len(name)], [i], f"name: place {i}", [f"Place number {i} is a quiet house by the river."], {"size": i})
            for i in range(12)
        ]
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    counts = {"read": 110, "used": 100, "train": 80, "dev": 8, "test": len(records), "quarantined": 10, "reasons": {"empty": 10}}
    prepared = key.below(home / "prepared")
    with whole_folder(prepared) as folder:
        write_split(folder, "test", records)
        write_json(
            folder / "card.json",
            {"format": 1, "fingerprint": fingerprint, "tokenizer_digest": "t" * 64, "counts": counts},
        )
    customer = JobCustomer(
        customer=key.customer,
        task=key.task,
        prepared=str(prepared),
        data_fingerprint=fingerprint,
        train_digest=fingerprint[::-1],
        config_digest="c" * 64,
        evaluate_digest=fingerprint,
        prefix_dir=str(key.below(home / "prefixes") / fingerprint[:16]),
        evaluation_dir=str(key.below(home / "evaluations") / fingerprint[:16]),
        prompt=JobPrompt("{input}\n", True, "none", 384, 128),
        prefix=JobPrefix(10, "all", "all", "prefix", "none", 512, "text", None, None),
        training=JobTraining(400, 10, 1, 5e-3, "linear", 0, 0.0, 1.0, 50, 3, 0),
        evaluation=JobEvaluation(["bleu", "rougeL", "chrf"], JobGate("bleu", 0.0, None), 1, max_new_tokens, 200),
    )
    with whole_folder(Path(customer.prefix_dir)) as folder:
        write_json(folder / "prefix.json", prefix_config(customer, counts, run_id))
    return customer


def prefix_config(customer: JobCustomer, counts: dict[str, Any], run_id: str | None) -> dict[str, Any]:
    """The content of a prefix.json."""
    return {
        "format": 1,
        "customer": customer.customer,
        "task": customer.task,
        "digest": customer.train_digest,
        "weights_sha256": "w" * 64,
        "prefix": {"length": 10, "layers": "all", "init": "text", "sites": {}, "parameters": 25_600},
        "prompt": {
            "template": "{input}\n",
            "eos": True,
            "truncation_side": "none",
            "max_input_tokens": 384,
            "max_target_tokens": 128,
        },
        "chat": False,
        "base": {"id": "org/base", "path": "base", "revision": None, "digest": "b" * 64, "tokenizer_digest": "t" * 64},
        "training": {
            "max_steps": 400,
            "lr": 5e-3,
            "steps": 250,
            "best_step": 200,
            "best_dev_loss": 1.25,
            "train_loss": 1.1,
            "seconds": 12.5,
            "history": [{"step": 0, "dev_loss": 3.0}]
            + [{"step": s, "loss": 3.0 / (1 + s / 60) + 0.4} for s in range(1, 251)]
            + [{"step": s, "dev_loss": 3.0 / (1 + s / 60) + 0.5} for s in range(50, 251, 50)],
            "peak_memory_bytes": 700 << 20,
        },
        "lineage": {
            "data_fingerprint": customer.data_fingerprint,
            "config_digest": "c" * 64,
            "seed": 0,
            "code_version": "0.1.0",
            "parent": None,
            "counts": counts,
        },
        "run_id": run_id,
    }
