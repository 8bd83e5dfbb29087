"""Why a stage is due for a customer, in words: `new`, `new data`, `new base`, `new settings`, `asked for`, `unfinished`, or the reason for which
it was queued (`pipeline.queued`): `drift`.

In: what is known of the customer now, and what was noted of its last registration. Out: words for the table, the dry run and a run's name. Decides
nothing: what is due follows from the digests (`flows.jobs`).
"""

from pathlib import Path
from typing import Any

from flows import jobs
from flows.notes import times_again
from pipeline.base import BaseModelInfo
from pipeline.config import Customer
from pipeline.errors import PrefixFleetError
from pipeline.files import read_json
from pipeline.home import Home
from pipeline.queued import read_queued
from pipeline.training.job import JobCustomer

NEW, DATA, BASE, SETTINGS, ASKED, UNFINISHED = "new", "new data", "new base", "new settings", "asked for", "unfinished"


def unprepared(customer: Customer, base: BaseModelInfo, home: Home, receipt: dict[str, Any] | None) -> str:
    """Why a customer's data is to be prepared."""
    from pipeline.data import read_card, same_sources

    note = read_queued(home, customer.key)
    if note is not None:
        return str(note.get("reason", "drift"))
    try:
        card = read_card(home.prepared(customer.key))
    except PrefixFleetError:
        return NEW if receipt is None else UNFINISHED
    changed = [BASE] if card.get("tokenizer_digest") != base.tokenizer_digest else []
    if not same_sources(customer, card):
        changed.append(DATA)
    return ", ".join(changed or [SETTINGS])


def unmade(member: JobCustomer, base: BaseModelInfo, home: Home, receipt: dict[str, Any] | None, known: bool) -> str:
    """Why a customer whose data is prepared is to be trained, evaluated or registered; `known`: it has a registered version."""
    note = read_queued(home, member.key)
    if note is not None:
        return str(note.get("reason", "drift"))
    if receipt is None:
        begun = jobs.is_trained(member) or (home.root / "prefixes" / member.customer / member.task).is_dir()
        return UNFINISHED if begun or known else NEW
    if receipt.get("train_digest") == member.train_digest:
        if receipt.get("evaluate_digest") == member.evaluate_digest:
            return UNFINISHED
        return DATA if receipt.get("data_fingerprint") != member.data_fingerprint else SETTINGS
    if jobs.is_trained(member) and not jobs.is_evaluated(member):
        return UNFINISHED
    if receipt.get("again", 0) != times_again(home, member.key):
        return ASKED
    changed = _changed(member, base, home, str(receipt.get("train_digest")))
    return ", ".join(changed) or SETTINGS


def _changed(member: JobCustomer, base: BaseModelInfo, home: Home, before: str) -> list[str]:
    """What differs from the prefix with the digest `before`; nothing if that is no digest, or the prefix is not here."""
    try:
        prefix = read_json(home.prefix(member.key, before) / "prefix.json", 1)
        card = read_json(Path(member.prepared) / "card.json", 1)
        lineage, old = prefix["lineage"], prefix["base"]
        data = lineage["data_fingerprint"] not in (card["train_fingerprint"], card["fingerprint"])
        differ = {
            DATA: data,
            BASE: old["digest"] != base.digest or old["tokenizer_digest"] != base.tokenizer_digest,
            SETTINGS: lineage["config_digest"] != member.config_digest,
        }
    except (PrefixFleetError, KeyError, TypeError):
        return []
    return [what for what, differs in differ.items() if differs]


def receipt_words(member: JobCustomer, home: Home) -> dict[str, Any]:
    """What a registration notes so that the next run can say why it does something."""
    return {"data_fingerprint": member.data_fingerprint, "again": times_again(home, member.key)}


def run_name(who: str, day: str, reasons: dict[str, tuple[str, str]], of: int) -> str:
    """`acme · 2026-11-22 · retrain (new data)` where one customer is due or asked for, else `fleet · 2026-11-22 · 12 of 300 due`.

    Args:
        who: the customer asked for, or the fleet.
        day: as it is to be read.
        reasons: for each customer that is due, what is done to it and why.
        of: how many customers were looked at.
    """
    if of == 1:
        what = next((f"{action} ({why})" for action, why in reasons.values()), "up to date")
        return f"{who} · {day} · {what}"
    return f"{who} · {day} · {len(reasons):,} of {of:,} due"


def action(due: tuple[str, ...], trained_before: bool) -> str:
    """The first stage that is due, as a verb; preparing is for training's sake."""
    if due[0] in ("prepare", "train"):
        return "retrain" if trained_before else "train"
    return due[0]
