"""Where PrefixFleet keeps its files: `PREFIXFLEET_HOME`, by default `.prefixfleet/` below the current folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.keys import CustomerKey, validate_digest, validate_id


@dataclass(frozen=True)
class Home:
    """The layout of the working folder (see `docs/files.md` for what each file holds). All paths are absolute."""

    root: Path

    @classmethod
    def current(cls) -> "Home":
        """The folder that the environment names."""
        return cls(Path(os.environ.get("PREFIXFLEET_HOME") or ".prefixfleet").expanduser().resolve())

    def prepared(self, key: CustomerKey) -> Path:
        """Folder of the prepared data of one customer."""
        return key.below(self.root, "prepared")

    def job(self, name: str) -> Path:
        """Folder of one job."""
        return self.root / "jobs" / name

    def prefix(self, key: CustomerKey, digest: str) -> Path:
        """Folder of one trained prefix; `digest` is that of everything it is trained from."""
        return key.below(self.root, "prefixes", validate_digest(digest)[:16])

    def evaluation(self, key: CustomerKey, digest: str) -> Path:
        """Folder of one evaluation; `digest` is that of the prefix, the test set and the evaluation settings."""
        return key.below(self.root, "evaluations", validate_digest(digest)[:16])

    def sweep(self, key: CustomerKey) -> Path:
        """Folder of the sweeps of one customer: a home of its own for the settings tried, and `reports/<digest>/` for what came of them."""
        return key.below(self.root / "sweeps")

    def drift(self, key: CustomerKey) -> Path:
        """Folder of what judges one customer's champion on rows that arrived since: a home of its own, as that of a sweep."""
        return key.below(self.root / "drift")

    def cached_prefix(self, key: CustomerKey, digest: str) -> Path:
        """Folder of a prefix that was downloaded from the registry; `digest` is that of its content."""
        return key.below(self.root / "cache" / "prefixes") / validate_digest(digest)[:16]

    def cached_prefixes(self, customer: str) -> Path:
        """All that was downloaded from the registry for one customer."""
        return self.root / "cache" / "prefixes" / validate_id(customer)

    def cache_lock(self, customer: str) -> Path:
        """The file that is locked while one customer's downloads are written or removed."""
        return self.root / "locks" / f"cache.{validate_id(customer)}.lock"

    @property
    def mlflow_database(self) -> Path:
        """The embedded MLflow store, used when no `MLFLOW_TRACKING_URI` is set."""
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """Artifacts of the embedded MLflow store."""
        return self.root / "mlartifacts"

    @property
    def prefect(self) -> Path:
        """Prefect's own home when no `PREFECT_API_URL` is set, so that runs here do not mix with the user's other flows."""
        return self.root / "prefect"
