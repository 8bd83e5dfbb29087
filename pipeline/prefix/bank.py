"""The prefixes of several customers, side by side: one tensor of keys and values per attention site, one slot per customer.

Slots are selected by index, never by sums over one-hot rows, so that nothing of one slot (a NaN, say) can reach a row of another.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import PrefixError


@dataclass(frozen=True)
class Site:
    """An attention layer that takes a prefix: number of key-value heads and their size."""

    heads: int
    head_dim: int


# One prefix: site name -> (keys, values), each float32 [heads_kv, P, head_dim].
Prefix = dict[str, tuple[torch.Tensor, torch.Tensor]]


class PrefixBank(nn.Module):
    """Keys and values of `slots` prefixes of at most `length` columns; shorter ones leave columns unused (zero, masked).

    Parameters of site s are one tensor `[slots, 2, heads_kv, length, head_dim]` in float32; key at 0, value at 1.
    """

    def __init__(self, sites: Mapping[str, Site], slots: int, length: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.sites = dict(sites)
        self.length = length
        # A ParameterList beside the order of `sites`, since parameter names may hold no dots.
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.zeros(slots, 2, site.heads, length, site.head_dim, device=device)) for site in self.sites.values()
        )
        self._index = {name: i for i, name in enumerate(self.sites)}
        self.lengths: torch.Tensor
        self.register_buffer("lengths", torch.zeros(slots, dtype=torch.int64, device=device))

    @torch.no_grad()
    def put(self, slot: int, prefix: Prefix) -> None:
        """Put a prefix into a slot; unused columns are cleared.

        Raises:
            PrefixError: its sites, heads or sizes are not those of the base, or it is longer than the bank.
        """
        if set(prefix) != set(self.sites):
            raise PrefixError(
                f"the prefix is for the sites {_few(prefix)}, the base has {_few(self.sites)}. It was trained on another base: train it anew."
            )
        lengths = {tensor.shape[1] for pair in prefix.values() for tensor in pair}
        if len(lengths) != 1 or max(lengths) > self.length:
            raise PrefixError(f"the prefix has lengths {sorted(lengths)}; expected one length of at most {self.length}")
        length = lengths.pop()
        for name, site in self.sites.items():
            for tensor in prefix[name]:
                if tensor.shape != (site.heads, length, site.head_dim):
                    raise PrefixError(
                        f"site {name}: the prefix has shape {list(tensor.shape)}, the base wants "
                        f"{[site.heads, length, site.head_dim]} (heads, length, head size). It was trained on another base: train it anew."
                    )
        for name in self.sites:
            tensor = self.tensors[self._index[name]]
            tensor[slot].zero_()
            tensor[slot, 0, :, :length], tensor[slot, 1, :, :length] = (t.to(tensor) for t in prefix[name])
        self.lengths[slot] = length

    @torch.no_grad()
    def take(self, slot: int) -> Prefix:
        """A copy of the prefix of a slot, on the CPU."""
        length = int(self.lengths[slot])
        tensors = {name: self.tensors[i][slot, :, :, :length].detach().cpu().clone() for name, i in self._index.items()}
        return {name: (tensor[0], tensor[1]) for name, tensor in tensors.items()}

    def gather(self, site: str, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of each row's slot at one site.

        Args:
            rows: slot of each row, int64 [B].

        Returns:
            keys and values [B, heads_kv, P, head_dim], and bool [B, P]: which columns are part of the row's prefix.
        """
        both = self.tensors[self._index[site]].to(dtype).index_select(0, rows)  # [B, 2, heads_kv, P, head_dim]
        visible = torch.arange(self.length, device=rows.device)[None, :] < self.lengths[rows][:, None]
        return both[:, 0], both[:, 1], visible


def _few(names: Mapping[str, object]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f", … ({len(listed)} in all)" if len(listed) > 3 else "")
