"""Make a job fit the memory of its devices, before the base is loaded: what `launch.device_memory` asks for.

In: a job, the engine that it runs with, devices and their memory. Out: the job with smaller micro-batches and fewer slots where it takes too much,
and why customers that do not fit even alone are left out. What a job takes is computed by `pipeline.training.plan`. What is learned stays the same.
"""

import dataclasses
from collections.abc import Sequence

from pipeline.errors import ConfigError
from pipeline.keys import CustomerKey
from pipeline.sizes import gib
from pipeline.training.job import Job, JobCustomer
from pipeline.training.plan import Need, Plan, plan


def fit(job: Job, engine: str, devices: int, memory: int, gpu: bool = True) -> tuple[Job, dict[CustomerKey, str]]:
    """Lower `max_tokens_per_micro_batch`, then `slots`, until a job takes no more than its devices have.

    Args:
        job: what was asked for; at least one customer.
        engine: as `pipeline.training.plan` names them.
        devices: over all machines.
        memory: bytes of each.
        gpu: count what a GPU takes for itself.

    Returns:
        the job with the customers that fit, and for each other one the reason with the figure.

    Raises:
        ConfigError: the base alone does not fit, or the job cannot be planned.
    """
    smaller = _shrunk(job, engine, devices, memory, gpu)
    if smaller is not None:
        return smaller, {}
    refused: dict[CustomerKey, str] = {}
    # Alone, customers of the same shape take the same.
    known: dict[str, str | None] = {}
    for customer in job.customers:
        shape = repr((customer.prefix, customer.prompt.max_input_tokens, customer.prompt.max_target_tokens))
        if shape not in known:
            known[shape] = _refusal(_least(job, [customer]), engine, devices, memory, gpu)
        reason = known[shape]
        if reason is not None:
            refused[customer.key] = reason
    left = [customer for customer in job.customers if customer.key not in refused]
    if not left:
        return dataclasses.replace(job, customers=[]), refused
    fitting = dataclasses.replace(job, customers=left)
    return _shrunk(fitting, engine, devices, memory, gpu) or _least(fitting, left), refused


def _shrunk(job: Job, engine: str, devices: int, memory: int, gpu: bool) -> Job | None:
    """The job with the largest budgets of the halvings that fits, or None."""
    while True:
        found = plan(job, devices, memory, gpu)
        if _need(found, engine, job).total <= memory:
            return job
        mixing = job.mixing
        # A micro-batch of one row is not cut further, whatever the budget says.
        if found.shape.rows > 1:
            mixing = dataclasses.replace(mixing, max_tokens_per_micro_batch=max(1, mixing.max_tokens_per_micro_batch // 2))
        elif mixing.slots > 1:
            mixing = dataclasses.replace(mixing, slots=max(1, min(mixing.slots, len(job.customers)) // 2))
        else:
            return None
        job = dataclasses.replace(job, mixing=mixing)


def _least(job: Job, customers: Sequence[JobCustomer]) -> Job:
    mixing = dataclasses.replace(job.mixing, slots=1, max_tokens_per_micro_batch=1)
    return dataclasses.replace(job, mixing=mixing, customers=list(customers))


def _refusal(alone: Job, engine: str, devices: int, memory: int, gpu: bool) -> str | None:
    """Why a job of one customer, a row at a time, does not fit; None if it does."""
    found = plan(alone, devices, memory, gpu)
    need = _need(found, engine, alone)
    if need.total <= memory:
        return None
    shape = found.shape
    return (
        f"does not fit into launch.device_memory: alone, a row of {shape.input_tokens} + {shape.target_tokens} tokens at a time, it takes "
        f"{gib(need.total)} of {gib(memory)} ({gib(need.weights)} weights, {gib(need.activations)} activations, "
        f"{gib(need.prefixes + need.optimiser)} prefix). Lower prompt.max_input_tokens or prefix.length, set launch.gradient_checkpointing, or "
        "split the base over more devices; `prefixfleet plan` says which engines fit."
    )


def _need(found: Plan, engine: str, job: Job) -> Need:
    for need in found.needs:
        if (need.engine, need.checkpointing) == (engine, job.mixing.gradient_checkpointing):
            return need
    raise ConfigError(f"launch.device_memory: what engine {engine} takes cannot be planned for this base. Remove device_memory.")
