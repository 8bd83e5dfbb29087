"""Peak memory and tokens a second of mixed training on this device, beside what `pipeline.training.plan` computes for it.

`python benchmarks/plan_memory.py` takes a GPU if there is one, with a random Llama of 1.1 billion parameters in bfloat16; else the processor, with
one of 40 million in float32. One line of JSON a shape. One process with the whole base: split ones are compared
by tests/pipeline/training/test_engines_slow.py. Weights are random: memory and time do not depend on them.
"""

import argparse
import ctypes
import gc
import json
import threading
import time
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.data import Record
from pipeline.prefix.base import attach
from pipeline.prefix.direct import Direct
from pipeline.prefix.initialise import from_random
from pipeline.training.job import Job, JobBase, JobCustomer, JobMixing, JobPrefix, JobPrompt, JobTraining
from pipeline.training.mixed import Mixed
from pipeline.training.plan import plan
from pipeline.training.resident import Resident

LARGE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# Input tokens, target tokens, tokens of a micro-batch, columns of a prefix, customers.
SHAPES = [(384, 128, 4096, 10, 8), (96, 32, 4096, 50, 32), (1920, 128, 8192, 20, 4), (384, 128, 16384, 10, 32)]
SMALL_SHAPES = [(96, 32, 1024, 10, 2), (24, 8, 1024, 50, 8), (224, 32, 512, 20, 1)]
ROWS = 8  # of each customer in a step


def job_of(shape: tuple[int, int, int, int, int], dtype: str, checkpointing: bool, rows: int = ROWS) -> Job:
    """The job that the planner is asked about."""
    inputs, targets, budget, columns, customers = shape
    prefix = JobPrefix(columns, "all", "all", "prefix", "none", 512, "random", None, None)
    training = JobTraining(8, rows, 1, 0.01, "constant", 0, 0.0, 1.0, 100, None, 0)
    each: list[Any] = [
        JobCustomer(
            customer=f"c{i}", task="default", prepared="", data_fingerprint="", train_digest="", config_digest="", evaluate_digest="",
            prefix_dir="", evaluation_dir="", champion_dir=None, prompt=JobPrompt("{input}", True, "none", inputs, targets), prefix=prefix,
            training=training, evaluation=None,  # type: ignore[arg-type]  # nobody evaluates here
        )
        for i in range(customers)
    ]  # fmt: skip
    base = JobBase("random", "random", None, "", dtype, None, "auto")
    return Job(3, "plan", ".", "plan", base, JobMixing(customers, budget, checkpointing, 1e9), each)


def rows_of(inputs: int, targets: int, vocabulary: int, count: int, seed: int) -> list[Record]:
    """Rows as long as the prompt allows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (count, inputs + targets), generator=generator).tolist()
    return [Record(row[:inputs], row[inputs:], "", [""]) for row in ids]


class Peak:
    """The most memory that was taken since it was entered."""

    def __init__(self, device: torch.device, before: int) -> None:
        self.device, self.before, self.bytes = device, before, 0

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous() - self.before)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self._done.set()
            self._thread.join()


def anonymous() -> int:
    """Memory of this process that no file stands for."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def measure(
    config: LlamaConfig, shape: tuple[int, int, int, int, int], device: torch.device, dtype: str, checkpointing: bool, steps: int
) -> dict[str, Any]:
    """One shape, measured and planned."""
    inputs, targets, budget, columns, customers = shape
    gc.collect()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else anonymous()
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    base = attach(model)
    if checkpointing:
        base.checkpoint_gradients()
    job = job_of(shape, dtype, checkpointing)
    mixed = Mixed(base, customers, columns, 0, budget, Accelerator(cpu=device.type == "cpu"))
    for slot in range(customers):
        rows = rows_of(inputs, targets, config.vocab_size, ROWS, slot)
        method = Direct(from_random(base.sites, columns, slot), base.device)
        mixed.residents[slot] = Resident(method, False, rows, rows[:1], job.customers[slot].training)
    mixed.step()  # kernels are chosen, AdamW's moments made
    gc.collect()
    with Peak(device, before) as peak:
        started = time.monotonic()
        reports = [mixed.step() for _ in range(steps)]
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    planned = plan(job, 1, 2**60, gpu=False, config=config)
    need = next(n for n in planned.needs if n.checkpointing == checkpointing)
    return {
        "shape": shape, "dtype": dtype, "checkpointing": checkpointing, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()), "measured_mib": round(peak.bytes / 2**20, 1),
        "planned_mib": round(need.total / 2**20, 1), "planned_over_measured": round(need.total / peak.bytes, 3),
        "activations_mib": round(need.activations / 2**20, 1),
        "tokens_per_second": round(sum(r.tokens for r in reports) / seconds),
    }  # fmt: skip


def main() -> None:
    """All shapes, with and without checkpointing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="the processor, though there is a GPU")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.cpu
    device, dtype = torch.device("cuda" if gpu else "cpu"), "bfloat16" if gpu else "float32"
    if not gpu:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is gone, so that the peak is what was needed
    config = LlamaConfig(**(LARGE if gpu else SMALL), max_position_embeddings=4096)
    for shape in SHAPES if gpu else SMALL_SHAPES:
        for checkpointing in (False, True):
            print(json.dumps(measure(config, shape, device, dtype, checkpointing, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
