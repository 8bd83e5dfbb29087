"""The fleet file as pydantic models: the one place where a value gets its default.

In: a YAML file, and the folder or table of customers that it names. Out: a `Fleet`, every customer's settings resolved against the defaults, every
path absolute. Knows nothing of what the settings do. Errors name the file, the line, the customer and the nearest known name.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.customers import DATA_SUFFIXES, SPLITS, Entry, from_folder, from_table
from pipeline.errors import ConfigError
from pipeline.keys import DEFAULT_TASK, CustomerKey, key_of, validate_id
from pipeline.sizes import parse_bytes

SITES = ("decoder.self", "encoder.self", "decoder.cross")
METRICS = (
    "bleu", "nist", "rougeL_coco", "cider", "chrf", "ter", "meteor", "rouge1", "rouge2", "rougeL", "exact_match", "slot_error_rate",
    "perplexity", "distinct1", "distinct2",
)  # fmt: skip
# What each convention computes by default; what it does to texts is in `pipeline.evaluation.presets`.
PRESETS = {
    "default": ("bleu", "rougeL", "chrf"),
    "e2e": ("bleu", "nist", "rougeL_coco", "cider"),
    "webnlg": ("bleu", "chrf", "ter"),
    "summarization": ("rouge1", "rouge2", "rougeL"),
}


class Settings(BaseModel):
    """A section of the fleet file. Unknown keys are errors: a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes, no, on and off as truth values, and pydantic would make 1 and 0 of them.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false, as YAML reads yes, no, on and off too; a text needs quotes")
        return value


class BaseSettings(Settings):
    """Which frozen language model the prefixes are for."""

    path: str = Field(description="a folder (relative to the fleet file) or a Hugging Face hub id")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit); recorded with every prefix")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights and activations of the base; auto: bfloat16 where the hardware computes in it"
    )
    quantization: Literal["int8", "int4"] | None = Field(
        None, description="the linear layers of the base in 8 bit (LLM.int8) or 4 bit (NF4); needs the extra `quantization`"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto",
        description="what computes attention: auto and sdpa: PyTorch's kernels; eager: the model's own; flash_attention_2, flex_attention: on a GPU",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


# What Prefect and file systems take as a name without quoting.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"


class ScheduleSettings(Settings):
    """When to look whether anything is due. A cron line alone means UTC."""

    cron: str = Field(description="minute, hour, day of month, month, day of week, as in `0 3 * * *`: every day at three")
    timezone: str = Field("UTC", description="an IANA name, such as Europe/Berlin, whose clock the cron line means")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"cron": value} if isinstance(value, str) else value

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, value: str) -> str:
        from cronsim import CronSim, CronSimError

        try:
            if len(value.split()) != 5:
                raise CronSimError("it needs five fields")
            CronSim(value, datetime(2026, 1, 1))
        except CronSimError as error:
            raise ValueError(
                f"is no cron line ({error}); write minute, hour, day of month, month and day of week, as in 0 3 * * *"
            ) from error
        return value

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:  # unknown, a folder, or a path that leads out of the database
            raise ValueError("is no time zone; write an IANA name, such as Europe/Berlin") from error
        return value

    def next_after(self, moment: datetime) -> datetime:
        """The first time after `moment` (aware) that the schedule names, in its own zone."""
        from cronsim import CronSim

        return next(CronSim(self.cron, moment.astimezone(ZoneInfo(self.timezone))))


class WorkPoolSettings(Settings):
    """A Prefect work pool that `prefixfleet deploy` makes."""

    type: str = Field(
        "process",
        pattern=_NAME,
        description="as Prefect calls it: process, docker, kubernetes, … A pool that somebody else made can be named too",
    )
    concurrency_limit: int | None = Field(
        None, ge=1, description="flow runs of the pool at a time: for a pool of GPU jobs, the number of GPU slots; null: no limit"
    )


class DeploySettings(Settings):
    """Where the flows themselves run, as `prefixfleet deploy` sets them up. Jobs run on `launch.work_pool`."""

    work_pool: str = Field(
        "prefixfleet", pattern=_NAME, description="the pool of fleet, customer, sweep and maintain; made if it is not there"
    )
    maintain: ScheduleSettings | None = Field(
        None, description="when `maintain` runs, as in `schedule`; null: when somebody starts it"
    )
    env: dict[str, str] = Field(
        {},
        description="environment of the runs on workers; PREFIXFLEET_HOME and the addresses of MLflow servers are those of whoever deploys unless "
        "named here. Everybody who sees the server can read it: no secrets",
    )
    notify: str | None = Field(
        None,
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
        description="TYPE/NAME of a block in Prefect that is told of failed runs, such as slack-webhook/operators; null: nobody is told",
    )


class RetentionSettings(Settings):
    """What `maintain` may remove. A champion, what `rollback` goes back to, and members of ensembles are never removed."""

    versions: int = Field(
        20, ge=1, description="the newest versions of a customer that stay; older ones go once they are older than `days`"
    )
    days: float = Field(
        30.0,
        ge=0,
        description="how long MLflow runs of which no version was made, prefixes and evaluations that were superseded, and the files of customers no "
        "longer in the fleet file stay",
    )
    checkpoints_days: float = Field(7.0, ge=0, description="how long the folder of a job stays after it was last written to")


class RetrainSettings(Settings):
    """What makes a customer due who has a champion. New settings, a new base and `--force` always do."""

    when: Literal["data", "drift", "never"] = Field(
        "data",
        description="data: any change of its data; drift: only when `maintain` has found that the champion does worse on rows that arrived since; "
        "never: neither",
    )
    min_rows: int = Field(
        50, ge=10, description="the champion is judged once so many usable rows have arrived that it does not know"
    )
    max_drop: float = Field(
        0.0,
        ge=0,
        description="it has fallen if the 95 % interval of the drop in gate.metric, from its recorded score to that on the new rows, lies above this",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"when": value} if isinstance(value, str) else value


class LaunchSettings(Settings):
    """How `accelerate launch` is called, and how the customers of a job share the hardware. Customers with equal settings make one job."""

    accelerate_config: str = Field(
        "cpu", description="the name of a file of accelerate_configs/, or the path of one (with a / or ending in .yaml)"
    )
    num_processes: int = Field(1, ge=1, description="processes in all")
    num_machines: int = Field(
        1, ge=1, description="machines; more than one need launcher and main_address, see docs/distributed.md"
    )
    launcher: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="for several machines, the command that runs another on one of them: started once for each {machine} (0, 1, …), or once for all "
        "if it does not name it; {command} is what to run there, {machines} their number",
    )
    main_address: str | None = Field(
        None, pattern=r"^[^\s:]+:\d{1,5}$", description="for several machines, HOST:PORT of the first, as the others see it"
    )
    machine_rank: str = Field(
        "{machine}",
        description="for a launcher that is started once for all: what the shell of a machine knows its number by, such as $SLURM_NODEID",
    )
    slots: int = Field(
        32, ge=1, le=4096, description="customers trained at once in mixed batches; when one finishes, the next takes its slot"
    )
    max_tokens_per_micro_batch: int = Field(
        4096,
        ge=1,
        description="of one forward and backward pass, padding included; halved by itself when a GPU runs out of memory",
    )
    gradient_checkpointing: bool = Field(False, description="less memory for activations, about a third more time a step")
    checkpoint_every_seconds: float = Field(
        60.0, ge=0, description="between two checkpoints of a job; 0: before every step. SIGTERM makes one at once"
    )
    customers_per_job: int = Field(
        256,
        ge=1,
        le=4096,
        description="more than so many who are due are cut into several jobs, which work pools run at the same time",
    )
    work_pool: str | None = Field(
        None,
        pattern=_NAME,
        description="run the jobs as flow runs of the deployment job/NAME on this work pool, whose machines share PREFIXFLEET_HOME; null: in the "
        "process of the flow. Those of sweep and maintain always run in theirs",
    )
    device_memory: str | None = Field(
        None,
        description="of each device, such as 24GiB: before the base is loaded, max_tokens_per_micro_batch and slots are lowered until training fits, "
        "and a customer that does not fit alone fails with the figure; null: nothing is planned",
    )

    @field_validator("device_memory")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_bytes(value, "device_memory")
            except ConfigError as error:
                raise ValueError("is no size; write 80GiB, 24GB or 512MiB") from error
        return value

    @model_validator(mode="after")
    def _machines_can_be_reached(self) -> "LaunchSettings":
        if self.num_machines == 1:
            if self.launcher is not None or self.main_address is not None:
                raise ValueError("launcher and main_address are for several machines; set num_machines, or remove them")
            return self
        if self.launcher is None or self.main_address is None:
            raise ValueError(f"num_machines: {self.num_machines} needs launcher and main_address")
        if not any("{command}" in part for part in self.launcher):
            raise ValueError("launcher must hold {command}, the place of what a machine is to run")
        per_machine = any("{machine}" in part for part in self.launcher)
        if not per_machine and self.machine_rank == "{machine}":
            raise ValueError(
                "launcher does not hold {machine}, so it is started once for all machines: set machine_rank to what a machine knows its number by"
            )
        if "num_processes" in self.model_fields_set and self.num_processes % self.num_machines:
            raise ValueError(f"num_processes: {self.num_processes} must be a multiple of num_machines: {self.num_machines}")
        return self


class PromptSettings(Settings):
    """How a record becomes the text before the target. Saved with the prefix: whoever serves it builds the same input."""

    template: str = Field(
        "{input}\n", description="text around the input; must hold {input}. Other fields of a record are not filled in"
    )
    eos: bool = Field(True, description="the target ends with the end-of-sequence token")
    truncation_side: Literal["none", "left", "right"] = Field(
        "none", description="cut inputs longer than max_input_tokens on this side; none: such rows go to quarantine"
    )
    max_input_tokens: int = Field(384, ge=1, description="of the whole prompt, template included")
    max_target_tokens: int = Field(128, ge=1, description="end token included; also the longest answer")

    @field_validator("template")
    @classmethod
    def _holds_input(cls, value: str) -> str:
        if "{input}" not in value:
            raise ValueError("must contain {input}, the place where the record's input goes")
        return value


class PrefixSettings(Settings):
    """The prefix itself (Li & Liang 2021, section 4); docs/method.md explains the choices."""

    length: int = Field(10, ge=1, le=4096, description="P: number of key and value vectors before every attention layer")
    layers: Literal["all"] | PositiveInt = Field("all", description="a number: only so many of the top layers get a prefix")
    sites: Literal["all"] | Annotated[tuple[Literal[SITES], ...], Field(min_length=1)] = Field(  # type: ignore[valid-type]
        "all", description="a list of the kinds of attention that get one; decoder-only bases have decoder.self alone"
    )
    placement: Literal["prefix", "infix"] = Field(
        "prefix", description="infix (decoder-only): between input and target, seen by the last prompt token and the target"
    )
    reparam: Literal["none", "mlp", "embedding"] = Field(
        "none",
        description="none: keys and values are trained directly; mlp: through an MLP, dropped afterwards, which wants a smaller lr; "
        "embedding (decoder-only): only input embeddings are trained",
    )
    mid_dim: int = Field(512, ge=1, description="hidden width of the MLP of reparam: mlp")
    init: Literal["text", "task", "random", "zeros", "prefix"] = Field(
        "text",
        description="text: keys and values that the frozen base computes for init_text; task: the same for the task's name; random: normal, "
        "std 0.02, or the MLP's own; zeros; prefix: those of init_prefix",
    )
    init_text: str | None = Field(None, description="text for init: text; by default training rows, sampled with the seed")
    init_prefix: str | None = Field(
        None,
        description="for init: prefix, a prefix folder, or `champion`: the customer's champion when training starts (init: text while there is none)",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "PrefixSettings":
        if (self.init == "prefix") != (self.init_prefix is not None):
            raise ValueError("init: prefix and init_prefix (a prefix folder, or champion) need each other")
        if self.init_text is not None and self.init not in ("text", "prefix"):
            raise ValueError(f"init_text is not used by init: {self.init}; set init: text or remove it")
        if self.init_text is not None and not self.init_text.strip():
            raise ValueError("init_text is empty; remove it to start from sampled training rows")
        if self.reparam == "embedding":
            if self.init in ("zeros", "prefix"):
                raise ValueError(f"reparam: embedding cannot start from init: {self.init}; choose text, task or random")
            if self.placement == "infix":
                raise ValueError(
                    "reparam: embedding has no infix: embeddings behind the prompt would depend on it. Choose none or mlp"
                )
            if self.layers != "all":
                raise ValueError("reparam: embedding has its keys and values in all layers; remove layers")
        if self.reparam == "mlp" and self.init in ("text", "task", "prefix") and self.length > self.mid_dim:
            # The MLP's last layer is solved for: with fewer hidden numbers than rows there is no exact solution.
            raise ValueError(
                f"reparam: mlp with mid_dim {self.mid_dim} cannot start from {self.length} given keys and values; set mid_dim to length or more"
            )
        if self.placement == "infix" and self.sites not in ("all", ("decoder.self",)):
            raise ValueError("placement: infix is for the self-attention of decoder-only bases; remove sites")
        if self.sites != "all" and len(set(self.sites)) != len(self.sites):
            raise ValueError("sites names one kind of attention twice")
        return self


# By `prefix.reparam`: the rates of AdamW that learned fastest and stayed steady on the example base; docs/method.md has the figures.
LEARNING_RATES = {"none": 0.1, "mlp": 1e-3, "embedding": 0.1}


class TrainingSettings(Settings):
    """AdamW on the prefix; the base never changes."""

    max_steps: int = Field(400, ge=1, description="optimiser steps, unless early stopping ends them before")
    batch_size: int = Field(10, ge=1, description="rows per optimiser step, over all processes")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="an optimiser step has so many times batch_size rows; how they are packed into micro-batches is the job's own affair",
    )
    lr: float = Field(
        LEARNING_RATES["none"],
        gt=0,
        description="peak learning rate; keys and values trained directly want far more than weights do. Where neither the customer nor the "
        f"defaults give one, it is {LEARNING_RATES['mlp']} with prefix.reparam: mlp",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="of the learning rate, down to zero at max_steps"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from zero")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient of a customer's prefix is clipped to this norm")
    eval_every: int = Field(50, ge=1, description="steps between two dev losses")
    early_stopping: int | None = Field(3, ge=1, description="stop after so many dev losses without improvement; null: never")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of the order of the rows and of the initial prefix")
    train_sampling_strategy: Literal["random", "group_by_length"] = Field(
        "random",
        description="group_by_length: the rows of a step are of like length, as with transformers' setting of this name. Large batches of one "
        "customer are padded less; many customers in one batch are put together by length anyway",
    )


class GateSettings(Settings):
    """What a prefix must reach to become champion. Gains count in the direction that is better for the metric, in its own unit."""

    metric: Literal[METRICS] = Field("bleu", description="the score that decides; by default the first of metrics")  # type: ignore[valid-type]  # a tuple of literals, unpacked by typing at run time
    min_gain_over_base: float = Field(0.0, description="it must be better than the base by more than this")
    min_score: float | None = Field(None, description="the score must be at least this (at most, where lower is better)")
    min_gain_over_champion: float | None = Field(
        0.0,
        description="it must be better than the champion by more than this, or the champion is kept; null: the champion is not asked",
    )
    max_regression_on_slice: float | None = Field(
        None,
        ge=0,
        description="no slice of 10 records or more may be worse than with the champion (the base, while there is none) by more than this",
    )
    significance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="gains count only with a p-value below this (paired bootstrap, of 10 test records or more); null: they count as they are",
    )


class EvaluationSettings(Settings):
    """Generation for the test split, and scores. docs/evaluation.md explains them."""

    preset: Literal[tuple(PRESETS)] = Field(  # type: ignore[valid-type]
        "default", description="how texts are compared: tokenisation, case, references, as the published tasks have it"
    )
    metrics: tuple[Literal[METRICS], ...] = Field(  # type: ignore[valid-type]
        PRESETS["default"], min_length=1, description="scores to compute; by default those of the preset"
    )
    gate: GateSettings = Field(GateSettings(), description="what makes a champion")
    num_beams: int = Field(1, ge=1, le=64, description="1: greedy; the paper takes 5 for table-to-text, 6 for summaries")
    max_new_tokens: int | None = Field(None, ge=1, description="by default the prompt's max_target_tokens")
    bootstrap_resamples: int = Field(1000, ge=1000, le=100_000, description="for 95 % intervals and p-values")
    slices: tuple[str, ...] = Field(
        ("input_length",),
        description="scores of parts of the test split: names of the records' fields, or input_length (thirds by tokens)",
    )
    prompt_baseline: bool = Field(
        True, description="also generate with the base and the instruction (or some training rows) as text in front"
    )
    instruction: str | None = Field(
        None, description="that instruction; by default prefix.init_text, and without one training rows as examples"
    )
    prompt_examples: int = Field(3, ge=1, le=64, description="how many training rows stand in for a missing instruction, at most")

    @model_validator(mode="before")
    @classmethod
    def _of_the_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        known = PRESETS.get(value.get("preset", "default")) if isinstance(value.get("preset", "default"), str) else None
        if known is not None:
            value.setdefault("metrics", known)
        metrics, gate = value.get("metrics"), value.get("gate", {})
        # Whatever is wrong with either is said by their own checks.
        if isinstance(metrics, list | tuple) and metrics and isinstance(gate, dict) and isinstance(metrics[0], str):
            value["gate"] = {"metric": metrics[0] if metrics[0] in METRICS else "bleu", **gate}
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluationSettings":
        if self.gate.metric not in self.metrics:
            raise ValueError(f"gate.metric is {self.gate.metric!r} but metrics are {list(self.metrics)}; add it to metrics")
        for name, values in (("metrics", self.metrics), ("slices", self.slices)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names one thing twice")
        if self.gate.max_regression_on_slice is not None:
            if not self.slices:
                raise ValueError("gate.max_regression_on_slice needs slices; name some, or remove it")
            if self.gate.metric.startswith("distinct"):
                raise ValueError(
                    f"gate.max_regression_on_slice cannot be asked of {self.gate.metric}, which is of all outputs together and not cut into slices; "
                    "name another gate.metric, or remove it"
                )
        if self.instruction is not None and not self.instruction.strip():
            raise ValueError("instruction is empty; remove it to use training rows as examples")
        return self


class ColumnSettings(Settings):
    """The names of the columns in the customer's files."""

    input: str = Field("input", description="the text that the model is given")
    target: str = Field("target", description="the text that it should write")
    references: str = Field("references", description="a list of such texts, instead of a target")
    messages: str = Field("messages", description="a chat, instead of input and target; its last assistant turn is the target")


class DataSettings(Settings):
    """Where a customer's rows are. Either `path` (split by hash of the input) or ready-made splits with at least `train`.

    A split that is not given is cut from `train` (or `path`) by hash of the input: a tenth each for dev and test.
    """

    path: str | None = Field(None, description="a JSONL, CSV, TSV or Parquet file, or a hub id")
    train: str | None = Field(None, description="ready-made training split; a file or a hub id, as are the next two")
    dev: str | None = Field(None, description="ready-made split for early stopping and for choosing the best step")
    test: str | None = Field(None, description="ready-made split for the scores")
    columns: ColumnSettings = Field(ColumnSettings(), description="where the columns have other names")
    revision: str | None = Field(None, description="hub revision, where the data is a hub id")
    name: str | None = Field(None, description="configuration name, where the data is a hub id")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of(self) -> "DataSettings":
        if (self.path is None) == (self.train is None):
            raise ValueError("needs either `path`, or `train` (with `dev` and `test` if there are any)")
        if self.path is not None and (self.dev is not None or self.test is not None):
            raise ValueError("has `path` and ready-made splits; name the training file `train` instead of `path`")
        return self

    @property
    def sources(self) -> dict[str, str]:
        """Split name to file or hub id; the key of an unsplit source is `all`."""
        named = {"all": self.path, "train": self.train, "dev": self.dev, "test": self.test}
        return {split: source for split, source in named.items() if source is not None}


class Defaults(Settings):
    """Settings of every customer that does not say otherwise."""

    prompt: PromptSettings = PromptSettings()
    prefix: PrefixSettings = PrefixSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    retrain: RetrainSettings = RetrainSettings()


class Customer(Settings):
    """One customer and task, every setting resolved."""

    id: str
    task: str = DEFAULT_TASK
    data: DataSettings
    schedule: ScheduleSettings | None = None
    launch: LaunchSettings = LaunchSettings()
    prompt: PromptSettings = PromptSettings()
    prefix: PrefixSettings = PrefixSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    retrain: RetrainSettings = RetrainSettings()

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_parameterisation(cls, value: Any) -> Any:
        """A learning rate that nobody gives is that of `prefix.reparam`: what is right for keys and values takes an MLP apart."""
        if not isinstance(value, dict) or "lr" in getattr(value.get("training"), "model_fields_set", ()):
            return value
        prefix, training = (
            section.model_dump(exclude_unset=True) if isinstance(section, Settings) else section
            for section in (value.get("prefix", {}), value.get("training", {}))
        )
        # Whatever else is wrong with either is said by their own checks.
        reparam = prefix.get("reparam") if isinstance(prefix, dict) else None
        if isinstance(training, dict) and isinstance(reparam, str) and reparam in LEARNING_RATES:
            value = {**value, "training": {"lr": LEARNING_RATES[reparam], **training}}
        return value

    @field_validator("id", "task")
    @classmethod
    def _valid_id(cls, value: str, info: Any) -> str:
        try:
            return validate_id(value, "customer" if info.field_name == "id" else "task")
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @property
    def key(self) -> CustomerKey:
        """(customer, task)."""
        return key_of(self.id, self.task)


def with_settings(customer: Customer, sections: dict[str, dict[str, Any]]) -> Customer:
    """`customer` with other values, given as in a fleet file.

    Raises:
        ConfigError: they do not fit together.
    """
    before = customer.model_dump(exclude_unset=True)
    try:
        return Customer.model_validate({**before, **{name: _overlay(before.get(name), own) for name, own in sections.items()}})
    except ValidationError as error:
        said = [
            f"{'.'.join(str(part) for part in item['loc'])}: {_what(item, ['customers', 0, *item['loc']])}"
            for item in error.errors()
        ]
        raise ConfigError("\n".join(f"customer {customer.key}: {problem}" for problem in said)) from error


def _string_ids(customer: dict[str, Any]) -> dict[str, Any]:
    """Numbers as text: `id: 42` needs no quotes. Numbers that YAML reads as others (`010`) were refused before."""
    return {k: str(v) if k in ("id", "task") and type(v) is int else v for k, v in customer.items()}


class Fleet(Settings):
    """A fleet file."""

    base_model: BaseSettings
    launch: LaunchSettings = LaunchSettings()
    defaults: Defaults = Defaults()
    customers: Annotated[tuple[Customer, ...], Field(min_length=1)]
    name: str = "fleet"
    schedule: ScheduleSettings | None = None
    work_pools: dict[Annotated[str, Field(pattern=_NAME)], WorkPoolSettings] = {}
    deploy: DeploySettings = DeploySettings()
    retention: RetentionSettings = RetentionSettings()
    _file: Path | None = PrivateAttr(None)

    @property
    def file(self) -> Path | None:
        """Where it was read from, as an absolute path without links; None if it was not read from a file."""
        return self._file

    @model_validator(mode="after")
    def _keys_are_unique(self) -> "Fleet":
        seen: set[CustomerKey] = set()
        for number, customer in enumerate(self.customers):
            if customer.key in seen:
                # The position goes along for the line; a plain ValueError would be about the whole file.
                raise PydanticCustomError(
                    "twice",
                    "{id} with task {task} stands twice; give one of them another `task`",
                    {"id": repr(customer.id), "task": repr(customer.task), "number": number},
                )
            seen.add(customer.key)
        return self

    def select(self, wanted: list[str]) -> tuple[Customer, ...]:
        """The customers named (`acme` means all tasks of acme, `acme/menu` one), or all if none is named.

        Raises:
            ConfigError: a name is not in the fleet.
        """
        if not wanted:
            return self.customers
        by_name: dict[str, list[Customer]] = {}
        for customer in self.customers:
            for name in (customer.id, f"{customer.id}/{customer.task}"):
                by_name.setdefault(name, []).append(customer)
        chosen: dict[CustomerKey, Customer] = {}
        for name in wanted:
            found = by_name.get(name)
            if not found:
                known = [str(c.key) for c in self.customers]
                raise ConfigError(
                    f"customer {name!r} is not in the fleet file.{_nearest(name, known)} It has: {', '.join(known[:20])}"
                )
            chosen.update((customer.key, customer) for customer in found)
        return tuple(chosen.values())


SECTIONS = ("prompt", "prefix", "training", "evaluation", "retrain")


# The one written in C reads ten thousand customers in a second instead of ten.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_fleet(path: Path | str) -> Fleet:
    """Read a fleet file.

    Raises:
        ConfigError: it is missing, not YAML, or says something unknown or impossible; every problem found is named with its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Give the path of a fleet file; examples/fleet.yaml is one to copy.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    try:
        tree = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, a number of thousands of digits
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is empty or no mapping. It needs at least `base_model` and `customers`.")
    if changed := [f"{path}:{line}: {what}" for line, what in sorted(_silent_changes(tree))]:
        raise ConfigError("\n".join(changed))
    given: list[Entry] | None = None
    try:
        # Defaults are validated first, alone, so that a mistake there is reported once and not for every customer.
        Fleet.model_validate({**content, "customers": [{"id": "x", "data": "x.jsonl"}]})
        given = _expanded(content, path)
        if given is not None:
            content = {**content, "customers": [entry for entry, _ in given]}
        fleet = Fleet.model_validate(_with_defaults(content, path.resolve()))
        fleet._file = path.resolve()
        return fleet
    except ValidationError as error:
        items = error.errors()
        # A list whose entries are all wrong counts as empty too; that says nothing new.
        locations = [item["loc"] for item in items]
        told = [
            item
            for item in items
            if item["type"] != "too_short"
            or not any(at != item["loc"] and at[: len(item["loc"])] == item["loc"] for at in locations)
        ]
        problems = [_problem(path, content, tree, item, given) for item in told]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from error


def _silent_changes(tree: yaml.Node) -> Iterator[tuple[int, str]]:
    """Line and message for all that YAML would make something else of, without a word: keys that stand twice, numbers not in base ten."""
    seen: set[int] = set()  # anchors make one node appear in several places
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        line = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key, value in node.value:
                waiting += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    here = key.start_mark.line + 1
                    if key.value in keys:
                        yield (
                            here,
                            f"{key.value}: stands twice, first in line {keys[key.value]}; YAML would take the last one. Delete one.",
                        )
                    keys.setdefault(key.value, here)
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and not _BASE_TEN.fullmatch(node.value):
            read = yaml.safe_load(node.value)
            yield (
                line,
                f'{node.value}: YAML reads this as {read!r}. Put quotes around it if it is a name: "{node.value}"; else write {read!r}.',
            )


# Not 010 (octal), 1:30 (base 60), 0x1f, 1_000. Numbers with a point or exponent, .inf and .nan are what they look like.
_BASE_TEN = re.compile(r"[-+]?(0|[1-9][0-9]*|[0-9]*\.[0-9]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF|nan|NaN|NAN))")


def _expanded(content: dict[str, Any], path: Path) -> list[Entry] | None:
    """The customers of a folder or a table, and where each one stands; None if the fleet file lists them.

    Raises:
        ConfigError: see `pipeline.customers`.
    """
    customers = content.get("customers")
    if not isinstance(customers, dict):
        return None
    readers: dict[Any, Callable[[Path], list[Entry]]] = {"folder": from_folder, "table": from_table}
    if (
        len(customers) != 1
        or not set(customers) <= set(readers)
        or not all(isinstance(value, str) for value in customers.values())
    ):
        raise ConfigError(
            f"{path}: customers: must be a list of customers, {{folder: DIR}} or {{table: FILE}} (.csv, .tsv, .jsonl, .parquet)."
        )
    ((kind, where),) = customers.items()
    return readers[kind](_absolute(where, path.resolve().parent))


def _with_defaults(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Lay each customer's sections over the defaults and make file names absolute."""
    customers = content.get("customers")
    resolved: Any = customers
    if isinstance(customers, list):
        sections = _Sections(content, path.parent)
        resolved = []
        for customer in customers:
            if isinstance(customer, dict):
                customer = sections.of(_string_ids(customer))
                if "data" in customer:
                    customer["data"] = absolute_data(customer["data"], path.parent)
            resolved.append(customer)
    base = content.get("base_model")
    base = {"path": base} if isinstance(base, str) else base
    if isinstance(base, dict) and isinstance(base.get("path"), str):
        base = {**base, "path": _absolute_base(base["path"], path.parent)}
    added = {"name": path.stem} if "name" not in content else {}
    if "launch" in content:
        added["launch"] = _absolute_launch(content["launch"], path.parent)
    return {**content, **added, "base_model": base, "customers": resolved}


class _Sections:
    """The sections of customers laid over those above them. Most customers have the same ones: each is built and checked once."""

    def __init__(self, content: dict[str, Any], folder: Path) -> None:
        self.above = {**(content.get("defaults") or {}), "launch": content.get("launch")}
        self.folder = folder
        self.built: dict[str, dict[str, Any]] = {}

    def of(self, customer: dict[str, Any]) -> dict[str, Any]:
        """`customer` with every section, as a model where it is valid and as it was written where it is not."""
        own = {section: customer[section] for section in (*SECTIONS, "launch") if customer.get(section) is not None}
        name = repr(own)
        if name not in self.built:
            self.built[name] = self._build(own)
        return {**customer, **self.built[name]}

    def _build(self, own: dict[str, Any]) -> dict[str, Any]:
        sections = {name: _overlay(self.above.get(name), own.get(name)) for name in (*SECTIONS, "launch")}
        sections["prefix"] = _absolute_prefix(sections["prefix"], self.folder)
        sections["launch"] = _absolute_launch(sections["launch"], self.folder)
        try:
            whole = Customer.model_validate({"id": "x", "data": "x.jsonl", **sections})
        except ValidationError:
            return sections  # said with its line when the fleet is checked
        return {name: getattr(whole, name) for name in sections}


def _overlay(below: Any, above: Any) -> Any:
    """Mappings merge key by key, anything else replaces."""
    if above is None:
        return below if below is not None else {}
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{k: _overlay(below.get(k), v) if isinstance(v, dict) else v for k, v in above.items()}}
    return above


def absolute_data(data: Any, folder: Path) -> Any:
    """A customer's `data` with its file names laid over `folder`."""
    data = {"path": data} if isinstance(data, str) else data
    if not isinstance(data, dict):
        return data
    return {
        key: str(_absolute(value, folder))
        if key in ("path", *SPLITS) and isinstance(value, str) and is_file_name(value)
        else value
        for key, value in data.items()
    }


def _absolute_prefix(prefix: Any, folder: Path) -> Any:
    start = prefix.get("init_prefix") if isinstance(prefix, dict) else None
    if not isinstance(start, str) or start == "champion":
        return prefix
    return {**prefix, "init_prefix": str(_absolute(start, folder))}


def _absolute_launch(launch: Any, folder: Path) -> Any:
    file = launch.get("accelerate_config") if isinstance(launch, dict) else None
    if not isinstance(file, str) or not ("/" in file or file.endswith((".yaml", ".yml"))):
        return launch  # the name of one that comes along
    return {**launch, "accelerate_config": str(_absolute(file, folder))}


def is_file_name(source: str) -> bool:
    """Whether a data source means a file (by its suffix) rather than a hub id."""
    return source.lower().endswith(DATA_SUFFIXES)


def _absolute_base(value: str, folder: Path) -> str:
    # `org/name` is a hub id unless such a folder stands beside the fleet file; with a leading ./, ../, / or ~ it is always a folder.
    local = _absolute(value, folder)
    looks_local = value.startswith((".", "/", "~")) or value.count("/") != 1
    return str(local) if looks_local or local.exists() else value


def _absolute(value: str, folder: Path) -> Path:
    return (folder / os.path.expanduser(value)).resolve()  # Path.expanduser raises for a user who is not there


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _problem(path: Path, content: dict[str, Any], tree: yaml.Node, item: Any, given: list[Entry] | None) -> str:
    """One validation error as `file:line: customer acme: section.key: what is wrong and what to do`; `given` are customers of a folder or table."""
    location = ["customers", item["ctx"]["number"]] if item["type"] == "twice" else list(item["loc"])
    # A setting that a customer inherits is wrong where it was written: in the defaults.
    place = f"{path}:{_line_of(tree, location)}"
    who = ""
    if len(location) > 1 and location[0] == "customers" and isinstance(location[1], int):
        customer = content["customers"][location[1]]
        if given is not None and _written_by(customer, location[2:]):
            place = given[location[1]][1]
        who = (
            f"customer {customer.get('id', location[1])!s}: "
            if isinstance(customer, dict)
            else f"customer number {location[1] + 1}: "
        )
    name = ".".join(str(part) for part in (location[2:] if who else location))
    where = f"{name}: " if name else "" if who else "fleet: "
    return f"{place}: {who}{where}{_what(item, location)}"


def _written_by(customer: Any, location: list[Any]) -> bool:
    """Whether a customer of a folder or table says itself what is wrong, or the defaults of the fleet file do."""
    for part in location:
        if not isinstance(customer, dict):
            break
        if part not in customer:
            return part not in (*SECTIONS, "launch") and len(location) == 1
        customer = customer[part]
    return True


# What pydantic says of the wrong kind of value, in words for people who write YAML and not Python.
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite_number": "must be a finite number",
    "string": "must be text in quotes",
    "bool": "must be true or false",
    "tuple": "must be a list",
    "dict": "must be a section of keys and values",
    "model": "must be a section of keys and values",
    "too_short": "needs at least 1 entry",
    "missing": "is missing",
}


def _what(item: Any, location: list[Any]) -> str:
    """What is wrong, and what was found there."""
    kind = item["type"]
    if kind == "extra_forbidden":
        known = _known_keys(location)
        return f"unknown key.{_nearest(str(location[-1]), known)} Known here: {', '.join(known)}"
    plain = _KINDS.get(kind) or _KINDS.get(kind.split("_")[0])
    what = plain or item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    value = item["input"]
    if value is None:
        return f"is empty; it {what}" if what.startswith("must") else what
    if kind in ("missing", "twice") or isinstance(value, dict | list | tuple | Settings):
        return what
    return f"{what} (got {_written(value)})"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)[:200] if isinstance(value, str) else str(value)[:200]


def _line_of(tree: yaml.Node, location: list[Any]) -> int:
    """1-based line of the deepest node of the YAML tree that `location` reaches."""
    node, line = tree, tree.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(part):
                    node, line = value_node, key_node.start_mark.line
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _known_keys(location: list[Any]) -> list[str]:
    """The keys that the section holding the last part of `location` takes."""
    model: Any = Fleet
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        # What is no field is a name in a section of names, such as that of a work pool.
        if part in getattr(model, "model_fields", {}):
            model = _section(model.model_fields[part].annotation)
    return sorted(getattr(model, "model_fields", {}))


def _section(annotation: Any) -> Any:
    """The model in an annotation such as `Model | None` or `dict[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)
