"""Fixtures of the data room: the example base, and a customer with one file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import BaseModelInfo, resolve_base
from pipeline.config import Customer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def base() -> BaseModelInfo:
    return resolve_base(str(ROOT / "examples" / "base"))


@pytest.fixture
def customer(tmp_path: Path) -> Callable[..., Customer]:
    """`customer(content, name="rows.jsonl", **sections)`: bytes, text, or a list of rows."""

    def make(content: Any, name: str = "rows.jsonl", data: dict[str, Any] | None = None, **sections: Any) -> Customer:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Customer(id="acme", data={"path": str(path), **(data or {})}, **sections)

    return make


def pairs(n: int) -> list[dict[str, str]]:
    return [{"input": f"name : Place {i}", "target": f"Place {i} is open."} for i in range(n)]


@pytest.fixture
def some_pairs() -> Callable[[int], list[dict[str, str]]]:
    return pairs
