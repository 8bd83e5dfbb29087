"""Which base `prefixfleet serve` loads. Imports no torch."""

from pathlib import Path

from pipeline.base import resolve_base
from pipeline.config import load_fleet
from pipeline.errors import RegistryError
from pipeline.files import read_json
from pipeline.home import Home
from pipeline.training.job import JobBase


def base_to_serve(fleet_file: Path | None, home: Home) -> JobBase:
    """The base of a fleet file, or that of the newest champion in the registry, which must be set up (`ensure_store`).

    Raises:
        ConfigError, BaseModelError: see `load_fleet`, `resolve_base` and `pipeline.registry.base_of`.
        RegistryError: nobody has a champion, or MLflow failed.
    """
    if fleet_file is not None:
        model = load_fleet(fleet_file).base_model
        base = resolve_base(model.path, model.revision, home.root / "cache" / "base_digests.json")
        return JobBase(base.id, str(base.path), base.revision, base.digest, model.dtype, model.quantization, model.attention)
    from pipeline.registry import base_of, lookup, status
    from pipeline.registry.store import shown_uri

    champions = [known for known in status() if known.champion_version is not None]
    if not champions:
        raise RegistryError(
            f"nobody has a champion at {shown_uri()}, so it is not known which base to load. `prefixfleet run FLEET.yaml` trains and registers; "
            "or name a fleet file."
        )
    newest = max(champions, key=lambda known: known.created_at)
    return base_of(read_json(lookup(newest.key).prefix_dir / "prefix.json", 1))
