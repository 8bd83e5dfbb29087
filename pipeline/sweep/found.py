"""The newest sweep over prefix lengths of a customer, for that customer's report. Standard library, but for `pipeline.files`."""

from pathlib import Path
from typing import Any

from pipeline.errors import PrefixFleetError
from pipeline.files import read_json

FORMAT = 1


def newest_length_sweep(sweeps: Path, base_digest: str) -> dict[str, Any] | None:
    """The content of the newest sweep.json below `sweeps` that varied the length of prefixes of this base; None if there is none.

    Args:
        sweeps: the folder of the customer's sweeps (`pipeline.home.Home.sweep`).
        base_digest: of the base that the report is about.
    """
    found = []
    for path in sweeps.glob("reports/*/sweep.json"):
        try:
            content = read_json(path, FORMAT)
        except PrefixFleetError:
            continue  # a damaged one is worth no failed evaluation
        if content.get("base", {}).get("digest") == base_digest and len(content.get("curves", {}).get("length", [])) > 1:
            found.append(content)
    return max(found, key=lambda content: str(content["made"]), default=None)
