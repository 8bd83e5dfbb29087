"""`prefixfleet deploy`: what a Prefect server should know of a fleet file, compared with what it knows, and made so.

In: a fleet file and a server. Out: the changes, applied or only told. Deployments of the flows, the fleet's own schedule and those of customers with
an hour of their own, the work pools that the file describes, queues, and the automation that tells of failed runs. Ours bear the tag
`prefixfleet` and that of their fleet; nothing else is ever changed or removed. Knows nothing of what the flows do.
"""

import datetime
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flows import jobs
from flows.launch import told_to_workers
from flows.prefect_api import pages, prefect_api
from pipeline.config import Fleet, ScheduleSettings, load_fleet
from pipeline.errors import ConfigError
from pipeline.files import digest_of
from pipeline.home import Home

TAG = "prefixfleet"
# Of a list, in what is told of a change.
_SHOWN = 120
_FLOWS = ("fleet", "customer", "sweep", "maintain")
# A run that somebody waits for goes before the nightly ones: of two queues of a pool the one made first has precedence.
_QUEUES = {"customer": "prefixfleet-on-demand", "sweep": "prefixfleet-on-demand"}
_SCHEDULED = "prefixfleet-scheduled"
# A run whose worker was killed would be "running" for ever, and hold its deployment's one slot. Longer than a server takes to start again.
_HEARTBEAT, _BEAT_SECONDS, _DEAD_SECONDS = "prefect.flow-run.heartbeat", 30, 150
_BEATING = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_BEAT_SECONDS)}


@dataclass(frozen=True)
class Change:
    """One thing that is not on the server as the fleet file wants it.

    Attributes:
        kind: `work pool`, `work queue`, `deployment`, `schedule` or `automation`.
        what: of an update, the settings that change, in words; of a schedule, when it fires.
        apply: makes it so.
    """

    action: Literal["create", "update", "remove"]
    kind: str
    name: str
    what: tuple[str, ...]
    apply: Callable[[Any], Any] = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"action": self.action, "kind": self.kind, "name": self.name, "what": list(self.what)}


@dataclass(frozen=True)
class _Wanted:
    """A deployment as the fleet file wants it; `schedules` by slug."""

    flow: str
    name: str
    entrypoint: str
    pool: str
    queue: str | None
    settings: dict[str, Any]
    schedules: dict[str, tuple[ScheduleSettings, dict[str, Any]]]

    @property
    def full_name(self) -> str:
        return f"{self.flow}/{self.name}"


def deploy(fleet_file: Path, home: Home, *, dry_run: bool = False) -> list[Change]:
    """Make deployments, schedules, pools, queues and the automation of a fleet be as its file says.

    Args:
        fleet_file: the workers must find it at the same path.
        home: `PREFIXFLEET_HOME` of the runs, which the workers must find at the same path too.
        dry_run: only say what differs.

    Returns:
        what was done, or would be: nothing if nothing differs.

    Raises:
        ConfigError: there is no server, a pool or block is missing, or somebody else has a deployment of one of our names.
        RegistryError: MLflow, which knows who was forgotten, failed.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "deploy needs a Prefect server: schedules fire nowhere else. Start one (`prefect server start`) and set PREFECT_API_URL to its "
            "address, such as http://127.0.0.1:4200/api."
        )
    from pipeline.registry import ensure_store, forgotten_customers

    fleet_file = fleet_file.resolve()
    fleet = load_fleet(fleet_file)
    ensure_store(home)
    forgotten = set(forgotten_customers())
    with prefect_api(home):
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            changes = list(_changes(client, fleet, fleet_file, home, forgotten))
            if not dry_run:
                for change in changes:
                    change.apply(client)
    return changes


def slug(fleet: Fleet) -> str:
    """The fleet's name as Prefect takes names; two fleets whose names differ have two, however odd these are."""
    return jobs.distinct(fleet.name)


def fleet_tag(fleet: Fleet) -> str:
    """The tag of all that belongs to the fleet, and of its flow runs."""
    return f"{TAG}:{slug(fleet)}"


def _changes(client: Any, fleet: Fleet, fleet_file: Path, home: Home, forgotten: set[str]) -> Iterator[Change]:
    gpu = _job_pools(fleet)
    yield from _pools(client, fleet, {fleet.deploy.work_pool, *gpu})
    wanted = [*_wanted(fleet, fleet_file, home, forgotten), *(_wanted_job(fleet, pool) for pool in gpu)]
    yield from _queues(client, wanted)
    known = _known(client)
    for one in wanted:
        yield from _deployment(client, fleet, one, known.get(one.full_name))
        yield from _schedules(one, known.get(one.full_name))
    names = {one.full_name for one in wanted}
    for name, deployment in known.items():
        if name not in names and {TAG, fleet_tag(fleet)} <= set(deployment.tags):
            yield _leave(name, deployment, fleet_tag(fleet))
    yield from _automations(client, fleet)


def _job_pools(fleet: Fleet) -> list[str]:
    """The pools that jobs run on, in the order of the file."""
    named = [fleet.launch.work_pool, *(customer.launch.work_pool for customer in fleet.customers)]
    return list(dict.fromkeys(pool for pool in named if pool is not None))


# --- what the fleet file wants


def _wanted(fleet: Fleet, fleet_file: Path, home: Home, forgotten: set[str]) -> Iterator[_Wanted]:
    environment = {**told_to_workers(home.root), **fleet.deploy.env, **_BEATING}
    for flow in _FLOWS:
        limit = {"concurrency_limit": 1, "concurrency_options": {"collision_strategy": "ENQUEUE"}} if flow == "fleet" else {}
        yield _Wanted(
            flow,
            slug(fleet),
            f"flows.{flow}.{flow}",
            fleet.deploy.work_pool,
            _QUEUES.get(flow, _SCHEDULED),
            {
                **limit,
                "tags": [TAG, fleet_tag(fleet)],
                "parameters": {"fleet_file": str(fleet_file)},
                "job_variables": {"env": environment},
            },
            dict(_wanted_schedules(fleet, fleet_file, flow, forgotten)),
        )


def _wanted_job(fleet: Fleet, pool: str) -> _Wanted:
    """Jobs of all fleets that share a pool share its slots, so they share a deployment, which has nothing of a fleet's own but its tag."""
    settings = {"tags": [TAG, fleet_tag(fleet)], "parameters": {}, "job_variables": {"env": _BEATING}}
    return _Wanted("job", pool, "flows.job.job", pool, None, settings, {})


def _wanted_schedules(
    fleet: Fleet, fleet_file: Path, flow: str, forgotten: set[str]
) -> Iterator[tuple[str, tuple[ScheduleSettings, dict[str, Any]]]]:
    if flow == "maintain" and fleet.deploy.maintain is not None:
        yield "maintain", (fleet.deploy.maintain, {})
    if flow != "fleet":
        return
    if fleet.schedule is not None:
        yield "fleet", (fleet.schedule, {})
    # One schedule for each distinct hour: a server makes three runs ahead of every schedule.
    hours: dict[str, tuple[ScheduleSettings, list[str]]] = {}
    for customer in fleet.customers:
        if customer.schedule is not None and customer.id not in forgotten:
            name = f"hour-{digest_of(customer.schedule.model_dump(mode='json'))[:12]}"
            hours.setdefault(name, (customer.schedule, []))[1].append(f"{customer.id}/{customer.task}")
    for name, (schedule, who) in hours.items():
        # `acme` would mean all tasks of acme, which may have hours of their own.
        yield name, (schedule, {"customers": sorted(who)})


# --- pools and queues


def _pools(client: Any, fleet: Fleet, needed: Iterable[str]) -> Iterator[Change]:
    known = {pool.name: pool for pool in pages(client.read_work_pools)}
    for name in dict.fromkeys([*needed, *fleet.work_pools]):
        described = fleet.work_pools.get(name)
        if name not in known:
            if described is None and name != fleet.deploy.work_pool:
                raise ConfigError(
                    f"launch.work_pool: the server has no work pool {name!r} and `work_pools` does not describe it. Add it there, such as "
                    f"`work_pools: {{{name}: {{type: process, concurrency_limit: 4}}}}`, or make it with `prefect work-pool create`."
                )
            kind, limit = (described.type, described.concurrency_limit) if described else ("process", None)
            yield _new_pool(name, kind, limit)
            continue
        if described is None:
            continue
        if known[name].type != described.type:
            raise ConfigError(
                f"work_pools.{name}: the server's pool of this name is of type {known[name].type}, not {described.type}. Name another, or correct "
                "the type."
            )
        limit = described.concurrency_limit
        if known[name].concurrency_limit != limit:
            yield _limit_pool(name, known[name].concurrency_limit, limit)


def _new_pool(name: str, kind: str, limit: int | None) -> Change:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.utilities.asyncutils import run_coro_as_sync
    from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

    template = run_coro_as_sync(get_default_base_job_template_for_infrastructure_type(kind))
    if not template:
        raise ConfigError(
            f"work_pools.{name}: Prefect knows no work pool type {kind!r} here. Install its package (prefect-kubernetes, prefect-docker, …) or "
            "correct the type."
        )
    description = "Made by `prefixfleet deploy`."
    wanted = WorkPoolCreate(name=name, type=kind, concurrency_limit=limit, base_job_template=template, description=description)
    return Change("create", "work pool", name, (f"type {kind}", _slots(limit)), lambda client: client.create_work_pool(wanted))


def _limit_pool(name: str, before: int | None, limit: int | None) -> Change:
    from prefect.client.schemas.actions import WorkPoolUpdate

    what = f"{_slots(before)} → {_slots(limit)}"
    update = WorkPoolUpdate(concurrency_limit=limit)
    return Change("update", "work pool", name, (what,), lambda client: client.update_work_pool(name, update))


def _slots(limit: int | None) -> str:
    return "any number of runs at once" if limit is None else f"{limit} runs at once"


def _queues(client: Any, wanted: Iterable[_Wanted]) -> Iterator[Change]:
    from prefect.exceptions import ObjectNotFound

    # Those on demand first; a priority is not given, for that would push the queues of others down.
    for pool, queue in sorted({(one.pool, one.queue) for one in wanted if one.queue is not None}):
        try:
            known = {found.name for found in pages(functools.partial(client.read_work_queues, work_pool_name=pool))}
        except ObjectNotFound:  # a pool that is still to be made
            known = set()
        if queue not in known:
            yield _new_queue(pool, queue)


def _new_queue(pool: str, queue: str) -> Change:
    return Change(
        "create",
        "work queue",
        f"{pool}/{queue}",
        (),
        lambda client: client.create_work_queue(name=queue, work_pool_name=pool, description="Made by `prefixfleet deploy`."),
    )


# --- deployments


def _known(client: Any) -> dict[str, Any]:
    """The deployments of flows that are called as ours, by full name, whosever they are."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    named = FlowFilter(name=FlowFilterName(any_=[*_FLOWS, "job"]))
    flows = {flow.id: flow.name for flow in client.read_flows(flow_filter=named)}
    return {f"{flows[one.flow_id]}/{one.name}": one for one in pages(client.read_deployments, flow_filter=named)}


def _deployment(client: Any, fleet: Fleet, wanted: _Wanted, known: Any | None) -> Iterator[Change]:
    settings = {**wanted.settings, **_of_flow(wanted), "work_pool_name": wanted.pool}
    if wanted.queue is not None:
        settings["work_queue_name"] = wanted.queue
    if known is None:
        shown = (f"on work pool {wanted.pool}",)
        yield Change(
            "create", "deployment", wanted.full_name, shown, functools.partial(_create, wanted=wanted, settings=settings)
        )
        return
    _check_ours(wanted, known)
    # Other fleets have their tags on the deployment of a pool, and people may have added theirs.
    settings["tags"] = [*known.tags, *(tag for tag in wanted.settings["tags"] if tag not in known.tags)]
    changed = {name: value for name, value in settings.items() if _now(known, name) != value}
    if changed:
        what = tuple(_difference(name, _now(known, name), value) for name, value in changed.items())
        update = functools.partial(_update, deployment=known.id, changed=changed)
        yield Change("update", "deployment", wanted.full_name, what, update)


def _of_flow(wanted: _Wanted) -> dict[str, Any]:
    """What follows from the flow's code: where it is, what it says of itself, and which parameters the UI asks for."""
    from prefect.utilities.callables import parameter_schema

    module, _, name = wanted.entrypoint.rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    return {
        "entrypoint": wanted.entrypoint,
        "description": (flow.description or "").strip(),
        "parameter_openapi_schema": parameter_schema(flow).model_dump(mode="json"),
        "enforce_parameter_schema": True,
    }


def _check_ours(wanted: _Wanted, known: Any) -> None:
    if TAG not in known.tags:
        raise ConfigError(
            f"deployment {wanted.full_name}: there is one, without the tag {TAG}, so somebody else made it. Give the fleet another `name:`, or "
            f"remove it (`prefect deployment delete '{wanted.full_name}'`)."
        )
    before, now = known.parameters.get("fleet_file"), wanted.settings["parameters"].get("fleet_file")
    if before != now:
        raise ConfigError(
            f"deployment {wanted.full_name}: is of another fleet file, {before}. Two fleets need two names: set `name:`. If the file was moved, "
            f"remove the deployment first (`prefect deployment delete '{wanted.full_name}'`)."
        )


def _now(known: Any, name: str) -> Any:
    """A setting as the server has it."""
    if name == "concurrency_limit":
        return None if known.global_concurrency_limit is None else known.global_concurrency_limit.limit
    value = getattr(known, name)
    return value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value


def _difference(name: str, before: Any, after: Any) -> str:
    if name in ("parameter_openapi_schema", "description"):
        return f"{name.removesuffix('_openapi_schema')} as the code has it now"
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
        inner = "; ".join(_difference(str(key), before.get(key), after.get(key)) for key in changed)
        return f"{name}.{inner}"
    return f"{name}: {_short(before)} → {_short(after)}"


def _short(value: Any) -> str:
    text = "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _create(client: Any, wanted: _Wanted, settings: dict[str, Any]) -> None:
    flow = client.create_flow_from_name(wanted.flow)
    client.create_deployment(flow, wanted.name, **{**settings, "concurrency_options": _options(settings)})


def _update(client: Any, deployment: Any, changed: dict[str, Any]) -> None:
    from prefect.client.schemas.actions import DeploymentUpdate

    client.update_deployment(deployment, DeploymentUpdate(**changed))


def _options(settings: Mapping[str, Any]) -> Any:
    from prefect.client.schemas.objects import ConcurrencyOptions

    options = settings.get("concurrency_options")
    return None if options is None else ConcurrencyOptions(**options)


def _leave(name: str, known: Any, tag: str) -> Change:
    """Take the fleet out of a deployment that it no longer needs; the last one out removes it."""
    others = [other for other in known.tags if other != tag]
    if any(other.startswith(f"{TAG}:") for other in others):
        what = (_difference("tags", known.tags, others),)
        return Change(
            "update", "deployment", name, what, functools.partial(_update, deployment=known.id, changed={"tags": others})
        )
    return Change("remove", "deployment", name, (), lambda client: client.delete_deployment(known.id))


# --- schedules


def _schedules(wanted: _Wanted, known: Any | None) -> Iterator[Change]:
    there = {schedule.slug: schedule for schedule in (known.schedules if known is not None else ()) if _is_ours(schedule)}
    for name, (when, parameters) in wanted.schedules.items():
        place = f"{wanted.full_name}: {name}"
        before = there.pop(name, None)
        if before is None:
            add = functools.partial(_add_schedule, wanted=wanted, slug=name, when=when, parameters=parameters)
            yield Change("create", "schedule", place, (_told(when, parameters),), add)
        elif _told(before.schedule, None) != _told(when, None) or before.parameters != parameters:
            change = functools.partial(_change_schedule, known=known, before=before, when=when, parameters=parameters)
            what = _scheduled_customers(before.parameters, parameters)
            yield Change(
                "update",
                "schedule",
                place,
                (f"{_told(before.schedule, before.parameters)} → {_told(when, parameters)}", *what),
                change,
            )
    for name, schedule in there.items():
        remove = functools.partial(_remove_schedule, known=known, schedule=schedule)
        yield Change(
            "remove", "schedule", f"{wanted.full_name}: {name}", (_told(schedule.schedule, schedule.parameters),), remove
        )


def _is_ours(schedule: Any) -> bool:
    """Whether it has a name as we give them; those that people add in the UI have none, or another."""
    name = schedule.slug or ""
    return name in ("fleet", "maintain") or bool(re.fullmatch("hour-[0-9a-f]{12}", name))


def _cron(when: ScheduleSettings) -> Any:
    from prefect.client.schemas.schedules import CronSchedule

    return CronSchedule(cron=when.cron, timezone=when.timezone)


def _add_schedule(client: Any, wanted: _Wanted, slug: str, when: ScheduleSettings, parameters: dict[str, Any]) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    made = DeploymentScheduleCreate(schedule=_cron(when), slug=slug, parameters=parameters)
    client.create_deployment_schedules(client.read_deployment_by_name(wanted.full_name).id, [made])


def _change_schedule(client: Any, known: Any, before: Any, when: ScheduleSettings, parameters: dict[str, Any]) -> None:
    # Whether it is paused is for those at the UI to say.
    client.update_deployment_schedule(known.id, before.id, schedule=_cron(when), parameters=parameters)


def _remove_schedule(client: Any, known: Any, schedule: Any) -> None:
    client.delete_deployment_schedule(known.id, schedule.id)


def _told(when: Any, parameters: Mapping[str, Any] | None) -> str:
    """When it fires and for whom; `when` has `cron` and `timezone`, as the fleet file's schedules and Prefect's do."""
    if not hasattr(when, "cron"):
        return str(when)  # somebody made an interval of it
    customers = (parameters or {}).get("customers")
    who = "" if customers is None else f", {len(customers)} customer{'s' if len(customers) != 1 else ''}"
    return f"{when.cron} ({when.timezone or 'UTC'}){who}"


def _scheduled_customers(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    old, new = set(before.get("customers") or ()), set(after.get("customers") or ())
    parts = (("+ ", sorted(new - old)), ("- ", sorted(old - new)))
    return tuple(_short([f"{sign}{name}" for name in names]) for sign, names in parts if names)


# --- automations: one tells of failed runs, one calls runs crashed whose process is gone


def _automations(client: Any, fleet: Fleet) -> Iterator[Change]:
    yield from _automation(client, fleet, "failed runs", _telling, f"to {fleet.deploy.notify}", fleet.deploy.notify is not None)
    silent = f"of which nothing is heard for {_DEAD_SECONDS} s"
    yield from _automation(client, fleet, "dead runs", _calling_dead, silent, True)


def _automation(
    client: Any, fleet: Fleet, kind: str, make: Callable[[Any, str, Fleet], Any], what: str, wanted: bool
) -> Iterator[Change]:
    name = f"{fleet_tag(fleet)} {kind}"
    found = [one for one in client.read_automations_by_name(name) if TAG in one.tags]
    if not wanted:
        for one in found:
            yield Change("remove", "automation", name, (), functools.partial(_remove_automation, automation=one.id))
        return
    automation, told = make(client, name, fleet), (what,)
    if not found:
        yield Change("create", "automation", name, told, lambda client: client.create_automation(automation))
        return
    parts = {"trigger", "actions"}
    # As Python's values: sets have no order.
    if found[0].model_dump(include=parts) != automation.model_dump(include=parts):
        update = functools.partial(_update_automation, automation=found[0].id, wanted=automation)
        yield Change("update", "automation", name, told, update)


def _telling(client: Any, name: str, fleet: Fleet) -> Any:
    from prefect.events.actions import CallWebhook, SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.exceptions import ObjectNotFound

    kind, _, block_name = str(fleet.deploy.notify).partition("/")
    try:
        block = client.read_block_document_by_name(block_name, kind, include_secrets=False).id
    except ObjectNotFound as error:
        raise ConfigError(
            f"deploy.notify: the server has no block {fleet.deploy.notify}. Make it in Prefect (docs/flows.md says how), which keeps its address "
            "secret, or correct the name: TYPE/NAME, such as slack-webhook/operators."
        ) from error
    told = 'flow_run.name ~ ": " ~ flow_run.state.name ~ ". " ~ (flow_run.state.message or "")'
    action: Any
    if kind == "webhook":
        action = CallWebhook(block_document_id=block, payload=f'{{"text": {{{{ ({told}) | tojson }}}}}}')
    else:
        action = SendNotification(block_document_id=block, subject=f"PrefixFleet, {fleet.name}", body=f"{{{{ {told} }}}}")
    ended = {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")}
    trigger = EventTrigger(
        expect=ended,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{fleet_tag(fleet)}"},
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=datetime.timedelta(0),
    )
    return AutomationCore(name=name, tags=[TAG, fleet_tag(fleet)], trigger=trigger, actions=[action])


def _calling_dead(client: Any, name: str, fleet: Fleet) -> Any:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    # Whatever else a run may do than being at work: then its silence is no sign.
    others = ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut", "Paused", "Suspended", "Scheduled", "AwaitingRetry")
    trigger = EventTrigger(
        after={_HEARTBEAT},
        expect={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in others)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{fleet_tag(fleet)}"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=datetime.timedelta(seconds=_DEAD_SECONDS),
    )
    message = f"Nothing was heard of its process for {_DEAD_SECONDS} s: the worker or its machine is gone. The next run goes on from what is on disk."
    return AutomationCore(
        name=name,
        tags=[TAG, fleet_tag(fleet)],
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )


def _update_automation(client: Any, automation: Any, wanted: Any) -> None:
    client.update_automation(automation, wanted)


def _remove_automation(client: Any, automation: Any) -> None:
    client.delete_automation(automation)
