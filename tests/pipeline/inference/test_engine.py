"""Mixed-customer generation: every row gets its own customer's text, whoever shares the batch."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pipeline.data import read_split
from pipeline.errors import BaseModelError, PrefixError, StorageError
from pipeline.inference import load_engine
from pipeline.prefix import load_base, load_prefix, save_prefix
from pipeline.prefix.initialise import from_random
from pipeline.training.job import Job

MakeJob = Callable[..., tuple[Job, Path]]


@pytest.fixture
def trained(make_job: MakeJob) -> Job:
    """A job whose prefixes are strong random ones, so that each customer's text is unmistakable."""
    return with_prefixes(make_job(customers=3)[0])


def with_prefixes(job: Job) -> Job:
    base = load_base(job.base, torch.device("cpu"))
    for seed, customer in enumerate(job.customers):
        prefix = {site: (key * 100, value * 100) for site, (key, value) in from_random(base.sites, 3 + seed, seed).items()}
        config = {"base": {"digest": job.base.digest}, "prompt": dataclasses.asdict(customer.prompt), "chat": False}
        config["prefix"] = {"placement": "prefix"}
        config["generation"] = {"num_beams": 2, "max_new_tokens": 7}
        save_prefix(Path(customer.prefix_dir), prefix, config)
    return job


def test_a_prefix_that_does_not_say_how_it_answers_is_refused_before_it_has_to(trained: Job) -> None:
    engine = load_engine(trained.base)
    folder = Path(trained.customers[0].prefix_dir)
    whole = json.loads((folder / "prefix.json").read_text())
    for changed, named in (
        ({"prompt": None}, "no prompt"),
        ({"chat": "no"}, "no chat"),
        ({"generation": []}, "no generation"),
        ({"generation": {"num_beams": 1}}, r"no generation\.max_new_tokens"),
        ({"generation": {**whole["generation"], "warmth": 1}}, "warmth is missing or unknown"),
        ({"prompt": {**whole["prompt"], "colour": "red"}}, "colour is missing or unknown"),
        ({"prompt": {}}, "template"),
        ({"prefix": None}, r"no prefix\.placement"),
    ):
        (folder / "prefix.json").write_text(json.dumps({**whole, **changed}))
        with pytest.raises(StorageError, match=rf"prefix\.json: .*{named}.*train or download it again"):
            engine.add(folder)


@pytest.mark.parametrize("beams", [1, 3])
def test_text_of_a_row_is_the_same_alone_and_in_a_mixed_batch(trained: Job, beams: int) -> None:
    engine = load_engine(trained.base)
    slots = [engine.add(Path(c.prefix_dir)) for c in trained.customers]
    prompts = [r.prompt_ids for r in read_split(Path(trained.customers[0].prepared), "test")]
    mixed_prompts = [p for p in prompts for _ in range(4)]
    mixed_slots = [slot for _ in prompts for slot in (0, *slots)]
    together = engine.generate(mixed_prompts, mixed_slots, max_new_tokens=8, num_beams=beams)
    alone = [
        engine.generate([p], [s], max_new_tokens=8, num_beams=beams)[0] for p, s in zip(mixed_prompts, mixed_slots, strict=True)
    ]
    assert together == alone
    # Customers were trained to answer differently, so a mix-up would show.
    by_slot = [tuple(together[i::4]) for i in range(4)]
    assert len(set(by_slot)) == 4


def test_an_encoder_decoders_text_is_the_same_alone_and_in_a_mixed_batch(make_job: MakeJob, tiny_encoder_decoder: Path) -> None:
    job = with_prefixes(make_job(customers=3, base=tiny_encoder_decoder)[0])
    engine = load_engine(job.base)
    slots = [0, *(engine.add(Path(c.prefix_dir)) for c in job.customers)]
    prompts = [
        r.prompt_ids[: 2 + i % 3] for i, r in enumerate(read_split(Path(job.customers[0].prepared), "test")) for _ in slots
    ]
    mixed = [slots[i % 4] for i in range(len(prompts))]
    places: list[int] = []
    together = engine.generate(prompts, mixed, max_new_tokens=8, finished=lambda at, texts: places.extend(at))
    assert together == [engine.generate([p], [s], max_new_tokens=8)[0] for p, s in zip(prompts, mixed, strict=True)]
    assert sorted(places) == list(range(len(prompts)))
    assert len(set(together)) > 4


def test_losses_are_those_of_the_plain_model_and_of_each_row_alone(trained: Job, tiny_base: Path) -> None:
    engine = load_engine(trained.base)
    slots = [0, *(engine.add(Path(c.prefix_dir)) for c in trained.customers)]
    records = read_split(Path(trained.customers[0].prepared), "test")
    prompts = [r.prompt_ids for r in records for _ in slots]
    targets = [r.target_ids for r in records for _ in slots]
    mixed = slots * len(records)
    found = engine.losses(prompts, targets, mixed)
    alone = [engine.losses([p], [t], [s])[0] for p, t, s in zip(prompts, targets, mixed, strict=True)]
    assert found == pytest.approx(alone, abs=1e-4)
    assert len({round(loss, 3) for loss in found[:4]}) == 4
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.tensor([prompts[0] + targets[0]])
    with torch.no_grad():
        chosen = plain(ids).logits[0, len(prompts[0]) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(targets[0])[:, None])
    assert found[0] == pytest.approx(-float(chosen.sum()), abs=1e-3)
    with pytest.raises(PrefixError, match="64 positions"):
        engine.losses([[5] * 60], [[6] * 3], [slots[1]])


@pytest.mark.parametrize("average", ["probabilities", "log_probabilities"])
def test_losses_of_an_ensemble_are_those_of_the_averaged_predictions(
    trained: Job, tiny_base: Path, tmp_path: Path, average: str
) -> None:
    """Against the plain model with each member's keys and values as its past."""
    engine = load_engine(trained.base)
    records = read_split(Path(trained.customers[0].prepared), "test")[:3]
    members = [load_prefix(Path(customer.prefix_dir)) for customer in trained.customers[:2]]
    config = {**members[0][1], "ensemble": {"average": average, "members": [config for _, config in members]}}
    together = {f"{i}.{site}": pair for i, (prefix, _) in enumerate(members) for site, pair in prefix.items()}
    save_prefix(tmp_path / "ensemble", together, config)
    slots = [engine.add(tmp_path / "ensemble"), engine.add(Path(trained.customers[2].prefix_dir)), 0]
    # Beside rows of a single prefix and of none.
    rows = [(record.prompt_ids, record.target_ids, slot) for record in records for slot in slots]
    found = engine.losses(*map(list, zip(*rows, strict=True)))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    for record, loss in zip(records, found[::3], strict=True):
        ids = torch.tensor([record.prompt_ids + record.target_ids])
        each = []
        for prefix, _ in members:
            past = DynamicCache()
            for layer in range(plain.config.num_hidden_layers):
                past.update(*(tensor.double()[None] for tensor in prefix[f"decoder.self.{layer}"]), layer)
            with torch.no_grad():
                each.append(plain(ids, past_key_values=past).logits[0, len(record.prompt_ids) - 1 : -1].softmax(-1))
        mean = (each[0] + each[1]) / 2 if average == "probabilities" else (each[0] * each[1]).sqrt()
        mean = mean / mean.sum(-1, keepdim=True)
        assert loss == pytest.approx(-float(mean.gather(-1, torch.tensor(record.target_ids)[:, None]).log().sum()), rel=1e-4)
    assert len({round(loss, 3) for loss in found[:3]}) == 3


def test_in_bfloat16_log_probabilities_are_those_of_each_row_alone_up_to_rounding(trained: Job) -> None:
    """Texts are not compared: two tokens whose logits are equal in eight bits change places with the shape of the batch."""
    engine = load_engine(dataclasses.replace(trained.base, dtype="bfloat16"))
    slots = [0, *(engine.add(Path(c.prefix_dir)) for c in trained.customers)]
    records = read_split(Path(trained.customers[0].prepared), "test")
    rows = [(r.prompt_ids, r.target_ids, slot) for r in records for slot in slots]
    found = engine.losses(*map(list, zip(*rows, strict=True)))
    alone = [engine.losses([p], [t], [s])[0] for p, t, s in rows]
    assert found == pytest.approx(alone, rel=0.02)
    assert found != pytest.approx([engine.losses([p], [t], [0])[0] for p, t, _ in rows], rel=0.02)


def test_rooms_are_what_is_left_of_the_bases_positions(trained: Job) -> None:
    engine = load_engine(trained.base)
    slot = engine.add(Path(trained.customers[1].prefix_dir))  # of length 4
    assert (engine.longest_answer(slot, 50), engine.longest_answer(0, 50), engine.longest_answer(slot, 99)) == (10, 14, 0)
    assert engine.longest_prompt(8) == 56


def test_slot_zero_is_the_base_without_prefix(trained: Job, tiny_base: Path) -> None:
    engine = load_engine(trained.base)
    engine.add(Path(trained.customers[0].prefix_dir))
    prompts = [r.prompt_ids for r in read_split(Path(trained.customers[0].prepared), "test")]
    found = engine.generate(prompts, [0] * len(prompts), max_new_tokens=8)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    for prompt, text in zip(prompts, found, strict=True):
        out = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert text == engine.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_the_same_prefix_gets_the_same_slot(trained: Job) -> None:
    engine = load_engine(trained.base)
    first = [engine.add(Path(c.prefix_dir)) for c in trained.customers]
    assert first == [engine.add(Path(c.prefix_dir)) for c in trained.customers] == [1, 2, 3]


def test_answer_prompts_and_decodes_as_was_saved_with_the_prefix(trained: Job) -> None:
    engine = load_engine(trained.base)
    slot = engine.add(Path(trained.customers[0].prefix_dir))
    record = read_split(Path(trained.customers[0].prepared), "test")[0]
    assert engine.answer([record.input], slot) == engine.generate([record.prompt_ids], [slot], max_new_tokens=7, num_beams=2)


def test_prefix_of_another_base_is_refused_with_both_digests(trained: Job) -> None:
    engine = load_engine(trained.base)
    engine.base_digest = "f" * 64
    with pytest.raises(BaseModelError, match=f"{trained.base.digest[:16]}.*ffffffffffffffff"):
        engine.add(Path(trained.customers[0].prefix_dir))


def test_prompt_too_long_for_the_base_is_an_error_not_nonsense(trained: Job) -> None:
    engine = load_engine(trained.base)
    slot = engine.add(Path(trained.customers[0].prefix_dir))
    with pytest.raises(PrefixError, match="64 positions"):
        engine.generate([[5] * 61], [slot], max_new_tokens=8)


def test_an_answer_ends_where_the_positions_of_the_base_end_and_cuts_nobody_elses_short(trained: Job) -> None:
    engine = load_engine(trained.base)
    slot = engine.add(Path(trained.customers[0].prefix_dir))  # of length 3, so 60 + 3 leave one position
    engine.base.model.generation_config.eos_token_id = None
    engine.tokenizer.eos_token = None
    long, short = engine.generate([[5] * 60, [5] * 10], [slot, slot], max_new_tokens=8)
    assert (len(long.split()), len(short.split())) == (1, 8)
