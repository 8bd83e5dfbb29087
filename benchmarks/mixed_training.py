"""Seconds, real tokens a second, padding and peak memory of training many customers: mixed, one by one, and with a plain PEFT loop.

    python benchmarks/mixed_training.py --base examples/base --data ../shared/data/customers
    python benchmarks/mixed_training.py … --customers 1 3 10 30 100 --shard-rows 60 --steps 20 --plot mixed.png

`mixed` and `one-by-one` are the same code with as many slots as customers, and with one slot. `peft` trains one customer after another with
PEFT's PrefixTuning as its documentation shows it, the base loaded once. All three use the same rows in the same order, P = 10, AdamW, the base in
bfloat16 and no dev losses. Every measurement is a process of its own; the kinds take turns, `--rounds` times, and the medians are shown. Loading
the base is not counted. CPU seconds, with OMP_NUM_THREADS=1, compare even on a machine that others use too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("mixed", "one-by-one", "peft")


@dataclass
class Row:
    """Tokens of a row."""

    prompt_ids: list[int]
    target_ids: list[int]


def read_customers(folder: Path, tokenizer: Any, count: int, shard_rows: int | None) -> list[list[Row]]:
    """The training rows of `count` customers, each a folder with train.jsonl; with `shard_rows`, cut into shards of so many rows first."""
    customers = []
    for file in sorted(folder.glob("*/train.jsonl")):
        rows = []
        for line in file.open(encoding="utf-8"):
            record = json.loads(line)
            prompt = tokenizer(record["input"] + "\n", add_special_tokens=False)["input_ids"]
            target = tokenizer((record.get("references") or [record.get("target")])[0], add_special_tokens=False)["input_ids"]
            if len(prompt) <= 384 and len(target) < 128:
                rows.append(Row(prompt, [*target, tokenizer.eos_token_id]))
        customers.append(rows)
    if shard_rows is not None:
        # The first shard of each customer, then the second of each, …
        pieces = [[c[i : i + shard_rows] for i in range(0, len(c) - shard_rows + 1, shard_rows)] for c in customers]
        customers = [piece[i] for i in range(max(map(len, pieces))) for piece in pieces if i < len(piece)]
    if len(customers) < count:
        sys.exit(f"{folder}: {len(customers)} customers, {count} asked for")
    return customers[:count]


def measure(kind: str, arguments: argparse.Namespace, count: int) -> dict[str, float]:
    """One measurement in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    customers = read_customers(arguments.data, tokenizer, count, arguments.shard_rows)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    run = _peft if kind == "peft" else _ours
    run(
        kind, model, [c[:20] for c in customers[:1]], arguments, tokenizer.pad_token_id, 2
    )  # what is made at the first use is not counted
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, began = time.monotonic(), time.process_time()
    real, padded = run(kind, model, customers, arguments, tokenizer.pad_token_id, arguments.steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    memory = (
        torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - began,
        "tokens_per_second": real / seconds,
        "padding_share": 1 - real / padded,
        "memory_mib": memory / 2**20,
    }


def _ours(
    kind: str, model: Any, customers: Sequence[Sequence[Row]], arguments: argparse.Namespace, pad: int, steps: int
) -> tuple[int, int]:
    """Real and padded tokens of training `customers` in slots."""
    from accelerate import Accelerator

    from pipeline.prefix.base import attach
    from pipeline.prefix.direct import Direct
    from pipeline.prefix.initialise import from_text
    from pipeline.training.job import JobTraining
    from pipeline.training.mixed import Mixed
    from pipeline.training.resident import Resident

    base = getattr(model, "_benchmarked", None) or attach(model)
    object.__setattr__(model, "_benchmarked", base)
    settings = JobTraining(
        max_steps=steps, batch_size=arguments.batch_size, gradient_accumulation_steps=1, lr=0.1, schedule="linear", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, eval_every=10**9, early_stopping=None, seed=0,
    )  # fmt: skip
    slots = 1 if kind == "one-by-one" else min(len(customers), arguments.slots)
    mixed = Mixed(base, slots, 10, pad, arguments.budget, Accelerator(cpu=base.device.type == "cpu"))
    waiting = list(customers)
    real = padded = 0
    while waiting or mixed.seated:
        while waiting and (slot := mixed.free_slot()) is not None:
            rows = waiting.pop(0)
            start = from_text(base, rows[0].prompt_ids + rows[0].target_ids, 10)
            mixed.residents[slot] = Resident(Direct(start, base.device), False, rows, rows[:1], settings)
        report = mixed.step()
        assert not report.failed, report.failed
        real, padded = real + report.tokens, padded + report.padded
        for slot, resident in mixed.seated:
            if resident.step == steps:
                mixed.leave(slot)
    return real, padded


def _peft(
    _: str, model: Any, customers: Sequence[Sequence[Row]], arguments: argparse.Namespace, pad: int, steps: int
) -> tuple[int, int]:
    """Real and padded tokens of training `customers` one after another with PEFT."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    real = padded = 0
    for rows in customers:
        prefixed: Any = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
        prefixed.train()
        parameters = [p for p in prefixed.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
        generator = torch.Generator().manual_seed(0)
        order: list[int] = []
        for _ in range(steps):
            while len(order) < arguments.batch_size:
                order += torch.randperm(len(rows), generator=generator).tolist()
            batch, order = [rows[i] for i in order[: arguments.batch_size]], order[arguments.batch_size :]
            width = max(len(r.prompt_ids) + len(r.target_ids) for r in batch)
            ids = torch.full((len(batch), width), pad)
            labels = torch.full((len(batch), width), -100)
            mask = torch.zeros(len(batch), width, dtype=torch.int64)
            for i, row in enumerate(batch):
                length = len(row.prompt_ids) + len(row.target_ids)
                ids[i, :length] = torch.tensor(row.prompt_ids + row.target_ids)
                labels[i, len(row.prompt_ids) : length] = torch.tensor(row.target_ids)
                mask[i, :length] = 1
            device = model.device
            loss = prefixed(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()  # as every loop that shows its loss
            real, padded = real + int(mask.sum()), padded + mask.numel()
    return real, padded


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each customer, train.jsonl in it")
    parser.add_argument("--customers", type=int, nargs="+", default=[10], help="how many, one or several numbers")
    parser.add_argument("--shard-rows", type=int, help="cut the customers into shards of so many rows, each a customer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[10])
    parser.add_argument("--budget", type=int, default=4096, help="max_tokens_per_micro_batch")
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--plot", type=Path, help="write a picture of seconds, tokens/s, padding and memory by number of customers"
    )
    parser.add_argument("--json", type=Path, help="write all measurements")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, count, size = arguments.one.split(",")
        arguments.batch_size = int(size)
        print("@" + json.dumps(measure(kind, arguments, int(count))))
        return
    found: dict[tuple[int, int, str], list[dict[str, float]]] = {}
    total = len(arguments.customers) * len(arguments.batch_size) * arguments.rounds * len(arguments.kinds)
    done = 0
    for count in arguments.customers:
        for size in arguments.batch_size:
            for _ in range(arguments.rounds):
                for kind in arguments.kinds:
                    done += 1
                    print(f"{done}/{total} {kind}, {count} customers, batch {size}", file=sys.stderr, flush=True)
                    found.setdefault((count, size, kind), []).append(_child(kind, count, size))
    print(
        "| customers | batch | kind | seconds | against mixed | CPU seconds | tokens/s | padding | peak MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    medians = {key: {name: statistics.median(r[name] for r in runs) for name in runs[0]} for key, runs in found.items()}
    for (count, size, kind), m in medians.items():
        # Of neighbours in time, for these machines' speed drifts.
        ratios = [
            r["seconds"] / q["seconds"]
            for r, q in zip(found[count, size, kind], found.get((count, size, "mixed"), []), strict=False)
        ]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        print(
            f"| {count} | {size} | {kind} | {m['seconds']:.1f} | {ratio} | {m['cpu_seconds']:.1f} | {m['tokens_per_second']:,.0f} "
            f"| {m['padding_share']:.1%} | {m['memory_mib']:,.0f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([{"key": key, "runs": runs} for key, runs in found.items()]))
    if arguments.plot:
        _plot(medians, arguments.plot)


def _child(kind: str, count: int, size: int) -> dict[str, float]:
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        "GOMP_SPINCOUNT": "3000",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    child = subprocess.run(
        [sys.executable, *sys.argv, "--one", f"{kind},{count},{size}"], capture_output=True, text=True, env=environment
    )
    lines = [line for line in child.stdout.splitlines() if line.startswith("@")]
    if child.returncode or not lines:
        sys.exit(f"{kind} failed:\n{child.stdout}{child.stderr}")
    result: dict[str, float] = json.loads(lines[-1][1:])
    return result


def _plot(medians: dict[tuple[int, int, str], dict[str, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = {
        "seconds": "seconds",
        "tokens_per_second": "real tokens/s",
        "padding_share": "padding share",
        "memory_mib": "peak memory, MiB",
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        for kind in KINDS:
            points = [(count, m[name]) for (count, _, k), m in sorted(medians.items()) if k == kind]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        axis.set(title=title, xlabel="customers", xscale="log", ylim=(0, None))
    axes[0].legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
