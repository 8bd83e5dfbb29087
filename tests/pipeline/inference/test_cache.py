"""Keys and values of rows that come and go, against plain lists."""

import random

import pytest
import torch
from transformers import DynamicCache

from pipeline.inference.cache import RowCache

HEADS, SIZE, LAYERS = 2, 3, 2


def batch(rows: list[torch.Tensor], behind: bool) -> DynamicCache:
    """A prefill's cache of rows [2, heads, length, size], whose padding is NaN, as attention over nothing but padding may give."""
    longest = max(row.shape[2] for row in rows)
    whole = torch.full((2, len(rows), HEADS, longest, SIZE), float("nan"))
    for i, row in enumerate(rows):
        whole[:, i, :, slice(0, row.shape[2]) if behind else slice(longest - row.shape[2], longest)] = row
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(whole[0] + layer, whole[1] + layer, layer)
    return cache


@pytest.mark.parametrize("seed", range(6))
def test_every_row_keeps_its_own_columns_and_what_it_does_not_use_is_zero(seed: int) -> None:
    drawn = random.Random(seed)
    cache, known = RowCache(), []  # what each row must have, [2, heads, length, size]

    def some(length: int) -> torch.Tensor:
        # A row without numbers must leave nothing behind.
        return torch.full((2, HEADS, length, SIZE), float("nan")) if drawn.random() < 0.3 else torch.randn(2, HEADS, length, SIZE)

    for _ in range(120):
        what = drawn.choice(["join", "step", "step", "step", "leave", "leave", "copy"])
        if what == "join" or not known:
            behind = drawn.random() < 0.5
            given = [some(drawn.randrange(1, 12)) for _ in range(drawn.randrange(1, 4))]
            chosen = [drawn.randrange(len(given)) for _ in range(drawn.randrange(1, 5))]
            if drawn.random() < 0.5:
                chosen = list(range(len(given)))
            cache.join(batch(given, behind), chosen, [given[i].shape[2] for i in chosen], padded_behind=behind)
            known += [given[i].clone() for i in chosen]
        elif what == "step":
            cache.make_room()
            new = [some(1) for _ in known]
            for layer in range(LAYERS):
                both = torch.stack(new, dim=1) + layer
                cache.update(both[0], both[1], layer)
            cache.advance()
            known = [torch.cat([old, more], dim=2) for old, more in zip(known, new, strict=True)]
        elif what == "leave":
            row = drawn.randrange(len(known))
            moved = cache.leave(row)
            assert moved == len(known) - 1
            known[row] = known[-1]
            known.pop()
        else:
            row = drawn.randrange(len(known))
            alike = [i for i, other in enumerate(known) if other.shape[2] == known[row].shape[2]]
            sources = [drawn.choice(alike) for _ in alike]
            cache.copy(sources, alike)
            before = [known[i] for i in sources]
            for i, content in zip(alike, before, strict=True):
                known[i] = content
        assert cache.lengths == [row.shape[2] for row in known]
        assert cache.rows == len(known) and cache.width == max(cache.lengths, default=0) == cache.get_seq_length()
        for layer in range(LAYERS if known else 0):
            for which, seen in enumerate((cache.layers[layer].keys, cache.layers[layer].values)):
                for i, row in enumerate(known):
                    length = row.shape[2]
                    assert torch.equal(seen[i, :, cache.width - length :].nan_to_num(99), (row[which] + layer).nan_to_num(99))
                    assert (seen[i, :, : cache.width - length] == 0).all()
    while cache.rows:
        cache.leave(0)
    assert cache.bytes == 0


def test_what_a_long_row_left_is_not_seen_when_the_window_widens_again() -> None:
    cache = RowCache()

    def join(length: int, value: float) -> None:
        cache.join(batch([torch.full((2, HEADS, length, SIZE), value)], False), [0], [length])

    for length, value in ((3, 1.0), (3, 2.0), (10, float("nan")), (3, 3.0)):
        join(length, value)
    cache.leave(3)
    cache.leave(2)  # the long one, the last now
    join(3, 4.0)  # in its place
    join(10, 5.0)
    assert cache.width == 10
    assert (cache.layers[0].keys[2, :, :7] == 0).all() and (cache.layers[0].keys[2, :, 7:] == 4).all()
