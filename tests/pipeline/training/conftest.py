"""Processes that end with their test."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .launching import Launch


@pytest.fixture
def launch(root: Path) -> Iterator[Launch]:
    """Start `accelerate launch` with a config; whatever of it is alive at the end of the test is killed."""
    children: list[subprocess.Popen[str]] = []

    def start(config: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        file = root / "accelerate_configs" / f"{config}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *arguments]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
        )  # fmt: skip
        children.append(child)
        return child

    yield start
    for child in children:
        with_all = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        for process in [child, *with_all]:
            process.kill()
        child.wait()
