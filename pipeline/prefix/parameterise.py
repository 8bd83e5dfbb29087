"""From a customer's settings to the module whose parameters are trained: which sites, which parameterisation, which start.

Every parameterisation is a module that gives `[2, heads_kv, P, head_dim]` for each of its sites; nothing else need know which one it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import PrefixError
from pipeline.prefix.bank import Prefix
from pipeline.prefix.base import FrozenBase
from pipeline.prefix.direct import Direct
from pipeline.prefix.embedding import EmbeddingOnly, embeddings_of_text, random_embeddings, refuse_encoder_decoder
from pipeline.prefix.initialise import chosen_sites, from_prefix, from_random, from_text, from_zeros
from pipeline.prefix.mlp import Reparameterised
from pipeline.training.job import JobCustomer


def parameterise(
    base: FrozenBase, base_digest: str, customer: JobCustomer, tokenizer: Any, rows: Sequence[Any]
) -> tuple[nn.Module, str | None]:
    """The untrained prefix that the customer's settings ask for.

    Args:
        base: the frozen base.
        base_digest: the digest of its weights, as prefixes name it.
        customer: settings and seed.
        tokenizer: the base's.
        rows: training rows, for an initial text.

    Returns:
        the module, and the weights' digest of the prefix that it starts from, if it starts from one.

    Raises:
        PrefixError: the base cannot have such a prefix.
    """
    settings, seed = customer.prefix, customer.training.seed
    infix = settings.placement == "infix"
    if infix and base.is_encoder_decoder:
        raise PrefixError(
            f"placement: infix is for decoder-only bases, and {base.model.config.model_type} is an encoder-decoder. Choose placement: prefix."
        )
    if infix:
        base.check_infix()
    sites = chosen_sites(base, settings.sites, settings.layers)
    text = _text(customer, tokenizer, rows)
    if settings.reparam == "embedding":
        refuse_encoder_decoder(base)
        random = settings.init == "random"
        initial = random_embeddings(base, settings.length, seed) if random else embeddings_of_text(base, text, settings.length)
        return EmbeddingOnly(base, initial), None
    start: Prefix | None
    parent = None
    if settings.init == "prefix" and settings.init_prefix is not None and settings.init_prefix != "champion":
        start, parent = from_prefix(Path(settings.init_prefix), base_digest, sites, settings.length, infix)
    elif settings.init == "zeros":
        start = from_zeros(sites, settings.length)
    elif settings.init == "random":
        # The MLP's own random weights are what the paper starts from.
        start = None if settings.reparam == "mlp" else from_random(sites, settings.length, seed)
    else:
        of_text = from_text(base, text, settings.length)
        start = {name: of_text[name] for name in sites}
    if settings.reparam == "mlp":
        width = base.model.get_input_embeddings().embedding_dim  # its weight may be split
        return Reparameterised(sites, settings.length, width, settings.mid_dim, seed, base.device, start), parent
    assert start is not None
    return Direct(start, base.device), parent


def _text(customer: JobCustomer, tokenizer: Any, rows: Sequence[Any]) -> list[int]:
    """The text of `init`: the task's name, the one that is given, or whole training rows drawn with the seed until they fill the prefix."""
    settings = customer.prefix
    given = customer.task.replace("-", " ").replace("_", " ") if settings.init == "task" else settings.init_text
    if given is not None:
        return list(tokenizer(given, add_special_tokens=False)["input_ids"])
    ids: list[int] = []
    for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(customer.training.seed)).tolist():
        ids += rows[i].prompt_ids + rows[i].target_ids
        if len(ids) >= settings.length:
            break
    return ids
