"""NIST as mteval-v13a has it (Doddington 2002): n-grams up to five, each worth the information that it carries.

In: tokenised texts. Out: sufficient statistics, one row a record, and the corpus score of a sum of such rows. nltk's NIST is
another figure.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

ORDERS = 5
# A text of two thirds of the references' mean length gets half the score.
_BETA = -math.log(0.5) / math.log(1.5) ** 2

_Words = tuple[str, ...]


def nist(references: Sequence[Sequence[Sequence[str]]]) -> Callable[[Sequence[Sequence[str]]], np.ndarray]:
    """NIST against `references`: of each record some texts, each a list of words.

    Returns:
        a function from outputs (lists of words) to [N, 14]: for each order the information of the n-grams that a reference has too;
        for each order the n-grams of the output; its words; the words of all references, their number, and 1.
    """
    counted = [[_ngrams(text) for text in own] for own in references]
    total: Counter[_Words] = Counter()
    for own in counted:
        for counts in own:
            total.update(counts)
    words = sum(len(text) for own in references for text in own)
    best = [_union(own) for own in counted]
    lengths = [(sum(len(text) for text in own), len(own), 1) for own in references]

    def information(ngram: _Words) -> float:
        return math.log2((total[ngram[:-1]] if len(ngram) > 1 else words) / total[ngram])

    def statistics(outputs: Sequence[Sequence[str]]) -> np.ndarray:
        rows = np.zeros((len(outputs), 2 * ORDERS + 4))
        for row, text, most, length in zip(rows, outputs, best, lengths, strict=True):
            for ngram, count in _ngrams(text).items():
                matched = min(count, most.get(ngram, 0))
                if matched:
                    row[len(ngram) - 1] += matched * information(ngram)
            row[ORDERS:-4] = [max(0, len(text) - n) for n in range(ORDERS)]
            row[-4:] = len(text), *length
        return rows

    return statistics


def nist_score(row: np.ndarray) -> float:
    """The score of a sum of statistics [14]; 0 or more, without an upper end."""
    information, counts, (length, words, texts, records) = row[:ORDERS], row[ORDERS:-4], row[-4:]
    if not length:
        return 0.0
    gained = sum(float(i / c) for i, c in zip(information, counts, strict=True) if c)
    # The mean length is that of all references in one pool: records with many of them count for more (found by the official figures).
    ratio = min(1.0, float(length / (words / texts * records))) if words else 1.0
    return gained * math.exp(-_BETA * math.log(ratio) ** 2)


def _union(counts: Sequence[Counter[_Words]]) -> Counter[_Words]:
    most: Counter[_Words] = Counter()
    for own in counts:
        most |= own
    return most


def _ngrams(words: Sequence[str]) -> Counter[_Words]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))
