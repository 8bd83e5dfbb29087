"""The prefixes of several customers, side by side: one tensor of keys and values per attention site, one slot per customer.

In: prefixes, or what the parameterisations of prefixes under training give. Out: keys and values for each row of a batch, by the row's slot.
Knows nothing of how keys and values come about. Slots are selected by index, never by sums over one-hot rows, so that nothing of one slot (a
NaN, say) can reach a row of another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.errors import PrefixError


@dataclass(frozen=True)
class Site:
    """An attention layer that takes a prefix: number of key-value heads and their size."""

    heads: int
    head_dim: int


# One prefix: site name -> (keys, values), each float32 [heads_kv, P, head_dim].
Prefix = dict[str, tuple[torch.Tensor, torch.Tensor]]

# The same while it is trained, with gradients: site name -> [2, heads_kv, P, head_dim], key at 0, value at 1.
Flat = Mapping[str, torch.Tensor]


class PrefixBank:
    """Keys and values of `slots` prefixes of at most `length` columns; what a slot does not use is zero and masked.

    A prefix need not have all sites of the base (top-k layers, decoder only): at the others its slot is empty.

    Attributes:
        tensors: site -> `[slots, 2, heads_kv, length, head_dim]`; key at 0, value at 1.
        columns: site -> number of columns of each slot there, int64 [slots].
        shifts: by how much each slot moves the positions of its row's decoder, int64 [slots].
        infix: whether a slot's columns stand between prompt and target (bool [slots]) instead of in front.
        has_infix: whether any does.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        slots: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sites = dict(sites)
        self.length = length
        self.tensors = {
            name: torch.zeros(slots, 2, site.heads, length, site.head_dim, device=device, dtype=dtype)
            for name, site in self.sites.items()
        }
        self.columns = {name: torch.zeros(slots, dtype=torch.int64, device=device) for name in self.sites}
        self._layouts = {name: [0] * slots for name in self.sites}
        self.shifts = torch.zeros(slots, dtype=torch.int64, device=device)
        self.infix = torch.zeros(slots, dtype=torch.bool, device=device)
        self.has_infix = False
        self._noted: dict[int, tuple[dict[str, int], bool]] = {}

    @classmethod
    def of(cls, sites: Mapping[str, Site], prefixes: Sequence[Flat], infix: Sequence[bool]) -> "PrefixBank":
        """A bank for one step of training: slot i holds `prefixes[i]`, and gradients flow back into it.

        Args:
            sites: all attention sites of the base.
            prefixes: what the parameterisations give, on one device; of any lengths, each with any of the sites.
            infix: for each prefix whether it stands between prompt and target.
        """
        first = next(iter(prefixes[0].values()))
        length = max(tensor.shape[2] for flat in prefixes for tensor in flat.values())
        bank = cls(sites, len(prefixes), length, first.device, first.dtype)
        for slot, (flat, between) in enumerate(zip(prefixes, infix, strict=True)):
            bank._note(slot, {name: tensor.shape[2] for name, tensor in flat.items()}, between)
        for name in bank.sites:
            held = [flat.get(name) for flat in prefixes]
            if any(tensor is not None for tensor in held):
                empty = bank.tensors[name]
                bank.tensors[name] = torch.stack(
                    [
                        empty[slot] if tensor is None else torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[2]))
                        for slot, tensor in enumerate(held)
                    ]
                )
        return bank

    @torch.no_grad()
    def put(self, slot: int, prefix: Prefix, infix: bool = False) -> None:
        """Put a prefix into a slot; unused columns are cleared.

        Raises:
            PrefixError: its sites, heads or sizes are not those of the base, or it is longer than the bank.
        """
        if not prefix or not set(prefix) <= set(self.sites):
            raise PrefixError(
                f"the prefix is for the sites {_few(prefix)}, the base has {_few(self.sites)}. It was trained on another base: train it anew."
            )
        lengths = {tensor.shape[1] for pair in prefix.values() for tensor in pair}
        if len(lengths) != 1 or max(lengths) > self.length:
            raise PrefixError(f"the prefix has lengths {sorted(lengths)}; expected one length of at most {self.length}")
        length = lengths.pop()
        for name in prefix:
            site = self.sites[name]
            for tensor in prefix[name]:
                if tensor.shape != (site.heads, length, site.head_dim):
                    raise PrefixError(
                        f"site {name}: the prefix has shape {list(tensor.shape)}, the base wants "
                        f"{[site.heads, length, site.head_dim]} (heads, length, head size). It was trained on another base: train it anew."
                    )
        for name, tensor in self.tensors.items():
            tensor[slot].zero_()
            if name in prefix:
                tensor[slot, 0, :, :length], tensor[slot, 1, :, :length] = (t.to(tensor) for t in prefix[name])
        self._note(slot, dict.fromkeys(prefix, length), infix)

    @torch.no_grad()
    def fill(self, slot: int, flat: Flat, infix: bool) -> None:
        """Put a prefix under training into a slot, without its gradients; whatever the slot held before is cleared.

        Args:
            slot: whose columns are replaced.
            flat: what the parameterisation gives; of the base's own sites and no longer than the bank.
            infix: whether it stands between prompt and target.
        """
        for name, tensor in self.tensors.items():
            given = flat.get(name)
            length = 0 if given is None else given.shape[2]
            if given is not None:
                tensor[slot, :, :, :length] = given
            if length < self.length:
                tensor[slot, :, :, length:] = 0
        columns = {name: given.shape[2] for name, given in flat.items()}
        if self._noted.get(slot) != (columns, infix):  # rarely: on a GPU each of these numbers would be a transfer
            self._note(slot, columns, infix)

    def _note(self, slot: int, columns: Mapping[str, int], infix: bool) -> None:
        for name in self.sites:
            self.columns[name][slot] = self._layouts[name][slot] = columns.get(name, 0)
        # A prefix of the encoder or of cross-attention alone puts nothing before the decoder's sequence.
        self.shifts[slot] = max((n for name, n in columns.items() if name.startswith("decoder.self.")), default=0)
        self.infix[slot] = infix
        self.has_infix = bool(self.infix.any())
        self._noted[slot] = (dict(columns), infix)

    @torch.no_grad()
    def take(self, slot: int) -> Prefix:
        """A copy of the prefix of a slot, on the CPU."""
        taken = {}
        for name, tensor in self.tensors.items():
            columns = int(self.columns[name][slot])
            if columns:
                key, value = tensor[slot, :, :, :columns].detach().cpu().clone()
                taken[name] = (key, value)
        return taken

    def layout(self, site: str) -> tuple[int, ...]:
        """`columns` of a site as numbers, without asking the device: sites of one layout have one mask."""
        return tuple(self._layouts[site])

    def gather(
        self, site: str, rows: torch.Tensor, dtype: torch.dtype, heads: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of each row's slot at one site.

        Args:
            rows: slot of each row, int64 [B].
            heads: which of the site's heads; all of them, unless processes share them out.

        Returns:
            keys and values [B, heads_kv, P, head_dim], and bool [B, P]: which columns are part of the row's prefix.
        """
        # Selected before it is cast, so that the gradients of a slot's rows are summed in the bank's own precision.
        both = self.tensors[site][:, :, heads].index_select(0, rows).to(dtype)  # [B, 2, heads_kv, P, head_dim]
        visible = torch.arange(self.length, device=rows.device)[None, :] < self.columns[site][rows][:, None]
        return both[:, 0], both[:, 1], visible


def _few(names: Mapping[str, object]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f", … ({len(listed)} in all)" if len(listed) > 3 else "")
