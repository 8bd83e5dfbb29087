"""Data sets of the Hugging Face hub, through `datasets`, without ever waiting long for a network that is not there.

The hub is asked for an answer in a bounded time first; if there is none, only the local cache is used (`datasets` alone would
retry for half a minute or more).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.errors import DataError
from pipeline.hub import PROBE_SECONDS, hub_answers

_REMEDY = "Check the id, `revision`, and access (`hf auth login`); or give a file (.jsonl, .csv, .tsv, .parquet)."
# What the hub's data sets call the splits.
_NAMES = {"train": ("train",), "dev": ("validation", "dev", "val", "valid"), "test": ("test",)}


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that `revision` (by default the newest) of data set `name` means now; `revision` itself if the hub does not
    answer.

    Raises:
        DataError: the hub knows no such data set or revision.
    """
    if not hub_answers():
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=PROBE_SECONDS * 2).sha
    except HfHubHTTPError as error:
        raise DataError(f"{name}: the hub does not give this data set ({describe(error)}). {_REMEDY}") from error
    except Exception:  # the network went away: the cache may still serve
        return revision


def load_hub_splits(name: str, split: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """Our split names to tables of a hub data set.

    Args:
        name: hub id.
        split: `all`: the data set's own train, dev (validation) and test splits are taken as they are, or its only split as
            `all`. Otherwise that split alone.
        config: configuration name.
        revision: branch, tag or commit.

    Raises:
        DataError: neither the hub nor the cache has it, or it has no such split.
    """
    reachable = hub_answers()
    with contextlib.nullcontext() if reachable else _offline():
        import datasets
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            tables = dict(datasets.load_dataset(name, config, revision=revision))
        except Exception as error:  # a wide family: network, access, unknown configuration, damaged files
            why = (
                "the hub does not give this data set"
                if reachable
                else "the hub cannot be reached, and the cache does not have this data set"
            )
            raise DataError(f"{name}: {why} ({describe(error)}). {_REMEDY}") from error
    found = {ours: next((theirs for theirs in names if theirs in tables), None) for ours, names in _NAMES.items()}
    if split != "all":
        own = found[split]
        if own is None:
            raise DataError(f"{name}: has no {split} split. It has: {', '.join(tables)}.")
        return {split: tables[own]}
    if len(tables) == 1:
        return {"all": next(iter(tables.values()))}
    if found["train"] is None:
        raise DataError(f"{name}: has no train split. It has: {', '.join(tables)}. Export the one you want to a file.")
    return {ours: tables[theirs] for ours, theirs in found.items() if theirs is not None}


def describe(error: Exception) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Switch huggingface_hub and datasets to their caches. Both read `HF_HUB_OFFLINE` at import only, so their copies are set."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
