"""PEFT's PrefixTuning as those would use it whom PrefixFleet is compared with, at its best settings: a lean loop, and transformers' Trainer.

    python benchmarks/peers.py JOB.json        # whole customers in this process, as benchmarks/cost.py starts it

The base is loaded once a process, in the dtype given; customers come one after another. Settings that every user of the Trainer would find: rows of
like length together, no checkpoints, no logs, no evaluation during training, no workers for data, no pinned memory. The lean loop puts rows of like
length together too. Knows nothing of PrefixFleet.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = 10
LR = 0.1
SEED = 0
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Tokens of a row."""

    prompt_ids: list[int]
    target_ids: list[int]


def encoded(records: Sequence[dict[str, Any]], tokenizer: Any, most_input: int = 384, most_target: int = 128) -> list[Row]:
    """Tokens of records with `input` and `target`; those that are too long are left out."""
    prompts = tokenizer([record["input"] + "\n" for record in records], add_special_tokens=False)["input_ids"]
    targets = tokenizer([record["target"] for record in records], add_special_tokens=False)["input_ids"]
    pairs = zip(prompts, targets, strict=True)
    return [Row(p, [*t, tokenizer.eos_token_id]) for p, t in pairs if len(p) <= most_input and len(t) < most_target]


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def batch_of(rows: Sequence[Row], pad: int) -> dict[str, Any]:
    """Token ids, labels and mask, int64 [rows, tokens of the longest]."""
    import torch

    width = max(len(row.prompt_ids) + len(row.target_ids) for row in rows)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), IGNORED)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.target_ids)
        ids[i, :end] = torch.tensor(row.prompt_ids + row.target_ids)
        labels[i, start:end] = torch.tensor(row.target_ids)
        mask[i, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prefixed(model: Any) -> Any:
    """A new prefix on `model`."""
    from peft import PrefixTuningConfig, get_peft_model

    made: Any = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
    made.train()
    return made


def drawn(rows: Sequence[Row], batch_size: int, grouped: bool, generator: Any) -> list[list[int]]:
    """The whole batches of an epoch, of rows drawn at random. Grouped: those of fifty batches are sorted by length, as in transformers' sampler."""
    import torch

    assert len(rows) >= batch_size, f"{len(rows)} rows are no batch of {batch_size}"
    # Before they are sorted: else it would always be the longest that are left over.
    order = torch.randperm(len(rows), generator=generator).tolist()[: len(rows) // batch_size * batch_size]
    if grouped:
        some = 50 * batch_size
        parts = [order[at : at + some] for at in range(0, len(order), some)]
        order = [i for part in parts for i in sorted(part, key=lambda i: len(rows[i].prompt_ids) + len(rows[i].target_ids))]
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def lean(model: Any, rows: Sequence[Row], steps: int, batch_size: int, pad: int, grouped: bool = True) -> tuple[Any, int, int]:
    """Train a prefix in a plain loop.

    Args:
        model: see `customers`.
        rows: as many as a batch at least.
        steps: with one batch each.
        batch_size: rows of a batch.
        pad: the token that fills up.
        grouped: whether rows of like length are put together, which pads less; PEFT's examples draw them at random.

    Returns:
        the model with its prefix, and the real and the padded tokens that went through the base.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    tuned = prefixed(model)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    generator = torch.Generator().manual_seed(SEED)
    epoch: list[list[int]] = []
    real = padded = 0
    for _ in range(steps):
        epoch = epoch or drawn(rows, batch_size, grouped, generator)
        taken = epoch.pop()
        batch = {name: tensor.to(model.device) for name, tensor in batch_of([rows[i] for i in taken], pad).items()}
        loss = tuned(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()  # as every loop that shows its loss
        real, padded = real + int(batch["attention_mask"].sum()), padded + batch["attention_mask"].numel()
    return tuned, real, padded


@dataclass
class Prepared:
    """transformers' Trainer, made ready.

    Attributes:
        tuned: the model with its prefix.
        own: the Trainer.
        batches: real and padded tokens of each batch that was made, in order.
        begun: seconds of the clock and of the processor at its first step, once there was one: what it does before takes as long as some steps.
    """

    tuned: Any
    own: Any
    batches: list[tuple[int, int]]
    begun: list[tuple[float, float]]

    def train(self) -> tuple[Any, int, int]:
        """As `lean`."""
        self.own.train()
        # One more is made ahead than there are steps, and not used.
        used = self.batches[: self.own.args.max_steps]
        return self.tuned, sum(real for real, _ in used), sum(padded for _, padded in used)


def trainer_of(model: Any, rows: Sequence[Row], steps: int, batch_size: int, pad: int, folder: Path) -> Prepared:
    """The same with transformers' Trainer, which is given an empty folder."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    tuned = prefixed(model)
    batches: list[tuple[int, int]] = []
    begun: list[tuple[float, float]] = []

    class Begin(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not begun:
                begun.append((time.perf_counter(), time.process_time()))

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = batch_of([feature["row"] for feature in features], pad)
        batches.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
        return batch

    settings = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, max_steps=steps, learning_rate=LR, weight_decay=0.0, max_grad_norm=1.0,
        lr_scheduler_type="linear", optim="adamw_torch_fused", train_sampling_strategy="group_by_length", remove_unused_columns=False,
        bf16=False, save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_num_workers=0, dataloader_pin_memory=False, use_cpu=model.device.type == "cpu", seed=SEED,
    )  # fmt: skip
    # It sorts by the length of what is called input_ids.
    data = [{"input_ids": row.prompt_ids + row.target_ids, "row": row} for row in rows]
    own = Trainer(model=tuned, args=settings, train_dataset=data, data_collator=collate, callbacks=[Begin()])
    return Prepared(tuned, own, batches, begun)


def answers(tuned: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int, batch_size: int) -> list[str]:
    """Greedy answers, in batches of prompts of like length."""
    import torch

    tuned.eval()
    found: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        with torch.inference_mode():
            made = tuned.generate(
                input_ids=ids.to(tuned.device), attention_mask=mask.to(tuned.device), max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        found |= dict(zip(batch, texts, strict=True))
    return [found[i] for i in range(len(prompts))]


def customers(job: dict[str, Any]) -> list[dict[str, float]]:
    """From raw rows to registered and evaluated, for each of a list of customers; seconds of each stage of each, and CPU seconds.

    `job` has `base`, `dtype`, `how` (`lean` or `trainer`), `customers` (folders with train.jsonl and test.jsonl), `steps`, `batch_size`,
    `new_tokens`, `answer_batch` (rows), `tracking_uri` and an empty folder `out`.
    """
    import mlflow
    import sacrebleu
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa")
    mlflow.set_tracking_uri(job["tracking_uri"])
    mlflow.set_experiment("peers")
    client = mlflow.MlflowClient()
    found = []
    for folder in map(Path, job["customers"]):
        took: dict[str, float] = {}
        since, cpu = time.monotonic(), time.process_time()

        def lap(stage: str, took: dict[str, float] = took) -> None:
            nonlocal since
            took[stage], since = time.monotonic() - since, time.monotonic()

        rows, records = encoded(read(folder / "train.jsonl"), tokenizer), read(folder / "test.jsonl")
        lap("prepare")
        out = Path(job["out"]) / folder.name
        if job["how"] == "lean":
            tuned, *_ = lean(model, rows, job["steps"], job["batch_size"], tokenizer.pad_token_id)
        else:
            tuned, *_ = trainer_of(model, rows, job["steps"], job["batch_size"], tokenizer.pad_token_id, out).train()
        lap("train")
        prompts = [row.prompt_ids for row in encoded([{"input": record["input"], "target": ""} for record in records], tokenizer)]
        texts = answers(tuned, tokenizer, prompts, job["new_tokens"], job["answer_batch"])
        bleu = sacrebleu.corpus_bleu(texts, [[record["target"] for record in records][: len(texts)]]).score
        lap("evaluate")
        adapter = out / "adapter"
        tuned.save_pretrained(adapter)
        (out / "answers.json").write_text(json.dumps(texts), encoding="utf-8")
        name = f"peers.{folder.name}"
        # No more than a version needs that somebody can find and load again: mlflow's own log_model takes seconds longer.
        with mlflow.start_run(run_name=folder.name) as run:
            mlflow.log_params({name: job[name] for name in ("base", "dtype", "steps", "batch_size")})
            mlflow.log_metric("bleu", bleu)
            mlflow.log_artifacts(str(out))
            client.create_registered_model(name)
            version = client.create_model_version(name, f"{run.info.artifact_uri}/adapter", run.info.run_id)
            client.set_registered_model_alias(name, "champion", version.version)
        lap("register")
        found.append({**took, "bleu": bleu, "cpu": time.process_time() - cpu})
    return found


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Whatever a library prints goes elsewhere: standard output is the answer.
    print(json.dumps(customers(given)))
