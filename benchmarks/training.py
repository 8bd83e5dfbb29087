"""Real tokens a second of training customers' prefixes: in one batch, one by one, with PEFT in a lean loop, and with PEFT and transformers' Trainer.

    python benchmarks/training.py                                           # the README's rows, on ../shared/base in bfloat16 and float32
    python benchmarks/training.py --sizes 16x5 64x1 --base 100m --dtype bfloat16
    python benchmarks/training.py --grid                                    # 1, 4, 16, 64 customers x batch 1, 5, 10, 32: hours

All kinds train on the same rows with the same prefix length, batch size and optimiser, and as many steps; the base is loaded before the clock runs,
once a process, and what is made at the first use is not counted.

- `mixed`: as many slots as customers; `one-by-one`: the same code with one slot.
- `lean` and `trainer`: see benchmarks/peers.py, customer after customer. `trainer` is timed from its first step on.
- `mixed-shuffled` and `lean-shuffled`: with rows drawn at random, which is PrefixFleet's default and what PEFT's examples do. The steps of all others
  have rows of like length (`train_sampling_strategy: group_by_length`).

Each customer has as many rows as the data gives so many customers, so that there are rows of like length to put together.

Those that take one customer after another are measured on the first --in-turn customers at the most, which the row says (`measured_customers`): the
next would cost them the same.

`share` is of the peak of this processor's (or GPU's) matrix products in the same dtype, measured in the same run; benchmarks/roofline.py says what
work is counted. All run in one process with the environment (threads and the like) that `prefixfleet run` gives its training processes.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, peers

KINDS = ("mixed", "mixed-shuffled", "one-by-one", "lean", "lean-shuffled", "trainer")
QUICK = ("16x5", "1x32", "64x1")
GRID = tuple(f"{customers}x{batch}" for customers in (1, 4, 16, 64) for batch in (1, 5, 10, 32))
# A Llama of 100 million parameters with the shared base's vocabulary; random weights, on which speed does not depend.
LLAMA_100M = dict(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=15, num_attention_heads=12, num_key_value_heads=4, head_dim=64
)


def read_data(folder: Path, tokenizer: Any) -> list[list[peers.Row]]:
    """Training rows of each customer below `folder`."""
    return [peers.encoded(peers.read(file), tokenizer) for file in sorted(folder.glob("*/train.jsonl"))]


def shards_of(everybody: Sequence[Sequence[peers.Row]], count: int, shard_rows: int | None = None) -> list[Sequence[peers.Row]]:
    """Rows of `count` customers: the first shard of each of `everybody`, then the second of each, … By default as large as gives so many."""
    most = max(map(len, everybody), default=0)
    if shard_rows is None:
        shard_rows = next((size for size in range(most, 0, -1) if sum(len(rows) // size for rows in everybody) >= count), 1)
    shards = [
        rows[at : at + shard_rows] for at in range(0, most, shard_rows) for rows in everybody if at + shard_rows <= len(rows)
    ]
    if len(shards) < count:
        sys.exit(f"--data gives {len(shards)} customers of {shard_rows} rows, {count} are asked for; take fewer --shard-rows")
    return shards[:count]


def load(base: str, dtype: str) -> Any:
    """A model: from a folder, or `100m`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(common.SEED)
    if base == "100m":
        config = AutoConfig.from_pretrained(common.SHARED / "base")
        config.update(LLAMA_100M)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def ours(
    base: Any,
    customers: Sequence[Sequence[peers.Row]],
    steps: int,
    batch_size: int,
    pad: int,
    slots: int,
    budget: int,
    grouped: bool = True,
) -> tuple[int, int]:
    """Train `customers` in slots on an attached base, the rows of a step of like length if `grouped`; real and padded tokens."""
    from accelerate import Accelerator

    from pipeline.prefix.direct import Direct
    from pipeline.prefix.initialise import from_text
    from pipeline.training.job import JobTraining
    from pipeline.training.mixed import Mixed
    from pipeline.training.resident import Resident

    settings = JobTraining(
        max_steps=steps, batch_size=batch_size, gradient_accumulation_steps=1, lr=peers.LR, schedule="linear", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, eval_every=10**9, early_stopping=None, seed=common.SEED,
        train_sampling_strategy="group_by_length" if grouped else "random",
    )  # fmt: skip
    mixed = Mixed(base, slots, peers.PREFIX, pad, budget, Accelerator(cpu=base.device.type == "cpu"))
    waiting = list(customers)
    real = padded = 0
    while waiting or mixed.seated:
        while waiting and (slot := mixed.free_slot()) is not None:
            rows = waiting.pop(0)
            start = from_text(base, rows[0].prompt_ids + rows[0].target_ids, peers.PREFIX)
            mixed.residents[slot] = Resident(Direct(start, base.device), False, rows, rows[:1], settings)
        report = mixed.step()
        assert not report.failed, report.failed
        real, padded = real + report.tokens, padded + report.padded
        for slot, resident in mixed.seated:
            if resident.step == steps:
                mixed.leave(slot)
    return real, padded


def measures(
    models: tuple[Any, Any], customers: Sequence[Sequence[peers.Row]], batch_size: int, pad: int, arguments: argparse.Namespace
) -> dict[str, Callable[[], common.Run]]:
    """What to measure of each kind on an attached base (ours) and on the bare model (the peers'). Each has run once before."""
    import torch

    base, bare = models

    def measure(kind: str, some: Sequence[Sequence[peers.Row]], steps: int) -> common.Run:
        tokens: list[tuple[int, int]] = []
        seconds = dict.fromkeys(("seconds", "cpu_seconds"), 0.0)

        def add(train: Callable[[], Sequence[Any]], begun: Sequence[tuple[float, float]] = ()) -> None:
            def run() -> common.Run:
                *_, real, padded = train()
                tokens.append((real, padded))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                wall, cpu = time.perf_counter(), time.process_time()
                return {"seconds": wall - begun[0][0], "cpu_seconds": cpu - begun[0][1]} if begun else {}

            for name, value in common.timed(run).items():
                seconds[name] += value

        if not kind.startswith(("lean", "trainer")):
            slots = 1 if kind == "one-by-one" else min(len(some), arguments.slots)
            add(lambda: ours(base, some, steps, batch_size, pad, slots, arguments.budget, kind != "mixed-shuffled"))
        for rows in some if kind.startswith("lean") else []:
            add(lambda rows=rows: peers.lean(bare, rows, steps, batch_size, pad, kind == "lean"))  # type: ignore[misc]  # bound now
        for rows in some if kind == "trainer" else []:
            with tempfile.TemporaryDirectory() as folder:
                made = peers.trainer_of(bare, rows, steps, batch_size, pad, Path(folder))
                add(lambda made=made: made.train(), made.begun)  # type: ignore[misc]  # bound now
        real, padded = (sum(pair[i] for pair in tokens) for i in range(2))
        measured = {"measured_customers": float(len(some))}
        rates = {"tokens_per_second": real / seconds["seconds"], "tokens_per_cpu_second": real / seconds["cpu_seconds"]}
        return {**seconds, **rates, **measured, "padding": 1 - real / padded}

    for kind in arguments.kinds:
        measure(kind, [rows[: max(20, batch_size)] for rows in customers[:2]], 2)
    of = {kind: customers if kind.startswith("mixed") else customers[: arguments.in_turn] for kind in arguments.kinds}
    return {kind: lambda kind=kind: measure(kind, of[kind], arguments.steps) for kind in arguments.kinds}  # type: ignore[misc]  # bound now


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--base",
        nargs="+",
        help="folders of causal language models of Llama's kind, or 100m (default: ../shared/base; with --grid both)",
    )
    parser.add_argument(
        "--data", type=Path, default=common.SHARED / "data" / "customers", help="folders with train.jsonl (default: ../shared/…)"
    )
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sizes", nargs="+", metavar="CUSTOMERSxBATCH", default=QUICK, help=f"default: {' '.join(QUICK)}")
    which.add_argument("--grid", action="store_true", help="1, 4, 16 and 64 customers x batch 1, 5, 10 and 32: hours")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=6, help="of each customer (default: 6)")
    parser.add_argument("--in-turn", type=int, default=10, metavar="N", help="see above (default: 10)")
    parser.add_argument("--shard-rows", type=int, metavar="N", help="rows of a customer (default: see above)")
    parser.add_argument("--budget", type=int, default=4096, help="max_tokens_per_micro_batch of ours (default: 4096)")
    parser.add_argument("--slots", type=int, default=64, help="launch.slots of ours, at the most (default: 64)")
    arguments = parser.parse_args(argv)
    if arguments.grid:
        arguments.sizes = GRID
    arguments.base = arguments.base or [str(common.SHARED / "base"), *(["100m"] if arguments.grid else [])]
    import torch
    from transformers import AutoTokenizer

    from benchmarks import roofline
    from pipeline.prefix.base import attach

    sizes = [tuple(int(number) for number in size.split("x")) for size in arguments.sizes]
    gc.freeze()  # the Trainer collects garbage each time, and would look through all libraries
    bench = common.Bench(
        "training",
        arguments,
        steps=arguments.steps,
        rounds=arguments.rounds,
        prefix=peers.PREFIX,
    )
    for named in arguments.base:
        tokenizer = AutoTokenizer.from_pretrained(common.SHARED / "base" if named == "100m" else named)
        everybody = read_data(arguments.data, tokenizer)
        for dtype in arguments.dtype:
            bare = load(named, dtype)
            models = attach(load(named, dtype)), bare
            on_cpu = bare.device.type == "cpu"
            peak = roofline.matmul_peak(bare.device, getattr(torch, dtype), (1024, 2048) if on_cpu else (4096, 8192, 16384))
            size = roofline.Size.of(bare.config)
            for count, batch_size in sizes:
                customers = shards_of(everybody, count, arguments.shard_rows)
                lengths = [(len(row.prompt_ids) + len(row.target_ids), len(row.target_ids)) for rows in customers for row in rows]
                flops = size.training_flops(lengths, peers.PREFIX) / sum(tokens for tokens, _ in lengths)
                kinds = measures(models, customers, batch_size, tokenizer.pad_token_id, arguments)
                found = common.in_turn(kinds, arguments.rounds, f"{dtype} {count}x{batch_size}")
                for kind, runs in found.items():
                    row = common.spread(runs)
                    row["measured_customers"] = int(row["measured_customers"])
                    del row["measured_customers_range"]
                    times = {
                        f"mixed_over_{unit}": statistics.median(run[name] for run in found["mixed"]) / row[name]
                        for unit, name in (("wall", "tokens_per_second"), ("cpu", "tokens_per_cpu_second"))
                        if "mixed" in found
                    }
                    bench.add({
                        "base": named, "dtype": dtype, "customers": count, "batch": batch_size, "rows": len(customers[0]), "kind": kind,
                        **row, **times,
                        "flops_per_token": flops, "peak_tflops": peak / 1e12, "share_of_peak": row["tokens_per_second"] * flops / peak,
                    })  # fmt: skip
    bench.show(COLUMNS)


COLUMNS: list[common.Column] = [
    ("base", lambda row: Path(row["base"]).name),
    ("dtype", lambda row: row["dtype"]),
    ("customers x batch", lambda row: f"{row['customers']} x {row['batch']}"),
    ("rows of each", lambda row: f"{row['rows']:,}"),
    ("kind", lambda row: row["kind"]),
    ("measured on", lambda row: str(row["measured_customers"])),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("least to most", lambda row: "{:,.0f} to {:,.0f}".format(*row["tokens_per_second_range"])),
    ("per CPU second", lambda row: f"{row['tokens_per_cpu_second']:,.0f}"),
    (
        "mixed is faster",
        lambda row: f"{row['mixed_over_wall']:.2f} (CPU {row['mixed_over_cpu']:.2f})" if "mixed_over_wall" in row else "",
    ),
    ("of peak", lambda row: f"{row['share_of_peak']:.1%}"),
    ("padding", lambda row: f"{row['padding']:.0%}"),
]


if __name__ == "__main__":
    common.in_child_environment()
    main()
