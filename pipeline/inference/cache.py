"""Keys and values of the running rows, for transformers' models: rows come and go between two forward passes.

In: what a prefill computed for new rows; one column for every row from each forward pass. Out: the views that attention reads. All rows end in the
same column, so that one pass appends to all of them, and differ in where they begin: to a model this is a batch padded in front, which every
architecture knows. Prefixes are not in here: they stand once for all rows of a customer in the bank. Knows nothing of requests.

One buffer a layer, [rows, heads_kv, columns, head_dim], larger than what is in use. A row that leaves is replaced by the last one; when the columns
are used up, the window of columns in use moves back to the front of the buffer. What a row does not use is zero: a NaN that another row left behind
would poison it even where it is masked.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

# Buffers grow by doubling their rows, and by this many columns beyond what is needed.
SPARE_COLUMNS = 64


class _Window:
    """Which part of the buffers is in use: `rows` rows, the columns from `start` to `end`."""

    def __init__(self) -> None:
        self.rows = self.start = self.end = 0

    @property
    def width(self) -> int:
        return self.end - self.start


class _Layer(CacheLayerMixin):
    """The buffers of one layer."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        self.window = window
        self.both: torch.Tensor | None = None  # [2, rows, heads_kv, columns, head_dim]: keys and values
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("rows join with what a prefill computed")

    def _in_use(self, which: int) -> torch.Tensor:
        assert self.both is not None
        return self.both[which, : self.window.rows, :, self.window.start : self.window.end]

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]  # an attribute of the base class; cross-attention reads it
        """[rows, heads_kv, width, head_dim]."""
        return self._in_use(0)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """As `keys`."""
        return self._in_use(1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one more column and return all: two views [rows, heads_kv, width + 1, head_dim]. `RowCache.advance` makes it stay."""
        window, both = self.window, self.both
        assert both is not None and key_states.shape[2] == 1
        both[0, : window.rows, :, window.end] = key_states[:, :, 0]
        both[1, : window.rows, :, window.end] = value_states[:, :, 0]
        seen = both[:, : window.rows, :, window.start : window.end + 1]
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns after this pass, and the first of them."""
        return self.window.width + query_length, 0

    def get_seq_length(self) -> int:
        """Columns before this pass."""
        return self.window.width

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class RowCache(Cache):
    """The keys and values of all running rows, of self-attention or of cross-attention.

    Attributes:
        lengths: how many columns each row has.
    """

    layers: Any  # of `_Layer`s; the base class allows other kinds

    def __init__(self) -> None:
        self._window = _Window()
        self.lengths: list[int] = []
        super().__init__(layer_class_to_replicate=partial(_Layer, self._window))  # type: ignore[arg-type]  # called without arguments

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self._window.rows

    @property
    def width(self) -> int:
        """Columns in use: those of the longest row."""
        return self._window.width

    @property
    def bytes(self) -> int:
        """What the buffers take."""
        return sum(layer.both.nbytes for layer in self.layers if layer.both is not None)

    def join(self, prefilled: DynamicCache, rows: Sequence[int], lengths: Sequence[int], *, padded_behind: bool = False) -> None:
        """Append rows.

        Args:
            prefilled: keys and values of a batch whose rows end in the last column.
            rows: which rows of that batch; one may join several times.
            lengths: columns of each of `rows`.
            padded_behind: its rows begin in the first column instead.
        """
        window, longest = self._window, max(lengths)
        width, first = max(window.width, longest), window.rows
        self._make_room(window.rows + len(rows), width, prefilled)
        for layer in self.layers:
            # Rows that have left since may have written where the others' window now widens to.
            layer.both[:, :first, :, window.end - width : window.start] = 0
        window.rows += len(rows)
        window.start = window.end - width
        at = torch.tensor(list(rows))
        computed: Any = prefilled.layers  # all with `keys` and `values`
        same = list(rows) == list(range(len(rows))) and len(rows) == computed[0].keys.shape[0]
        for layer, given in zip(self.layers, computed, strict=True):
            for which, new in enumerate((given.keys, given.values)):
                chosen = new if same else new.index_select(0, at.to(new.device))
                place = layer.both[which, first : window.rows, :, window.start : window.end]
                place[:, :, : width - longest] = 0
                if padded_behind:
                    for i, length in enumerate(lengths):
                        place[i, :, width - length :] = chosen[i, :, :length]
                else:
                    place[:, :, width - longest :] = chosen[:, :, chosen.shape[2] - longest :]
                for i, length in enumerate(lengths):
                    if length < longest:
                        place[i, :, width - longest : width - length] = 0
        self.lengths += lengths

    def advance(self) -> None:
        """Keep the column that a forward pass has appended to every row."""
        self._window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def leave(self, row: int) -> int:
        """Remove a row.

        Returns:
            the row that now stands in its place under the number `row`: its number before, which is `row` itself if that was the last.
        """
        window = self._window
        last = window.rows - 1
        if row != last:
            for layer in self.layers:
                layer.both[:, row, :, window.start : window.end] = layer.both[:, last, :, window.start : window.end]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        window.rows = last
        window.start = window.end - max(self.lengths, default=0)
        if not last:
            self.layers, window.start, window.end = [], 0, 0
        return last

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make rows the copies of others of the same length, all at once: what beam search does at every step."""
        window = self._window
        moved = [(source, target) for source, target in zip(sources, targets, strict=True) if source != target]
        if not moved or not self.layers:
            return
        device = self.layers[0].both.device
        source, target = (torch.tensor(side, device=device) for side in zip(*moved, strict=True))
        for layer in self.layers:
            seen = layer.both[:, :, :, window.start : window.end]
            seen[:, target] = seen[:, source]

    def make_room(self) -> None:
        """See that every row can take one more column."""
        self._make_room(self._window.rows, self._window.width, None)

    def _make_room(self, rows: int, width: int, like: DynamicCache | None) -> None:
        """Room for so many rows of `width` columns that end where the present ones do, and for one more column."""
        window = self._window
        if like is not None:
            while len(self.layers) < len(like.layers):
                self.layers.append(_Layer(window))
        held = self.layers[0].both
        wide = held is not None and held.shape[3] >= width + 1
        if held is not None and wide and rows <= held.shape[1] and window.end >= width and window.end < held.shape[3]:
            return
        enough = held is not None and wide and held.shape[3] >= 2 * width  # or it would have to move again soon
        columns = held.shape[3] if held is not None and enough else 2 * width + SPARE_COLUMNS
        capacity = 0 if held is None else held.shape[1]
        if rows > capacity:
            capacity = max(rows, 2 * capacity)
        for i, layer in enumerate(self.layers):
            before = layer.both
            if before is None:
                assert like is not None
                new: Any = like.layers[i]
                keys = new.keys
                layer.both = keys.new_zeros(2, capacity, keys.shape[1], columns, keys.shape[3])
                continue
            kept = before[:, : window.rows, :, window.start : window.end]
            if before.shape[1] == capacity and before.shape[3] == columns:
                kept = kept.clone()
                before.zero_()
                layer.both = before
            else:
                layer.both = before.new_zeros(2, capacity, before.shape[2], columns, before.shape[4])
            layer.both[:, : window.rows, :, width - window.width : width] = kept
        window.start, window.end = width - window.width, width
