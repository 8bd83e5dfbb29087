"""Keys and values as parameters themselves: what is trained is what is served."""

import torch
from torch import nn

from pipeline.prefix.bank import Flat, Prefix


class Direct(nn.Module):
    """`2 · sites · heads_kv · P · head_dim` numbers, one parameter `[2, heads_kv, P, head_dim]` per site."""

    def __init__(self, initial: Prefix, device: torch.device) -> None:
        super().__init__()
        self.names = list(initial)  # names of parameters may hold no dots
        self.tensors = nn.ParameterList(nn.Parameter(torch.stack(pair).to(device)) for pair in initial.values())

    def forward(self) -> Flat:
        """Site -> [2, heads_kv, P, head_dim]."""
        return dict(zip(self.names, self.tensors, strict=True))
