"""Peak memory of training prefixes against batch, length and checkpointing: ours, PEFT's, and what `pipeline.training.plan` computes.

    python benchmarks/memory.py                      # a GPU if there is one, else the processor
    python benchmarks/memory.py --shapes equal       # only what PEFT is compared on

Random Llamas, for memory does not depend on weights: of 1.1 billion parameters in bfloat16 on a GPU; on the processor of 38 million (`plan`) and of
the 12.6 million of ../shared/base (`equal`). One process with the whole base: split ones are compared by
tests/pipeline/training/test_engines_slow.py.

- `plan`: many customers in a batch, beside the planner's figure.
- `equal`: one customer, and PEFT with the same rows in one batch (`benchmarks/peers.py`, the lean loop). PEFT refuses prefix tuning with gradient
  checkpointing (peft 0.21: "Prefix tuning does not work with gradient checkpointing"), so ours with it is set against PEFT without.

`above_base` is the peak of some steps less what the process held with the base loaded. On the processor it is anonymous memory, looked at every two
milliseconds, with freed memory given back at once, so that it is what was needed.
"""

import copy
import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, peers
from pipeline.data import Record
from pipeline.prefix.base import attach
from pipeline.prefix.direct import Direct
from pipeline.prefix.initialise import from_random
from pipeline.training.job import Job, JobBase, JobCustomer, JobMixing, JobPrefix, JobPrompt, JobTraining
from pipeline.training.mixed import Mixed
from pipeline.training.plan import plan
from pipeline.training.resident import Resident

LARGE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# Of ../shared/base.
BASE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


class Shape(NamedTuple):
    """Tokens of a row's input and target, tokens of a micro-batch at the most, columns of a prefix, customers, and rows of each in a step."""

    inputs: int
    targets: int
    budget: int
    columns: int
    customers: int
    rows: int = 8


PLAN = {
    "large": [
        Shape(384, 128, 4096, 10, 8),
        Shape(96, 32, 4096, 50, 32),
        Shape(1920, 128, 8192, 20, 4),
        Shape(384, 128, 16384, 10, 32),
    ],
    "small": [Shape(96, 32, 1024, 10, 2), Shape(24, 8, 1024, 50, 8), Shape(224, 32, 512, 20, 1)],
}
# A budget for all rows of a step at once, as PEFT takes them, and with it the default.
EQUAL = {
    "large": [
        Shape(3 * length // 4, length // 4, 2**30, 10, 1, rows) for length, rows in ((512, 1), (512, 8), (512, 32), (2048, 8))
    ],
    "small": [
        Shape(3 * length // 4, length // 4, 2**30, 10, 1, rows)
        for length, rows in ((128, 1), (128, 8), (128, 32), (512, 8), (512, 32))
    ],
}


def job_of(shape: Shape, dtype: str, checkpointing: bool) -> Job:
    """The job that the planner is asked about."""
    inputs, targets, budget, columns, customers, rows = shape
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


def measured(device: torch.device, before: int, run: Callable[[], int]) -> dict[str, float]:
    """Peak memory and tokens a second of `run`, which returns its tokens."""
    gc.collect()
    with Peak(device, before) as peak:
        started = time.monotonic()
        tokens = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    return {"peak_mib": peak.bytes / 2**20, "tokens_per_second": tokens / seconds}


def held(device: torch.device) -> int:
    """Memory in use."""
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else anonymous()


def base_mib(model: LlamaForCausalLM) -> float:
    """Of its weights."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad) / 2**20


def ours(config: LlamaConfig, shape: Shape, device: torch.device, dtype: str, checkpointing: bool, steps: int) -> dict[str, Any]:
    """One shape, measured and planned."""
    before = held(device)
    with torch.device(device):
        model = LlamaForCausalLM(copy.deepcopy(config)).to(getattr(torch, dtype))
    base = attach(model)
    if checkpointing:
        base.checkpoint_gradients()
    job = job_of(shape, dtype, checkpointing)
    mixed = Mixed(base, shape.customers, shape.columns, 0, shape.budget, Accelerator(cpu=device.type == "cpu"))
    for slot in range(shape.customers):
        rows = rows_of(shape.inputs, shape.targets, config.vocab_size, shape.rows, slot)
        method = Direct(from_random(base.sites, shape.columns, slot), base.device)
        mixed.residents[slot] = Resident(method, False, rows, rows[:1], job.customers[slot].training)
    mixed.step()  # kernels are chosen, AdamW's moments made
    found = measured(device, before, lambda: sum(mixed.step().tokens for _ in range(steps)))
    needs = plan(job, 1, 2**60, gpu=False, config=copy.deepcopy(config)).needs  # which it writes its own attention into
    planned = next(need.total for need in needs if need.checkpointing == checkpointing) / 2**20
    return {
        **found,
        "base_mib": base_mib(model),
        "planned_mib": planned,
        "planned_over_measured": planned / max(found["peak_mib"], 2**-10),
    }


def theirs(config: LlamaConfig, shape: Shape, device: torch.device, dtype: str, steps: int) -> dict[str, Any]:
    """PEFT, all rows of a step in one batch."""
    before = held(device)
    with torch.device(device):
        model = LlamaForCausalLM(copy.deepcopy(config)).to(getattr(torch, dtype))
    rows = [
        peers.Row(row.prompt_ids, row.target_ids)
        for row in rows_of(shape.inputs, shape.targets, config.vocab_size, shape.rows, 0)
    ]
    peers.lean(model, rows, 1, shape.rows, 0)
    found = measured(device, before, lambda: peers.lean(model, rows, steps, shape.rows, 0)[1])
    return {**found, "base_mib": base_mib(model)}


def main(argv: Sequence[str] | None = None) -> None:
    """All shapes, with and without checkpointing."""
    parser = common.parser(__doc__, rounds=None)
    parser.add_argument("--shapes", nargs="+", choices=["plan", "equal"], default=["plan", "equal"])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, both on the processor"
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="the processor, though there is a GPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny base and tiny shapes, to see it work")
    arguments = parser.parse_args(argv)
    gpu = torch.cuda.is_available() and not arguments.cpu and not arguments.smoke
    device, dtypes = torch.device("cuda" if gpu else "cpu"), arguments.dtype or (["bfloat16"] if gpu else ["bfloat16", "float32"])
    if not gpu:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is gone
    which = "large" if gpu else "small"
    small = {**SMALL, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    tiny = LlamaConfig(**small, max_position_embeddings=4096)
    sizes = {"plan": LARGE, "equal": LARGE} if gpu else {"plan": SMALL, "equal": BASE}
    configs = {
        name: tiny if arguments.smoke else LlamaConfig(**size, max_position_embeddings=4096) for name, size in sizes.items()
    }
    bench = common.Bench("memory", arguments, device=device.type, steps=arguments.steps)
    gc.freeze()  # so that collecting does not look through all libraries each time
    todo: list[tuple[str, str, Shape, str]] = []
    for shapes in arguments.shapes:
        for shape in (PLAN if shapes == "plan" else EQUAL)[which][: 1 if arguments.smoke else None]:
            kinds = ("plain", "checkpointing", *(("peft",) if shapes == "equal" else ()))
            todo += [(dtype, shapes, shape, kind) for dtype in dtypes for kind in kinds]
    peaks: dict[tuple[str, Shape, str], float] = {}

    def run(dtype: str, shapes: str, shape: Shape, kind: str) -> dict[str, Any]:
        if kind == "peft":
            return theirs(configs[shapes], shape, device, dtype, arguments.steps)
        return ours(configs[shapes], shape, device, dtype, kind == "checkpointing", arguments.steps)

    for dtype, shapes, shape, kind in common.bar(todo, "memory"):
        # What libraries take at their first use, of a shape too, is nobody's.
        run(dtype, shapes, shape, kind)
        found = run(dtype, shapes, shape, kind)
        row = {
            "dtype": dtype,
            "shapes": shapes,
            "kind": kind,
            **shape._asdict(),
            **found,
            "above_base_mib": found["peak_mib"] - found["base_mib"],
        }
        peaks[dtype, shape, kind] = row["above_base_mib"]
        if kind == "peft":
            row["plain_over_peft"] = peaks[dtype, shape, "plain"] / peaks[dtype, shape, kind]
            row["checkpointing_over_peft"] = peaks[dtype, shape, "checkpointing"] / peaks[dtype, shape, kind]
        bench.add(row)
    bench.show(COLUMNS)


COLUMNS: list[common.Column] = [
    ("customers x rows x tokens", lambda row: f"{row['customers']} x {row['rows']} x {row['inputs'] + row['targets']}"),
    ("dtype", lambda row: row["dtype"]),
    ("kind", lambda row: row["kind"]),
    ("base MiB", lambda row: f"{row['base_mib']:,.1f}"),
    ("above it", lambda row: f"{row['above_base_mib']:,.1f}"),
    ("planned / measured", lambda row: f"{row['planned_over_measured']:.2f}" if "planned_over_measured" in row else ""),
    ("plain / PEFT", lambda row: f"{row['plain_over_peft']:.2f}" if "plain_over_peft" in row else ""),
    ("checkpointing / PEFT", lambda row: f"{row['checkpointing_over_peft']:.2f}" if "plain_over_peft" in row else ""),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
]


if __name__ == "__main__":
    main()
