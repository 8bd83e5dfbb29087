"""What is to be done, and the job files that say so: pure functions from settings, prepared data and base to digests and jobs.

In: a `Fleet`, the cards of the prepared data, the base. Out: for every customer what is due, and one job for each way to launch. A stage is due
if the folder named by the digest of everything it depends on is not there: so nothing is done twice, and nothing stale is used. Knows nothing
of Prefect, imports no torch.
"""

import contextlib
import dataclasses
import functools
import heapq
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.notes import times_again
from pipeline.base import BaseModelInfo
from pipeline.config import Customer, EvaluationSettings, Fleet, LaunchSettings, PrefixSettings, PromptSettings, TrainingSettings
from pipeline.errors import ConfigError, PrefixFleetError, StorageError
from pipeline.files import digest_of, is_whole, read_json, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.training.job import (
    Job,
    JobBase,
    JobCustomer,
    JobEvaluation,
    JobGate,
    JobMixing,
    JobPrefix,
    JobPrompt,
    JobTraining,
    write_job,
)
from pipeline.training.results import EVALUATION_FILES, PREFIX_FILES, read_result, result_path, write_result

# Raised when the same settings and data would give another prefix, or the same prefix another score: everything is then due again.
METHOD_VERSION = 1
EVALUATION_VERSION = 3

STAGES = ("prepare", "train", "evaluate", "register")
# Of the launch settings: how the same work is cut, which one may change to go on with less memory.
_CHANGES_NO_JOB = (
    "slots", "max_tokens_per_micro_batch", "gradient_checkpointing", "checkpoint_every_seconds", "customers_per_job", "work_pool", "device_memory",
)  # fmt: skip
_PART = "part.json"
_RESULT = {"train": "train", "evaluate": "eval"}  # what the results of the stages that run in a child are called


def job_customer(
    customer: Customer, card: dict[str, Any], base: BaseModelInfo, dtype: str, home: Home, quantization: str | None = None
) -> JobCustomer:
    """One customer of a job: every setting resolved, the digests of everything that its prefix and its evaluation depend on, the folders."""
    made = _settings(customer.prompt, customer.prefix, customer.training, customer.evaluation)
    config_digest = made.config_digest
    if customer.prefix.init_prefix is not None:
        config_digest = _config_digest(made, _start(customer.prefix.init_prefix))
    depends = [card["train_fingerprint"], config_digest, base.digest, base.tokenizer_digest, dtype, METHOD_VERSION]
    depends += [] if quantization is None else [quantization]
    again = times_again(home, customer.key)
    train_digest = digest_of([*depends, {"again": again}] if again else depends)
    evaluate_digest = digest_of([train_digest, card["fingerprint"], made.evaluation_settings, EVALUATION_VERSION])
    return JobCustomer(
        customer=customer.id,
        task=customer.task,
        prepared=str(home.prepared(customer.key)),
        data_fingerprint=card["fingerprint"],
        train_digest=train_digest,
        config_digest=config_digest,
        evaluate_digest=evaluate_digest,
        prefix_dir=str(home.prefix(customer.key, train_digest)),
        evaluation_dir=str(home.evaluation(customer.key, evaluate_digest)),
        champion_dir=None,  # which one it is changes with every promotion, and is looked up when the job is written
        prompt=made.prompt,
        prefix=made.prefix,
        training=made.training,
        evaluation=made.evaluation,
    )


@dataclass(frozen=True)
class _Settings:
    """The sections of a customer as a job file has them; `config_digest` is that of all that a version is made with."""

    prompt: JobPrompt
    prefix: JobPrefix
    training: JobTraining
    evaluation: JobEvaluation
    evaluation_settings: dict[str, Any]
    config_digest: str


@functools.lru_cache(maxsize=4096)
def _settings(
    prompt: PromptSettings, prefix: PrefixSettings, training: TrainingSettings, evaluation: EvaluationSettings
) -> _Settings:
    """Made once for the many customers that have the same."""
    settings = evaluation.model_dump(mode="json")
    settings["max_new_tokens"] = settings["max_new_tokens"] or prompt.max_target_tokens
    made = _Settings(
        JobPrompt(**prompt.model_dump(mode="json")),
        JobPrefix(**prefix.model_dump(mode="json")),
        JobTraining(**training.model_dump(mode="json")),
        JobEvaluation(**{**settings, "gate": JobGate(**settings["gate"])}),
        settings,
        "",
    )
    return dataclasses.replace(made, config_digest=_config_digest(made, prefix.init_prefix))


def _config_digest(made: _Settings, start: str | None) -> str:
    # How it is decoded is part of a version, for it is served as it was judged.
    generation = [made.evaluation_settings["num_beams"], made.evaluation_settings["max_new_tokens"]]
    prompt, prefix, training = (dataclasses.asdict(section) for section in (made.prompt, made.prefix, made.training))
    if training["train_sampling_strategy"] == "random":
        del training["train_sampling_strategy"]  # which is newer than many a prefix; what it says is what they were made with
    return digest_of([prompt, {**prefix, "init_prefix": start}, training, generation])


def _start(init_prefix: str | None) -> str | None:
    """What a warm start contributes to the digest: the content of the prefix that it starts from, wherever that lies.

    `champion` stays the word: which version it is changes with every training, and that alone is no reason to train again.
    """
    if init_prefix is None or init_prefix == "champion":
        return init_prefix
    try:
        return str(read_json(Path(init_prefix) / "prefix.json", 1)["weights_sha256"])
    except StorageError as error:
        raise ConfigError(
            f"prefix.init_prefix: {init_prefix} holds no prefix that can be read. Give the folder of a trained prefix, or `champion`."
        ) from error


def is_trained(customer: JobCustomer) -> bool:
    """Whether its prefix is there."""
    return is_whole(customer.prefix_dir, PREFIX_FILES)


def is_evaluated(customer: JobCustomer) -> bool:
    """Whether its evaluation is there."""
    return is_whole(customer.evaluation_dir, EVALUATION_FILES)


@dataclass(frozen=True)
class PlannedJob:
    """A job and how to launch it; `path` is its job file."""

    job: Job
    launch: LaunchSettings
    path: Path


def plan(
    fleet: Fleet, chosen: Sequence[Customer], due: Mapping[CustomerKey, JobCustomer], base: BaseModelInfo, home: Home
) -> list[PlannedJob]:
    """Jobs of at most `launch.customers_per_job` customers for each distinct way to launch, in the order of the fleet file. Writes nothing.

    A job is named by the home, the fleet file's place (one that is moved begins its unfinished jobs anew), the customers that the run is about,
    the way to launch and the number of its part, not by who of them is still due or how the work is cut into micro-batches: a run that goes on
    where another one ended finds the same folder, and with it the checkpoint. Who was in which part is told by the parts' files (`keep`): whoever
    is still due stays where it was.

    Args:
        fleet: the fleet file.
        chosen: the customers that the run is about.
        due: those for whom something must be done.
        base: the base.
        home: where jobs are.
    """
    groups: dict[str, tuple[LaunchSettings, list[Customer]]] = {}
    for customer in chosen:
        # Fields set by hand count: a number of processes that is not given comes from the accelerate config.
        how = digest_of(customer.launch.model_dump(mode="json", exclude_unset=True))
        groups.setdefault(how, (customer.launch, []))[1].append(customer)
    everybody = len(chosen) == len(fleet.customers)
    scope = None if everybody else sorted(str(customer.key) for customer in chosen)
    # Two files of one name are two fleets, and so are those of two homes that share a server.
    whose = [str(home.root), str(fleet.file)]
    jobs: list[PlannedJob] = []
    names: set[str] = set()
    for launch, group in groups.values():
        launched = launch.model_dump(mode="json", exclude_unset=True, exclude=set(_CHANGES_NO_JOB))
        name, number = "", 0
        while not name or name in names:  # groups that differ in nothing else are numbered
            name = f"{readable(fleet.name)}-{digest_of([*whose, base.path.as_posix(), scope, launched, number])[:10]}"
            number += 1
        names.add(name)
        members = [due[customer.key] for customer in group if customer.key in due]
        for part, customers in sorted(_parts(members, launch.customers_per_job, name, home).items()):
            jobs.append(_planned(fleet, launch, customers, base, home, f"{name}-{part}" if part else name))
    return jobs


def _planned(
    fleet: Fleet, launch: LaunchSettings, customers: list[JobCustomer], base: BaseModelInfo, home: Home, name: str
) -> PlannedJob:
    folder = home.job(name)
    job = Job(
        format=3,
        name=name,
        folder=str(folder),
        experiment="prefixfleet",
        base=JobBase(
            id=base.id,
            path=str(base.path),
            revision=base.revision,
            digest=base.digest,
            dtype=fleet.base_model.dtype,
            quantization=fleet.base_model.quantization,
            attention=fleet.base_model.attention,
        ),
        mixing=JobMixing(
            # LLM.int8 keeps the columns that are large in any row of a batch in 16 bit: rows of two customers must not meet.
            slots=1 if fleet.base_model.quantization == "int8" else launch.slots,
            max_tokens_per_micro_batch=launch.max_tokens_per_micro_batch,
            gradient_checkpointing=launch.gradient_checkpointing,
            checkpoint_every_seconds=launch.checkpoint_every_seconds,
        ),
        customers=customers,
    )
    return PlannedJob(job, launch, folder / "job.yaml")


def _parts(members: list[JobCustomer], most: int, name: str, home: Home) -> dict[int, list[JobCustomer]]:
    """Cut those due into parts as equal as can be; whoever was in a part before and is not through yet stays in it."""
    if len(members) <= most and not (home.job(name) / _PART).exists():
        return {0: members} if members else {}
    before = _parts_before(name, home)
    parts: dict[int, list[JobCustomer]] = {}
    new = []
    for member in members:
        part = before.get((str(member.key), member.train_digest))
        if part is None or len(parts.get(part, ())) >= most:
            new.append(member)
        else:
            parts.setdefault(part, []).append(member)
    wanted = max(len(parts), -(-len(members) // most))
    free = (number for number in range(len(members) + len(parts)) if number not in parts)
    for _ in range(wanted - len(parts)):
        parts[next(free)] = []
    smallest = [(len(held), number) for number, held in parts.items()]
    heapq.heapify(smallest)
    for member in new:
        held, number = heapq.heappop(smallest)
        parts[number].append(member)
        heapq.heappush(smallest, (held + 1, number))
    return {number: held for number, held in parts.items() if held}


def _parts_before(name: str, home: Home) -> dict[tuple[str, str], int]:
    """(customer's key, digest of what it is trained from) to the number of the part that it was in."""
    found: dict[tuple[str, str], int] = {}
    for file in home.root.joinpath("jobs").glob(f"{name}*/{_PART}"):
        number = file.parent.name.removeprefix(name).removeprefix("-") or "0"
        if number.isdecimal():
            with contextlib.suppress(PrefixFleetError, KeyError, TypeError):
                found.update(((key, digest), int(number)) for key, digest in read_json(file, 1)["members"])
    return found


def keep(planned: PlannedJob) -> None:
    """Write down who is in a job, so that a later run finds everybody's checkpoint.

    Raises:
        StorageError: the file cannot be written.
    """
    members = [[str(member.key), member.train_digest] for member in planned.job.customers]
    write_json(planned.path.with_name(_PART), {"format": 1, "members": members})


def only(planned: PlannedJob, members: Sequence[JobCustomer]) -> PlannedJob:
    """A job of its own for some of a job's customers, in a folder of its own."""
    name = f"{planned.job.name}-{digest_of(sorted(str(member.key) for member in members))[:8]}"
    folder = planned.path.parent.with_name(name)
    job = dataclasses.replace(planned.job, name=name, folder=str(folder), customers=list(members))
    return PlannedJob(job, planned.launch, folder / planned.path.name)


def due_in(planned: PlannedJob, stage: str) -> list[JobCustomer]:
    """The customers of a job for whom `train` or `evaluate` can and must run now."""
    if stage == "train":
        return [c for c in planned.job.customers if not is_trained(c)]
    return [c for c in planned.job.customers if is_trained(c) and not is_evaluated(c)]


def write(
    planned: PlannedJob,
    stage: str,
    champions: Mapping[CustomerKey, Path] | None = None,
    failed: Mapping[CustomerKey, str] | None = None,
) -> None:
    """Write the job file for those due in `stage`, and forget what an earlier run of the same job said of them.

    Args:
        planned: the job.
        stage: `train` or `evaluate`.
        champions: the prefix folders of the champions that customers start from, or that they are compared with.
        failed: customers that cannot even start, and why: left out of the file, with a result that says so.
    """
    champions, failed = champions or {}, failed or {}
    customers = [_beside(c, stage, champions.get(c.key)) for c in due_in(planned, stage)]
    for customer in customers:
        result_path(planned.job, customer.key, _RESULT[stage]).unlink(missing_ok=True)
        if customer.key in failed:
            write_result(planned.job, customer, _RESULT[stage], time.monotonic(), failed[customer.key])
    started = [c for c in customers if c.key not in failed]
    write_job(planned.path, dataclasses.replace(planned.job, customers=started))


def _beside(customer: JobCustomer, stage: str, champion: Path | None) -> JobCustomer:
    """The customer with its champion, as `stage` takes it."""
    if champion is None:
        return customer
    if stage == "evaluate":
        return dataclasses.replace(customer, champion_dir=str(champion))
    return dataclasses.replace(customer, prefix=dataclasses.replace(customer.prefix, init_prefix=str(champion)))


def result_of(planned: PlannedJob, customer: JobCustomer, stage: str) -> tuple[str | None, float]:
    """What became of a customer in a stage that has just run: (reason of failure or None, seconds)."""
    finished = is_trained(customer) if stage == "train" else is_evaluated(customer)
    reason: str | None = None
    seconds = 0.0
    with contextlib.suppress(PrefixFleetError):  # a damaged file says as little as none
        result = read_result(planned.job, customer.key, _RESULT[stage])
        if result is not None:
            reason = str(result["reason"]) if result.get("reason") else None
            seconds = float(str(result.get("seconds") or 0.0))
    # The folder is the truth: results are only words about it.
    return (None if finished else reason or f"{stage}: the process ended before it came to this customer"), seconds


def is_of(fleet: str, job: str) -> bool:
    """Whether a fleet of this name gives its jobs such names as `job`: `shop` has no job of `shop-eu`. See `plan` and `only`."""
    return re.fullmatch(rf"{readable(fleet)}-[0-9a-f]{{10}}(-\d{{1,6}})?(-[0-9a-f]{{8}})*", job) is not None


def readable(name: str) -> str:
    """`name` as part of a file or folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "fleet"


def distinct(name: str) -> str:
    """`readable`, but two names that differ, in case alone too, have two."""
    plain = readable(name)
    return plain if plain == name else f"{plain[:33]}-{digest_of(name)[:6]}"
