"""The job file: what one process of training or evaluation is asked to do.

Plain dataclasses and YAML, for it is read on bare GPU nodes. No field has a default: every value was fixed when the job was written
(`pipeline.config` is where defaults live). `python -m pipeline.training JOB.yaml` and `python -m pipeline.evaluation JOB.yaml` read the same file.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_type_hints

import yaml

from pipeline.errors import ConfigError
from pipeline.files import write_text
from pipeline.keys import CustomerKey

FORMAT = 3
SCHEDULES = ("linear", "cosine", "constant")
SAMPLING_STRATEGIES = ("random", "group_by_length")


@dataclass(frozen=True)
class JobBase:
    """The frozen base: where it is and what it must be."""

    id: str
    path: str
    revision: str | None
    digest: str
    dtype: str
    quantization: str | None
    attention: str


@dataclass(frozen=True)
class JobPrompt:
    """See `pipeline.config.PromptSettings`."""

    template: str
    eos: bool
    truncation_side: str
    max_input_tokens: int
    max_target_tokens: int


@dataclass(frozen=True)
class JobPrefix:
    """See `pipeline.config.PrefixSettings`."""

    length: int
    layers: int | str
    sites: list[str] | str
    placement: str
    reparam: str
    mid_dim: int
    init: str
    init_text: str | None
    init_prefix: str | None


@dataclass(frozen=True)
class JobTraining:
    """See `pipeline.config.TrainingSettings`."""

    max_steps: int
    batch_size: int
    gradient_accumulation_steps: int
    lr: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    eval_every: int
    early_stopping: int | None
    seed: int
    train_sampling_strategy: str = "random"


@dataclass(frozen=True)
class JobMixing:
    """How the customers of a job share its batches. See `pipeline.config.LaunchSettings`; nothing of it changes what is learned."""

    slots: int
    max_tokens_per_micro_batch: int
    gradient_checkpointing: bool
    checkpoint_every_seconds: float


@dataclass(frozen=True)
class JobGate:
    """See `pipeline.config.GateSettings`."""

    metric: str
    min_gain_over_base: float
    min_score: float | None
    min_gain_over_champion: float | None
    max_regression_on_slice: float | None
    significance: float | None


@dataclass(frozen=True)
class JobEvaluation:
    """See `pipeline.config.EvaluationSettings`; `max_new_tokens` is resolved."""

    preset: str
    metrics: list[str]
    gate: JobGate
    num_beams: int
    max_new_tokens: int
    bootstrap_resamples: int
    slices: list[str]
    prompt_baseline: bool
    instruction: str | None
    prompt_examples: int


@dataclass(frozen=True)
class JobCustomer:
    """One customer of a job. Digests are of everything the stage's outcome depends on; folders are absolute.

    Attributes:
        prepared: folder with {train,dev,test}.parquet and card.json.
        data_fingerprint: the card's fingerprint; the stage refuses data that was prepared anew since.
        train_digest: names the prefix; `prefix_dir` is where it goes.
        config_digest: digest of the settings alone (prompt, prefix, training).
        evaluate_digest: names the evaluation; `evaluation_dir` is where it goes.
        champion_dir: the prefix folder of the champion when the job was written, for evaluation; None if there is none.
    """

    customer: str
    task: str
    prepared: str
    data_fingerprint: str
    train_digest: str
    config_digest: str
    evaluate_digest: str
    prefix_dir: str
    evaluation_dir: str
    champion_dir: str | None
    prompt: JobPrompt
    prefix: JobPrefix
    training: JobTraining
    evaluation: JobEvaluation

    @property
    def key(self) -> CustomerKey:
        """(customer, task)."""
        return CustomerKey(self.customer, self.task)


@dataclass(frozen=True)
class Job:
    """A job: one base, one process group, any number of customers.

    Attributes:
        folder: where the job's own files go: its metrics and checkpoints, and those of each customer in `<folder>/<customer>/<task>/`.
        experiment: MLflow experiment that runs are logged to, when a tracking store is configured.
    """

    format: Literal[3]
    name: str
    folder: str
    experiment: str
    base: JobBase
    mixing: JobMixing
    customers: list[JobCustomer]


def write_job(path: Path, job: Job) -> None:
    """Write a job file, whole or not at all."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(job), sort_keys=False, allow_unicode=True))


def read_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        ConfigError: missing, of another format, or with missing or unknown fields.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such job file. `prefixfleet train FLEET.yaml` writes one.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a job file ({error}).") from error
    if isinstance(content, dict) and "base_model" in content:
        raise ConfigError(
            f"{path}: is a fleet file, not a job file. `prefixfleet train {path}` writes its jobs to .prefixfleet/jobs/<job>/job.yaml (below "
            "PREFIXFLEET_HOME if that is set) before it loads anything: start it once, stop it with Ctrl-C, and give that file."
        )
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path}: is no job file of format {FORMAT}. Write it again with `prefixfleet train FLEET.yaml`.")
    job: Job = _build(Job, content, str(path))
    _check(job, str(path))
    return job


def _check(job: Job, place: str) -> None:
    """Refuse values that a fleet file would not give: a job file may have been written by hand."""
    at_least: list[tuple[str, float | None, float]] = [
        ("mixing.slots", job.mixing.slots, 1),
        ("mixing.max_tokens_per_micro_batch", job.mixing.max_tokens_per_micro_batch, 1),
        ("mixing.checkpoint_every_seconds", job.mixing.checkpoint_every_seconds, 0),
    ]
    seen: set[CustomerKey] = set()
    for i, customer in enumerate(job.customers):
        here, training = f"customers[{i}]", customer.training
        if customer.key in seen:
            raise ConfigError(f"{place}.{here}: {customer.key} stands twice. Delete one.")
        seen.add(customer.key)
        whole = ("max_steps", "batch_size", "gradient_accumulation_steps", "eval_every", "early_stopping")
        at_least += [(f"{here}.training.{name}", getattr(training, name), 1) for name in whole]
        none_below_zero = ("warmup_steps", "weight_decay", "seed")
        at_least += [(f"{here}.training.{name}", getattr(training, name), 0) for name in none_below_zero]
        at_least += [(f"{here}.prefix.length", customer.prefix.length, 1)]
        for name in ("lr", "max_grad_norm"):
            value = getattr(training, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{place}.{here}.training.{name}: {value} is not a positive number")
        for name, known in (("schedule", SCHEDULES), ("train_sampling_strategy", SAMPLING_STRATEGIES)):
            if getattr(training, name) not in known:
                raise ConfigError(f"{place}.{here}.training.{name}: {getattr(training, name)!r} is none of {', '.join(known)}")
    for name, value, least in at_least:
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{place}.{name}: {value} must be at least {least:g}")


def _build(kind: Any, content: Any, place: str) -> Any:
    """Build dataclass `kind` from nested mappings, naming the place of whatever does not fit."""
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: expected a mapping, got {content!r}")
    fields = dataclasses.fields(kind)
    names = [f.name for f in fields]
    content = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING} | content
    for missing in [n for n in names if n not in content]:
        raise ConfigError(f"{place}.{missing}: is missing")
    for unknown in [n for n in content if n not in names]:
        raise ConfigError(f"{place}.{unknown}: unknown field. Known: {', '.join(names)}")
    hints = get_type_hints(kind)
    values = {}
    for name in names:
        hint, value = hints[name], content[name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value, f"{place}.{name}")
        elif name == "customers":
            if not isinstance(value, list):
                raise ConfigError(f"{place}.customers: expected a list")
            value = [_build(JobCustomer, item, f"{place}.customers[{i}]") for i, item in enumerate(value)]
        elif not _fits(value, hint):
            raise ConfigError(f"{place}.{name}: {value!r} is not of the type {hint}")
        values[name] = value
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    text = str(hint)
    if value is None:
        return hint is NoneType
    if hint is float or "float" in text:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, bool)
    if "int" in text and hint is not str:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str or text.startswith("str"):
        return isinstance(value, str)
    return isinstance(value, list) if text.startswith("list") else hint is not NoneType
