"""A base on 1, 2 and 4 processes of the processor, whole on each (DDP) or split (ZeRO-3, FSDP2): bytes kept, bytes sent, tokens a second.

    python benchmarks/sharding.py
    python benchmarks/sharding.py --processes 2 --engines fsdp2 --base 100m

Each case is started by `accelerate launch` with the configuration file of accelerate_configs/ that users take. Kept are the base's weights that a
process has between steps; sent is what a process puts on the wire in one step, as PyTorch's operations name it, gradients of the prefixes, gathered
weights and all. Processes share the cores, and each has as many threads as the cores give the most of them, so tokens a second say what splitting
costs and not what more machines would give.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, peers

CONFIGS = {"ddp": "cpu_2proc", "zero3": "zero3_2proc_cpu", "fsdp2": "fsdp2_2proc_cpu"}
CUSTOMERS, ROWS, TOKENS = 8, 5, 96


def measure(base: str, dtype: str, steps: int) -> dict[str, float]:
    """What each process of a case runs; the figures of the process that keeps most, and tokens of all."""
    import torch

    from benchmarks.memory import rows_of
    from benchmarks.training import load
    from benchmarks.wire import Exchanged
    from pipeline.prefix.base import attach
    from pipeline.prefix.direct import Direct
    from pipeline.prefix.initialise import from_random
    from pipeline.prefix.placing import whole_where_it_is
    from pipeline.training.engines import chosen, processes
    from pipeline.training.job import JobTraining
    from pipeline.training.mixed import Mixed
    from pipeline.training.resident import Resident

    accelerator = processes()
    engine = chosen(accelerator, getattr(torch, dtype))
    frozen = attach(load(base, dtype), place=engine.place or whole_where_it_is)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in frozen.placed.kept())
    settings = JobTraining(10**6, ROWS, 1, 0.01, "constant", 0, 0.0, 1.0, 10**9, None, common.SEED)
    mixed = Mixed(frozen, CUSTOMERS, peers.PREFIX, 0, 4096, accelerator, engine=engine)
    for slot in range(CUSTOMERS):
        rows = rows_of(3 * TOKENS // 4, TOKENS // 4, frozen.model.config.vocab_size, ROWS, slot)
        mixed.residents[slot] = Resident(
            Direct(from_random(frozen.sites, peers.PREFIX, slot), frozen.device), False, rows, rows[:1], settings
        )
    with Exchanged() as counting:
        mixed.step()
    count = accelerator.num_processes
    tokens = 0

    def train() -> None:
        nonlocal tokens
        tokens = sum(mixed.step().tokens for _ in range(steps))

    found = common.timed(train)
    most = torch.tensor([float(kept), counting.whole * (count - 1) / count])
    if count > 1:
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    kept_mib, sent_mib = (most / 2**20).tolist()
    return {"kept_mib": kept_mib, "sent_mib_per_step": sent_mib, "tokens_per_second": tokens / found["seconds"]}


def launched(engine: str, processes: int, arguments: Any) -> common.Run:
    """One case, in processes of its own."""
    config = common.ROOT / "accelerate_configs" / f"{CONFIGS[engine] if processes > 1 else 'cpu'}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes), __file__,
            "--base", arguments.base, "--dtype", arguments.dtype, "--steps", str(arguments.steps), "--worker", str(out),
        ]  # fmt: skip
        # As many threads in each process, however many processes there are.
        threads = max(1, common.machine()["cores"] // max(arguments.processes))
        environment = common.child_environment(OMP_NUM_THREADS=str(threads), DS_ACCELERATOR="cpu")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{engine} on {processes} processes failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found: common.Run = json.loads(out.read_text(encoding="utf-8"))
        return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--base", default=str(common.SHARED / "base"), help="folder of a causal language model, or 100m (default: ../shared/base)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=5, help="that are timed (default: 5)")
    parser.add_argument("--worker", type=Path, help="measure in this process and write the figures there")
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        import os

        found = measure(arguments.base, arguments.dtype, arguments.steps)
        if os.environ.get("RANK", "0") == "0":
            arguments.worker.write_text(json.dumps(found), encoding="utf-8")
        return
    bench = common.Bench(
        "sharding", arguments, base=arguments.base, dtype=arguments.dtype, rounds=arguments.rounds, steps=arguments.steps,
        customers=CUSTOMERS, batch=ROWS, tokens_of_a_row=TOKENS,
    )  # fmt: skip
    cases = {
        ("none" if count == 1 else engine, count): lambda engine=engine, count=count: launched(engine, count, arguments)
        for count in arguments.processes
        for engine in (arguments.engines[:1] if count == 1 else arguments.engines)
    }  # type: ignore[misc]  # bound now
    runs = common.in_turn({f"{engine} {count}": run for (engine, count), run in cases.items()}, arguments.rounds, "sharding")
    for engine, count in cases:
        bench.add({"engine": engine, "processes": count, **common.spread(runs[f"{engine} {count}"])})
    bench.show(COLUMNS)


COLUMNS: list[common.Column] = [
    ("engine", lambda row: row["engine"]),
    ("processes", lambda row: str(row["processes"])),
    ("MiB of the base on each", lambda row: f"{row['kept_mib']:,.2f}"),
    ("MiB sent by each in a step", lambda row: f"{row['sent_mib_per_step']:,.2f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("least to most", lambda row: "{:,.0f} to {:,.0f}".format(*row["tokens_per_second_range"])),
]


if __name__ == "__main__":
    main()
