"""From prepared rows to micro-batches and tensors, and the loss of each row. Knows the shapes of both kinds of models, nothing of optimisers."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from pipeline.prefix import FrozenBase
from pipeline.training.loss import cross_entropy

IGNORED = -100
# oneDNN makes a program for every product of a new shape and keeps a thousand of them, megabytes for each shape of a micro-batch.
# So there are few shapes: lengths and numbers of rows are rounded.
ROUND_POSITIONS_TO = 32
# 1, 2, 3, 4, 6, 8, 12, 16, 24, …
_ROWS = sorted({1} | {base << k for base in (2, 3) for k in range(20)})


class TokenRow(Protocol):
    """A row of prepared data: the prompt's tokens and the target's."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens (the encoder's input for encoder-decoders)."""

    @property
    def target_ids(self) -> list[int]:
        """The target's tokens."""


def tokens_of(row: TokenRow) -> int:
    """Tokens of a row, prompt and target."""
    return len(row.prompt_ids) + len(row.target_ids)


def padded_tokens(rows: Sequence[TokenRow], two_sided: bool = False) -> int:
    """Size of the micro-batch that these rows make, padding included, as budgets count it.

    Args:
        rows: at least one.
        two_sided: for an encoder-decoder, whose prompts and targets are padded apart.
    """
    if two_sided:
        return len(rows) * (rounded(max(len(row.prompt_ids) for row in rows)) + rounded(max(len(row.target_ids) for row in rows)))
    return len(rows) * rounded(max(map(tokens_of, rows)))


def pack(rows: Sequence[TokenRow], budget: int, overhead: int = 64, two_sided: bool = False) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens, padding included, rows of like length together.

    Of all ways to cut the rows, sorted by length, into micro-batches of 1, 2, 3, 4, 6, 8, 12, … rows, this one has the least padding, a further
    micro-batch counting as `overhead` tokens. A row that is longer than the budget makes a micro-batch of its own.

    Args:
        rows: to be cut.
        budget: see above.
        overhead: what a further forward and backward pass costs, against the padding that it saves.
        two_sided: see `padded_tokens`.

    Returns:
        indices of `rows`, each exactly once; the longest rows first, so that what does not fit in memory shows at once.
    """
    if two_sided:
        # Targets are short and alike: each counts as the longest, so that rows need be sorted by one length only.
        target = rounded(max((len(row.target_ids) for row in rows), default=0))
        sizes = [rounded(len(row.prompt_ids)) + target for row in rows]
    else:
        sizes = [rounded(tokens_of(row)) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-sizes[i], -tokens_of(rows[i]), -len(rows[i].target_ids), i))
    # best[k]: least cost of all rows from the k-th on, and where the micro-batch that begins there ends.
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(order) + 1)
    for k in range(len(order) - 1, -1, -1):
        length = sizes[order[k]]
        most = max(1, min(budget // length, len(order) - k))
        best[k] = min((length * n + overhead + best[k + n][0], k + n) for n in _ROWS[: bisect_right(_ROWS, most)])
    batches = []
    k = 0
    while k < len(order):
        batches.append(order[k : best[k][1]])
        k = best[k][1]
    return batches


def grouped(rows: Sequence[TokenRow], order: Sequence[int], batch: int, first: int, generator: torch.Generator) -> list[int]:
    """An epoch's order in which the rows of a step are of like length, as with transformers' `train_sampling_strategy="group_by_length"`.

    The rows of fifty steps at a time are sorted by length and cut into steps, whose order is drawn; so rows still come in another order, and in other
    company, in every epoch.

    Args:
        rows: of the customer.
        order: all of them, as drawn.
        batch: rows of a step.
        first: how many rows the step lacks that the epoch before left unfinished; they come first.
        generator: draws the order of the steps.
    """
    some = 50 * batch
    by_length = [i for at in range(0, len(order), some) for i in sorted(order[at : at + some], key=lambda i: tokens_of(rows[i]))]
    ends = [*range(first, len(order), batch), len(order)]
    steps = [by_length[start:end] for start, end in pairwise([0, *ends])]
    begun, *whole = steps if first else [[], *steps]
    left = whole.pop() if whole and len(whole[-1]) < batch else []
    drawn = torch.randperm(len(whole), generator=generator).tolist()
    return [i for step in (begun, *(whole[k] for k in drawn), left) for i in step]


def left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T], T as `rounded` gives it, with padding in front, and the attention mask [B, T]: 1 for tokens, 0 for padding."""
    return _padded(rows, pad, device, left=True)


def right_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As `left_padded`, with padding behind."""
    return _padded(rows, pad, device, left=False)


def _padded(rows: Sequence[list[int]], pad: int, device: torch.device, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    length = rounded(max(len(row) for row in rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)


def rounded(length: int) -> int:
    """The length that rows of so many tokens are padded to: a multiple of 8 up to 64, of 16 beyond."""
    step = 8 if length <= 64 else 16
    return -(-length // step) * step


def row_losses(base: FrozenBase, rows: Sequence[TokenRow], pad: int) -> torch.Tensor:
    """Summed cross-entropy of each row's target tokens, in nats. Call inside `base.prefixes(…)`.

    One number a row, for no row's loss may reach another's customer, not even as a NaN in a sum.

    Returns:
        [B], float32, or float64 where the base computes in it.
    """
    logits, wanted, of_row = _logits(base, rows, pad)
    return summed_losses(logits, wanted, of_row, len(rows))


def summed_losses(logits: torch.Tensor, wanted: torch.Tensor, of_row: torch.Tensor, rows: int) -> torch.Tensor:
    """Cross-entropy summed for each of `rows` rows, [rows], float32 or more; logits [N, vocabulary], token and row of each, int64 [N]."""
    losses = cross_entropy(logits, wanted)
    return losses.new_zeros(rows).index_add(0, of_row, losses)


def target_logits(base: FrozenBase, rows: Sequence[TokenRow], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the base predicts for the tokens of each row's target. Call inside `base.prefixes(…)`.

    Returns:
        logits [N, vocabulary] in float32 or more, row by row; the tokens themselves and the row that each is of, int64 [N].
    """
    logits, wanted, of_row = _logits(base, rows, pad)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, of_row


def _logits(base: FrozenBase, rows: Sequence[TokenRow], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `target_logits`, in the base's own type."""
    targets = [row.target_ids for row in rows]
    if base.is_encoder_decoder:
        ids, mask = right_padded([row.prompt_ids for row in rows], pad, base.device)
        labels, real = right_padded(targets, IGNORED, base.device)
        # The mask says which positions are padding: those alone may pass the end of BART's table.
        inputs = {
            "decoder_input_ids": base.model.prepare_decoder_input_ids_from_labels(labels=labels),
            "decoder_attention_mask": real,
        }
        starts, width = [0] * len(rows), labels.shape[1]
    else:
        ids, mask = left_padded([row.prompt_ids + row.target_ids[:-1] for row in rows], pad, base.device)
        inputs = {}
        # The last prompt token predicts the first of the target, which stands at the end.
        width = ids.shape[1]
        starts = [width - len(target) for target in targets]
        base.prompts_end_at(torch.tensor(starts, device=base.device))
    flat = [
        i * width + start + k for i, (start, target) in enumerate(zip(starts, targets, strict=True)) for k in range(len(target))
    ]
    wanted, count = [token for target in targets for token in target], len(flat)
    # Rounded up too, with a position whose loss is left out.
    flat += flat[:1] * (-count % ROUND_POSITIONS_TO)
    base.logits_only_at(torch.tensor(flat, device=base.device))
    logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits[0, :count]
    of_row = torch.tensor([i for i, target in enumerate(targets) for _ in target], device=base.device)
    return logits, torch.tensor(wanted, device=base.device), of_row
