"""What each part of mixed training on a processor gives: tokens a CPU second with all of them, and with one taken out.

    python benchmarks/ablation.py
    python benchmarks/ablation.py --base ../shared/base --dtype float32 --size 16x5

The parts are those of docs/training.md, in float32 without those for 16 bit. In place of what is taken out is what PyTorch and transformers would do:

- `attention`: scaled_dot_product_attention with its own backward pass. `kept shares`: the shares of attention computed again on the way back.
- `norms`: autograd's backward pass of RMSNorm. `loss`: cross_entropy of a float32 copy.
- `grouping`: rows put into micro-batches as they come, and not by length. `targets only`: logits of all positions, the prompts' too.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, training

OF_16_BIT = ("attention", "kept shares", "norms")
PARTS = ("nothing", "attention", "kept shares", "norms", "loss", "grouping", "targets only")


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    """What is attached and trained inside lacks a part."""
    import torch

    from pipeline.prefix import FrozenBase, kernels
    from pipeline.prefix import base as of_base
    from pipeline.training import batches, mixed

    def attention(query: Any, key: Any, value: Any, seen: Any, scale: float) -> Any:
        mask = None if seen is None else seen.mask
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

    def in_order(rows: Sequence[Any], budget: int, overhead: int, two_sided: bool) -> list[list[int]]:
        cut: list[list[int]] = [[]]
        for i in range(len(rows)):
            if cut[-1] and batches.padded_tokens([rows[j] for j in [*cut[-1], i]], two_sided) > budget:
                cut.append([])
            cut[-1].append(i)
        return cut

    found = batches._logits

    def of_all(base: Any, rows: Sequence[Any], pad: int) -> Any:
        """Logits of all positions, of which those of the targets are then taken."""
        at: list[Any] = []
        forward = base.model.forward

        def model(*given: Any, **named: Any) -> Any:
            out = forward(*given, **named)
            (places,) = at
            out.logits = out.logits.flatten(0, 1).index_select(0, places)[None]
            return out

        with (
            mock.patch.object(FrozenBase, "logits_only_at", lambda _, positions: at.append(positions)),
            mock.patch.object(base.model, "forward", model),
        ):
            return found(base, rows, pad)

    patches: dict[str, tuple[Any, str, Any]] = {
        "attention": (kernels._ByProducts, "apply", staticmethod(attention)),
        "kept shares": (kernels, "_KEPT_COLUMNS", 0),
        "norms": (of_base, "lighten", lambda model: []),
        "loss": (batches, "cross_entropy", lambda logits, wanted: torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")),
        "grouping": (mixed, "pack", in_order),
        "targets only": (batches, "_logits", of_all),
    }  # fmt: skip
    with mock.patch.object(*patches[part]) if part in patches else contextlib.nullcontext():
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument(
        "--base", default=str(common.SHARED / "base"), help="folder of a causal language model of Llama's kind, or 100m"
    )
    parser.add_argument("--data", type=Path, default=common.SHARED / "data" / "customers")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--size", default="16x5", metavar="CUSTOMERSxBATCH")
    parser.add_argument("--parts", nargs="+", choices=PARTS[1:], help="default: all that the dtype has")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args(argv)
    from transformers import AutoTokenizer

    from pipeline.prefix.base import attach

    parts = arguments.parts or [part for part in PARTS[1:] if arguments.dtype == "bfloat16" or part not in OF_16_BIT]
    count, batch = (int(number) for number in arguments.size.split("x"))
    tokenizer = AutoTokenizer.from_pretrained(common.SHARED / "base" if arguments.base == "100m" else arguments.base)
    customers = training.shards_of(training.read_data(arguments.data, tokenizer), count)
    bench = common.Bench(
        "ablation",
        arguments,
        base=arguments.base,
        dtype=arguments.dtype,
        size=arguments.size,
        steps=arguments.steps,
        rounds=arguments.rounds,
    )

    def train(part: str, base: Any, steps: int) -> common.Run:
        tokens = 0

        def run() -> None:
            nonlocal tokens
            tokens, _ = training.ours(base, customers, steps, batch, tokenizer.pad_token_id, count, 4096, grouped=False)

        with without(part):
            took = common.timed(run)
        return {**took, "tokens_per_cpu_second": tokens / took["cpu_seconds"]}

    kinds: dict[str, Callable[[], common.Run]] = {}
    for part in ("nothing", *parts):
        with without(part):
            base = attach(training.load(arguments.base, arguments.dtype))
        train(part, base, 1)
        kinds[part] = partial(train, part, base, arguments.steps)
    found = common.in_turn(kinds, arguments.rounds, "ablation")
    whole = statistics.median(run["tokens_per_cpu_second"] for run in found["nothing"])
    for part, runs in found.items():
        row = common.spread(runs)
        bench.add({"without": part, **row, "gain": whole / row["tokens_per_cpu_second"] - 1})
    bench.show(COLUMNS)


COLUMNS: list[common.Column] = [
    ("without", lambda row: row["without"]),
    ("tokens per CPU second", lambda row: f"{row['tokens_per_cpu_second']:,.0f}"),
    ("least to most", lambda row: "{:,.0f} to {:,.0f}".format(*row["tokens_per_cpu_second_range"])),
    ("what it gives", lambda row: "" if row["without"] == "nothing" else f"{row['gain']:+.0%}"),
]


if __name__ == "__main__":
    common.in_child_environment()
    main()
