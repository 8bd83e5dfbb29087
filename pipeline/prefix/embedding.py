"""Embedding-only (Li & Liang 2021, section 7.2; prompt tuning, Lester et al. 2021): P trained vectors at the input embeddings.

Each step runs them through the frozen base as a prefill and uses the keys and values that come of it, so for everything else it is one more way to
make keys and values; they are what is saved. Decoder-only: an encoder-decoder has no one row of embeddings in front of everything.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import PrefixError
from pipeline.prefix.bank import Flat
from pipeline.prefix.base import FrozenBase
from pipeline.prefix.initialise import repeated


def refuse_encoder_decoder(base: FrozenBase) -> None:
    """An encoder-decoder has no one row of embeddings in front of everything.

    Raises:
        PrefixError: the base is one.
    """
    if base.is_encoder_decoder:
        raise PrefixError(
            f"embedding-only prefixes are for decoder-only bases, and {base.model.config.model_type} is an encoder-decoder. "
            "Choose reparam: none or mlp."
        )


class EmbeddingOnly(nn.Module):
    """P input embeddings [P, hidden size]; their keys and values are those of a prompt that consists of them."""

    def __init__(self, base: FrozenBase, initial: torch.Tensor) -> None:
        """Take `initial` [P, hidden size] as the start.

        Raises:
            PrefixError: the base is an encoder-decoder.
        """
        super().__init__()
        refuse_encoder_decoder(base)
        self.base = base
        self.embeddings = nn.Parameter(initial.to(base.device, torch.float32, copy=True))

    def forward(self) -> Flat:
        """Site -> [2, heads_kv, P, head_dim], through the base. Call outside `base.prefixes(…)`."""
        return dict(zip(self.base.sites, _Prefill.apply(self.base, self.embeddings), strict=True))


class _Prefill(torch.autograd.Function):
    """The keys and values of each site, [2, heads_kv, P, head_dim], for a prompt of embeddings [P, hidden size].

    They are computed again for their gradient: other passes go through the base in between, and a base that is split over processes has its weights
    together only while a pass is under way.
    """

    @staticmethod
    def forward(ctx: Any, base: FrozenBase, embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.base = base
        ctx.save_for_backward(embeddings)
        flat = _prefill(base, embeddings)[1]
        base.placed.settle()
        return flat

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        with torch.enable_grad():
            embeddings = ctx.saved_tensors[0].detach().requires_grad_()
            output, flat = _prefill(ctx.base, embeddings)
            # The output's gradient of zero changes no number; it brings the backward pass into every block by its end, where a split base
            # waits for it.
            (found,) = torch.autograd.grad([output, *flat], embeddings, [torch.zeros_like(output), *gradients])
        ctx.base.placed.settle()
        return None, found


def _prefill(base: FrozenBase, embeddings: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The base's logits for a prompt of embeddings, and each site's keys and values."""
    model = base.model
    training = model.training
    # Gradient checkpointing acts in train() mode only; a prompt of P embeddings does not need it.
    model.eval()
    try:
        with base.capturing() as captured:
            logits = model(inputs_embeds=embeddings[None].to(model.dtype), use_cache=False, logits_to_keep=1).logits
    finally:
        model.train(training)
    dtype = torch.promote_types(model.dtype, torch.float32)  # as every prefix under training
    return logits, tuple(torch.stack([captured[site][0][0], captured[site][1][0]]).to(dtype) for site in base.sites)


def embeddings_of_text(base: FrozenBase, token_ids: Sequence[int], length: int) -> torch.Tensor:
    """The input embeddings [P, hidden size] of a text, cut or repeated: an untrained prefix then acts as that text in front."""
    ids = torch.tensor(repeated(token_ids, length), device=base.device)
    return base.embed(ids).float()


def random_embeddings(base: FrozenBase, length: int, seed: int) -> torch.Tensor:
    """Normal, as wide as the vocabulary's own embeddings are on average."""
    weight = base.placed.whole(base.model.get_input_embeddings().weight)
    spread = weight.float().std().cpu()
    return torch.randn(length, weight.shape[1], generator=torch.Generator().manual_seed(seed)) * spread
