"""Prefix training and mixed decoding on one GPU against PEFT, as shares of what its matrix unit gives: one run, under eight minutes.

    python benchmarks/gpu.py                                  # Llama 1B and 8B, Qwen 32B shapes, random weights, bfloat16
    python benchmarks/gpu.py --shape llama-8b --minutes 4 --json gpu.jsonl
    python benchmarks/gpu.py --smoke                          # the same on tiny shapes, on a processor: what the tests run

Needs torch (2.11 or newer), transformers (5.17 or newer), accelerate, safetensors and PEFT, and nothing else. Weights are random, for neither speed
nor memory depends on them. Rows are random tokens of one length, half prompt and half target, P = 10.

- `train`: real tokens a second of optimiser steps. `ours` is mixed training of several customers in one batch; `peft` is PEFT's PrefixTuning with a
  lean loop, base loaded once, one customer after another, with sdpa, with the package flash-attn where it is installed, and with the first and
  the last size compiled too. All take turns, `--rounds` times; the medians are shown, with the range, and ours is set against PEFT's fastest.
- `share`: of the peak, the fastest bfloat16 matrix product measured in the same run; benchmarks/roofline.py says what work is counted, the same for
  both: what prefix training needs, and not what is computed beyond that (checkpointing, logits of the prompt).
- `memory`: the peak, the base included, and the base alone. While one kind is measured, the others have nothing but the base, which all share.
- `decode`: tokens a second of greedy answers, one row for each of many customers in one batch, against PEFT's `generate` for one after another.

What no longer fits into the time is named as left out. Exit status 1 if anything else failed.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, roofline
from benchmarks.peers import Row
from pipeline.inference.decoder import Decoder
from pipeline.inference.request import Decoding, Loaded, Members, Request
from pipeline.prefix import FrozenBase, attach
from pipeline.prefix.direct import Direct
from pipeline.prefix.initialise import from_random
from pipeline.prefix.kernels import GPU_ONLY
from pipeline.training.job import JobTraining
from pipeline.training.mixed import Mixed
from pipeline.training.resident import Resident

PREFIX = 10
SEED = 0
Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """What makes a model's speed: the published sizes of its family."""

    family: str
    hidden: int
    layers: int
    heads: int
    heads_kv: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    def config(self) -> Any:
        """As transformers takes it."""
        kind = {"llama": LlamaConfig, "qwen": Qwen3Config}[self.family]
        return kind(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads_kv,
            head_dim=self.head_dim, intermediate_size=self.intermediate, vocab_size=self.vocabulary, tie_word_embeddings=self.tied,
            max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip


# Llama 3.2 1B, Llama 3.1 8B, Qwen3 1.7B, 8B and 32B, from their published config.json.
SHAPES = {
    "llama-1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "llama-8b": Shape("llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "qwen-1.7b": Shape("qwen", 2048, 28, 16, 8, 128, 6144, 151936, tied=True),
    "qwen-8b": Shape("qwen", 4096, 36, 32, 8, 128, 12288, 151936),
    "qwen-32b": Shape("qwen", 5120, 64, 64, 8, 128, 25600, 151936),
}
TINY = {"llama-tiny": Shape("llama", 64, 2, 4, 2, 16, 128, 256), "qwen-tiny": Shape("qwen", 64, 2, 4, 2, 16, 128, 256)}


class _Tokens:
    """What the decoder asks of a tokenizer, for a model that has none."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, None

    def decode(self, ids: list[int], **_: Any) -> str:
        """Tokens as numbers."""
        return " ".join(map(str, ids))


class Bench:
    """One run: the device, its peak, the clock, and the rows that were measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cpu" if arguments.smoke or not torch.cuda.is_available() else "cuda")
        self.ends = time.monotonic() + 60 * arguments.minutes
        self.rows: list[dict[str, Any]] = []
        self.failed = False
        # The whole of what has to be known to compare a row with another machine's.
        self.setting = {
            "dtype": "bfloat16",
            "seed": SEED,
            "rounds": arguments.rounds,
            "machine": common.machine(),
            "versions": common.versions(),
        }
        self.peak = roofline.matmul_peak(self.device, torch.bfloat16, (256,) if arguments.smoke else (4096, 8192, 16384))

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, and print it as a line of JSON."""
        self.rows.append(row)
        line = json.dumps({**row, "peak_tflops": self.peak / 1e12, **self.setting})
        print(line, flush=True)
        if self.arguments.json is not None:
            with self.arguments.json.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def enough(self, what: str, seconds: float) -> bool:
        """Whether there is time for what takes about so many seconds; if not, says that it is left out."""
        if time.monotonic() + seconds < self.ends:
            return True
        self.add({"what": what, "left_out": "no time"})
        return False

    @contextlib.contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """What fails is a row of its own and ends nothing else; running out of memory is a result."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.add({"what": what, "left_out": "out of memory"})
        except Exception as error:  # of whatever kind: the other measurements are worth having
            self.failed = True
            self.add({"what": what, "failed": f"{type(error).__name__}: {error}"})
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def in_turn(self, what: str, kinds: dict[str, Callable[[], Step]], seconds: float) -> dict[str, dict[str, Any]]:
        """Seconds of a step of each kind, all in turn, each made anew and let go: median, least and most, and the peak memory.

        What a kind other than the first cannot do is a row of its own, and the others go on.
        """
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        memory: dict[str, float] = dict.fromkeys(kinds, 0.0)
        for _ in range(self.arguments.rounds):
            for kind in list(found):
                try:
                    took, most = self._timed(kinds[kind](), seconds)
                except Exception as error:  # of whatever kind: it is somebody else's code
                    if kind == next(iter(kinds)):
                        raise
                    del found[kind]
                    self.add({"what": f"{what} {kind}", "left_out": f"{type(error).__name__}: {error}"})
                    continue
                finally:
                    gc.collect()
                found[kind].append(took)
                memory[kind] = max(memory[kind], most)
        return {
            kind: {"seconds": statistics.median(runs), "range": [min(runs), max(runs)], "memory_gib": memory[kind] or None}
            for kind, runs in found.items()
        }

    def _timed(self, step: Step, seconds: float) -> tuple[float, float]:
        """Seconds of a step, and the peak memory in GiB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step()  # what is made at the first use is not counted
        self.wait()
        started, count = time.monotonic(), 0
        while count < 2 or time.monotonic() - started < seconds:
            step()
            count += 1
            self.wait()
        took = (time.monotonic() - started) / count
        return took, torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0


def make(shape: Shape, device: torch.device) -> Any:
    """A model of random weights, made where it computes."""
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def twin(model: Any, shape: Shape, device: torch.device, kernel: str = "sdpa") -> Any:
    """A second model on the weights of `model`, for PEFT: ours has its hooks in the first."""
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16, attn_implementation=kernel).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    # Its tables are in no state dict.
    with torch.device(device):
        other.model.rotary_emb = type(other.model.rotary_emb)(config=other.config)
    return other


def rows_of(shape: Shape, count: int, length: int) -> list[Row]:
    """Random rows, half prompt and half target."""
    ids = torch.randint(3, shape.vocabulary, (count, length), generator=torch.Generator().manual_seed(SEED)).tolist()
    return [Row(row[: length // 2], row[length // 2 :]) for row in ids]


def our_step(base: FrozenBase, shape: Shape, customers: int, batch: int, length: int) -> Step:
    """An optimiser step of so many customers, all their rows in one batch."""
    settings = JobTraining(
        max_steps=10**6, batch_size=batch, gradient_accumulation_steps=1, lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, eval_every=10**9, early_stopping=None, seed=SEED,
    )  # fmt: skip
    accelerator = Accelerator(cpu=base.device.type == "cpu")
    mixed = Mixed(base, customers, PREFIX, 0, customers * batch * (length + 8), accelerator)
    rows = rows_of(shape, customers * batch, length)
    for slot in range(customers):
        own = rows[slot * batch : (slot + 1) * batch]
        mixed.residents[slot] = Resident(
            Direct(from_random(base.sites, PREFIX, slot), base.device), False, own, own[:1], settings
        )

    def step() -> float:
        report = mixed.step()
        assert not report.failed, report.failed
        return 0.0

    return step


def peft_step(model: Any, shape: Shape, batch: int, length: int) -> Step:
    """An optimiser step of one customer with PEFT; `model` is the bare base."""
    prefixed: Any = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
    prefixed.train()
    trained = [p for p in prefixed.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    device = next(model.parameters()).device
    ids = torch.tensor([row.prompt_ids + row.target_ids for row in rows_of(shape, batch, length)], device=device)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    mask = torch.ones_like(ids)

    def step() -> float:
        loss = prefixed(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())  # as every loop that shows its loss

    return step


def compile_blocks(model: Any) -> None:
    """Compile every block; PyTorch leaves the attention hook, which is Python, between the compiled parts."""
    for block in model.model.layers:
        block.compile()


def pefts(model: Any, shape: Shape, bench: Bench, compiled: bool) -> dict[str, Any]:
    """What PEFT is measured with, by name: bare models on the weights of `model`."""
    found = {"peft": twin(model, shape, bench.device)}
    if bench.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        found["peft flash"] = twin(model, shape, bench.device, "flash_attention_2")
    if compiled:
        found["peft compiled"] = twin(model, shape, bench.device)
        compile_blocks(found["peft compiled"])
    return found


def train(
    bench: Bench, name: str, shape: Shape, length: int, sizes: list[tuple[int, int]], variants: list[tuple[str, bool, bool]]
) -> None:
    """Rows of `train` for one shape.

    Args:
        bench: the run.
        name: of the shape.
        shape: its sizes.
        length: tokens of a row.
        sizes: (customers, rows of each): PEFT gets the same rows, customer after customer.
        variants: (kernel, checkpointing, compiled): the first with all sizes and against PEFT, the others with the first size, alone.
    """
    seconds = 0.05 if bench.arguments.smoke else 2.0
    for kernel, checkpointing, compiled in variants:
        plain = (kernel, checkpointing, compiled) == variants[0]
        what = f"train {name} {kernel}{' checkpointing' if checkpointing else ''}{' compiled' if compiled else ''}"
        if kernel in GPU_ONLY and bench.device.type != "cuda":
            bench.add({"what": what, "left_out": "needs a GPU"})
            continue
        for customers, batch in sizes if plain else sizes[:1]:
            sized = f"{what} {customers}x{batch}"
            smoke = bench.arguments.smoke
            # Compiling a block and its backward pass takes a minute or so.
            compiles = not smoke and (compiled or (plain and (customers, batch) in (sizes[0], sizes[-1])))
            if not bench.enough(sized, bench.arguments.rounds * 4 * seconds + (0 if smoke else 90 if compiles else 10)):
                continue
            with bench.surviving(sized):
                model = make(shape, bench.device)
                size = roofline.Size.of(model.config)
                weights = sum(p.nbytes for p in model.parameters()) / 2**30
                others = pefts(model, shape, bench, compiles) if plain else {}
                base = attach(model, attention=kernel)
                if checkpointing:
                    base.checkpoint_gradients()
                if compiled:
                    compile_blocks(model)
                kinds = {"ours": partial(our_step, base, shape, customers, batch, length)}
                kinds |= {kind: partial(peft_step, other, shape, batch, length) for kind, other in others.items()}
                found = bench.in_turn(sized, kinds, seconds)
                fastest = min((measured["seconds"] for kind, measured in found.items() if kind != "ours"), default=None)
                for kind, measured in found.items():
                    many = customers if kind == "ours" else 1
                    tokens = many * batch * length
                    work = size.training_flops([(length, length // 2)] * (many * batch), PREFIX)
                    bench.add({
                        "what": sized, "kind": kind, "customers": customers, "batch": batch, "length": length, "kernel": kernel,
                        "checkpointing": checkpointing, "compiled": compiled, **measured,
                        "base_gib": weights, "tokens_per_second": tokens / measured["seconds"],
                        "share_of_peak": work / measured["seconds"] / bench.peak,
                        "against_peft": fastest * customers / measured["seconds"] if fastest is not None and kind == "ours" else None,
                    })  # fmt: skip
                del model, others, base, kinds


def decode(bench: Bench, name: str, shape: Shape, customers: int, prompt: int, tokens: int) -> None:
    """Rows of `decode` for one shape: one answer for each customer."""
    what = f"decode {name} {customers} customers"
    if not bench.enough(what, 45 * (not bench.arguments.smoke)):
        return
    with bench.surviving(what), torch.inference_mode():
        model = make(shape, bench.device)
        prompts = [row.prompt_ids for row in rows_of(shape, customers, 2 * prompt)]
        other = twin(model, shape, bench.device)
        base = attach(model)
        prefixes = [Loaded(from_random(base.sites, PREFIX, i)).to(base.device, torch.bfloat16) for i in range(customers)]

        def together() -> float:
            decoder = Decoder(base, _Tokens(), max_rows=customers, max_tokens=10**9)
            decoder.ends = []  # every answer has all its tokens
            requests = [Request(p, Members((f,)), Decoding(tokens)) for p, f in zip(prompts, prefixes, strict=True)]
            for request in requests:
                decoder.submit(request)
            while decoder.busy:
                decoder.step()
            assert all(len(request.tokens) == tokens for request in requests)
            return 0.0

        prefixed: Any = get_peft_model(other, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
        prefixed.eval()
        prefixed.generation_config.eos_token_id = None
        some = prompts[: min(4, customers)]  # each customer takes the same time

        def one_by_one() -> float:
            for ids in some:
                given = torch.tensor([ids], device=bench.device)
                prefixed.generate(
                    input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, pad_token_id=0
                )
            return 0.0

        found = bench.in_turn(what, {"ours": lambda: together, "peft": lambda: one_by_one}, 0.0)
        answers = {"ours": customers, "peft": len(some)}
        rates = {kind: answers[kind] * tokens / measured["seconds"] for kind, measured in found.items()}
        for kind, rate in rates.items():
            bench.add({
                "what": what, "kind": kind, "customers": customers, "prompt": prompt, "new_tokens": tokens, **found[kind],
                "tokens_per_second": rate, "against_peft": rate / rates["peft"] if kind == "ours" and "peft" in rates else None,
            })  # fmt: skip


def show(bench: Bench) -> None:
    """The table, on standard error, where the lines of JSON are not."""
    of, packages = bench.setting["machine"], bench.setting["versions"]
    print(f"\n{of['gpu'] or of['cpu']}, {packages}: bfloat16 peak {bench.peak / 1e12:,.1f} TFLOP/s", file=sys.stderr)
    print(f"{'':44}  kind             tokens/s  of peak  peak GiB  against PEFT", file=sys.stderr)
    for row in bench.rows:
        if "kind" not in row:
            print(f"{row['what']:44}  {row.get('left_out') or row['failed']}", file=sys.stderr)
            continue
        share = f"{row['share_of_peak']:7.1%}" if row.get("share_of_peak") is not None else " " * 7
        memory = f"{row['memory_gib']:8.1f}" if row["memory_gib"] is not None else " " * 8
        ratio = f"{row['against_peft']:12.2f}" if row["against_peft"] is not None else ""
        print(
            f"{row['what']:44}  {row['kind']:13}  {row['tokens_per_second']:10,.0f}  {share}  {memory}  {ratio}", file=sys.stderr
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: llama-8b, llama-1b, qwen-32b")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=512, help="tokens of a training row")
    parser.add_argument("--json", type=Path, help="append the lines to this file too")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a processor")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke runs tiny shapes on a processor")
    transformers.utils.logging.set_verbosity_error()
    bench = Bench(arguments)
    plain, flash, flex = ((kernel, False, False) for kernel in ("sdpa", "flash_attention_2", "flex_attention"))
    checkpointing, compiled = ("flash_attention_2", True, False), ("flash_attention_2", False, True)
    if arguments.smoke:
        for name, shape in TINY.items():
            train(bench, name, shape, 32, [(4, 2), (8, 1)], [plain, ("sdpa", True, False), flash])
            decode(bench, name, shape, 4, 8, 4)
    for name in [] if arguments.smoke else arguments.shape or ["llama-8b", "llama-1b", "qwen-32b"]:
        shape, length = SHAPES[name], arguments.length
        if name == "qwen-32b":  # 61 GiB of weights: trained on the one card, and no more
            train(bench, name, shape, length, [(8, 1)], [checkpointing])
            continue
        train(bench, name, shape, length, [(1, 16), (16, 1), (64, 1)], [flash, checkpointing, plain, compiled, flex])
        decode(bench, name, shape, 64, 128, 64)
    show(bench)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
