"""Corpus scores with 95 % bootstrap intervals: BLEU, chrF, ROUGE-1/2/L.

In: the outputs of one or more systems and the references of each record, as text. Out: points from 0 to 100, an interval, and for
each metric the signature that says how it was computed. Knows nothing of models, customers or files.

A metric is reduced once to sufficient statistics, one row a record. The corpus score is a function of their sum, so a bootstrap
resample costs one matrix product instead of reading all texts again, and all metrics and systems see the same resamples.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import cast

import numpy as np
from rouge_score import rouge_scorer, tokenizers
from rouge_score import tokenize as rouge_tokenize
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from sacrebleu.metrics.chrf import CHRF

from pipeline.errors import EvaluationError

# sacrebleu's own default: `sacrebleu --confidence` on the same texts gives the same resamples.
SEED = 12345

_ROUGE = ("rouge1", "rouge2", "rougeL")
# The index matrix of a block of resamples stays below this many numbers (16 MB as float64).
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Score:
    """A corpus score in points (0..100) and its 95 % bootstrap interval."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What `score_systems` found.

    Attributes:
        systems: system name to metric name to score.
        signatures: metric name to the settings it was computed with.
        notes: metric name to a warning, where the metric cannot judge these texts.
    """

    systems: dict[str, dict[str, Score]]
    signatures: dict[str, str]
    notes: dict[str, str]


@dataclass(frozen=True)
class _Metric:
    """One metric prepared for a set of references.

    Attributes:
        statistics: outputs -> array [records, k], one row of sufficient statistics a record.
        score_of: a sum of such rows [k] -> points.
        signature: settings in sacrebleu's notation.
        note: why the metric says nothing about these texts, or None.
    """

    statistics: Callable[[Sequence[str]], np.ndarray]
    score_of: Callable[[np.ndarray], float]
    signature: str
    note: str | None


def score_systems(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = SEED,
    lowercase: bool = False,
) -> Scores:
    """Score the outputs of several systems on the same records.

    Args:
        systems: name of a system (`base`, `prefix`) to its outputs, one a record. An output may be empty.
        references: of each record, one or more.
        metrics: of `bleu`, `chrf`, `rouge1`, `rouge2`, `rougeL`.
        resamples: bootstrap resamples for the interval; the same for all metrics and systems.
        seed: of the resamples.
        lowercase: compare BLEU and chrF without case. ROUGE never sees case.

    Raises:
        EvaluationError: no records, numbers of outputs and references that differ, a record without reference, or an unknown
            metric.
    """
    _check(systems, references)
    prepared = {name: _prepare(name, references, lowercase) for name in metrics}
    statistics = {
        (system, name): metric.statistics(outputs) for system, outputs in systems.items() for name, metric in prepared.items()
    }
    scores: dict[str, dict[str, Score]] = {system: {} for system in systems}
    for (system, name), (values, sums) in _with_resampled_sums(statistics, resamples, seed).items():
        score_of = prepared[name].score_of
        scores[system][name] = _score(score_of(values.sum(axis=0)), [score_of(row) for row in sums])
    return Scores(
        systems=scores,
        signatures={name: f"{metric.signature}|bs:{resamples}|seed:{seed}" for name, metric in prepared.items()},
        notes={name: metric.note for name, metric in prepared.items() if metric.note is not None},
    )


def sentence_chrf(systems: Mapping[str, Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """chrF of each output by itself, in points, for each system: what samples are ordered by.

    Raises:
        EvaluationError: as `score_systems`.
    """
    _check(systems, references)
    metric = _prepare("chrf", references, lowercase=False)
    return {name: [metric.score_of(row) for row in metric.statistics(outputs)] for name, outputs in systems.items()}


def _check(systems: Mapping[str, Sequence[str]], references: Sequence[Sequence[str]]) -> None:
    for name, outputs in systems.items():
        if len(outputs) != len(references):
            raise EvaluationError(
                f"{name}: {len(outputs)} outputs for {len(references)} records. Generate for every record, in their order."
            )
    if not references:
        raise EvaluationError("there is no record to score. Give a test split with at least one row.")
    for number, of_record in enumerate(references, start=1):
        if not of_record:
            raise EvaluationError(f"record {number} has no reference. Give it at least one, or leave it out.")


def _prepare(name: str, references: Sequence[Sequence[str]], lowercase: bool) -> _Metric:
    if name == "bleu":
        bleu = BLEU(lowercase=lowercase, force=True, references=_streams(references))
        judges = any(len(bleu.tokenizer(text).split()) >= MAX_NGRAM_ORDER for own in references for text in own)
        return _from_sacrebleu(
            bleu, None if judges else "BLEU counts runs of four words and no reference holds one; use chrf for such texts."
        )
    if name == "chrf":
        return _from_sacrebleu(CHRF(lowercase=lowercase, references=_streams(references)), None)
    if name in _ROUGE:
        return _rouge(name, references)
    raise EvaluationError(f"unknown metric {name!r}. Known: {', '.join(('bleu', 'chrf', *_ROUGE))}.")


def _streams(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """References record by record -> sacrebleu's layout, stream by stream; None where a record has fewer than the others."""
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(max(map(len, references)))]
    return cast(list[list[str]], streams)  # sacrebleu takes None and says so in its documentation, not in its type hints


def _from_sacrebleu(metric: BLEU | CHRF, note: str | None) -> _Metric:
    # The statistics have no public name in sacrebleu 2.6.0, but its own bootstrap (`sacrebleu.significance`) goes through these
    # two methods. `references` were given to the constructor: they are read once for all systems.
    return _Metric(
        statistics=lambda outputs: np.array(metric._extract_corpus_statistics(outputs, None), dtype=np.float64),
        score_of=lambda row: float(metric._compute_score_from_stats(row).score),  # type: ignore[arg-type]  # annotated list, takes arrays
        signature=metric.get_signature().format(),
        note=note,
    )


def _rouge(name: str, references: Sequence[Sequence[str]]) -> _Metric:
    scorer = rouge_scorer.RougeScorer([name], tokenizer=_StemmingTokenizer())

    def statistics(outputs: Sequence[str]) -> np.ndarray:
        best = (scorer.score_multi(own, output)[name].fmeasure for output, own in zip(outputs, references, strict=True))
        return np.array([[100 * value, 1.0] for value in best])

    judges = any(_rouge_tokens(text) for own in references for text in own)
    counts = {len(own) for own in references}
    nrefs = str(counts.pop()) if len(counts) == 1 else "var"
    return _Metric(
        statistics=statistics,
        score_of=lambda row: float(row[0] / row[1]),
        signature=f"{name}|nrefs:{nrefs}|refs:best|stem:yes|package:rouge-score|version:{version('rouge-score')}",
        note=None if judges else f"{name} sees only a-z and digits and no reference holds any; use chrf for such texts.",
    )


class _StemmingTokenizer(tokenizers.Tokenizer):
    """rouge-score's tokeniser with its stemmer, remembering texts: it meets an output again with every reference and metric."""

    def tokenize(self, text: str) -> list[str]:
        return _rouge_tokens(text)


class _Stemmer:
    """The Porter stemmer that rouge-score uses, remembering words: it takes nine tenths of ROUGE's time."""

    def __init__(self) -> None:
        self.stem = functools.lru_cache(maxsize=100_000)(tokenizers.porter.PorterStemmer().stem)


_stemmer = _Stemmer()


@functools.lru_cache(maxsize=20_000)
def _rouge_tokens(text: str) -> list[str]:
    return list(rouge_tokenize.tokenize(text, _stemmer))


def _with_resampled_sums(
    statistics: Mapping[tuple[str, str], np.ndarray], resamples: int, seed: int
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Each [records, k] of `statistics` with its sums over every resample, [resamples, k]."""
    values = np.concatenate(list(statistics.values()), axis=1)
    sums = np.concatenate([counts @ values for counts in _resample_counts(len(values), resamples, seed)])
    edges = np.cumsum([own.shape[1] for own in statistics.values()])[:-1]
    return {
        key: (own, resampled) for (key, own), resampled in zip(statistics.items(), np.split(sums, edges, axis=1), strict=True)
    }


def _resample_counts(records: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each record was drawn, in blocks [resamples, records]. The draws are those of sacrebleu's bootstrap."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, block := max(1, _BLOCK // records)):
        rows = min(block, resamples - start)
        drawn = generator.integers(0, records, size=(rows, records)) + records * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * records).reshape(rows, records).astype(np.float64)


def _score(score: float, resampled: list[float]) -> Score:
    # The percentiles of sacrebleu's `estimate_ci`. Six digits: beyond them sums differ with the order of addition.
    ordered = sorted(resampled)
    cut = len(ordered) // 40
    return Score(round(score, 6), round(ordered[cut], 6), round(ordered[-1 - cut], 6))
