"""Embedding-only (Li & Liang 2021, section 7.2; prompt tuning, Lester et al. 2021): P trained vectors at the input embeddings.

Each step runs them through the frozen base as a prefill and uses the keys and values that come of it, so for everything else it is one more way to
make keys and values; they are what is saved. Decoder-only: an encoder-decoder has no one row of embeddings in front of everything.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.errors import PrefixError
from pipeline.prefix.bank import Flat
from pipeline.prefix.base import FrozenBase
from pipeline.prefix.initialise import repeated


class EmbeddingOnly(nn.Module):
    """P input embeddings [P, hidden size]; their keys and values are those of a prompt that consists of them."""

    def __init__(self, base: FrozenBase, initial: torch.Tensor) -> None:
        """Take `initial` [P, hidden size] as the start.

        Raises:
            PrefixError: the base is an encoder-decoder.
        """
        super().__init__()
        if base.is_encoder_decoder:
            raise PrefixError(
                f"embedding-only prefixes are for decoder-only bases, and {base.model.config.model_type} is an encoder-decoder. "
                "Choose reparam: none or mlp."
            )
        self.base = base
        self.embeddings = nn.Parameter(initial.to(base.device, torch.float32, copy=True))

    def forward(self) -> Flat:
        """Site -> [2, heads_kv, P, head_dim], through the base. Call outside `base.prefixes(…)`."""
        model = self.base.model
        training = model.training
        # Gradient checkpointing, which acts in train() mode only, would run this again in `backward`, behind the batch's own prefixes.
        model.eval()
        try:
            with self.base.capturing() as captured:
                model(inputs_embeds=self.embeddings[None].to(model.dtype), use_cache=False, logits_to_keep=1)
        finally:
            model.train(training)
        dtype = torch.promote_types(model.dtype, torch.float32)  # as every prefix under training
        return {name: torch.stack([key[0], value[0]]).to(dtype) for name, (key, value) in captured.items()}


def embeddings_of_text(base: FrozenBase, token_ids: Sequence[int], length: int) -> torch.Tensor:
    """The input embeddings [P, hidden size] of a text, cut or repeated: an untrained prefix then acts as that text in front."""
    ids = torch.tensor(repeated(token_ids, length), device=base.device)
    return base.model.get_input_embeddings()(ids).detach().float()


def random_embeddings(base: FrozenBase, length: int, seed: int) -> torch.Tensor:
    """Normal, as wide as the vocabulary's own embeddings are on average."""
    weight = base.model.get_input_embeddings().weight
    spread = weight.float().std().cpu()
    return torch.randn(length, weight.shape[1], generator=torch.Generator().manual_seed(seed)) * spread
