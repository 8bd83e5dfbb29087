"""What a prefix is before training. Real words are the default: in low-data settings this decides success (Li & Liang 2021, section 7.4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.errors import PrefixError
from pipeline.prefix.bank import Prefix, Site
from pipeline.prefix.base import FrozenBase
from pipeline.prefix.store import is_infix, load_prefix, require

RANDOM_STD = 0.02
KINDS = ("decoder.self", "encoder.self", "decoder.cross")


def chosen_sites(base: FrozenBase, kinds: Sequence[str] | str, layers: int | str) -> dict[str, Site]:
    """The sites of a base that get a prefix.

    Args:
        kinds: `all`, or some of `decoder.self`, `encoder.self`, `decoder.cross`.
        layers: `all`, or a number: only so many of the top layers, of encoder and decoder each.

    Raises:
        PrefixError: the base has no such attention, or fewer layers.
    """
    present = [kind for kind in KINDS if f"{kind}.0" in base.sites]
    wanted = present if kinds == "all" else list(kinds)
    if missing := [kind for kind in wanted if kind not in present]:
        raise PrefixError(
            f"prefix.sites: the base ({base.model.config.model_type}) has no {', '.join(missing)}; it has {', '.join(present)}"
        )
    chosen = {}
    for kind in wanted:
        of_kind = [name for name in base.sites if name.startswith(f"{kind}.")]
        if isinstance(layers, int) and layers > len(of_kind):
            raise PrefixError(f"prefix.layers is {layers}, but the base has {len(of_kind)} layers of {kind}: at most so many")
        chosen.update(dict.fromkeys(of_kind[-layers:] if isinstance(layers, int) else of_kind))
    return {name: site for name, site in base.sites.items() if name in chosen}


def from_zeros(sites: Mapping[str, Site], length: int) -> Prefix:
    """Keys and values of zero: the softmax gives each column weight, the values add nothing."""
    return {
        name: (torch.zeros(s.heads, length, s.head_dim), torch.zeros(s.heads, length, s.head_dim)) for name, s in sites.items()
    }


def from_random(sites: Mapping[str, Site], length: int, seed: int) -> Prefix:
    """Keys and values drawn from a normal distribution of standard deviation 0.02."""
    generator = torch.Generator().manual_seed(seed)
    prefix: Prefix = {}
    for name, site in sites.items():
        key, value = torch.randn(2, site.heads, length, site.head_dim, generator=generator) * RANDOM_STD
        prefix[name] = (key, value)
    return prefix


def repeated(token_ids: Sequence[int], length: int) -> list[int]:
    """A text made to fill a prefix: longer than `length` is cut, shorter is repeated.

    Raises:
        PrefixError: there is no token.
    """
    if not token_ids:
        raise PrefixError("init: text needs a text of at least one token; set prefix.init_text or choose init: random")
    return (list(token_ids) * -(-length // len(token_ids)))[:length]


@torch.no_grad()
def from_text(base: FrozenBase, token_ids: Sequence[int], length: int) -> Prefix:
    """The keys and values that the frozen base itself computes for a text, so that an untrained prefix acts as that text in front.

    All sites of the base; an encoder-decoder reads the text with both parts.

    Args:
        token_ids: the text, see `repeated`.
        length: P.

    Raises:
        PrefixError: there is no token, or the base has no more than P positions.
    """
    base.check_length(length, 1)
    ids = torch.tensor([repeated(token_ids, length)], device=base.device)
    inputs = {"input_ids": ids}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    try:
        with base.capturing() as captured:
            base.model(**inputs, use_cache=False)
    except IndexError as error:
        raise PrefixError(
            f"a prefix of {length} columns from text passes the positions of the base. Shorten the prefix."
        ) from error
    # Trained in float32 whatever the base computes in.
    dtype = torch.promote_types(base.model.dtype, torch.float32)
    return {
        name: (key[0].to("cpu", dtype, copy=True), value[0].to("cpu", dtype, copy=True))
        for name, (key, value) in captured.items()
    }


def from_prefix(folder: Path, base_digest: str, sites: Mapping[str, Site], length: int, infix: bool) -> tuple[Prefix, str]:
    """A warm start: the keys and values of another prefix.

    Args:
        folder: a prefix folder.
        base_digest: of the base that is about to be trained on.
        sites, length, infix: what is about to be trained.

    Returns:
        the prefix and the digest of its weights.

    Raises:
        PrefixError: it is damaged, or for another base, other sites, another length or place.
        StorageError: there is no such folder, or its prefix.json does not say what it must.
    """
    prefix, config = load_prefix(folder)
    require(folder, config, "prefix.length")
    theirs, digest = config["prefix"], config["base"]["digest"]
    if digest != base_digest:
        raise PrefixError(
            f"{folder}: is a prefix for the base with digest {digest[:16]}, this base has {base_digest[:16]}. A prefix is worth nothing on "
            "another base: choose another prefix.init."
        )
    found = (sorted(prefix), int(theirs["length"]), is_infix(config))
    if found != (sorted(sites), length, infix):
        has, wants = (
            f"length {p}, {len(names)} sites and placement {'infix' if between else 'prefix'}"
            for names, p, between in (found, (sites, length, infix))
        )
        raise PrefixError(
            f"{folder}: has {has}; asked for are {wants}. A warm start keeps them: set prefix.length, layers, sites and placement to what it has, "
            "or choose another prefix.init."
        )
    return prefix, str(config["weights_sha256"])
