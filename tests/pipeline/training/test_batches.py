"""Micro-batches: every row once, within the budget, little padding; and the loss of each row."""

import random
from dataclasses import replace

import pytest
import torch

from pipeline.data import Record
from pipeline.training.batches import pack, padded_tokens, rounded, tokens_of
from pipeline.training.resident import Resident

from .crowd import SETTINGS


def rows(lengths: list[int]) -> list[Record]:
    return [Record([2] * (n - 1), [0], "", [""]) for n in lengths]


@pytest.mark.parametrize("budget", [1, 64, 1000, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_in_one_micro_batch_and_none_passes_the_budget_but_for_a_row_alone(budget: int, seed: int) -> None:
    given = rows([random.Random(seed).randint(2, 300) for _ in range(70)])
    batches = pack(given, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(70))
    assert all(len(batch) == 1 or padded_tokens([given[i] for i in batch]) <= budget for batch in batches)
    longest = [max(tokens_of(given[i]) for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True), "what does not fit in memory must show first"


def test_no_way_to_cut_the_sorted_rows_into_few_sizes_has_less_padding_and_overhead() -> None:
    """Compared with every way there is, for a few rows."""
    for seed in range(20):
        draw = random.Random(seed)
        given = rows([draw.choice([8, 16, 24, 64, 72, 200]) for _ in range(9)])
        budget = draw.choice([100, 300, 2000])

        def cost(batches: list[list[int]], given: list[Record] = given) -> float:
            return sum(padded_tokens([given[i] for i in batch]) + 64 for batch in batches)

        order = sorted(range(9), key=lambda i: -tokens_of(given[i]))
        ways = []
        for cuts in range(2**8):
            batches = [[order[0]]]
            for k in range(1, 9):
                if cuts >> (k - 1) & 1:
                    batches.append([])
                batches[-1].append(order[k])
            if all(
                len(b) in (1, 2, 3, 4, 6, 8) and (len(b) == 1 or padded_tokens([given[i] for i in b]) <= budget) for b in batches
            ):
                ways.append(cost(batches))
        assert cost(pack(given, budget)) == min(ways)


def test_no_rows_make_no_micro_batches() -> None:
    assert pack([], 100) == []


def test_padding_stays_below_a_tenth_alone_and_in_a_crowd() -> None:
    """Lengths as those of the ten WebNLG customers of the benchmark: lognormal, from 20 to 380 tokens, half of them below 95."""
    for customers in (1, 3, 10):
        real = padded = 0
        for seed in range(30):
            draw = random.Random(seed)
            given = rows([min(380, max(20, round(draw.lognormvariate(4.55, 0.55)))) for _ in range(10 * customers)])
            for batch in pack(given, 4096):
                real += sum(tokens_of(given[i]) for i in batch)
                padded += padded_tokens([given[i] for i in batch])
        assert 1 - real / padded < (0.1 if customers > 1 else 0.12)


def test_a_hundred_steps_meet_few_shapes() -> None:
    """Each costs the matrix library some time and memory. Lengths as above."""
    shapes = set()
    for seed in range(100):
        draw = random.Random(seed)
        given = rows([min(380, max(20, round(draw.lognormvariate(4.55, 0.55)))) for _ in range(80)])
        shapes |= {(len(batch), rounded(max(tokens_of(given[i]) for i in batch))) for batch in pack(given, 4096)}
    assert len(shapes) < 150


def test_prompts_and_targets_of_an_encoder_decoder_are_padded_apart_within_the_budget() -> None:
    draw = random.Random(0)
    given = [Record([2] * draw.randint(1, 90), [0] * draw.randint(1, 30), "", [""]) for _ in range(50)]
    batches = pack(given, 400, two_sided=True)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    for batch in batches:
        taken = [given[i] for i in batch]
        size = padded_tokens(taken, two_sided=True)
        assert size == len(taken) * (
            rounded(max(len(r.prompt_ids) for r in taken)) + rounded(max(len(r.target_ids) for r in taken))
        )
        assert size <= 400


@pytest.mark.parametrize(("size", "batch"), [(40, 5), (43, 5), (3, 5), (260, 4), (7, 1)])
def test_grouped_by_length_every_epoch_has_every_row_once_and_its_steps_rows_of_like_length(size: int, batch: int) -> None:
    """But for a step that runs on over the end of an epoch."""
    draw = random.Random(0)
    given = rows([draw.randint(2, 60) for _ in range(size)])
    place = {id(row): i for i, row in enumerate(given)}
    settings = replace(SETTINGS, batch_size=batch, train_sampling_strategy="group_by_length", max_steps=10**6)

    def resident(drawn: int) -> Resident:
        made = Resident(torch.nn.Linear(1, 1), False, given, given[:1], settings)
        made.drawn = drawn
        return made

    steps, one = [], resident(0)
    while one.drawn < 4 * size:
        steps.append([place[id(row)] for row in one.next_rows()])
        one.drawn += batch
    drawn = [i for step in steps for i in step]
    epochs = [drawn[epoch * size : (epoch + 1) * size] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    # From any row on, as after a restart.
    assert [place[id(row)] for row in resident(2 * size + 1).next_rows()] == (drawn * 2)[2 * size + 1 : 2 * size + 1 + batch]
    if size > 2 * batch:
        assert epochs[0] != epochs[1]
    inside = [step for k, step in enumerate(steps) if k * batch // size == (k * batch + batch - 1) // size]
    for number in range(4):
        of = [step for k, step in enumerate(inside) if set(step) <= set(epochs[number])][: size // batch - 1]
        padding = sum(batch * max(tokens_of(given[i]) for i in step) - sum(tokens_of(given[i]) for i in step) for step in of)
        # Sorted, all steps of fifty together pad no more than one row of the longest for each row of a step.
        assert padding <= 60 * batch * -(-size // (50 * batch))
