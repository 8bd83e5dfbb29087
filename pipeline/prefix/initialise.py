"""What a prefix is before training. Real words are the default: in low-data settings this decides success (Li & Liang 2021, section 7.4)."""

import torch

from pipeline.errors import PrefixError
from pipeline.prefix.bank import Prefix
from pipeline.prefix.base import FrozenBase

RANDOM_STD = 0.02


def from_zeros(base: FrozenBase, length: int) -> Prefix:
    """Keys and values of zero: the softmax gives each column weight, the values add nothing."""
    return {
        name: (torch.zeros(s.heads, length, s.head_dim), torch.zeros(s.heads, length, s.head_dim))
        for name, s in base.sites.items()
    }


def from_random(base: FrozenBase, length: int, seed: int) -> Prefix:
    """Keys and values drawn from a normal distribution of standard deviation 0.02."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tuple(torch.randn(2, site.heads, length, site.head_dim, generator=generator) * RANDOM_STD)
        for name, site in base.sites.items()
    }


@torch.no_grad()
def from_text(base: FrozenBase, token_ids: list[int], length: int) -> Prefix:
    """The keys and values that the frozen base itself computes for a text, so that an untrained prefix acts as that text in front.

    Args:
        token_ids: the text; longer than `length` is cut, shorter is repeated before it is run through the base.
        length: P.

    Raises:
        PrefixError: there is no token.
    """
    if not token_ids:
        raise PrefixError("init: text needs a text of at least one token; set prefix.init_text or choose init: random")
    ids = torch.tensor([(token_ids * -(-length // len(token_ids)))[:length]], device=base.device)
    inputs = {"input_ids": ids}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with base.lock:
        base.active.captured = {}
        try:
            base.model(**inputs, use_cache=False)
            captured = base.active.captured
        finally:
            base.active.captured, base.active.called = None, []
    return {name: (key[0].float().cpu().clone(), value[0].float().cpu().clone()) for name, (key, value) in captured.items()}
