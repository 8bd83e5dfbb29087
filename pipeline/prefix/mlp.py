"""Reparameterisation by an MLP (Li & Liang 2021, section 4.3): `P_θ[i] = MLP(P'_θ[i])`; after training only what it gives is kept.

As in the original code (`gpt2/train_control.py`, `seq2seq/prefixTuning.py`): an embedding of P rows as wide as the base, a linear map to the mid
dimension, tanh, a linear map to keys and values of all layers; encoder, decoder and cross-attention each have their own.
"""

from collections.abc import Mapping

import torch
from torch import nn

from pipeline.prefix.bank import Flat, Prefix, Site


class Reparameterised(nn.Module):
    """An MLP per kind of site (`decoder.self`, …) that gives the keys and values of all its layers."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        length: int,
        width: int,
        mid_dim: int,
        seed: int,
        device: torch.device,
        initial: Prefix | None,
    ) -> None:
        """See `initial`: without it, the output begins as random as PyTorch's layers make it, which is how the paper trains.

        Args:
            sites: those that get a prefix.
            length: P.
            width: of P', the base's hidden size.
            mid_dim: 512 for table-to-text and 800 for summarisation in the paper.
            initial: keys and values that the output must begin as.
        """
        super().__init__()
        self.sites = dict(sites)
        self.kinds = list(dict.fromkeys(name.rpartition(".")[0] for name in sites))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inputs = nn.ParameterList(nn.Parameter(torch.randn(length, width)) for _ in self.kinds)
            self.networks = nn.ModuleList(
                nn.Sequential(nn.Linear(width, mid_dim), nn.Tanh(), nn.Linear(mid_dim, sum(map(_size, self._of(kind).values()))))
                for kind in self.kinds
            )
        if initial is not None:
            self._fit(initial)
        self.to(device)

    def _of(self, kind: str) -> dict[str, Site]:
        return {name: site for name, site in self.sites.items() if name.rpartition(".")[0] == kind}

    def forward(self) -> Flat:
        """Site -> [2, heads_kv, P, head_dim]."""
        computed: dict[str, torch.Tensor] = {}
        for kind, given, network in zip(self.kinds, self.inputs, self.networks, strict=True):
            sites = self._of(kind)
            parts = network(given).split([_size(site) for site in sites.values()], dim=1)  # [P, 2 * heads_kv * head_dim] each
            for (name, site), part in zip(sites.items(), parts, strict=True):
                computed[name] = part.view(-1, 2, site.heads, site.head_dim).permute(1, 2, 0, 3)
        return {name: computed[name] for name in self.sites}

    @torch.no_grad()
    def _fit(self, initial: Prefix) -> None:
        """Make the output what `initial` says.

        The original code takes 500 steps of Adam on the squared error (`lowdata_init_train3` for GPT-2, `lowdata_init_train2` for BART). The last
        layer is linear in its weights, so least squares brings that error to its minimum at once, for P up to the mid dimension to zero.
        """
        for kind, given, network in zip(self.kinds, self.inputs, self.networks, strict=True):
            wanted = torch.cat([torch.stack(initial[name]).permute(2, 0, 1, 3).flatten(1) for name in self._of(kind)], dim=1)
            assert isinstance(network, nn.Sequential) and isinstance(network[2], nn.Linear)
            features = network[:2](given).double()  # [P, mid]
            last = network[2]
            last.bias.copy_(wanted.mean(0))
            rest = wanted.double() - last.bias.double()
            last.weight.copy_((torch.linalg.pinv(features) @ rest).T)


def _size(site: Site) -> int:
    return 2 * site.heads * site.head_dim
