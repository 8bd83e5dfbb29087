"""What all tests share: quiet libraries, no network, small threads, and the real input where it is at hand."""

import importlib.util
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Before any library reads them.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "OMP_NUM_THREADS": "1",  # two test processes share two cores
        "TOKENIZERS_PARALLELISM": "false",
    }
)

import pytest

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and official scores, kept beside the checkout and never copied into it; tests that need them skip where they are absent."""
    path = ROOT.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return path


def _of_docker(name: str) -> ModuleType:
    """A module of docker/, which is no package: `docker` is another's name."""
    spec = importlib.util.spec_from_file_location(f"prefixfleet_docker_{name}", ROOT / "docker" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stack() -> ModuleType:
    """docker/stack.py: real servers on loopback. `stack.load(NAME)` is another module of docker/."""
    module = _of_docker("stack")
    module.load = _of_docker  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="session")
def stack_folder() -> Iterator[Path]:
    """A folder for a stack. Not below pytest's: PostgreSQL runs as another user if we are root, who could not pass through those."""
    with tempfile.TemporaryDirectory(prefix="stack", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def example_base() -> Path:
    """The embedded base model."""
    return ROOT / "examples" / "base"


# The files that take longest go first, so that the last of the processes that share the tests does not end with one of them alone.
_LONGEST = ("pipeline/training", "flows/test_exchange", "flows", "pipeline/registry", "pipeline/compare", "pipeline/inference")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; the order within a file stays."""

    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        return next((i for i, start in enumerate(_LONGEST) if file.startswith(start)), len(_LONGEST))

    items.sort(key=place)
