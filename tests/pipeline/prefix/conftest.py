"""A bank to put before the tiny models of `families`; the bases that training loads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.prefix import FrozenBase, Prefix, PrefixBank
from pipeline.prefix.initialise import from_text
from pipeline.training import run


@pytest.fixture
def bank_of_text() -> Callable[..., PrefixBank]:
    """A bank: slot 0 empty, slot 1 the prefix of a text, slot 2 another, shorter one."""

    def make(base: FrozenBase, text: list[int], dtype: torch.dtype = torch.float64) -> PrefixBank:
        prefix: Prefix = from_text(base, text, len(text))
        bank = PrefixBank(base.sites, slots=3, length=len(text) + 2, dtype=dtype)
        bank.put(1, prefix)
        bank.put(2, {site: (key[:, :2] * 1.5, value[:, :2]) for site, (key, value) in prefix.items()})
        return bank

    return make


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FrozenBase, str]]:
    """The bases that runs load, each with the digest of its weights at that moment."""
    bases: list[tuple[FrozenBase, str]] = []
    load = run.load_base

    def remember(*given: Any, **named: Any) -> FrozenBase:
        base = load(*given, **named)
        bases.append((base, base.digest()))
        return base

    monkeypatch.setattr(run, "load_base", remember)
    return bases
