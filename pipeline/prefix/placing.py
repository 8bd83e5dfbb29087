"""Where the weights of a base lie: what the rest of the code asks about them, whoever put them there.

One process with all of it is the plain case, `whole_where_it_is`. `pipeline.training.engines` has those that split a base over processes. Knows
nothing of prefixes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Heads:
    """Which of an attention's key-value heads this process computes: all of them, unless processes share them out (tensor parallelism).

    Attributes:
        part, parts: the `part`-th of `parts` equal runs of heads.
        whole: own heads [B, heads_kv / parts, …] -> those of all, [B, heads_kv, …], the same on all of them; the gradient of that, the same on all of
            them too, goes back to each one's own heads. Every process must call it at the same time.
    """

    part: int = 0
    parts: int = 1
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda own: own

    def own(self, count: int) -> slice:
        """Where this process's heads are among all of them, `count` being how many it computes."""
        return slice(self.part * count, (self.part + 1) * count)


@dataclass(frozen=True)
class Placed:
    """A model whose weights are where they belong.

    Attributes:
        device: where its inputs go.
        kept: the tensors of weights that this process keeps, whole ones or its parts.
        whole: a weight whole, as a new tensor or the weight itself. Every process must ask for the same one at the same time.
        settle: called between passes: gives back what the last one left gathered.
        heads: which heads of its attentions this process computes.
    """

    device: torch.device
    kept: Callable[[], list[torch.Tensor]]
    whole: Callable[[nn.Parameter], torch.Tensor]
    settle: Callable[[], None]
    heads: Heads = Heads()


# Puts the weights of a model where they belong. Hooks and settings are on the model already, its weights wherever loading left them.
Place = Callable[[Any], Placed]


def whole_where_it_is(model: Any) -> Placed:
    """The model as it is, all of it in this process."""
    return Placed(
        device=next(model.parameters()).device,
        kept=lambda: list(model.parameters()),
        whole=lambda parameter: parameter,
        settle=lambda: None,
    )
