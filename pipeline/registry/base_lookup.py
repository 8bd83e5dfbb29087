"""From a prefix folder to something that answers: find the base that the prefix was trained on, and load it once a process.

In: the content of `prefix.json`, the environment variable `PREFIXFLEET_BASE`. Out: a `JobBase` for
`pipeline.inference.load_engine`, or a function from texts to texts. Knows nothing of MLflow. No torch until a prefix is opened.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import resolve_base
from pipeline.errors import BaseModelError
from pipeline.home import Home
from pipeline.training.job import JobBase

if TYPE_CHECKING:
    from pipeline.inference import PrefixEngine

# By digest of the base, of the tokenizer, dtype, quantisation. Not in pyfunc_model.py, which MLflow runs anew for every model loaded.
_engines: dict[tuple[str, str, str, str | None], "PrefixEngine"] = {}
_loading = threading.Lock()


def base_of(prefix: dict[str, Any]) -> JobBase:
    """The base of a prefix, as it is on this machine.

    Looked for in `PREFIXFLEET_BASE` (a folder or hub id; if set, nowhere else), in the folder where training had it, and by its
    hub id.

    Args:
        prefix: the content of a `prefix.json`.

    Raises:
        BaseModelError: not found, or found with other weights, settings or another tokenizer; the message names the digests and
            the places.
    """
    base = prefix["base"]
    chosen = os.environ.get("PREFIXFLEET_BASE")
    places = [(chosen, None)] if chosen else [(base["path"], None)]
    # A folder's name alone means nothing on another machine; a hub id does.
    if not chosen and base["revision"] is not None:
        places.append((base["id"], base["revision"]))
    home = Home.current().root
    digests = home / "cache" / "base_digests.json" if home.exists() else None
    seen = []
    for place, revision in places:
        try:
            found = resolve_base(place, revision, digests)
        except BaseModelError as error:
            seen.append(str(error))
            continue
        if (found.digest, found.tokenizer_digest) == (base["digest"], base["tokenizer_digest"]):
            return JobBase(
                id=base["id"],
                path=str(found.path),
                revision=base["revision"],
                digest=base["digest"],
                dtype=base["dtype"],
                quantization=base.get("quantization"),
                attention="auto",  # no part of what a prefix is: every kernel gives the same up to rounding
            )
        seen.append(f"{place} has digest {found.digest[:16]} and a tokenizer with digest {found.tokenizer_digest[:16]}.")
    remedy = "correct or unset PREFIXFLEET_BASE" if chosen else "set PREFIXFLEET_BASE to the folder that has it"
    raise BaseModelError(
        f"customer {prefix['customer']}: the prefix was trained on base {base['id']} with digest {base['digest'][:16]} "
        f"and a tokenizer with digest {base['tokenizer_digest'][:16]}. {' '.join(seen)} A prefix works with its own base only: {remedy}."
    )


def open_prefix(folder: Path) -> Callable[[list[str]], list[str]]:
    """A function that answers texts with the prefix in `folder`, on a base shared by all prefixes of this process.

    Raises:
        BaseModelError: see `base_of`.
        PrefixError: the prefix is damaged.
        StorageError: so is its prefix.json.
    """
    from pipeline.inference import load_engine
    from pipeline.prefix import read_config
    from pipeline.prefix.store import require

    prefix = read_config(folder)
    require(folder, prefix, "customer", *(f"base.{name}" for name in ("id", "revision", "path", "tokenizer_digest", "dtype")))
    base = prefix["base"]
    same = (base["digest"], base["tokenizer_digest"], base["dtype"], base.get("quantization"))
    with _loading:
        if same not in _engines:
            _engines[same] = load_engine(base_of(prefix))
        engine = _engines[same]
        slot = engine.add(folder)
    return lambda texts: engine.answer(texts, slot)
