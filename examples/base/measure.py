"""What a base can be made to do: prefixes trained with plain PEFT, full fine-tuning as the ceiling, and the base alone, in BLEU.

    python measure.py --base FOLDER --data DIR [DIR ...] [--method none instruction prefix full] [--steps 600] [--device cuda]

Each DIR holds train.jsonl and dev.jsonl. Records are `{"input", "target"}` or `{"input", "references": [...]}`; the prompt is the
input and a newline, the target ends with the end-of-text token. A prefix starts from the keys and values that the frozen base computes for
`--init-text` (its first `--length` tokens, repeated if it has fewer); without the option, for the start of the first training
target. Every combination of folder, method and rate is one run; `--jobs` of them share the device. Prints one line of JSON for
each; `--outputs` keeps what was generated, for by_relation.py. Knows nothing of the pipeline: it is the independent check of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from random import Random
from typing import Any

import sacrebleu
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, get_linear_schedule_with_warmup

# none: the base alone; instruction: the base alone behind a line of instruction.
RATES = {"none": [0.0], "instruction": [0.0], "prefix": [0.1], "full": [5e-4]}


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, each with a list `references`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"input": r["input"], "references": r.get("references") or [r["target"]]} for r in rows]


def encode(tokenizer: Any, record: dict[str, Any], reference: str) -> tuple[list[int], list[int]]:
    """(prompt ids, target ids)."""
    prompt = tokenizer(record["input"] + "\n", add_special_tokens=False)["input_ids"]
    return prompt, [*tokenizer(reference, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def keys_and_values(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(key, value) of every layer, each [batch, heads_kv, tokens, head_dim]."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def start_from_text(model: Any, base: Any, tokenizer: Any, text: str, length: int) -> None:
    """Set PEFT's prefix to the keys and values that the base computes for the first `length` tokens of `text`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (ids * length)[:length]
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([ids], device=base.device), use_cache=True).past_key_values
        flat = [
            x[0].transpose(0, 1).reshape(length, -1) for pair in keys_and_values(cache) for x in pair
        ]  # [P, heads_kv * head_dim]
        weight = model.prompt_encoder["default"].embedding.weight
        weight.copy_(torch.cat(flat, dim=1).to(weight.dtype))


@torch.no_grad()
def generate(
    base: Any, prefix: list[tuple[torch.Tensor, torch.Tensor]], prompts: list[list[int]], eos: int, pad: int, limit: int
) -> list[list[int]]:
    """Greedy continuations of left-padded prompts after a prefix; positions count real tokens only."""
    batch, width, device = len(prompts), max(map(len, prompts)), base.device
    length = prefix[0][0].shape[2] if prefix else 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[1] * length + [0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix):
        cache.update(key.expand(batch, -1, -1, -1).clone(), value.expand(batch, -1, -1, -1).clone(), layer)
    columns = []
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    for _ in range(limit):
        logits = base(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        chosen = logits[:, -1].argmax(-1)
        columns.append(chosen)
        ended |= chosen == eos
        if ended.all():
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
    rows = torch.stack(columns, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def bleu(hypotheses: list[str], records: list[dict[str, Any]]) -> float:
    """sacrebleu with its defaults; records may differ in their number of references."""
    most = max(len(r["references"]) for r in records)
    columns = [[r["references"][i] if i < len(r["references"]) else None for r in records] for i in range(most)]
    return sacrebleu.corpus_bleu(hypotheses, columns).score


def run(job: tuple[argparse.Namespace, str, str, float]) -> str:
    """One folder, method and rate; the line to print."""
    args, folder, method, lr = job
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    dtype = torch.float32 if method == "full" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype).eval().to(args.device)
    train, dev = read(Path(folder) / "train.jsonl"), read(Path(folder) / "dev.jsonl")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    pairs = [encode(tokenizer, r, ref) for r in train for ref in r["references"]]
    pairs = [(p, t) for p, t in pairs if len(p) + len(t) <= 512]
    model: Any = base
    before = args.instruction + "\n" if method == "instruction" else ""
    if method == "prefix":
        model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.length))
        start_from_text(model, base, tokenizer, args.init_text or train[0]["references"][0], args.length)
    loss_sum, losses = 0.0, []
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=method == "full")
    if method in ("prefix", "full"):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimiser, min(30, args.steps // 10), args.steps)
        rng = Random(args.seed)
        order: list[int] = []
        for step in range(args.steps):
            if len(order) < args.batch:
                order += rng.sample(range(len(pairs)), len(pairs))
            chosen, order = [pairs[i] for i in order[: args.batch]], order[args.batch :]
            width = max(len(p) + len(t) for p, t in chosen)
            ids = torch.tensor([p + t + [pad] * (width - len(p) - len(t)) for p, t in chosen])
            labels = torch.tensor([[-100] * len(p) + t + [-100] * (width - len(p) - len(t)) for p, t in chosen])[:, 1:]
            mask = (torch.arange(width)[None] < torch.tensor([len(p) + len(t) for p, t in chosen])[:, None]).long()
            places = (labels != -100).nonzero(as_tuple=True)
            ids, mask, wanted = (x.to(args.device) for x in (ids, mask, labels[places]))
            past = model.get_prompt(batch_size=len(chosen)) if method == "prefix" else None
            if past is not None:
                mask = torch.cat([mask.new_ones(len(chosen), args.length), mask], dim=1)
            with autocast:
                hidden = base.model(input_ids=ids, attention_mask=mask, past_key_values=past).last_hidden_state
                logits = base.lm_head(hidden[places])  # target positions only: the vocabulary costs more than the blocks
            loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            loss_sum += loss.item()
            if (step + 1) % 50 == 0:
                losses.append(round(loss_sum / 50, 3))
                loss_sum = 0.0
    prefix: list[tuple[torch.Tensor, torch.Tensor]] = []
    if method == "prefix":
        past = model.get_prompt(batch_size=1)
        prefix = [(k.detach().to(dtype), v.detach().to(dtype)) for k, v in keys_and_values(past)]
    texts: list[str] = [""] * len(dev)
    order = sorted(range(len(dev)), key=lambda i: len(dev[i]["input"]))
    with autocast:
        for at in range(0, len(order), args.rows):
            rows = order[at : at + args.rows]
            prompts = [encode(tokenizer, {"input": before + dev[i]["input"]}, "")[0] for i in rows]
            for i, out in zip(rows, generate(base, prefix, prompts, eos, pad, args.max_new_tokens), strict=True):
                texts[i] = tokenizer.decode(out).strip()
    if args.outputs:
        args.outputs.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**r, "output": text}, ensure_ascii=False) + "\n" for r, text in zip(dev, texts, strict=True)]
        name = f"{Path(folder).name}-{method}-{lr:g}.jsonl"
        (args.outputs / name).write_text("".join(lines), encoding="utf-8")
    result = {
        "data": folder,
        "method": method,
        "length": args.length,
        "steps": args.steps if method in ("prefix", "full") else 0,
        "batch": args.batch,
        "lr": lr,
        "seed": args.seed,
        "bleu": round(bleu(texts, dev), 2),
        "losses": losses,
        "seconds": round(time.monotonic() - began),
        "samples": [[dev[i]["input"], texts[i]] for i in Random(1).sample(range(len(dev)), min(args.show, len(dev)))],
    }
    return json.dumps(result, ensure_ascii=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="folders with train.jsonl and dev.jsonl")
    parser.add_argument("--method", nargs="+", choices=list(RATES), default=["prefix"])
    parser.add_argument("--lr", nargs="+", help="rates to try, each method=rate; default: " + str(RATES))
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--init-text")
    parser.add_argument(
        "--instruction", default="Describe:", help="line that stands before each input of the method `instruction`"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rows", type=int, default=32, help="inputs decoded at a time")
    parser.add_argument("--max-new-tokens", type=int, default=90)
    parser.add_argument("--show", type=int, default=3, help="samples in the printed line")
    parser.add_argument("--outputs", type=Path, help="folder for every record's output, DATA-METHOD-RATE.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for given in args.lr or []:
        if given.split("=")[0] not in RATES or "=" not in given:
            parser.error(f"--lr {given}: give method=rate, with one of {', '.join(RATES)}")
    rates = {
        name: [float(r.split("=")[1]) for r in args.lr or [] if r.split("=")[0] == name] or own for name, own in RATES.items()
    }
    jobs = [(args, folder, method, lr) for method in args.method for lr in rates[method] for folder in args.data]
    if args.jobs == 1:
        for job in jobs:
            print(run(job), flush=True)
        return
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for line in pool.imap_unordered(run, jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
