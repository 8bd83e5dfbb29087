"""A bank to put before the tiny models of `families`."""

from collections.abc import Callable

import pytest
import torch

from pipeline.prefix import FrozenBase, Prefix, PrefixBank
from pipeline.prefix.initialise import from_text


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
