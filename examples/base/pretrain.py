"""Pretrain the embedded base: build the data mix from public repositories, train, keep the best model on disk.

    python pretrain.py --sources DIR --out RUN --minutes 70 [--init FOLDER] [--threads 2]

`DIR` holds git clones named as in README.md. `RUN/best` is always a loadable folder of the best model so far (lowest loss on
held-out draws of the mix); `RUN/checkpoint.pt` lets the same command go on after an interruption. The learning rate follows the
share of `--minutes` that has been trained, so the run ends when it should on a machine whose speed nobody knows beforehand.
`--max-steps` ends it earlier (a smoke run). Without `--init` a tokenizer is trained on the mix and the weights start at random.
`--plot RUN` draws the curves and stops.

Windows of `--seq` tokens begin with the beginning of a document and hold whole documents; the loss is on targets, on every
token of plain text. Weights are float32 masters with a bfloat16 working copy. Knows nothing about prefixes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from mix import Doc, Mix
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
LATE = 0.55  # share of the training time after which documents are drawn for the last part of a run
SHARD = 480  # windows made from one seed
SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": 8192, "max_position_embeddings": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
}  # fmt: skip


def train_tokenizer(mix: Mix) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,192 tokens from 40,000 documents of the mix."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random("tokenizer")
    texts = (text(doc) for _ in range(10_000) for doc, _ in zip(mix.docs(rng), range(4), strict=False))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=[EOS, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD, model_max_length=SHAPE["max_position_embeddings"]
    )


def text(doc: Doc) -> str:
    """A document as one string, without the end token."""
    return f"{doc.input}\n{doc.target}" if doc.input else doc.target


def windows(mix: Mix, tokenizer: Any, seed: str, count: int, seq: int, late: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` windows of `seq` tokens as (ids, labels), both [count, seq]; label -100 where there is no loss."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.full((count, seq), pad, dtype=torch.long)
    labels = torch.full((count, seq), -100, dtype=torch.long)
    encode = lambda s: tokenizer(s, add_special_tokens=False)["input_ids"]  # noqa: E731
    rng = Random(seed)
    for row in range(count):
        at = misses = 0
        for doc in mix.docs(rng, late):
            prompt = encode(doc.input + "\n") if doc.input else []
            target = [*encode(doc.target), eos]
            if at and at + len(prompt) + len(target) > seq:  # the next document may be shorter
                misses += 1
                if misses == 4 or seq - at < 24:
                    break
                continue
            whole = (prompt + target)[: seq - at]
            ids[row, at : at + len(whole)] = torch.tensor(whole)
            if len(prompt) < len(whole):
                labels[row, at + len(prompt) : at + len(whole)] = torch.tensor(whole[len(prompt) :])
            at += len(whole)
            if at >= seq - 8:
                break
    return ids, labels


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over labelled tokens; logits are made at labelled positions only."""
    keep = labels[:, 1:] != -100
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[keep]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels[:, 1:][keep])


class Masters:
    """Float32 copies of bfloat16 parameters and the AdamW that steps them."""

    def __init__(self, model: LlamaForCausalLM, lr: float, scratch: dict[str, torch.Tensor] | None) -> None:
        """Start from the parameters of `model`, or from `scratch` where given."""
        self.work = dict(model.named_parameters())
        start = scratch or self.work
        self.full = {n: start[n].detach().float().clone().requires_grad_() for n in self.work}
        wide, flat = [p for p in self.full.values() if p.ndim > 1], [p for p in self.full.values() if p.ndim == 1]
        groups = [{"params": wide, "weight_decay": 0.02}, {"params": flat, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.97), eps=1e-9)
        self.peak = lr

    def step(self, share_of_peak: float) -> float:
        """Clip to norm 1, step, copy back. Returns the gradient norm."""
        for name, parameter in self.work.items():
            self.full[name].grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.full.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak * share_of_peak
        self.optimiser.step()
        with torch.no_grad():
            for name, parameter in self.work.items():
                parameter.copy_(self.full[name])
        return float(norm)


def share_of_peak(progress: float, step: int, warmup: int = 60) -> float:
    """Warm-up over steps, constant to 35 % of the time, then a line to zero."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1 - progress) / 0.65))


def save_folder(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a model folder under another name, then put it in place."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, rows: int) -> float:
    """Mean loss over windows drawn with a seed that training never uses."""
    losses = [loss_of(model, ids[i : i + rows], labels[i : i + rows]).item() for i in range(0, len(ids), rows)]
    return sum(losses) / len(losses)


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of a prompt, for reading."""
    ids = tokenizer(prompt + "\n", return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


PROMPTS = [
    "name : Olive & Ash | type : bistro | cuisine : Basque | district : canal side | near : Foxglove Books",
    "Verrin_Bridge : location : Oldacre | Verrin_Bridge : architect : Ines_Calloway | Oldacre : country : Portugal",
]


def train(args: argparse.Namespace) -> None:
    """The whole run, from wherever the last one stopped."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    mix = Mix(Path(args.sources))
    print(json.dumps(mix.counts()), flush=True)
    scratch = None
    if args.init:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
        model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.bfloat16)
    else:
        tokenizer = train_tokenizer(mix)
        ends = {
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **ends))
        scratch = {n: p.detach().clone() for n, p in model.named_parameters()}
        model = model.to(torch.bfloat16)
    model.train()
    masters = Masters(model, args.lr, scratch)
    held = windows(mix, tokenizer, "held-out", args.held_out, args.seq, late=True)
    step, tokens, trained, best = 0, 0, 0.0, math.inf
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step, tokens, trained, best = state["step"], state["tokens"], state["trained"], state["best"]
        with torch.no_grad():
            for name, parameter in masters.full.items():
                parameter.copy_(state["weights"][name])
                masters.work[name].copy_(parameter)
        masters.optimiser.load_state_dict(state["optimiser"])
    per_shard = SHARD // args.rows
    limit = args.minutes * 60
    log = (out / "log.jsonl").open("a")
    next_eval = trained + args.eval_minutes * 60
    shard: tuple[torch.Tensor, torch.Tensor] | None = None
    recent: list[float] = []
    while trained < limit and (args.max_steps is None or step < args.max_steps):
        began = time.monotonic()
        if shard is None or step % per_shard == 0:
            shard = windows(mix, tokenizer, f"{args.seed}-{step // per_shard}", SHARD, args.seq, late=trained > LATE * limit)
        at = step % per_shard * args.rows
        ids, labels = shard[0][at : at + args.rows], shard[1][at : at + args.rows]
        loss = loss_of(model, ids, labels)
        loss.backward()
        scale = share_of_peak(trained / limit, step)
        norm = masters.step(scale)
        step, tokens = step + 1, tokens + int((ids != tokenizer.pad_token_id).sum())
        recent.append(loss.item())
        trained += time.monotonic() - began
        last = trained >= limit or step == args.max_steps
        if step % 10 == 0 or last:
            row = {
                "step": step,
                "tokens": tokens,
                "minutes": trained / 60,
                "loss": sum(recent) / len(recent),
                "lr": scale,
                "norm": norm,
            }
            recent = []
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if trained >= next_eval or last:
            began = time.monotonic()
            next_eval = trained + args.eval_minutes * 60
            model.eval()
            value = held_out_loss(model, *held, args.rows)
            row = {
                "step": step,
                "tokens": tokens,
                "minutes": trained / 60,
                "held_out": value,
                "samples": [sample(model, tokenizer, p) for p in PROMPTS],
            }
            print(json.dumps(row, ensure_ascii=False), flush=True)
            log.write(json.dumps(row, ensure_ascii=False) + "\n")
            log.flush()
            if value < best:
                best = value
                save_folder(model, tokenizer, out / "best")
            model.train()
            state = {
                "step": step,
                "tokens": tokens,
                "trained": trained + time.monotonic() - began,
                "best": best,
                "weights": masters.full,
                "optimiser": masters.optimiser.state_dict(),
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            trained += time.monotonic() - began
    log.close()


def plot(run: Path) -> None:
    """`RUN/curves.png` from `RUN/log.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(
        [r["tokens"] / 1e6 for r in rows if "loss" in r],
        [r["loss"] for r in rows if "loss" in r],
        lw=0.7,
        label="training, mean of 10 steps",
    )
    axes.plot(
        [r["tokens"] / 1e6 for r in rows if "held_out" in r],
        [r["held_out"] for r in rows if "held_out" in r],
        "o-",
        label="held-out draws of the mix",
    )
    axes.set(xlabel="million tokens", ylabel="cross-entropy of target tokens")
    axes.legend()
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", help="folder of git clones, named as in README.md")
    parser.add_argument("--out", help="folder of the run: best/, checkpoint.pt, log.jsonl")
    parser.add_argument("--init", help="model folder to start from; default: from scratch")
    parser.add_argument("--minutes", type=float, default=70.0, help="training time that the learning rate is planned for")
    parser.add_argument("--max-steps", type=int, help="stop after this many steps")
    parser.add_argument("--rows", type=int, default=16, help="windows a step")
    parser.add_argument("--seq", type=int, default=256, help="tokens a window")
    parser.add_argument("--lr", type=float, default=1.3e-3, help="peak learning rate")
    parser.add_argument("--eval-minutes", type=float, default=5.0, help="training time between held-out losses and checkpoints")
    parser.add_argument("--held-out", type=int, default=96, help="held-out windows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="RUN", help="draw RUN/curves.png and stop")
    args = parser.parse_args()
    if args.plot:
        plot(Path(args.plot))
    elif not (args.sources and args.out):
        parser.error("--sources and --out are needed")
    else:
        train(args)


if __name__ == "__main__":
    main()
