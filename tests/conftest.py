"""What all tests share: quiet libraries, no network, small threads, and the real input where it is at hand."""

import os
import signal
from pathlib import Path

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
