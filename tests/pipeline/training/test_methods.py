"""Every parameterisation, placement and start through a whole training run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data import Record, read_split
from pipeline.errors import BaseModelError
from pipeline.inference import load_engine
from pipeline.prefix import PrefixBank, is_infix, load_base, load_prefix
from pipeline.prefix.initialise import from_text
from pipeline.training.batches import row_losses
from pipeline.training.job import Job
from pipeline.training.results import read_result
from pipeline.training.run import run_job

MakeJob = Callable[..., tuple[Job, Path]]


@pytest.mark.parametrize(
    ("prefix", "lr"),
    [
        ({"reparam": "mlp", "mid_dim": 32}, 0.01),
        ({"reparam": "mlp", "mid_dim": 32, "init": "random"}, 0.01),
        ({"reparam": "embedding"}, 0.1),
        ({"placement": "infix"}, 0.1),
        ({"placement": "infix", "reparam": "mlp", "mid_dim": 32}, 0.01),
        ({"layers": 1}, 0.1),
        ({"init": "task"}, 0.1),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value),
)
def test_every_method_learns_and_leaves_flat_keys_and_values_that_have_the_best_dev_loss(
    make_job: MakeJob, prefix: dict[str, Any], lr: float
) -> None:
    job, _ = make_job(prefix=prefix, max_steps=40, eval_every=10, lr=lr)
    assert run_job(job) == 0  # it fails the customer if the base's weights have changed
    folder = Path(job.customers[0].prefix_dir)
    learned, config = load_prefix(folder)
    dev = {entry["step"]: entry["dev_loss"] for entry in config["training"]["history"] if "dev_loss" in entry}
    assert min(dev.values()) < dev[0] - 0.03
    layers = [1] if "layers" in prefix else [0, 1]
    assert {site: (k.shape, v.shape) for site, (k, v) in learned.items()} == {
        f"decoder.self.{layer}": ((2, 3, 8), (2, 3, 8)) for layer in layers
    }
    assert all(t.dtype == torch.float32 for pair in learned.values() for t in pair)
    assert config["prefix"]["parameters"] == 2 * len(layers) * 2 * 3 * 8
    base = load_base(job.base, torch.device("cpu"))
    bank = PrefixBank(base.sites, slots=1, length=3)
    bank.put(0, learned, is_infix(config))
    rows = read_split(Path(job.customers[0].prepared), "dev")
    with torch.no_grad(), base.prefixes(bank, torch.zeros(len(rows), dtype=torch.int64)):
        measured = float(row_losses(base, rows, pad=1).sum()) / sum(len(row.target_ids) for row in rows)
    assert measured == pytest.approx(config["training"]["best_dev_loss"], abs=1e-6)


@pytest.mark.parametrize("kind", ["decoder.self", "encoder.self", "decoder.cross"])
def test_each_kind_of_site_of_an_encoder_decoder_learns_alone(make_job: MakeJob, tiny_encoder_decoder: Path, kind: str) -> None:
    job, _ = make_job(base=tiny_encoder_decoder, prefix={"sites": [kind]}, max_steps=30, eval_every=10, lr=0.1)
    assert run_job(job) == 0
    learned, config = load_prefix(Path(job.customers[0].prefix_dir))
    assert {site.rpartition(".")[0] for site in learned} == {kind}
    assert config["training"]["best_step"] > 0
    engine = load_engine(job.base)
    assert engine.generate([[5, 6]], [engine.add(Path(job.customers[0].prefix_dir))], max_new_tokens=4)


def test_loss_behind_an_infix_is_that_of_each_row_alone_with_the_end_of_its_prompt_known(make_job: MakeJob) -> None:
    job, _ = make_job()
    base = load_base(job.base, torch.device("cpu"))
    rows = [Record([3, 4, 5], [6, 7, 0], "", [""]), Record([8], [9, 0], "", [""]), Record([3, 4], [5, 6, 7, 8, 0], "", [""])]
    bank = PrefixBank(base.sites, slots=1, length=3)
    bank.put(0, from_text(base, [10, 11, 12], 3), infix=True)
    with torch.no_grad():
        with base.prefixes(bank, torch.zeros(3, dtype=torch.int64)):
            together = row_losses(base, rows, pad=1).sum()
        alone = 0.0
        for row in rows:
            with base.prefixes(bank, torch.zeros(1, dtype=torch.int64)):
                base.prompts_end_at(torch.tensor([len(row.prompt_ids) - 1]))
                logits = base.model(input_ids=torch.tensor([row.prompt_ids + row.target_ids])).logits[0].log_softmax(-1)
            start = len(row.prompt_ids) - 1
            alone -= sum(float(logits[start + i, token]) for i, token in enumerate(row.target_ids))
    assert float(together) == pytest.approx(alone, rel=1e-5)


def test_answers_behind_an_infix_are_those_that_the_teacher_forced_pass_finds_best(make_job: MakeJob) -> None:
    job, _ = make_job(prefix={"placement": "infix"}, max_steps=20, lr=0.1)
    run_job(job)
    engine = load_engine(job.base)
    engine.base.model.generation_config.eos_token_id = None
    folder = Path(job.customers[0].prefix_dir)
    slot = engine.add(folder)
    prompts = [record.prompt_ids for record in read_split(Path(job.customers[0].prepared), "test")]
    answers = engine.generate(prompts, [slot] * len(prompts), max_new_tokens=6)
    bank = PrefixBank(engine.base.sites, slots=1, length=3)
    bank.put(0, load_prefix(folder)[0], infix=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids: list[int] = []
        for _ in range(6):  # without a cache, one more token each time
            with torch.no_grad(), engine.base.prefixes(bank, torch.tensor([0])):
                engine.base.prompts_end_at(torch.tensor([len(prompt) - 1]))
                ids.append(int(engine.base.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
            if ids[-1] == engine.tokenizer.eos_token_id:
                break
        assert engine.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


def test_a_warm_start_goes_on_from_the_other_prefix_and_names_it_as_parent(make_job: MakeJob) -> None:
    first, _ = make_job(name="first", max_steps=30, eval_every=10, lr=0.1)
    run_job(first)
    folder = Path(first.customers[0].prefix_dir)
    _, config = load_prefix(folder)
    second, _ = make_job(name="second", prefix={"init": "prefix", "init_prefix": str(folder)}, max_steps=2, eval_every=2)
    assert run_job(second) == 0
    _, warm = load_prefix(Path(second.customers[0].prefix_dir))
    assert warm["training"]["history"][0]["dev_loss"] == pytest.approx(config["training"]["best_dev_loss"], abs=1e-6)
    assert warm["lineage"]["parent"] == config["weights_sha256"] and config["lineage"]["parent"] is None


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_a_kernel_of_a_gpu_is_refused_without_one(make_job: MakeJob, attention: str) -> None:
    job, _ = make_job()
    with pytest.raises(BaseModelError, match=rf"attention: {attention} needs a GPU.*auto or sdpa"):
        load_base(dataclasses.replace(job.base, attention=attention), torch.device("cpu"))


def test_the_kernel_that_a_job_names_computes_its_attention(make_job: MakeJob) -> None:
    job, _ = make_job()
    for named, kernel in (("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        assert load_base(dataclasses.replace(job.base, attention=named), torch.device("cpu")).active.kernel == kernel


def test_what_the_base_cannot_have_fails_the_customer_with_a_remedy(make_job: MakeJob) -> None:
    job, _ = make_job(prefix={"layers": 7})
    assert run_job(job) == 1
    result = read_result(job, job.customers[0].key, "train")
    assert result is not None and "prefix.layers is 7" in str(result["reason"])
