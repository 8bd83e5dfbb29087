"""Pretrain the embedded base from scratch: build the data mix, train on a GPU or a CPU, keep the best model on disk.

    python pretrain.py --material material.json.xz --out RUN --minutes 8

`--material` is the compact file that sources.py makes, or the folder of git clones that it is made from. `RUN/best` is always a
loadable folder of the best model so far (lowest loss on held-out windows of the mix); `RUN/checkpoint.pt` lets the same command go
on after an interruption. The learning rate follows the share of `--minutes` that has been trained, so the run ends when it
should on a machine whose speed nobody knows beforehand; `--max-steps` ends it earlier (a smoke run). `--plot RUN` draws the curves and stops.

Windows are drawn by worker processes into shards on disk, each a function of its number. A machine that trains faster than
they draw sees shards again. Weights are float32, the arithmetic bfloat16. Matrices are trained with Muon, the embedding and the norms
with AdamW. Knows nothing about prefixes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
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
LONG_EVERY = 8  # every eighth shard has windows of the whole context, the others of half of it
SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": 8192, "max_position_embeddings": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Words, single digits and runs of signs apart, each with the space before it.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ------------------------------------------------------------------------------------------------------------------ data


def train_tokenizer(mix: Mix) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,192 tokens from 12,000 windows of the mix; digits stand alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (text for n in range(12_000) for doc, _ in zip(mix.window(Random(f"tokenizer-{n}")), range(4), strict=False)
             for text in (doc.input, doc.target))  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=[EOS, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD, model_max_length=SHAPE["max_position_embeddings"]
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


def draw_shard(mix: Mix, tokenizer: Any, name: str, seq: int) -> np.ndarray:
    """A shard, int16 [SHARD_TOKENS / seq, seq]; a function of its name."""
    return np.stack([window(mix, tokenizer, Random(f"{name}-{row}"), seq) for row in range(SHARD_TOKENS // seq)])


def length_of(index: int) -> int:
    """Tokens of a window in the shard with this number."""
    whole = SHAPE["max_position_embeddings"]
    return whole if index % LONG_EVERY == LONG_EVERY - 1 else whole // 2


def worker(material: Path, tokenizer_folder: Path, folder: Path, seed: int, first: int, step: int, keep: int) -> None:
    """Write shards first, first + step, … as folder/INDEX.npy, never more than `keep` ahead of folder/wanted."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    mix, tokenizer = Mix(Material.read(material)), AutoTokenizer.from_pretrained(tokenizer_folder)
    index, parent = first, os.getppid()
    while os.getppid() == parent:  # else the run was killed
        if index > int((folder / "wanted").read_text() or 0) + keep:
            time.sleep(0.2)
            continue
        part = folder / f"{index}.part.npy"
        np.save(part, draw_shard(mix, tokenizer, f"{seed}-{index}", length_of(index)))
        part.rename(folder / f"{index}.npy")
        index += step


def shards(folder: Path, start: int, rng: Random) -> Iterator[tuple[int, np.ndarray]]:
    """(number, shard) in order. Where the next one is not there yet, an earlier one of the same window length is seen again."""
    index = start
    seen: list[int] = []
    while True:
        part = folder / "wanted.part"
        part.write_text(str(index))
        part.rename(folder / "wanted")
        alike = [i for i in seen[-200:] if length_of(i) == length_of(index)]
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


def new_model(tokenizer: Any) -> LlamaForCausalLM:
    """Random weights; what writes into the residual stream starts smaller, by the number of such writers."""
    eos = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=eos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id))
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.div_(math.sqrt(2 * SHAPE["num_hidden_layers"]))
    return model


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As LlamaRMSNorm: float32 inside, the type of `x` outside."""
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + SHAPE["rms_norm_eps"]))).to(x.dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions; x [rows, heads, seq, head_dim], cos and sin [seq, head_dim]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def block(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """One Llama layer on x [rows, seq, hidden], as transformers computes it; a function, so that it is compiled once for all layers."""
    norm_in, q, k, v, o, norm_mid, gate, up, down = weights
    rows, seq, _ = x.shape
    dim = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
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


def train(args: argparse.Namespace) -> None:
    """The whole run, from wherever the last one stopped."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="shards-", dir=args.shards))
    mix = Mix(Material.read(Path(args.material)))
    if not (out / "tokenizer").exists():
        train_tokenizer(mix).save_pretrained(out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    model = new_model(tokenizer).to(device)
    optimiser = Optimiser(model, args.lr, args.decay)
    step, tokens, trained, best, index = 0, 0, 0.0, math.inf, 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        step, tokens, trained, best, index = (state[k] for k in ("step", "tokens", "trained", "best", "index"))
        model.load_state_dict(state["weights"])
        optimiser.load(state["optimiser"])
    (folder / "wanted").write_text(str(index))
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=worker,
            args=(Path(args.material), out / "tokenizer", folder, args.seed, index + i, args.workers, args.ahead),
            daemon=True,
        )
        for i in range(args.workers)
    ]
    for process in workers:
        process.start()
    loss_of = Loss(model, torch.bfloat16, args.compile)
    short = SHAPE["max_position_embeddings"] // 2
    held = split_labels(torch.from_numpy(draw_shard(mix, tokenizer, "held-out", short)[: args.held_out]).to(device))
    limit = args.minutes * 60
    source = shards(folder, index, Random(args.seed))
    queue: list[tuple[torch.Tensor, torch.Tensor]] = []
    log = (out / "log.jsonl").open("a")
    recent: list[torch.Tensor] = []
    again = shown = 0
    next_eval = trained + args.eval_minutes * 60
    for length in (short, 2 * short):  # compile before the clock starts
        ids = torch.zeros(args.tokens // length, length, dtype=torch.long, device=device)
        loss_of(ids, ids).backward()
    model.zero_grad(set_to_none=True)
    began = time.monotonic() - trained
    while trained < limit and (args.max_steps is None or step < args.max_steps):
        if not queue:
            number, shard = next(source)
            index, again, shown = max(index, number + 1), again + (number < 0), shown + 1
            whole = torch.from_numpy(shard).to(device, non_blocking=True)
            per_step = args.tokens // shard.shape[1]
            queue = [split_labels(part) for part in whole.split(per_step) if len(part) == per_step]
        ids, labels = queue.pop()
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
            state = {"step": step, "tokens": tokens, "trained": trained, "best": best, "index": index}
            state |= {"weights": model.state_dict(), "optimiser": optimiser.state()}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            began += time.monotonic() - pause  # looking is not training
            next_eval = trained + args.eval_minutes * 60
    log.close()
    for process in workers:
        process.terminate()
    shutil.rmtree(folder, ignore_errors=True)


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


def main() -> None:
    """Command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--material", help="material.json.xz of sources.py, or the folder of clones")
    parser.add_argument("--out", help="folder of the run: tokenizer/, best/, checkpoint.pt, log.jsonl")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time that the learning rate is planned for")
    parser.add_argument("--max-steps", type=int, help="stop after this many steps")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--tokens", type=int, default=65536 if gpu else 4096, help="tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay of matrices")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that draw shards")
    parser.add_argument("--ahead", type=int, default=400, help="shards that may wait")
    parser.add_argument("--shards", help="where shards are kept while the run lasts; default: the system's temporary folder")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="torch.compile")
    parser.add_argument("--eval-minutes", type=float, default=1.5, help="training time between held-out losses and checkpoints")
    parser.add_argument("--held-out", type=int, default=256, help="held-out windows, a multiple of those of a step")
    parser.add_argument("--print-every", type=int, default=200, help="steps, a multiple of 20")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="RUN", help="draw RUN/curves.png and stop")
    args = parser.parse_args()
    if args.plot:
        plot(Path(args.plot))
    elif not (args.material and args.out):
        parser.error("--material and --out are needed")
    else:
        train(args)


if __name__ == "__main__":
    main()
