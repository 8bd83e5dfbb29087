"""ROUGE-L and CIDEr as the COCO caption scorer has them (the E2E challenge's too), on `ptb_tokens`.

In: outputs and references as text. Out: one number a record; the corpus score is their mean. The figures are those of
pycocoevalcap 1.2, whose two peculiarities are kept: ROUGE-L takes the best precision and the best recall over the references even
where they are of different ones, and CIDEr's length penalty compares the numbers of word pairs.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.evaluation.ptb import ptb_tokens

_BETA = 1.2
_ORDERS = 4
_SIGMA = 6.0

_Words = tuple[str, ...]
# For each order of n-grams: n-gram to TF-IDF weight, and the norm of these weights; last the number of word pairs.
_Vector = tuple[list[dict[_Words, float]], list[float], int]


def rouge_l(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """F with beta 1.2 of the longest common subsequence, 0 to 1, one a record [N]."""
    return np.array(
        [_rouge_l(ptb_tokens(text), [ptb_tokens(r) for r in own]) for text, own in zip(outputs, references, strict=True)]
    )


def _rouge_l(words: _Words, references: Sequence[_Words]) -> float:
    # The scorer splits at blanks, so that an empty text counts as one word that nothing equals but another empty text's.
    words, references = words or ("",), [own or ("",) for own in references]
    common = [_longest_common(words, own) for own in references]
    precision = max(common) / len(words)
    recall = max(length / len(own) for length, own in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(a: _Words, b: _Words) -> int:
    """Length of the longest common subsequence, with the rows of the table as the bits of an integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(a) - row.bit_count()


def cider(references: Sequence[Sequence[str]]) -> Callable[[Sequence[str]], np.ndarray]:
    """CIDEr-D against `references`, whose document frequencies weigh the n-grams.

    Returns:
        a function from outputs to one number a record, 0 to 10, [N].
    """
    counted = [[_ngrams(ptb_tokens(text)) for text in own] for own in references]
    documents = Counter(ngram for own in counted for ngram in {ngram for counts in own for ngram in counts})
    rarity = {ngram: math.log(len(references)) - math.log(count) for ngram, count in documents.items()}
    never = math.log(len(references))  # an n-gram of no reference counts as one of a single record

    def vector(counts: Counter[_Words]) -> _Vector:
        weights: list[dict[_Words, float]] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, never)
        norms = [math.sqrt(sum(weight * weight for weight in of_order.values())) for of_order in weights]
        return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    vectors = [[vector(counts) for counts in own] for own in counted]

    def score(outputs: Sequence[str]) -> np.ndarray:
        scores = []
        for text, own in zip(outputs, vectors, strict=True):
            of_output = vector(_ngrams(ptb_tokens(text)))
            scores.append(10 * sum(_similarity(of_output, reference) for reference in own) / len(own))
        return np.array(scores)

    return score


def _ngrams(words: _Words) -> Counter[_Words]:
    return Counter(words[i : i + n] for n in range(1, _ORDERS + 1) for i in range(len(words) - n + 1))


def _similarity(output: _Vector, reference: _Vector) -> float:
    """Mean over the orders of the clipped cosine, less for a different length."""
    total = 0.0
    for theirs, ours, norm, own_norm in zip(reference[0], output[0], reference[1], output[1], strict=True):
        if norm and own_norm:
            common = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
            total += common / (norm * own_norm)
    return total / _ORDERS * math.exp(-((output[2] - reference[2]) ** 2) / (2 * _SIGMA**2))
