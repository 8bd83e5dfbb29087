"""Ensembles: several prefixes of one customer that answer together.

In: prefix folders (other seeds, lengths, versions). Out: one folder like a prefix's, which is evaluated, registered and served like one. Its
prefix.json names the members and how they are averaged:

- `probabilities`, `log_probabilities`: of the next token, at every step; the members' rows share the batch. prefix.safetensors holds all members,
  tensors `<member>.<site>.key|value`, so an ensemble outlives the versions that it was made of.
- `parameters`: of keys and values, where shapes agree. That gives an ordinary prefix, which costs no more than one to answer with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from pipeline.errors import PrefixError
from pipeline.files import digest_of
from pipeline.inference.request import Average, Loaded, Members
from pipeline.prefix import Prefix, is_infix, load_prefix, read_config, save_prefix
from pipeline.prefix.store import is_ensemble, load_ensemble, require

AVERAGES: tuple[str, ...] = ("probabilities", "log_probabilities", "parameters")
# Part of every step's batch: an ensemble of n costs n times one prefix.
MOST_MEMBERS = 16

# What members must share: or it would be unclear how the ensemble is prompted and decoded.
_SAME = ("customer", "task", "prompt", "chat", "generation")


def load_members(folder: Path) -> tuple[Members, dict[str, Any]]:
    """What stands before the rows of a prefix folder, or of an ensemble's, and the content of its prefix.json.

    Raises:
        StorageError, PrefixError: see `pipeline.prefix.load_prefix`.
    """
    config = read_config(folder)
    if not is_ensemble(config):
        prefix, config = load_prefix(folder)
        return Members((Loaded(prefix, is_infix(config)),)), config
    prefixes, config = load_ensemble(folder)
    average: Average = config["ensemble"]["average"]
    if average not in get_args(Average) or len(prefixes) != len(config["ensemble"]["members"]):
        raise PrefixError(f"{folder}: its prefix.json does not go with its weights. Make the ensemble again.")
    infix = [is_infix(member) for member in config["ensemble"]["members"]]
    return Members(tuple(Loaded(prefix, between) for prefix, between in zip(prefixes, infix, strict=True)), average), config


def describe(folders: Sequence[Path], names: Sequence[str], average: str) -> dict[str, Any]:
    """The prefix.json of an ensemble, without the digest of its weights.

    Args:
        folders: of the members.
        names: what to call them, such as `version 3`.
        average: one of `AVERAGES`.

    Raises:
        PrefixError: unknown average; fewer than two, too many, twice the same, an ensemble among them, of different customers, bases or
            prompts, or, for `parameters`, of other shapes.
    """
    if average not in AVERAGES:
        raise PrefixError(f"{average!r} cannot be averaged. Choose one of {', '.join(AVERAGES)}.")
    if not 2 <= len(folders) <= MOST_MEMBERS:
        raise PrefixError(f"an ensemble has 2 to {MOST_MEMBERS} members, not {len(folders)}. Name more, or fewer, versions.")
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if not is_ensemble(config):
            require(folder, config, "prefix.placement", "prefix.length")
    first = configs[0]
    for name, config in zip(names, configs, strict=True):
        if is_ensemble(config):
            raise PrefixError(f"{name} is an ensemble itself. Name its members instead.")
        differing = [field for field in _SAME if config[field] != first[field]]
        if any(config["base"][field] != first["base"][field] for field in ("digest", "tokenizer_digest", "dtype")):
            differing.append("base")
        if differing:
            raise PrefixError(f"{name} differs from {names[0]} in {', '.join(differing)}. Members of an ensemble share these.")
        if average == "parameters" and _shapes(config) != _shapes(first):
            raise PrefixError(
                f"{name} has other sites, another length or place than {names[0]}, so parameters cannot be averaged. "
                "Average probabilities or log_probabilities."
            )
    weights = [config["weights_sha256"] for config in configs]
    twice = next((names[i] for i, one in enumerate(weights) if one in weights[:i]), None)
    if twice is not None:
        raise PrefixError(f"{twice} holds the same weights as another member. Name each prefix once.")
    members = [
        {
            "name": name,
            "digest": config["digest"],
            "weights_sha256": config["weights_sha256"],
            "prefix": config["prefix"],
            "seed": config["lineage"]["seed"],
            "data_fingerprint": config["lineage"]["data_fingerprint"],
        }
        for name, config in zip(names, configs, strict=True)
    ]
    fingerprints = {member["data_fingerprint"] for member in members}
    whole = {
        **{field: first[field] for field in (*_SAME, "base")},
        "digest": digest_of(["ensemble", average, weights, [is_infix(config) for config in configs], [first[f] for f in _SAME]]),
        "prefix": {**first["prefix"], "length": max(config["prefix"]["length"] for config in configs)},
        "training": {"ensemble_of": ", ".join(names), "average": average},
        "lineage": {
            **first["lineage"],
            "seed": None,
            "data_fingerprint": fingerprints.pop() if len(fingerprints) == 1 else "",
            "parent": None,
        },
        "run_id": None,
        "ensemble": {"average": average, "members": members},
    }
    parameters = [config["prefix"].get("parameters") for config in configs]
    if average != "parameters" and None not in parameters:
        whole["prefix"]["parameters"] = sum(parameters)
    return whole


def make_ensemble(folders: Sequence[Path], config: dict[str, Any], out: Path) -> None:
    """Write the folder of an ensemble.

    Args:
        folders: of the members.
        config: what `describe` made of them.
        out: the folder to write.

    Raises:
        PrefixError: a member is damaged.
        StorageError: it cannot be written.
    """
    prefixes = [load_prefix(folder)[0] for folder in folders]
    if config["ensemble"]["average"] == "parameters":
        save_prefix(out, mean_of(prefixes), config)
        return
    save_prefix(out, {f"{i}.{site}": pair for i, prefix in enumerate(prefixes) for site, pair in prefix.items()}, config)


def mean_of(prefixes: Sequence[Prefix]) -> Prefix:
    """The mean of keys and values of prefixes of one shape, computed in float64."""

    def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)

    return {
        site: (mean([prefix[site][0] for prefix in prefixes]), mean([prefix[site][1] for prefix in prefixes]))
        for site in prefixes[0]
    }


def _shapes(config: dict[str, Any]) -> list[Any]:
    return [config["prefix"]["length"], sorted(config["prefix"]["sites"]), is_infix(config)]
