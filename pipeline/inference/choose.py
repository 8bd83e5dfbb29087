"""From logits to tokens: averaging the members of an ensemble, drawing, log-probabilities. Every row by itself, whoever its neighbours are."""

from collections.abc import Sequence

import torch

from pipeline.inference.request import Average, Decoding, TokenLogprob


def averaged(logits: torch.Tensor, average: Average) -> torch.Tensor:
    """What several predictions say together, as log-probabilities.

    Args:
        logits: float32 [members, beams, vocabulary].
        average: `probabilities`: their arithmetic mean; `log_probabilities`: their geometric mean, made a distribution again.

    Returns:
        [beams, vocabulary].
    """
    each = logits.log_softmax(-1)
    if average == "probabilities":
        return each.logsumexp(0) - torch.tensor(float(len(logits)), device=logits.device).log()
    return each.mean(0).log_softmax(-1)


def draw(scores: torch.Tensor, how: Sequence[Decoding], numbers: Sequence[float]) -> list[int]:
    """Draw a token for each row: temperature, then the `top_k` likeliest, then of those the fewest that have `top_p` together.

    Args:
        scores: float32 [B, vocabulary], logits or log-probabilities.
        how: of each row; every temperature above 0.
        numbers: one random number in [0, 1) a row.
    """
    device = scores.device
    # The likeliest at 0, in float64: with a tiny temperature the others go to minus infinity, and nothing overflows to NaN.
    scores = scores.double()
    scores = scores - scores.max(-1, keepdim=True).values
    scores = scores / torch.tensor([d.temperature for d in how], dtype=torch.float64, device=device)[:, None]
    tokens: torch.Tensor | None = None
    if any(d.top_p < 1 or d.top_k for d in how):
        scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(scores.shape[1], device=device)[None, :]
        most = torch.tensor([d.top_k or scores.shape[1] for d in how], device=device)[:, None]
        scores = scores.masked_fill(rank >= most, float("-inf"))
        chances = scores.softmax(-1)
        before = chances.cumsum(-1) - chances  # of all likelier tokens
        top_p = torch.tensor([d.top_p for d in how], device=device)[:, None]
        scores = scores.masked_fill((before >= top_p) & (rank > 0), float("-inf"))
    # Also in float64, for float32 sums over a large vocabulary are off in the fifth digit.
    reached = scores.softmax(-1).cumsum(-1)
    wanted = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None] * reached[:, -1:]
    places = torch.searchsorted(reached, wanted, right=True).clamp(max=scores.shape[1] - 1)
    return (places if tokens is None else tokens.gather(1, places))[:, 0].tolist()


def logprob_of(scores: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """The log-probability of a token and of the `top` likeliest; `scores` is float32 [vocabulary]."""
    log_probs = scores.log_softmax(-1)
    best = torch.topk(log_probs, top)
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(log_probs[token]), pairs)
