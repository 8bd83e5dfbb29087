"""Tokens a second for one row each of many customers in one batch, against one customer after another with PEFT and `generate`.

    python benchmarks/generation.py --base examples/base
    python benchmarks/generation.py --base ../shared/base --customers 1 8 32 64 --rounds 5 --json generation.jsonl

Both sides use the same base, prefixes (P = 10, exported to PEFT's format), prompts and number of new tokens, greedily, and must give the same tokens;
they take turns (A B A B), and medians are shown. CPU seconds, with OMP_NUM_THREADS=1, compare even on a machine that others use too. Time to first
token is that of requests that all come at once; for PEFT a customer waits for those before it. The memory of a further customer is measured by
loading many more prefixes.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from pipeline.inference import Decoding, Members, Request
from pipeline.inference.decoder import Decoder
from pipeline.inference.request import Loaded
from pipeline.prefix import FrozenBase, attach, load_prefix, save_prefix
from pipeline.prefix.initialise import from_random
from pipeline.prefix.peft_format import export_peft

LENGTH = 10


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    """Inputs of two example customers, by turns."""
    files = [Path(__file__).parent.parent / "examples" / "customers" / f"{name}.jsonl" for name in ("bistro", "harbour")]
    texts = [[json.loads(line)["input"] for line in file.open(encoding="utf-8")] for file in files]
    return [tokenizer(texts[i % 2][i // 2] + "\n", add_special_tokens=False)["input_ids"] for i in range(count)]


def together(base: FrozenBase, tokenizer: Any, prefixes: list[Loaded], prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All customers in one batch."""
    decoder = Decoder(base, tokenizer, max_rows=len(prompts), max_tokens=10**9)
    decoder.ends = []  # every answer has all its tokens, or the two sides would not do the same work
    started = time.monotonic()
    requests = [Request(p, Members((f,)), Decoding(tokens)) for p, f in zip(prompts, prefixes, strict=True)]
    for request in requests:
        decoder.submit(request)
    while decoder.busy:
        decoder.step()
    return {"tokens": [r.tokens for r in requests], "first": [(r.first_token_at or 0.0) - started for r in requests]}


class _First:
    """Notes when the first token is there."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.prompt = True

    def put(self, _: torch.Tensor) -> None:
        """The prompt comes first, then each token."""
        if not self.prompt and self.at is None:
            self.at = time.monotonic()
        self.prompt = False

    def end(self) -> None:
        """Nothing to do."""


def one_by_one(model: Any, prompts: list[list[int]], tokens: int, pad: int) -> dict[str, Any]:
    """One customer after another with PEFT."""
    out, first, started = [], [], time.monotonic()
    for i, prompt in enumerate(prompts):
        model.set_adapter(f"c{i}")
        watch = _First()
        ids = torch.tensor([prompt], device=model.device)
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=pad, streamer=watch,
        )  # fmt: skip
        out.append(made[0, len(prompt) :].tolist())
        first.append((watch.at or 0.0) - started)
    return {"tokens": out, "first": first}


def memory_of_a_customer(base: FrozenBase, folder: Path, count: int) -> dict[str, float]:
    """Bytes that `count` further prefixes take, by their tensors and by the process."""
    process = psutil.Process()
    load_prefix(folder)  # what is made at the first use is not counted
    before = process.memory_info().rss
    held = [Loaded(load_prefix(folder)[0]).to(base.device, base.model.dtype) for _ in range(count)]
    return {"tensors": sum(p.bytes for p in held) / count, "process": (process.memory_info().rss - before) / count}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--base", type=Path, default=Path("examples/base"))
    parser.add_argument("--customers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=40, help="of each answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prefixes-held", type=int, default=500, help="how many are loaded to see what one takes (default: 500)")
    arguments = parser.parse_args(argv)
    try:
        from peft import PeftModel
    except ImportError:
        sys.exit("needs PEFT: pip install 'prefixfleet[compare]'")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    set_verbosity_error()
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            arguments.base, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
        ).to(device).eval()  # fmt: skip

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    most = max(arguments.customers)
    prompts = prompts_of(tokenizer, most)
    base = attach(load(), max_positions=None)
    made = [from_random(base.sites, LENGTH, seed) for seed in range(most)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base_named = {"id": str(arguments.base), "revision": None, "digest": "", "is_encoder_decoder": False}
        config: dict[str, Any] = {"base": base_named, "prefix": {"placement": "prefix"}}
        model: Any = None
        for i, prefix in enumerate(made):
            save_prefix(folder / f"p{i}", prefix, config)
            export_peft(folder / f"p{i}", folder / f"a{i}")
            if model is None:
                model = PeftModel.from_pretrained(load(), folder / "a0", adapter_name="c0")
            else:
                model.load_adapter(str(folder / f"a{i}"), adapter_name=f"c{i}")
        memory = memory_of_a_customer(base, folder / "p0", arguments.prefixes_held)
    model.eval()
    model.generation_config.eos_token_id = None  # see `together`
    prefixes = [Loaded(prefix).to(base.device, base.model.dtype) for prefix in made]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with torch.inference_mode():
        together(base, tokenizer, prefixes[:2], prompts[:2], 4)  # what is made at the first use is not counted
        one_by_one(model, prompts[:2], 4, pad)
        bench = common.Bench(
            "generation", arguments, base=str(arguments.base), dtype=arguments.dtype, device=device, tokens=arguments.tokens,
            rounds=arguments.rounds, bytes_per_customer=memory["tensors"], process_bytes_per_customer=memory["process"],
        )  # fmt: skip
        for count in arguments.customers:
            answers: dict[str, list[list[int]]] = {}

            def measure(kind: str, count: int = count, answers: dict[str, list[list[int]]] = answers) -> common.Run:
                if kind == "ours":
                    found = together(base, tokenizer, prefixes[:count], prompts[:count], arguments.tokens)
                else:
                    found = one_by_one(model, prompts[:count], arguments.tokens, pad)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                answers.setdefault(kind, found["tokens"])
                return {"first_token": statistics.median(found["first"])}

            kinds = {kind: lambda kind=kind: common.timed(lambda: measure(kind)) for kind in ("ours", "peft")}  # type: ignore[misc]  # bound now
            runs = {kind: common.spread(of) for kind, of in common.in_turn(kinds, arguments.rounds, f"{count} customers").items()}
            rates = {
                f"{kind}_tokens_per_{unit}": count * arguments.tokens / of[name]
                for kind, of in runs.items()
                for unit, name in (("second", "seconds"), ("cpu_second", "cpu_seconds"))
            }
            bench.add({
                "customers": count, "equal_answers": sum(a == b for a, b in zip(answers["ours"], answers["peft"], strict=True)),
                "ratio_wall": runs["peft"]["seconds"] / runs["ours"]["seconds"],
                "ratio_cpu": runs["peft"]["cpu_seconds"] / runs["ours"]["cpu_seconds"], **rates,
                **{f"{kind}_{name}": value for kind, of in runs.items() for name, value in of.items()},
            })  # fmt: skip
    bench.show(COLUMNS)
    print(
        f"A further customer: {memory['tensors']:,.0f} bytes of keys and values; measured in the process, {memory['process']:,.0f} bytes.",
        file=sys.stderr,
    )


COLUMNS: list[common.Column] = [
    ("customers", lambda row: str(row["customers"])),
    ("equal answers", lambda row: str(row["equal_answers"])),
    *(
        (f"{kind} per CPU second", lambda row, kind=kind: f"{row[f'{kind}_tokens_per_cpu_second']:,.0f}")
        for kind in ("ours", "peft")
    ),
    ("ratio", lambda row: f"{row['ratio_cpu']:.1f}"),
    *((f"{kind} tokens/s", lambda row, kind=kind: f"{row[f'{kind}_tokens_per_second']:,.0f}") for kind in ("ours", "peft")),
    ("ratio", lambda row: f"{row['ratio_wall']:.1f}"),
    *((f"{kind} first token s", lambda row, kind=kind: f"{row[f'{kind}_first_token']:.2f}") for kind in ("ours", "peft")),
]

if __name__ == "__main__":
    common.in_child_environment()
    main()
