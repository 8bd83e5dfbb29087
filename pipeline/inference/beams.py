"""Beam search for one answer, equal to that of transformers (5.23, `GenerationMixin._beam_search`): the same candidates, scores and ends.

In: log-probabilities of the next token for every beam. Out: which beam each new one goes on from, and with which token. Written anew because
transformers runs its search over a whole batch that begins and ends together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# What transformers gives a hypothesis that does not count.
_NEVER = -1.0e9


@dataclass(frozen=True)
class _Hypothesis:
    score: float
    tokens: tuple[int, ...]
    finished: bool


class BeamSearch:
    """The state of one search.

    Args:
        num_beams: two or more.
        max_new_tokens: longest answer, the end token included.
        ends: end tokens.
        length_penalty: the power of the length by which scores are divided.
        early_stopping: True stops as soon as there are `num_beams` ended hypotheses; False when the running ones are not likely to be better;
            "never" when they cannot be.
        stops: whether a hypothesis ends with these tokens for another reason than an end token.
    """

    def __init__(
        self,
        num_beams: int,
        max_new_tokens: int,
        ends: Sequence[int],
        length_penalty: float,
        early_stopping: bool | str,
        stops: Callable[[Sequence[int]], bool],
    ) -> None:
        self.num_beams, self.max_new_tokens, self.ends = num_beams, max_new_tokens, frozenset(ends)
        self.length_penalty, self.early_stopping, self.stops = length_penalty, early_stopping, stops
        self.beams: list[tuple[int, ...]] = [()] * num_beams
        # Only the first counts at the beginning, for all are alike.
        self.scores = [0.0] + [_NEVER] * (num_beams - 1)
        self.ended = [_Hypothesis(_NEVER, (), False)] * num_beams
        self._improvable = True
        self.done = False

    def step(self, log_probs: torch.Tensor) -> tuple[list[int], list[int]]:
        """Go on by one token.

        Args:
            log_probs: float32 [num_beams, vocabulary].

        Returns:
            for each beam the one that it goes on from, and its new token; of no use once `done`.
        """
        vocabulary = log_probs.shape[1]
        total = log_probs + torch.tensor(self.scores, device=log_probs.device)[:, None]
        count = min(max(2, 1 + len(self.ends)) * self.num_beams, total.numel())
        best = torch.topk(total.flatten(), count)
        scores, places = best.values.tolist(), best.indices.tolist()
        parents, tokens = [place // vocabulary for place in places], [place % vocabulary for place in places]
        grown = [(*self.beams[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        length = len(grown[0])
        full = length >= self.max_new_tokens
        hits = [full or token in self.ends or self.stops(beam) for token, beam in zip(tokens, grown, strict=True)]

        running = [score + (_NEVER if hit else 0.0) for score, hit in zip(scores, hits, strict=True)]
        chosen = sorted(range(count), key=lambda i: -running[i])[: self.num_beams]
        self._end(scores, grown, hits, length)
        self.beams, self.scores = [grown[i] for i in chosen], [running[i] for i in chosen]
        self._check_end(length, all(hits))
        return [parents[i] for i in chosen], [tokens[i] for i in chosen]

    def _end(self, scores: list[float], grown: list[tuple[int, ...]], hits: list[bool], length: int) -> None:
        """Take the hypotheses that end here among the best, if they are."""
        closed = (self.early_stopping is True and all(one.finished for one in self.ended)) or not self._improvable
        if closed:
            return
        new = [
            _Hypothesis(scores[i] / length**self.length_penalty, grown[i], True)
            for i in range(min(self.num_beams, len(grown)))
            if hits[i]
        ]
        self.ended = sorted([*self.ended, *new], key=lambda one: -one.score)[: self.num_beams]

    def _check_end(self, length: int, all_hit: bool) -> None:
        longest = self.max_new_tokens if self.early_stopping == "never" and self.length_penalty > 0 else length
        possible = self.scores[0] / longest**self.length_penalty
        everyone = all(one.finished for one in self.ended)
        worst = min(one.score for one in self.ended) if everyone else _NEVER
        self._improvable = self._improvable and possible > worst
        self.done = not self._improvable or all_hit or (self.early_stopping is True and everyone)

    @property
    def best(self) -> tuple[int, ...]:
        """The tokens of the best hypothesis, its end token included."""
        return self.ended[0].tokens
