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
class Placed:
    """A model whose weights are where they belong.

    Attributes:
        device: where its inputs go.
        kept: the tensors of weights that this process keeps, whole ones or its parts.
        whole: a weight whole, as a new tensor or the weight itself. Every process must ask for the same one at the same time.
        settle: called between passes: gives back what the last one left gathered.
    """

    device: torch.device
    kept: Callable[[], list[torch.Tensor]]
    whole: Callable[[nn.Parameter], torch.Tensor]
    settle: Callable[[], None]


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
