"""What is asked of the decoder, and what comes back: plain data. Knows nothing of models, customers or HTTP."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from pipeline.errors import ConfigError
from pipeline.prefix import Prefix

# stop: an end token or a stop string; length: as many tokens as were asked for; cancelled: nobody waits any more; error: see `Request.error`.
FinishReason = Literal["stop", "length", "cancelled", "error"]

# How the members of an ensemble are averaged at every step.
Average = Literal["probabilities", "log_probabilities"]

TOP_LOGPROBS = 20  # of a position at most


@dataclass(frozen=True)
class Decoding:
    """How an answer is searched for.

    Attributes:
        max_new_tokens: the longest answer.
        num_beams: 1 for greedy search or sampling.
        temperature: 0 for search; otherwise tokens are drawn.
        top_p: draw from the smallest set of tokens that has this probability (after temperature and top_k).
        top_k: draw from so many of the likeliest tokens; 0: from all.
        seed: of this answer's own random numbers; the same seed draws the same tokens whoever shares the batch, in float32 or float64. In bfloat16
            probabilities depend on the shape of the batch, and so may tokens.
        stop: the answer ends before the first of these texts.
        top_logprobs: note the log-probability of every token, and of so many of the likeliest at its place; None: of none.
        length_penalty, early_stopping: of beam search, as transformers means them; None: what the base's generation_config.json says.
    """

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None

    def __post_init__(self) -> None:
        for wrong, text in (
            (self.max_new_tokens < 1, "max_new_tokens must be 1 or more"),
            (self.num_beams < 1, "num_beams must be 1 or more"),
            (not 0 <= self.temperature < float("inf"), "temperature must be 0 or more"),
            (not 0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k < 0, "top_k must be 0 or more"),
            (not all(self.stop), "a stop text must not be empty"),
            (
                self.top_logprobs is not None and not 0 <= self.top_logprobs <= TOP_LOGPROBS,
                f"top_logprobs must be 0 to {TOP_LOGPROBS}",
            ),
            (
                self.num_beams > 1 and self.temperature > 0,
                "beams search, they do not draw: set temperature to 0, or num_beams to 1",
            ),
            (self.num_beams > 1 and self.top_logprobs is not None, "beam search notes no log-probabilities: set num_beams to 1"),
        ):
            if wrong:
                raise ConfigError(f"{text}.")


def seed_of(seed: int, index: int) -> int:
    """The seed of the answer at this place among those that were asked for at once.

    The first has `seed` itself. The others are far from those of neighbouring seeds: were they `seed` + index, three answers with seed 1 and
    three with seed 2 would share two.
    """
    if not index:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class TokenLogprob:
    """The token at one place of an answer: its log-probability given what stands before, and the likeliest tokens there (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Loaded:
    """A prefix in memory, ready to stand before rows. The same object is the same prefix.

    Attributes:
        prefix: keys and values by site; empty for the base alone.
        infix: whether it stands between prompt and answer.
    """

    prefix: Prefix
    infix: bool = False

    @property
    def length(self) -> int:
        """Its columns."""
        return max((key.shape[1] for key, _ in self.prefix.values()), default=0)

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.nbytes for pair in self.prefix.values() for tensor in pair)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Loaded":
        """A copy on `device` in `dtype`, which holds on to no file."""
        return Loaded(
            {
                site: (key.to(device, dtype, copy=True), value.to(device, dtype, copy=True))
                for site, (key, value) in self.prefix.items()
            },
            self.infix,
        )


# The base without a prefix.
NO_PREFIX = Loaded({})


@dataclass(frozen=True, eq=False)
class Members:
    """What answers: one prefix, or several whose predictions are averaged at every step."""

    prefixes: tuple[Loaded, ...]
    average: Average = "probabilities"

    @property
    def length(self) -> int:
        """The columns of the longest."""
        return max(prefix.length for prefix in self.prefixes)

    @property
    def bytes(self) -> int:
        """What their tensors take."""
        return sum(prefix.bytes for prefix in self.prefixes)


BASE_ALONE = Members((NO_PREFIX,))

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """One answer that is asked for, and what there is of it.

    Attributes:
        prompt_ids: the prompt's tokens (the encoder's input for encoder-decoders).
        members: what stands before them.
        on_text: called by the thread that decodes with every further piece of the text, which is then made while tokens come.
        on_end: called by that thread once, when the answer has ended.
        tokens: of the answer, without the token that ended it.
        text: of the answer; whole once `finish_reason` is set.
        logprobs: one for each token, if asked for.
        first_token_at: `time.monotonic()` of it; None before, and for beams, whose first token is known with the last.
        error: in words, for `finish_reason` error.
        cause: the exception behind it, where the answer could not begin.
    """

    prompt_ids: Sequence[int]
    members: Members
    decoding: Decoding
    on_text: Callable[[str], None] | None = None
    on_end: Callable[[], None] | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_at: float | None = None
    error: str | None = None
    cause: Exception | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes."""
        return len(self.members.prefixes) * self.decoding.num_beams
