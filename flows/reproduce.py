"""`prefixfleet reproduce`: one claim of the paper, from its data to its page. Imports no torch.

Whatever is a prefix is a slot of one mixed job, as in a sweep; methods that change weights run one after another, as in a comparison, each in a
process of its own. Every arm has as many learning rates to try with the first seed, the best by dev loss kept for the others. What is finished is
kept by a digest of all that it depends on, so a killed run goes on, and names that share runs share them.
"""

import itertools
import logging
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import compare, events, jobs, launch, locks, sweep_work, work
from pipeline.compare.methods import FACTORS, METHODS
from pipeline.config import Customer, DataSettings, Fleet, PrefixSettings, TrainingSettings
from pipeline.data import Record, read_split
from pipeline.errors import BaseModelError, ConfigError, PrefixFleetError, TrainingError
from pipeline.files import digest_of, read_json, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.paper.claims import Arm, Data, Reproduction, Scale, reproduction
from pipeline.paper.judge import Run, judge, part_rows, plain
from pipeline.paper.report import write_paper
from pipeline.paper.sources import LOADERS, drawn, write_splits
from pipeline.registry import ensure_store
from pipeline.sweep.grid import Variant
from pipeline.sweep.score import facts_of
from pipeline.training.job import JobCustomer, write_job

FORMAT = 1
RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
EXPERIMENT = "prefixfleet-paper"
# Rates at paper scale are one of these, a third of it and three times it; those of `METHODS` are for small bases and dozens of steps. Weights and
# adapters: the paper's rate for most sets. LoRA: Hu et al. 2021 for GPT-2 medium on E2E. Embeddings, for which nobody has published one: a tenth of
# that of small scale, since thousands of steps are taken instead of dozens.
PAPER_RATES = {"full": 5e-5, "top2": 5e-5, "adapter": 5e-5, "lora": 2e-4, "embedding": 3e-3}
DATA: dict[Scale, Path] = {"small": Path("../shared/data"), "paper": Path("data")}

_OWN_BASE = (
    "The base is examples/base, 18.9 million parameters. The smaller one beside the checkout, ../shared/base, cannot put a list into words: its "
    "README has prefixes below 1 BLEU."
)

Logger = logging.Logger | logging.LoggerAdapter[Any]


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    Attributes:
        scale: `small` or `paper`.
        data: the folder with the data sets.
        bases: recipe -> base instead of its own; under "" one for all recipes.
        seeds: the first chooses learning rates.
        steps: instead of the recipe's.
        out: where everything goes.
    """

    scale: Scale
    data: Path
    out: Path
    bases: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None


@dataclass
class _Set:
    """A data set as it is trained on: for each seed a customer (the same for all, unless rows are drawn) with its prepared data."""

    data: Data
    todo: work.Work
    customers: dict[int, Customer] = field(default_factory=dict)
    cards: dict[int, dict[str, Any]] = field(default_factory=dict)

    def prepared(self, seed: int) -> Path:
        return self.todo.home.prepared(self.customers[seed].key)

    def test(self) -> list[Record]:
        return read_split(self.prepared(next(iter(self.customers))), "test")


@dataclass(frozen=True)
class Cell:
    """One training: an arm with a seed and a learning rate."""

    arm: Arm
    seed: int
    lr: float
    customer: Customer


def run_reproduction(name: str, asked: Asked, logger: Logger, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Run what is not there yet, judge the claims, and write the page.

    Args:
        name: of `pipeline.paper.claims.NAMES`.
        asked: see there.
        logger: gets what the children print.
        say: told what happens.

    Returns:
        the content of `<name>.json`, and its folder.

    Raises:
        ConfigError: there is no such name, or a recipe does not go with the options.
        DataError: data is not there; the message says which, where to get it, and the option.
        BaseModelError: the base is not there.
        TrainingError: another run is at work there.
        EvaluationError: there is nothing that could be judged; `failed` of the content has what failed of a reproduction that could be.
    """
    plan = reproduction(name, asked.scale)
    if not RECIPES.is_dir():
        raise ConfigError(
            f"{RECIPES}: is not there. The settings are recipes of the source checkout: install it from there, with `pip install -e .`."
        )
    home = Home(asked.out.resolve() / asked.scale / "work")
    ensure_store(Home.current())
    keys = {CustomerKey(_named(data, seed)) for data in plan.data for seed in asked.seeds}
    with locks.holding(home, keys) as busy:
        if busy:
            raise TrainingError(f"{home.root}: another run is at work there; wait for it, or give another folder with --out.")
        sets = {data.name: _opened(data, asked, home) for data in plan.data}
        for one in sets.values():
            for seed, customer in one.customers.items():
                one.cards[seed] = work.prepare(customer, one.todo.base, home).card
            for part in one.data.parts:
                part_rows(one.test(), part)  # before anything is trained
        runs, failed, slots = _runs(plan, sets, asked, logger, say)
    base = runs.pop("base")
    content = {
        "format": FORMAT,
        **plain(plan, _base_notes(sets, asked)),
        **judge(
            plan,
            runs,
            {key: one.test() for key, one in sets.items()},
            {key: one.customers[asked.seeds[0]].evaluation.preset for key, one in sets.items()},
            base,
        ),
        "failed": failed,
        "slots": slots,
        "budget": {
            "seeds": list(asked.seeds),
            "rates": len(FACTORS),
            "steps": {key: one.customers[asked.seeds[0]].training.max_steps for key, one in sets.items()},
            "rows_per_step": {key: one.customers[asked.seeds[0]].training.batch_size for key, one in sets.items()},
            "train_rows": {key: one.cards[asked.seeds[0]]["counts"]["train"] for key, one in sets.items()},
            "test_records": {key: len(one.test()) for key, one in sets.items()},
        },
        "bases": {one.todo.base.id: one.todo.base.digest for one in sets.values()},
        "recipes": sorted({data.recipe for data in plan.data}),
    }
    folder = asked.out.resolve() / asked.scale / name
    write_paper(content, folder)
    return content, folder


def _base_notes(sets: Mapping[str, _Set], asked: Asked) -> list[str]:
    """Which base was taken, where it is not the paper's."""
    others = {one.data.recipe: _base_of(one.data, asked) for one in sets.values() if _base_of(one.data, asked)}
    notes = [f"{recipe}: the base is {base}, given with --base, and not the recipe's." for recipe, base in others.items()]
    if asked.scale == "paper":
        return [f"{note} The paper's figures are of another base." for note in notes]
    return notes if len(others) == len({one.data.recipe for one in sets.values()}) else [_OWN_BASE, *notes]


def _base_of(data: Data, asked: Asked) -> str | None:
    return asked.bases.get(data.recipe) or asked.bases.get("")


def _named(data: Data, seed: int) -> str:
    """The customer's id: one for all seeds, unless each draws rows of its own."""
    return data.name if data.rows is None else f"{data.name}-r{seed}"


def _opened(data: Data, asked: Asked, home: Home) -> _Set:
    """Read the recipe and the data, and write the rows that are trained on."""
    splits = LOADERS[asked.scale](data.name.partition("-")[0] if data.rows else data.name, asked.data.expanduser())
    recipe = RECIPES / f"{data.recipe}.yaml"

    def change(fleet: Fleet) -> Fleet:
        other = _base_of(data, asked)
        model = fleet.base_model.model_copy(update={"path": other} if other else {})
        return fleet.model_copy(update={"base_model": model, "name": f"paper-{data.name}"})

    try:
        opened = _Set(data, work.open_work(recipe, None, home, change))
    except BaseModelError as error:
        raise BaseModelError(
            f"{error} (The recipe is {recipe}; --base {data.recipe}=BASE takes another folder or hub id.)"
        ) from error
    (own,) = opened.todo.customers
    training = own.training.model_dump()
    if asked.steps is not None:
        training |= {"max_steps": asked.steps, "eval_every": max(1, asked.steps // 4)}
    for seed in asked.seeds:
        rows = splits if data.rows is None else drawn(splits, data.rows, seed)
        named = _named(data, seed)
        paths = write_splits(rows, home.root / "data" / named)
        opened.customers[seed] = own.model_copy(
            update={"id": named, "data": DataSettings(**paths), "training": TrainingSettings(**{**training, "seed": seed})}
        )
    return opened


def rates_of(arm: Arm, customer: Customer, scale: Scale) -> tuple[float, ...]:
    """The learning rates that an arm is tried with, as many for every arm, the likeliest first."""
    method = "embedding" if arm.prefix.get("reparam") == "embedding" else arm.method
    if method == "prefix":
        return tuple(customer.training.lr * factor for factor in FACTORS)
    if scale == "paper":
        return tuple(PAPER_RATES[method] * factor for factor in FACTORS)
    return METHODS[method].rates or ()


def _is_prefix(arm: Arm) -> bool:
    return arm.method == "prefix"


def cells(arms: Sequence[Arm], sets: Mapping[str, Any], wanted: Mapping[str, Sequence[tuple[int, float]]]) -> list[Cell]:
    """The trainings of arms: `wanted` gives (seed, learning rate) for the key of each."""
    made = []
    for arm in arms:
        for seed, lr in wanted.get(arm.key, ()):
            own: Customer = sets[arm.data].customers[seed]
            prefix = PrefixSettings(**{**own.prefix.model_dump(), **arm.prefix}) if _is_prefix(arm) else own.prefix
            training = TrainingSettings(**{**own.training.model_dump(), "lr": lr})
            name = f"p{prefix.length}-r{seed}-{digest_of([prefix.model_dump(mode='json'), training.model_dump()])[:16]}"
            changed = own.model_copy(update={"task": name, "prefix": prefix, "training": training})
            made.append(Cell(arm, seed, lr, changed))
    return made


def _runs(
    plan: Reproduction, sets: Mapping[str, _Set], asked: Asked, logger: Logger, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[str], dict[str, Any] | None]:
    """Train and answer. Returns key of an arm -> its runs (`base`: data set -> outputs), what failed, and what the slots cost."""
    slots = [arm for arm in plan.arms if _is_prefix(arm) and not arm.alone]
    others = [arm for arm in plan.arms if arm not in slots]
    first, *rest = asked.seeds
    rates = {arm.key: rates_of(arm, sets[arm.data].customers[first], asked.scale) for arm in plan.arms}
    failed: list[str] = []
    runs: dict[str, Any] = {"base": {}}
    cost = None
    if slots:
        tried = cells(slots, sets, {arm.key: [(first, lr) for lr in rates[arm.key]] for arm in slots})
        say(f"{plan.name}: {len(tried)} settings as slots of one mixed job")
        members, cost = _trained(f"{plan.name}-rates", tried, sets, failed, logger, measured=True)
        found = {
            arm.key: [
                (cell.lr, _facts(members[cell.customer.key])["best_dev_loss"])
                for cell in tried
                if cell.arm == arm and cell.customer.key in members
            ]
            for arm in slots
        }
        best = {key: min(of, key=lambda pair: pair[1])[0] for key, of in found.items() if of}
        repeated = cells(slots, sets, {key: [(seed, lr) for seed in rest] for key, lr in best.items()})
        if repeated:
            say(f"{plan.name}: {len(repeated)} further seeds as slots of one mixed job")
            members |= _trained(f"{plan.name}-seeds", repeated, sets, failed, logger)[0]
        kept = [cell for cell in tried if best.get(cell.arm.key) == cell.lr] + repeated
        kept = [cell for cell in kept if cell.customer.key in members]
        try:
            answers = _answered(plan.name, kept, members, sets, logger)
        except PrefixFleetError as error:
            failed.append(f"answers of the slots: {error}")
            kept, answers = [], {}
        for cell in kept:
            member = members[cell.customer.key]
            facts = {**_facts(member), "tries": [{"lr": lr, "dev_loss": loss} for lr, loss in found[cell.arm.key]]}
            outputs = answers[f"{cell.customer.id}/{cell.customer.task}"]
            runs.setdefault(cell.arm.key, []).append(Run(cell.seed, cell.lr, outputs, facts))
            runs["base"].setdefault(cell.arm.data, answers[f"{cell.customer.id}/base"])
    counter = work.Counter("methods", len(others) * len(asked.seeds)) if others else None
    for arm in others:
        chosen: float | None = None
        for seed in asked.seeds:
            # The first seed tries them all within one process, and keeps the best.
            wanted = rates[arm.key] if chosen is None else (chosen,)
            say(f"{arm.key}, seed {seed}: {'learning rates ' + ', '.join(f'{lr:g}' for lr in wanted)}")
            result = _method(arm, sets[arm.data], seed, wanted)
            if counter is not None:
                counter.step()
            if "error" in result:
                failed.append(f"{arm.key}, seed {seed}: {result['error']}")
                if chosen is None:
                    break  # no rate is chosen
                continue
            chosen = float(result["lr"])
            runs.setdefault(arm.key, []).append(Run(seed, chosen, result["outputs"], _facts_of(result, sets[arm.data], seed)))
    for data, one in sets.items():
        if data not in runs["base"]:
            result = _method(Arm("base", data, "base"), one, first, ())
            if "error" in result:
                failed.append(f"{data}/base: {result['error']}")
            else:
                runs["base"][data] = result["outputs"]
    return runs, failed, cost


def _facts_of(result: Mapping[str, Any], one: _Set, seed: int) -> dict[str, Any]:
    """What is known of a method's run; of a GPU also the hours of an epoch and the share of its memory."""
    facts = {**result, "trained": result.get("kept", result["trained"])}
    if result.get("gpu_seconds") is not None:
        steps = one.cards[seed]["counts"]["train"] / one.customers[seed].training.batch_size
        facts["hours_per_epoch"] = result["gpu_seconds"] / result["steps"] * steps / 3600
        facts["memory_percent"] = 100 * result["peak_memory_bytes"] / result["gpu_memory_bytes"]
        facts["peak_memory_bytes"] = facts["cpu_seconds"] = None
    return facts


def _trained(
    name: str, tried: Sequence[Cell], sets: Mapping[str, _Set], failed: list[str], logger: Logger, measured: bool = False
) -> tuple[dict[Any, JobCustomer], dict[str, Any] | None]:
    """Train cells as slots, one mixed job for each base. Returns those that are trained, and (`measured`) CPU seconds of the first job and of one
    cell of it by itself."""
    members: dict[Any, JobCustomer] = {}
    cost = None
    by_base: dict[str, dict[Any, Cell]] = {}
    for cell in tried:
        by_base.setdefault(sets[cell.arm.data].todo.base.digest, {}).setdefault(cell.customer.key, cell)
    for number, of in enumerate(by_base.values()):
        todo = sets[next(iter(of.values())).arm.data].todo
        # By customer and task: data sets with the same recipe have tasks of the same names.
        variants = [_variant(cell) for cell in of.values()]
        job = f"{name}-{number}" if number else name
        own = {str(key): _member(cell, sets, todo.home) for key, cell in of.items()}
        before = digest_of(sorted(member.train_digest for member in own.values()))[:16]
        note = todo.home.root / "seconds" / f"{before}.json"
        fresh = not note.exists() and not any(jobs.is_trained(member) for member in own.values())
        if fresh:
            write_json(note, {"format": FORMAT, "slots": None})  # a run that is killed has spent seconds that nobody counts
        started = _cpu_seconds()
        try:
            _, wrong = sweep_work.train_settings(todo, job, variants, own, todo.home, EXPERIMENT, logger)
        except PrefixFleetError as error:
            failed.append(f"{job}: {error}")
            continue
        if fresh:
            write_json(note, {"format": FORMAT, "slots": _cpu_seconds() - started, "cells": len(of)})
        failed += [f"{cell.arm.key} ({key}): {wrong[str(key)]}" for key, cell in of.items() if str(key) in wrong]
        members |= {key: own[str(key)] for key in of if jobs.is_trained(own[str(key)])}
        if measured and cost is None and len(of) > 1:
            try:
                cost = _cost(note, job, list(of.values()), sets, logger)
            except PrefixFleetError as error:
                failed.append(f"{job}, one of them alone: {error}")
    return members, cost


def _variant(cell: Cell) -> Variant:
    return Variant(str(cell.customer.key), {}, cell.customer, False)


def _member(cell: Cell, sets: Mapping[str, _Set], home: Home) -> JobCustomer:
    one = sets[cell.arm.data]
    return sweep_work.member(cell.customer, one.cards[cell.seed], one.todo, home, one.prepared(cell.seed))


def _cost(note: Path, name: str, of: Sequence[Cell], sets: Mapping[str, _Set], logger: Logger) -> dict[str, Any] | None:
    """CPU seconds of a mixed job beside those of the middle one of its cells in a job of its own, measured once, from its first step to its last:
    what a killed measurement left is removed."""
    try:
        known = read_json(note, FORMAT)
    except PrefixFleetError:
        return None
    if known["slots"] is None:
        return None
    if "alone" not in known:
        cell = of[len(of) // 2]
        todo = sets[cell.arm.data].todo
        alone = Home(todo.home.root / "alone" / note.stem)
        shutil.rmtree(alone.root, ignore_errors=True)
        alone.identity()
        member = _member(cell, sets, alone)
        started = _cpu_seconds()
        variant = _variant(cell)
        sweep_work.train_settings(todo, f"{name}-alone", [variant], {variant.name: member}, alone, EXPERIMENT, logger)
        known |= {"alone": _cpu_seconds() - started, "of": cell.arm.key}
        write_json(note, known)
    return {"cells": known["cells"], "cpu_seconds": known["slots"], "alone_cpu_seconds": known["alone"], "alone": known["of"]}


def _cpu_seconds() -> float:
    """Of all children so far that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _facts(member: JobCustomer) -> dict[str, Any]:
    facts = facts_of(read_json(Path(member.prefix_dir) / "prefix.json", FORMAT), member)
    return {"trained": facts["parameters"], "bytes": facts["bytes"], "best_dev_loss": float(facts["dev_loss"])}


def _answered(
    name: str, kept: Sequence[Cell], members: Mapping[Any, JobCustomer], sets: Mapping[str, _Set], logger: Logger
) -> dict[str, list[str]]:
    """Outputs of trained prefixes for their test splits, and of the base, one process for each base."""
    answers: dict[str, list[str]] = {}
    by_base = itertools.groupby(
        sorted(kept, key=lambda cell: sets[cell.arm.data].todo.base.digest), key=lambda cell: sets[cell.arm.data].todo.base.digest
    )
    for digest, of in by_base:
        asked = list(of)
        todo = sets[asked[0].arm.data].todo
        folder = todo.home.root / "answers" / f"{name}-{digest[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        customers = tuple(cell.customer for cell in asked)
        fleet = todo.fleet.model_copy(update={"name": f"{name}-answers", "customers": customers})
        (planned,) = jobs.plan(
            fleet, customers, {cell.customer.key: members[cell.customer.key] for cell in asked}, todo.base, todo.home
        )
        write_job(folder / "job.yaml", planned.job)
        task = {"format": FORMAT, "job": str(folder / "job.yaml"), "outputs": str(todo.home.root / "outputs.jsonl")}
        write_json(folder / "task.json", task)
        launch.run_module("pipeline.paper", folder / "task.json", planned.launch, events.emit, logger)
        answers |= read_json(folder / "answers.json", FORMAT)["answers"]
    return answers


def _method(arm: Arm, one: _Set, seed: int, rates: Sequence[float]) -> dict[str, Any]:
    """One method with one seed in a process of its own, or what it came to before. `error`: why it came to nothing."""
    customer = one.customers[seed]
    if _is_prefix(arm):
        customer = customer.model_copy(update={"prefix": PrefixSettings(**{**customer.prefix.model_dump(), **arm.prefix})})
    member, job = compare.float32_job(one.todo, customer, one.cards[seed], one.prepared(seed))
    setting = digest_of([member.train_digest, member.evaluate_digest, arm.method, arm.share, list(rates)])
    folder = one.todo.home.root / "methods" / customer.id / setting[:16]
    result = compare.known_result(folder / f"{arm.method}.json")
    if result is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_job(folder / "job.yaml", job)
        task = {"format": FORMAT, "method": arm.method, "tries": len(rates), "adapter_share": arm.share, "rates": list(rates)}
        write_json(folder / "task.json", task)
        try:
            compare.run_method(folder / "job.yaml", folder / "task.json", arm.method)
        except PrefixFleetError as error:
            return {"error": str(error)}  # the others go on; this one is tried again the next time
        result = read_json(folder / f"{arm.method}.json", FORMAT)
        for tensors in folder.glob("*.safetensors"):
            tensors.unlink()  # only their size counts, and it is in the result
    return result
