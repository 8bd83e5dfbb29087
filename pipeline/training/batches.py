"""From prepared rows to tensors, and the loss at target positions. Knows the shapes of both kinds of models, nothing of optimisers."""

from collections.abc import Sequence
from typing import Protocol

import torch

from pipeline.prefix import FrozenBase

IGNORED = -100
# Lengths are rounded up: the matrix library (oneDNN) keeps a program for every shape that it meets, and hundreds of lengths cost gigabytes.
ROUND_TO = 16


class TokenRow(Protocol):
    """A row of prepared data: the prompt's tokens and the target's."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens (the encoder's input for encoder-decoders)."""

    @property
    def target_ids(self) -> list[int]:
        """The target's tokens."""


def left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T], T a multiple of 16, with padding in front, and the attention mask [B, T]: 1 for tokens, 0 for padding."""
    return _padded(rows, pad, device, left=True)


def right_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As `left_padded`, with padding behind."""
    return _padded(rows, pad, device, left=False)


def _padded(rows: Sequence[list[int]], pad: int, device: torch.device, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    length = _rounded(max(len(row) for row in rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)


def _rounded(length: int) -> int:
    return -(-length // ROUND_TO) * ROUND_TO


def target_loss(base: FrozenBase, rows: Sequence[TokenRow], pad: int) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the target tokens, and their number. Call inside `base.prefixes(…)`.

    Returns:
        the sum in float32 (a scalar with gradients) and the number of target tokens.
    """
    targets = [row.target_ids for row in rows]
    if base.is_encoder_decoder:
        ids, mask = right_padded([row.prompt_ids for row in rows], pad, base.device)
        labels, _ = right_padded(targets, IGNORED, base.device)
        decoder_ids = base.model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = base.model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False).logits
    else:
        # Padding in front brings every row's target to the end, so that the base computes logits for the last positions only:
        # logits and softmax over the vocabulary cost more than all other products of a small model.
        ids, mask = left_padded([row.prompt_ids + row.target_ids[:-1] for row in rows], pad, base.device)
        labels, _ = left_padded(targets, IGNORED, base.device)  # never longer than ids, since a prompt has a token at least
        base.prompts_end_at(torch.tensor([ids.shape[1] - len(t) for t in targets], device=base.device))
        logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=labels.shape[1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, sum(len(t) for t in targets)
