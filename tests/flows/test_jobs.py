"""What is due and what jobs are made of it."""

from pathlib import Path
from typing import Any

import pytest

from flows import jobs
from pipeline.base import BaseModelInfo
from pipeline.config import Customer, Fleet
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.home import Home
from pipeline.training.job import read_job

# Of the settings of `customer()`, before training.train_sampling_strategy was there.
OLD_DIGEST = "d1f55a41d57ab10dd354fde8529453d927f53e952b6caba319a65887b4442619"
CARD = {"fingerprint": "f" * 64, "train_fingerprint": "t" * 64}


def base(**changes: Any) -> BaseModelInfo:
    known: dict[str, Any] = {
        "id": "base",
        "path": Path("/models/base"),
        "revision": None,
        "digest": "b" * 64,
        "tokenizer_digest": "t" * 64,
        "is_encoder_decoder": False,
        "model_type": "llama",
        "max_positions": 512,
    }
    return BaseModelInfo(**{**known, **changes})


def customer(id: str = "acme", **settings: Any) -> Customer:
    return Customer.model_validate({"id": id, "data": "/data/acme.jsonl", **settings})


def digests(
    home: Home,
    card: dict[str, Any] = CARD,
    on: BaseModelInfo | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    **settings: Any,
) -> tuple[str, str, str]:
    member = jobs.job_customer(customer(**settings), card, on or base(), dtype, home, quantization)
    return member.config_digest, member.train_digest, member.evaluate_digest


@pytest.mark.parametrize(
    "changed",
    [
        {"training": {"lr": 0.01}},
        {"training": {"train_sampling_strategy": "group_by_length"}},
        {"prefix": {"length": 5}},
        {"prompt": {"template": "Say: {input}\n"}},
        {"card": {"fingerprint": "f" * 64, "train_fingerprint": "e" * 64}},
        {"evaluation": {"num_beams": 2}},
        {"evaluation": {"max_new_tokens": 9}},
        {"on": base(digest="c" * 64)},
        {"on": base(tokenizer_digest="c" * 64)},
        {"dtype": "float32"},
        {"quantization": "int8"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_makes_another_prefix_makes_another_train_digest(tmp_path: Path, changed: dict[str, Any]) -> None:
    before, after = digests(Home(tmp_path)), digests(Home(tmp_path), **changed)
    assert before[1] != after[1] and before[2] != after[2]


@pytest.mark.parametrize(
    "changed",
    [
        {"evaluation": {"gate": {"min_score": 3.0}}},
        {"evaluation": {"bootstrap_resamples": 2000}},
        {"card": {**CARD, "fingerprint": "e" * 64}},  # a corrected test reference
    ],
)
def test_what_concerns_the_test_set_alone_changes_the_evaluation_and_not_the_prefix(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    before, after = digests(Home(tmp_path)), digests(Home(tmp_path), **changed)
    assert before[:2] == after[:2] and before[2] != after[2]


def test_a_setting_that_came_later_trains_nobody_anew_who_does_not_use_it(tmp_path: Path) -> None:
    assert digests(Home(tmp_path), training={"train_sampling_strategy": "random"})[0] == digests(Home(tmp_path))[0] == OLD_DIGEST


def test_where_a_base_lies_or_data_is_read_from_changes_no_digest(tmp_path: Path) -> None:
    moved = digests(Home(tmp_path / "elsewhere"), on=base(path=Path("/other/base"), id="other"), data="/other/acme.csv")
    assert moved == digests(Home(tmp_path))


def test_max_new_tokens_is_the_prompt_s_target_length_unless_given(tmp_path: Path) -> None:
    member = jobs.job_customer(customer(prompt={"max_target_tokens": 33}), CARD, base(), "auto", Home(tmp_path))
    assert member.evaluation.max_new_tokens == 33


def plan(
    fleet: Fleet, members: list[tuple[Customer, Any]], home: Home, chosen: list[Customer] | None = None
) -> list[jobs.PlannedJob]:
    due = {customer.key: member for customer, member in members}
    return jobs.plan(fleet, list(fleet.customers) if chosen is None else chosen, due, base(), home)


def test_one_job_for_each_way_to_launch(tmp_path: Path) -> None:
    home = Home(tmp_path)
    customers = [
        customer("a"),
        customer("b", launch={"accelerate_config": "cpu_2proc"}),
        customer("c"),
        customer("a", task="menu"),
    ]
    fleet = Fleet(base_model={"path": "base"}, customers=customers, name="My Fleet!")  # type: ignore[arg-type]
    members = [(c, jobs.job_customer(c, CARD, base(), "auto", home)) for c in fleet.customers]
    planned = plan(fleet, members, home)
    assert [[str(c.key) for c in p.job.customers] for p in planned] == [["a", "c", "a/menu"], ["b"]]
    assert all(p.job.name.startswith("my-fleet-") for p in planned)
    assert planned[0].path.parent == home.job(planned[0].job.name)
    # The same work finds the same folder, and so its checkpoints.
    assert [p.job.name for p in plan(fleet, members, home)] == [p.job.name for p in planned]
    # Homes share Prefect servers, where a job is found by its name.
    assert {p.job.name for p in plan(fleet, members, Home(tmp_path / "other"))}.isdisjoint(p.job.name for p in planned)


def test_a_job_keeps_its_folder_when_fewer_are_due_or_the_work_is_cut_otherwise(tmp_path: Path) -> None:
    home = Home(tmp_path)

    def made(**launch: Any) -> tuple[Fleet, list[tuple[Customer, Any]]]:
        customers = [customer("a", launch=launch), customer("b", launch=launch), customer("c", launch={**launch, "slots": 7})]
        fleet = Fleet(base_model={"path": "base"}, customers=customers)  # type: ignore[arg-type]
        return fleet, [(c, jobs.job_customer(c, CARD, base(), "auto", home)) for c in fleet.customers]

    fleet, members = made()
    names = [p.job.name for p in plan(fleet, members, home)]
    assert len(set(names)) == 2, "two ways to launch are two jobs, even if they differ only in how the work is cut"
    assert [p.job.name for p in plan(fleet, members[1:], home)] == names, "a is through"
    assert [p.job.name for p in plan(fleet, members[2:], home)] == names[1:], "a and b are through"
    less, members_of_less = made(slots=2, max_tokens_per_micro_batch=100)
    assert [p.job.name for p in plan(less, members_of_less, home)] == names
    assert plan(*made(accelerate_config="cpu_2proc"), home)[0].job.name not in names
    assert plan(fleet, members[:1], home, [fleet.customers[0]])[0].job.name not in names, (
        "a run of its own, perhaps at the same time"
    )


def test_written_job_reads_back_equal_and_forgets_old_results(tmp_path: Path) -> None:
    home = Home(tmp_path)
    which = {"layers": 2, "sites": ["decoder.self", "decoder.cross"]}
    of_base = {"path": "base", "quantization": "int8", "attention": "flex_attention"}
    fleet = Fleet(base_model=of_base, customers=[customer(prefix=which)])  # type: ignore[arg-type]
    members = [(c, jobs.job_customer(c, CARD, base(), "auto", home)) for c in fleet.customers]
    (planned,) = plan(fleet, members, home)
    result = home.job(planned.job.name) / "acme" / "default" / "train_result.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"format": 1, "reason": "old", "seconds": 1.0}')
    assert jobs.result_of(planned, members[0][1], "train") == ("old", 1.0)
    jobs.write(planned, "train")
    assert read_job(planned.path) == planned.job
    assert (planned.job.base.quantization, planned.job.base.attention) == ("int8", "flex_attention")
    reason, seconds = jobs.result_of(planned, members[0][1], "train")
    assert reason is not None and "before it came to this customer" in reason and seconds == 0.0


def test_result_says_done_only_if_the_folder_is_whole(tmp_path: Path) -> None:
    home = Home(tmp_path)
    fleet = Fleet(base_model={"path": "base"}, customers=[customer()])  # type: ignore[arg-type]
    members = [(c, jobs.job_customer(c, CARD, base(), "auto", home)) for c in fleet.customers]
    (planned,) = plan(fleet, members, home)
    folder = Path(members[0][1].prefix_dir)
    folder.mkdir(parents=True)
    assert jobs.due_in(planned, "train") and not jobs.due_in(planned, "evaluate")
    (folder / "prefix.json").write_text("{}")
    assert jobs.due_in(planned, "train"), "a folder that lost a file counts as none"
    (folder / "prefix.safetensors").write_text("")
    assert jobs.result_of(planned, members[0][1], "train") == (None, 0.0)
    assert not jobs.due_in(planned, "train") and jobs.due_in(planned, "evaluate")


def test_a_warm_start_counts_by_the_content_it_starts_from_and_champion_by_the_word(tmp_path: Path) -> None:
    def saved(folder: str, weights: str) -> str:
        (tmp_path / folder).mkdir()
        write_json(tmp_path / folder / "prefix.json", {"format": 1, "weights_sha256": weights})
        return str(tmp_path / folder)

    home = Home(tmp_path)
    one, copy, other = (
        digests(home, prefix={"init": "prefix", "init_prefix": start})
        for start in (saved("one", "a" * 64), saved("copy", "a" * 64), saved("other", "b" * 64))
    )
    assert one == copy and one[1] != other[1]
    with pytest.raises(ConfigError, match=r"init_prefix: .*none holds no prefix"):
        digests(home, prefix={"init": "prefix", "init_prefix": str(tmp_path / "none")})
    warm = customer(prefix={"init": "prefix", "init_prefix": "champion"})
    fleet = Fleet(base_model={"path": "base"}, customers=[warm])  # type: ignore[arg-type]
    member = jobs.job_customer(warm, CARD, base(), "auto", home)
    (planned,) = plan(fleet, [(warm, member)], home)
    jobs.write(planned, "train", {warm.key: tmp_path / "one"})
    (written,) = read_job(planned.path).customers
    assert written.prefix.init_prefix == str(tmp_path / "one") and written.train_digest == member.train_digest
    jobs.write(planned, "train", {})  # no champion yet
    assert read_job(planned.path).customers[0].prefix.init_prefix == "champion"
