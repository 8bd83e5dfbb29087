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

GATE = JobGate("bleu", 0.0, None, 0.0, None, None)
BASE = JobBase(id="org/base", path="base", revision=None, digest="b" * 64, dtype="float32", quantization=None, attention="auto")


class FakeEngine:
    """Answers from what the tests say: `answers[prefix folder name or None](prompt)`."""

    def __init__(self) -> None:
        self.answers: dict[str | None, Callable[[list[int]], str]] = {None: lambda prompt: "the base says little"}
        self.slots: list[str | None] = [None]
        self.calls: list[tuple[int, int, int]] = []  # rows, max_new_tokens, num_beams
        self.loads = 0
        self.tokenizer = FakeTokenizer()
        self.limit: int | None = None  # positions of the base
        self.asked: list[tuple[list[int], int]] = []  # prompt and slot of every row

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
        finished: Callable[[list[int], list[str]], None] | None = None,
    ) -> list[str]:
        self.calls.append((len(prompts), max_new_tokens, num_beams))
        texts = []
        for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
            self.asked.append((prompt, slot))
            texts.append(self.answers[self.slots[slot]](prompt))
            if finished is not None:
                finished([i], texts[-1:])
        return texts

    def losses(self, prompts: Sequence[list[int]], targets: Sequence[list[int]], slots: Sequence[int]) -> list[float]:
        """A nat a token without prefix, half with one."""
        return [len(target) / (2 if slot else 1) for target, slot in zip(targets, slots, strict=True)]

    def longest_prompt(self, max_new_tokens: int) -> int | None:
        return None if self.limit is None else self.limit - max_new_tokens

    def longest_answer(self, slot: int, prompt: int) -> int | None:
        return None if self.limit is None else max(0, self.limit - prompt)


class FakeTokenizer:
    """A token for each word, numbered by its length; 900 begins, 901 ends."""

    bos_token_id, eos_token_id, unk_token_id = 900, 901, 902
    chat_template = None

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [len(word) for word in texts.split()]}
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """`make_job("acme", "bistro")` writes prepared data (12 test records) and a prefix folder for each and returns the job."""

    def make(*names: str, records: list[Record] | None = None, run_id: str | None = None, max_new_tokens: int = 32) -> Job:
        customers = [_customer(tmp_path, n, records, run_id, max_new_tokens) for n in names]
        return Job(3, "test", str(tmp_path / "job"), "x", BASE, JobMixing(32, 4096, False, 60.0), customers)

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
        write_split(
            folder, "train", [Record([100 + i], [i, 901], f"name: spot {i}", [f"Spot {i} is by the sea."]) for i in range(6)]
        )
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
        champion_dir=None,
        evaluation=JobEvaluation(
            "default", ["bleu", "rougeL", "chrf"], GATE, 1, max_new_tokens, 200, ["input_length"], False, None, 3
        ),
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
        "weights_sha256": customer.train_digest,
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
