"""ROUGE as the package rouge-score computes it, remembering what it stemmed.

In: texts. Out: its scorer and its tokens. A module of its own because rouge-score imports the whole of NLTK, and with it scikit-learn (2 s, 90 MB),
which a process that only shows scores need not have.
"""

import functools

from rouge_score import rouge_scorer, tokenizers
from rouge_score import tokenize as rouge_tokenize


def scorer(name: str) -> rouge_scorer.RougeScorer:
    """rouge-score's scorer of the metric `name`, with stemming."""
    return rouge_scorer.RougeScorer([name], tokenizer=_StemmingTokenizer())


class _StemmingTokenizer(tokenizers.Tokenizer):
    """rouge-score's tokeniser with its stemmer, remembering texts: it meets an output again with every reference and metric."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


class _Stemmer:
    """The Porter stemmer that rouge-score uses, remembering words: it takes nine tenths of ROUGE's time."""

    def __init__(self) -> None:
        self.stem = functools.lru_cache(maxsize=100_000)(tokenizers.porter.PorterStemmer().stem)


_stemmer = _Stemmer()


@functools.lru_cache(maxsize=20_000)
def tokens(text: str) -> list[str]:
    """What ROUGE compares of a text: stemmed words of a-z and digits."""
    return list(rouge_tokenize.tokenize(text, _stemmer))
