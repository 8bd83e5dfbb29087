"""Which settings a sweep tries: every combination of the values given, each as a customer of a job.

In: a customer and values by axis. Out: variants, each a `Customer` with a task name of its own that its settings alone decide, so that a sweep
to which a value is added finds the finished ones again. Knows nothing of data, jobs or scores.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from pipeline.config import Customer, PrefixSettings, TrainingSettings
from pipeline.errors import ConfigError
from pipeline.files import digest_of


class Axis(NamedTuple):
    """One thing that is varied: where it stands in the fleet file, and the option that gives its values."""

    section: str
    field: str
    option: str


AXES = {
    "length": Axis("prefix", "length", "--lengths"),
    "lr": Axis("training", "lr", "--lrs"),
    "batch_size": Axis("training", "batch_size", "--batch-sizes"),
    "steps": Axis("training", "max_steps", "--steps"),
    "init": Axis("prefix", "init", "--inits"),
    "seed": Axis("training", "seed", "--seeds"),
}
# What starts a prefix without another one.
INITS = ("text", "task", "random", "zeros")
# What is tried where nothing is asked for.
LENGTHS = (1, 5, 10, 20)
MOST = 64


@dataclass(frozen=True)
class Variant:
    """One setting with one seed.

    Attributes:
        name: the task that it is in the job: `p20-lr0_3-b10-s400-text-r0`.
        settings: axis -> value, all of them.
        customer: the same as a customer, to make a job of.
        current: whether the fleet file says just this.
    """

    name: str
    settings: dict[str, Any]
    customer: Customer
    current: bool


def variants(customer: Customer, values: Mapping[str, Sequence[Any]]) -> list[Variant]:
    """Every combination of `values`, and what the fleet file says for the other axes.

    Args:
        customer: whose settings are varied.
        values: axis -> what to try; an axis that is absent or empty is not varied. Repeated values count once.

    Raises:
        ConfigError: a value that a fleet file could not have, or more combinations than a sweep takes.
    """
    now = {axis: getattr(getattr(customer, of.section), of.field) for axis, of in AXES.items()}
    # Another prefix to start from has one length, and is a budget that not every setting could have.
    own: dict[str, Any] = {**now, "init": "text" if now["init"] == "prefix" else now["init"]}
    tried = {axis: list(dict.fromkeys(values.get(axis) or [own[axis]])) for axis in AXES}
    count = 1
    for of in tried.values():
        count *= len(of)
    if count > MOST:
        shown = " x ".join(f"{len(of)} {axis}" for axis, of in tried.items() if len(of) > 1)
        raise ConfigError(f"{shown} are {count:,} settings; a sweep takes {MOST} at most. Vary less at once.")
    made = []
    for combination in itertools.product(*tried.values()):
        settings = dict(zip(tried, combination, strict=True))
        changed = _customer(customer, settings)
        made.append(Variant(changed.task, settings, changed, settings == now))
    return made


def _customer(customer: Customer, settings: Mapping[str, Any]) -> Customer:
    prefix: dict[str, Any] = customer.prefix.model_dump()
    training: dict[str, Any] = customer.training.model_dump()
    for axis, value in settings.items():
        (prefix if AXES[axis].section == "prefix" else training)[AXES[axis].field] = value
    prefix["init_prefix"] = None
    if prefix["init"] == "task":
        # The task's name is the variant's in the job.
        prefix |= {"init": "text", "init_text": customer.task.replace("-", " ").replace("_", " ")}
    elif prefix["init"] != "text":
        prefix["init_text"] = None
    try:
        made = PrefixSettings(**prefix), TrainingSettings(**training)
    except ValidationError as error:
        problem = error.errors()[0]
        wrong = next((axis for axis, of in AXES.items() if problem["loc"] == (of.field,)), None)
        given = f"{customer.key}: " if wrong is None else f"{AXES[wrong].option} {settings[wrong]}: "
        raise ConfigError(f"{given}{problem['msg'].removeprefix('Value error, ')}") from error
    return customer.model_copy(update={"task": _name(settings), "prefix": made[0], "training": made[1]})


def _name(settings: Mapping[str, Any]) -> str:
    # The shortest decimal form of a number is unique; a task's name holds neither a full stop nor a plus.
    lr = repr(float(settings["lr"])).replace(".", "_").replace("+", "")
    name = f"p{settings['length']}-lr{lr}-b{settings['batch_size']}-s{settings['steps']}-{settings['init']}-r{settings['seed']}"
    return name if len(name) <= 63 else digest_of(dict(settings))[:32]
