"""What a base can be made to do: a prefix trained with plain PEFT, full fine-tuning as the ceiling, and the base alone, in BLEU.

    python measure.py --base FOLDER --train train.jsonl --dev dev.jsonl [--method prefix|full|none] [--steps 600]

Records are `{"input", "target"}` or `{"input", "references": [...]}`; the prompt is the input and a newline, the target ends with
the end-of-text token. The prefix starts from the keys and values that the frozen base computes for `--init-text` (its first
`--length` tokens, repeated if it has fewer); without the option, for the start of the first training target. Prints JSON.
Knows nothing of the pipeline: it is the independent check of it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import sacrebleu
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, get_linear_schedule_with_warmup


def read(path: str) -> list[dict[str, Any]]:
    """Records of a JSONL file, each with a list `references`."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
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
        cache = base(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
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
    batch, width = len(prompts), max(map(len, prompts))
    length = prefix[0][0].shape[2] if prefix else 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[1] * length + [0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix):
        cache.update(key.expand(batch, -1, -1, -1).clone(), value.expand(batch, -1, -1, -1).clone(), layer)
    out: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(batch))
    for _ in range(limit):
        logits = base(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        chosen = logits[:, -1].argmax(-1)
        for row in list(open_rows):
            if chosen[row] == eos:
                open_rows.remove(row)
            else:
                out[row].append(int(chosen[row]))
        if not open_rows:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
    return out


def bleu(hypotheses: list[str], records: list[dict[str, Any]]) -> float:
    """sacrebleu with its defaults; records may differ in their number of references."""
    most = max(len(r["references"]) for r in records)
    columns = [[r["references"][i] if i < len(r["references"]) else None for r in records] for i in range(most)]
    return sacrebleu.corpus_bleu(hypotheses, columns).score


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--method", choices=["prefix", "full", "none"], default="prefix")
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--init-text")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--lr", type=float, help="default: 1e-2 for a prefix, 5e-4 for full fine-tuning")
    parser.add_argument("--max-new-tokens", type=int, default=90)
    parser.add_argument("--show", type=int, default=3, help="samples in the printed line")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    dtype = torch.float32 if args.method == "full" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype).eval()
    train, dev = read(args.train), read(args.dev)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    pairs = [encode(tokenizer, r, ref) for r in train for ref in r["references"]]
    pairs = [(p, t) for p, t in pairs if len(p) + len(t) <= 512]
    model: Any = base
    lr = args.lr or (5e-4 if args.method == "full" else 1e-2)
    if args.method == "prefix":
        model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.length))
        start_from_text(model, base, tokenizer, args.init_text or train[0]["references"][0], args.length)
    loss_sum, losses = 0.0, []
    if args.method != "none":
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
            labels = torch.tensor([[-100] * len(p) + t + [-100] * (width - len(p) - len(t)) for p, t in chosen])
            mask = (torch.arange(width)[None] < torch.tensor([len(p) + len(t) for p, t in chosen])[:, None]).long()
            past = model.get_prompt(batch_size=len(chosen)) if args.method == "prefix" else None
            if past is not None:
                mask = torch.cat([mask.new_ones(len(chosen), args.length), mask], dim=1)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.method == "full"):
                hidden = base.model(input_ids=ids, attention_mask=mask, past_key_values=past).last_hidden_state
                keep = labels[:, 1:] != -100  # logits at target positions only: the vocabulary costs more than the blocks
                logits = base.lm_head(hidden[:, :-1][keep])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][keep])
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
    if args.method == "prefix":
        past = model.get_prompt(batch_size=1)
        prefix = [(k.to(dtype), v.to(dtype)) for k, v in keys_and_values(past)]
    texts: list[str] = [""] * len(dev)
    order = sorted(range(len(dev)), key=lambda i: len(dev[i]["input"]))
    with torch.autocast("cpu", torch.bfloat16, enabled=args.method == "full"):
        for at in range(0, len(order), 32):
            rows = order[at : at + 32]
            prompts = [encode(tokenizer, dev[i], "")[0] for i in rows]
            for i, out in zip(rows, generate(base, prefix, prompts, eos, pad, args.max_new_tokens), strict=True):
                texts[i] = tokenizer.decode(out).strip()
    result = {
        "train": args.train,
        "method": args.method,
        "length": args.length,
        "steps": args.steps,
        "batch": args.batch,
        "lr": lr,
        "seed": args.seed,
        "bleu": round(bleu(texts, dev), 2),
        "losses": losses,
        "seconds": round(time.monotonic() - began),
        "samples": [[dev[i]["input"], texts[i]] for i in Random(1).sample(range(len(dev)), min(args.show, len(dev)))],
    }
    print(json.dumps(result, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
