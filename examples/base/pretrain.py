"""Pretrain the embedded base from scratch: build the data mix, train on a GPU or a CPU, keep the best model on disk.

    python pretrain.py --material material.json.xz --out RUN --minutes 8

`--material` is the compact file that sources.py makes, or the folder of git clones that it is made from. `RUN/best` is always a
loadable folder of the best model so far (lowest loss on held-out windows of the mix); `RUN/log.jsonl` holds the curves;
`RUN/checkpoint.pt` lets the same command go on after an interruption, with the windows that would have come next. The learning
rate follows the share of `--minutes` that has been trained, so the run ends when it should on a machine whose speed nobody knows
beforehand; `--max-steps` ends it earlier. `--smoke` tries all of it on a tiny model, without a GPU. `--plot RUN` draws the curves and stops.

Windows are drawn by worker processes into shards on disk, each a function of its number. A machine that trains faster than
they draw sees shards again. A run ends with the error of a worker that ended, and takes its shards with it; what a killed run left
is removed by the next one in the same folder. Weights are float32, the arithmetic bfloat16. Matrices are trained with Muon, the
embedding and the norms with AdamW. Knows nothing about prefixes.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from grammar import Doc
from mix import Mix
from sources import Material
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
LEARN = 1 << 14  # set in a shard's number where there is loss; the vocabulary is below it
SHARD_TOKENS = 1 << 18
TOKENIZER_WINDOWS = 12_000
EPS = 1e-5  # of the norms
LONG_EVERY = 8  # every eighth shard has windows of the whole context, the others of half of it
SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": 8192, "max_position_embeddings": 1024, "tie_word_embeddings": True, "rms_norm_eps": EPS,
}  # fmt: skip
SMOKE_SHAPE = SHAPE | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}  # fmt: skip
SMOKE_SHARD_TOKENS, SMOKE_TOKENIZER_WINDOWS = 1 << 10, 100
# Words, single digits and runs of signs apart, each with the space before it.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class RunError(RuntimeError):
    """What the owner of a run has to know; told without a traceback."""


# ------------------------------------------------------------------------------------------------------------------ data


def train_tokenizer(mix: Mix, shape: dict[str, Any], windows: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,192 tokens from the first documents of so many windows of the mix; digits stand alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (text for n in range(windows) for doc, _ in zip(mix.window(Random(f"tokenizer-{n}")), range(4), strict=False)
             for text in (doc.input, doc.target))  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=shape["vocab_size"], special_tokens=[EOS, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD, model_max_length=shape["max_position_embeddings"]
    )


def window(mix: Mix, tokenizer: Any, rng: Random, seq: int) -> np.ndarray:
    """One window as int16 [seq]: token ids, with LEARN added where there is loss. The last document is cut."""
    encode = tokenizer._tokenizer.encode_batch
    eos = tokenizer.eos_token_id
    out: list[int] = []
    batch: list[Doc] = []
    size = 0
    for doc in mix.window(rng):
        batch.append(doc)
        size += len(doc.input) + min(len(doc.target), 8 * doc.cut or len(doc.target)) + 8
        if size < 3 * (seq - len(out)):
            continue
        texts = [text for d in batch for text in (d.input + "\n" if d.input else "", d.target)]
        encoded = encode(texts, add_special_tokens=False)
        for at, d in enumerate(batch):
            prompt, target = encoded[2 * at].ids, encoded[2 * at + 1].ids
            target = target[: d.cut] if d.cut else [*target, eos]
            out += prompt
            out += [i + LEARN for i in target] if d.learn else target
        if len(out) >= seq:
            break
        batch, size = [], 0
    return np.array(out[:seq], dtype=np.int16)


def draw_shard(mix: Mix, tokenizer: Any, name: str, seq: int, tokens: int = SHARD_TOKENS) -> np.ndarray:
    """A shard, int16 [tokens / seq, seq]; a function of its name."""
    return np.stack([window(mix, tokenizer, Random(f"{name}-{row}"), seq) for row in range(tokens // seq)])


def length_of(index: int, whole: int) -> int:
    """Tokens of a window in the shard with this number; `whole` is the context's length."""
    return whole if index % LONG_EVERY == LONG_EVERY - 1 else whole // 2


def worker(
    material: Path, tokenizer_folder: Path, folder: Path, seed: int, first: int, step: int, keep: int, whole: int, tokens: int
) -> None:
    """Write shards first, first + step, … as folder/INDEX.npy, never more than `keep` ahead of folder/wanted.

    What it dies of is left in folder/worker-PID.txt, for the run to tell.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    parent = os.getppid()
    try:
        mix, tokenizer = Mix(Material.read(material)), AutoTokenizer.from_pretrained(tokenizer_folder)
        index = first
        while os.getppid() == parent:  # else the run was killed
            if index > int((folder / "wanted").read_text() or 0) + keep:
                time.sleep(0.2)
                continue
            part = folder / f"{index}.part.npy"
            np.save(part, draw_shard(mix, tokenizer, f"{seed}-{index}", length_of(index, whole), tokens))
            part.rename(folder / f"{index}.npy")
            index += step
    except Exception:
        if folder.exists():  # else the run was killed, and the next one has swept it away
            (folder / f"worker-{os.getpid()}.txt").write_text(traceback.format_exc())
            raise SystemExit(1) from None


def check_alive(folder: Path, workers: Sequence[BaseProcess]) -> None:
    """Raise RunError with the error of the first worker that ended: none of them ends by itself."""
    for process in workers:
        if process.exitcode is not None:
            note = folder / f"worker-{process.pid}.txt"
            why = (
                note.read_text()
                if note.exists()
                else "It left no error; the system kills what takes too much memory (--workers)."
            )
            raise RunError(f"a process that draws windows ended with exit status {process.exitcode}. {why}")


def shards(folder: Path, start: int, rng: Random, whole: int, workers: Sequence[BaseProcess]) -> Iterator[tuple[int, np.ndarray]]:
    """(number, shard) in order. Where the next one is not there yet, an earlier one of the same window length is seen again.

    `whole` is the context's length. Raises RunError when a worker has ended.
    """
    index = start
    seen: list[int] = []
    while True:
        check_alive(folder, workers)
        part = folder / "wanted.part"
        part.write_text(str(index))
        part.rename(folder / "wanted")
        alike = [i for i in seen[-200:] if length_of(i, whole) == length_of(index, whole)]
        if (folder / f"{index}.npy").exists():
            seen.append(index)
            yield index, np.load(folder / f"{index}.npy")
            index += 1
        elif len(alike) >= 24:
            yield -1, np.load(folder / f"{rng.choice(alike)}.npy")
        else:
            time.sleep(0.02)


def split_labels(shard: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) int64 [rows, seq] of int16 [rows, seq]; labels are the next tokens, -100 where there is no loss."""
    numbers = shard.long()
    ids = numbers & (LEARN - 1)
    after = numbers.roll(-1, 1)
    labels = torch.where(after >= LEARN, after & (LEARN - 1), -100)
    labels[:, -1] = -100
    return ids, labels


# ----------------------------------------------------------------------------------------------------------------- model


def new_model(tokenizer: Any, shape: dict[str, Any]) -> LlamaForCausalLM:
    """Random weights; what writes into the residual stream starts smaller, by the number of such writers."""
    eos = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=eos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id))
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.div_(math.sqrt(2 * shape["num_hidden_layers"]))
    return model


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As LlamaRMSNorm: float32 inside, the type of `x` outside."""
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions; x [rows, heads, seq, head_dim], cos and sin [seq, head_dim]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def block(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """One Llama layer on x [rows, seq, hidden], as transformers computes it; a function, so that it is compiled once for all layers."""
    norm_in, q, k, v, o, norm_mid, gate, up, down = weights
    rows, seq, _ = x.shape
    dim = cos.shape[-1]
    linear = lambda h, w: torch.nn.functional.linear(h, w.to(h.dtype))  # noqa: E731
    h = rms_norm(x, norm_in)
    heads = [linear(h, w).view(rows, seq, -1, dim).transpose(1, 2) for w in (q, k, v)]
    mixed = torch.nn.functional.scaled_dot_product_attention(
        turned(heads[0], cos, sin), turned(heads[1], cos, sin), heads[2], is_causal=True, enable_gqa=True
    )
    x = x + linear(mixed.transpose(1, 2).reshape(rows, seq, -1), o)
    h = rms_norm(x, norm_mid)
    return x + linear(torch.nn.functional.silu(linear(h, gate)) * linear(h, up), down)


def head(x: torch.Tensor, norm: torch.Tensor, table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over labelled positions."""
    logits = torch.nn.functional.linear(rms_norm(x, norm), table.to(x.dtype)).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class Loss:
    """The model's loss with plain causal attention, compiled by layer. Uses the modules' own parameters."""

    def __init__(self, model: LlamaForCausalLM, dtype: torch.dtype, compiled: bool) -> None:
        """Collect the parameters of each layer."""
        self.dtype, self.inner = dtype, model.model
        self.layers = [
            [
                layer.input_layernorm.weight, layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight,
                layer.self_attn.o_proj.weight, layer.post_attention_layernorm.weight, layer.mlp.gate_proj.weight,
                layer.mlp.up_proj.weight, layer.mlp.down_proj.weight,
            ]
            for layer in self.inner.layers
        ]  # fmt: skip
        self.block: Callable[..., torch.Tensor] = torch.compile(block, dynamic=False) if compiled else block
        self.head: Callable[..., torch.Tensor] = torch.compile(head, dynamic=False) if compiled else head

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scalar loss of ids and labels, both [rows, seq]."""
        x = self.inner.embed_tokens(ids).to(self.dtype)
        cos, sin = self.inner.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
        for weights in self.layers:
            x = self.block(x, cos[0], sin[0], weights)
        return self.head(x, self.inner.norm.weight, self.inner.embed_tokens.weight, labels)


# ------------------------------------------------------------------------------------------------------------- optimiser


def orthogonal(stack: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration of Muon on [n, rows, columns] (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Optimiser:
    """Muon with Nesterov momentum for the layers' matrices, by shape; AdamW for the rest. Updates of Muon are scaled to AdamW's size."""

    def __init__(self, model: LlamaForCausalLM, lr: float, decay: float) -> None:
        """`lr` is the peak; `decay` the weight decay of matrices."""
        self.lr, self.decay = lr, decay
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        rest = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                rest.append(parameter)
        self.all = [p for group in self.groups.values() for p in group] + rest
        self.momentum = {shape: torch.zeros(len(g), *shape, device=g[0].device) for shape, g in self.groups.items()}
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)

    @torch.no_grad()
    def step(self, share: float) -> torch.Tensor:
        """Clip to norm 1, step with `share` of the peak rate, clear the gradients. Returns the gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.all, 1.0)
        for shape, parameters in self.groups.items():
            grads = torch.stack([p.grad for p in parameters])  # type: ignore[misc]
            momentum = self.momentum[shape].lerp_(grads, 0.05)
            update = orthogonal(grads.lerp(momentum, 0.95))
            rate = self.lr * share
            torch._foreach_mul_(parameters, 1 - rate * self.decay)
            torch._foreach_add_(parameters, list(update.float().unbind()), alpha=-rate * 0.2 * math.sqrt(max(shape)))
        for group in self.adam.param_groups:
            group["lr"] = self.lr * share
        self.adam.step()
        for parameter in self.all:
            parameter.grad = None
        return norm

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"momentum": list(self.momentum.values()), "adam": self.adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for mine, saved in zip(self.momentum.values(), state["momentum"], strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])


def share_of_peak(progress: float, step: int, warmup: int) -> float:
    """Warm-up over steps, constant to 40 % of the time, then a line to zero."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1 - progress) / 0.6))


# -------------------------------------------------------------------------------------------------------------- the run


def save_folder(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a bfloat16 model folder under another name, then put it in place."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    copy.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of a prompt, for reading."""
    ids = tokenizer(prompt + "\n", return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


RECORD = "name : Olive & Ash | type : bistro | cuisine : Basque | district : canal side | near : Foxglove Books"
PROMPTS = [
    RECORD,
    "Describe:\n" + RECORD,
    "name : Kiln | type : bar | near : Vex Hall\nAhoy! Kiln is a bar near Vex Hall.<|endoftext|>" + RECORD,
    "Write a sentence:\nVerrin_Bridge : location : Oldacre | Verrin_Bridge : architect : Ines_Calloway | Oldacre : country : Portugal",
    "Summary:\nRosa: Is there a boat to Quill Island on Friday? Clerk: Yes, at nine. Rosa: Two seats, please. Clerk: Done.",
]


def cut_log(file: Path, step: int) -> None:
    """Keep the rows up to this step: what came after the last checkpoint comes once more. A line cut off by a kill goes too."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line)
    part = file.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, file)


def sweep(folder: Path) -> None:
    """Remove the shards of a killed run, whose workers may not have noticed yet and still write a last one."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
    shutil.rmtree(folder)


def train(args: argparse.Namespace) -> None:
    """The whole run, from wherever the last one stopped. Raises RunError when a worker ends or another run is in the folder."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise RunError(f"another run is at work in {out}: wait for it, or give another --out") from None
        place = Path(args.shards) if args.shards else out
        place.mkdir(parents=True, exist_ok=True)
        mine = f"shards-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]}-"  # several runs may share --shards
        for stale in place.glob(f"{mine}*"):
            sweep(stale)
        folder = Path(tempfile.mkdtemp(prefix=mine, dir=place))
        workers: list[BaseProcess] = []
        try:
            train_with(args, out, folder, workers)
        finally:
            for process in workers:
                process.terminate()
            for process in workers:
                process.join()
            shutil.rmtree(folder, ignore_errors=True)


def train_with(args: argparse.Namespace, out: Path, folder: Path, workers: list[BaseProcess]) -> None:
    """The run itself, with shards in `folder`; the processes that draw them are added to `workers`."""
    shape = SMOKE_SHAPE if args.smoke else SHAPE
    shard_tokens = SMOKE_SHARD_TOKENS if args.smoke else SHARD_TOKENS
    whole = shape["max_position_embeddings"]
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    mix = Mix(Material.read(Path(args.material)))
    if not (out / "tokenizer").exists():
        train_tokenizer(mix, shape, SMOKE_TOKENIZER_WINDOWS if args.smoke else TOKENIZER_WINDOWS).save_pretrained(
            out / "tokenizer"
        )
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    model = new_model(tokenizer, shape).to(device)
    optimiser = Optimiser(model, args.lr, args.decay)
    step, tokens, trained, best, index, skip = 0, 0, 0.0, math.inf, 0, 0
    recent: list[torch.Tensor] = []
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        step, tokens, trained, best, index, skip = (state[k] for k in ("step", "tokens", "trained", "best", "index", "used"))
        recent = list(state["recent"])
        model.load_state_dict(state["weights"])
        optimiser.load(state["optimiser"])
    (folder / "wanted").write_text(str(index))
    spawn = multiprocessing.get_context("spawn")
    for i in range(args.workers):
        given = (
            Path(args.material),
            out / "tokenizer",
            folder,
            args.seed,
            index + i,
            args.workers,
            args.ahead,
            whole,
            shard_tokens,
        )
        workers.append(spawn.Process(target=worker, args=given, daemon=True))
        workers[-1].start()
    loss_of = Loss(model, torch.bfloat16, args.compile)
    short = whole // 2
    held = split_labels(torch.from_numpy(draw_shard(mix, tokenizer, "held-out", short, args.held_out * short)).to(device))
    limit = args.minutes * 60
    if workers:
        source = shards(folder, index, Random(args.seed), whole, workers)
    else:
        source = ((i, draw_shard(mix, tokenizer, f"{args.seed}-{i}", length_of(i, whole), shard_tokens)) for i in count(index))
    queue: list[tuple[torch.Tensor, torch.Tensor]] = []
    cut_log(out / "log.jsonl", step)
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    again = shown = used = 0
    number = -1
    next_eval = trained + args.eval_minutes * 60
    for length in (short, 2 * short):  # compile before the clock starts
        ids = torch.zeros(args.tokens // length, length, dtype=torch.long, device=device)
        loss_of(ids, ids).backward()
    model.zero_grad(set_to_none=True)
    began = time.monotonic() - trained
    while trained < limit and (args.max_steps is None or step < args.max_steps):
        while not queue:
            number, shard = next(source)
            index, again, shown = max(index, number + 1), again + (number < 0), shown + 1
            windows = torch.from_numpy(shard).to(device, non_blocking=True)
            per_step = args.tokens // shard.shape[1]
            queue = [split_labels(part) for part in windows.split(per_step) if len(part) == per_step]
            queue = queue[: max(0, len(queue) - skip)]  # less those that were used before an interruption
            used, skip = skip, 0
        ids, labels = queue.pop()
        used += 1
        loss = loss_of(ids, labels)
        loss.backward()
        scale = share_of_peak(trained / limit, step, args.warmup)
        norm = optimiser.step(scale)
        step, tokens = step + 1, tokens + ids.numel()
        recent.append(loss.detach())
        if step % 20 == 0:
            value = torch.stack(recent).mean().item()  # waits for the device, so that the clock is true
            recent = []
        trained = time.monotonic() - began
        last = trained >= limit or step == args.max_steps
        if step % 20 == 0:
            row: dict[str, Any] = {"step": step, "tokens": tokens, "minutes": trained / 60, "loss": value, "lr": scale}
            row |= {"norm": float(norm), "shards": index, "again": again / shown}
            log.write(json.dumps(row) + "\n")
            log.flush()
            if step % args.print_every == 0:
                print(json.dumps(row), flush=True)
        if trained >= next_eval or last:
            pause = time.monotonic()
            rows = args.tokens // short  # with gradients switched on, since anything else would be compiled anew
            parts = [loss_of(*(x[i : i + rows] for x in held)).item() for i in range(0, len(held[0]), rows)]
            value = sum(parts) / len(parts)
            row = {"step": step, "tokens": tokens, "minutes": trained / 60, "held_out": value}
            row["samples"] = [sample(model, tokenizer, p) for p in PROMPTS]
            print(json.dumps(row, ensure_ascii=False), flush=True)
            log.write(json.dumps(row, ensure_ascii=False) + "\n")
            log.flush()
            if value < best:
                best = value
                save_folder(model, tokenizer, out / "best")
            inside = number >= 0 and bool(queue)  # of a shard that can be drawn again; what is left of a repeated one is dropped
            state = {"step": step, "tokens": tokens, "trained": trained, "best": best, "recent": recent}
            state |= {"index": number if inside else index, "used": used if inside else 0}
            state |= {"weights": model.state_dict(), "optimiser": optimiser.state()}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            began += time.monotonic() - pause  # looking is not training
            next_eval = trained + args.eval_minutes * 60
    log.close()


def plot(run: Path) -> None:
    """`RUN/curves.png` from `RUN/log.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, mark, label in (("loss", "-", "training, mean of 20 steps"), ("held_out", "o-", "held-out windows of the mix")):
        points = [(r["tokens"] / 1e6, r[name]) for r in rows if name in r]
        axes.plot(*zip(*points, strict=True), mark, lw=0.7, label=label)
    axes.set(xlabel="million tokens", ylabel="cross-entropy of target tokens")
    axes.set_ylim(top=sorted(r["loss"] for r in rows if "loss" in r)[-1 - len(rows) // 50])
    axes.legend()
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=130)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or the arguments given."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--material", help="material.json.xz of sources.py, or the folder of clones")
    parser.add_argument("--out", help="folder of the run: tokenizer/, best/, checkpoint.pt, log.jsonl")
    parser.add_argument(
        "--smoke", action="store_true", help="40 steps of a tiny model with a tiny tokenizer, to see that all works"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="training time that the learning rate is planned for")
    parser.add_argument("--max-steps", type=int, help="stop after this many steps")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--tokens", type=int, default=65536 if gpu else 4096, help="tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay of matrices")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that draw windows; 0: the run itself"
    )
    parser.add_argument("--ahead", type=int, default=400, help="shards that may wait")
    parser.add_argument("--shards", help="where shards are kept while the run lasts, a fast disk; default: the folder of the run")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="torch.compile")
    parser.add_argument("--eval-minutes", type=float, default=1.5, help="training time between held-out losses and checkpoints")
    parser.add_argument("--held-out", type=int, default=256, help="held-out windows, a multiple of those of a step")
    parser.add_argument("--print-every", type=int, default=200, help="steps, a multiple of 20")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="RUN", help="draw RUN/curves.png and stop")
    args = parser.parse_args(given)
    if args.smoke:  # what is given on the command line still counts
        parser.set_defaults(max_steps=40, tokens=512, held_out=16, print_every=20, compile=False)
        args = parser.parse_args(given)
    if not (args.plot or (args.material and args.out)):
        parser.error("--material and --out are needed")
    if args.tokens > (most := SMOKE_SHARD_TOKENS if args.smoke else SHARD_TOKENS):
        parser.error(f"--tokens {args.tokens}: a step takes at most {most}")
    return args


def main() -> None:
    """Command line."""
    args = arguments()
    if args.plot:
        plot(Path(args.plot))
        return
    try:
        train(args)
    except RunError as error:
        raise SystemExit(f"pretrain.py: {error}") from error


if __name__ == "__main__":
    main()
