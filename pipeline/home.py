"""Where PrefixFleet keeps its files: `PREFIXFLEET_HOME`, by default `.prefixfleet/` below the current folder."""

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.keys import CustomerKey, validate_digest, validate_id

_IDENTITY = "identity"


def identity_above(place: Path) -> str | None:
    """The identity of the home that a folder lies in, at whatever depth; None if it lies in none."""
    for folder in place.parents:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (folder / _IDENTITY).read_text(encoding="utf-8")
    return None


@dataclass(frozen=True)
class Home:
    """The layout of the working folder (see `docs/files.md` for what each file holds). All paths are absolute."""

    root: Path

    @classmethod
    def current(cls) -> "Home":
        """The folder that the environment names."""
        return cls(Path(os.environ.get("PREFIXFLEET_HOME") or ".prefixfleet").expanduser().resolve())

    def identity(self) -> str:
        """A word that no other home has, made when it is first asked for: a path may be another folder on another machine.

        Raises:
            StorageError: it cannot be written.
        """
        file = self.root / _IDENTITY
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            own = file.with_name(f".{_IDENTITY}.{secrets.token_hex(8)}.tmp")
            if not file.exists():
                own.write_text(secrets.token_hex(8), encoding="utf-8")
                with contextlib.suppress(FileExistsError):
                    os.link(own, file)  # whole, and the first of several wins
                own.unlink()
            return file.read_text(encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"{file}: cannot be written ({error.strerror}). Check PREFIXFLEET_HOME and its permissions."
            ) from error

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
