"""The metrics: what each is called, which way is better, and how it is computed.

In: references, and for some metrics the inputs. Out: a `Metric`, which turns outputs into sufficient statistics, one row a record,
and sums of such rows into corpus scores. So a bootstrap resample costs one matrix product instead of reading all texts again.
Knows nothing of models, customers or files.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, cast

import numpy as np
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from pipeline.errors import EvaluationError
from pipeline.evaluation import coco
from pipeline.evaluation.meteor import Meteor, check_meteor
from pipeline.evaluation.nist import nist, nist_score
from pipeline.evaluation.presets import Preset
from pipeline.evaluation.slots import slot_errors


@dataclass(frozen=True)
class Kind:
    """What a reader must know of a metric.

    Attributes:
        better: which way is better.
        top: the end of its scale, None if it has none. With 100 it is in points.
    """

    better: Literal["higher", "lower"]
    top: float | None


METRICS = {
    "bleu": Kind("higher", 100),
    "nist": Kind("higher", None),
    "rougeL_coco": Kind("higher", 100),
    "cider": Kind("higher", 10),
    "chrf": Kind("higher", 100),
    "ter": Kind("lower", None),
    "meteor": Kind("higher", 100),
    "rouge1": Kind("higher", 100),
    "rouge2": Kind("higher", 100),
    "rougeL": Kind("higher", 100),
    "exact_match": Kind("higher", 100),
    "slot_error_rate": Kind("lower", None),
    "perplexity": Kind("lower", None),
    "distinct1": Kind("higher", 100),
    "distinct2": Kind("higher", 100),
}
_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Metric:
    """One metric prepared for a set of references.

    Attributes:
        statistics: outputs -> [N, k], one row of sufficient statistics a record.
        score_of: sums of such rows [R, k] -> [R].
        signature: settings in sacrebleu's notation.
        note: what a reader must know before believing it on these texts, or None.
        of_parts: whether the rows of some records make the score of these records; distinct-n is of all outputs together.
    """

    statistics: Callable[[Sequence[str]], np.ndarray]
    score_of: Callable[[np.ndarray], np.ndarray]
    signature: str
    note: str | None = None
    of_parts: bool = True


def check_metrics(names: Sequence[str], inputs: Sequence[str]) -> None:
    """Refuse at once what could not be computed after minutes of generation.

    Raises:
        EvaluationError: METEOR without its program, or the slot error rate of inputs without slots.
    """
    if "meteor" in names:
        check_meteor()
    if "slot_error_rate" in names and slot_errors(inputs) is None:
        raise _no_slots()


def prepare(
    name: str, references: Sequence[Sequence[str]], inputs: Sequence[str] | None, preset: Preset, stack: ExitStack
) -> Metric:
    """A metric for these references.

    Args:
        name: of `METRICS`; `perplexity` is of losses, not of texts, and prepared by `perplexity()`.
        references: of each record, one or more.
        inputs: what slot errors are found by.
        preset: see there.
        stack: ends the programs that the metric starts.

    Raises:
        EvaluationError: unknown, or not to be computed here.
    """
    shortened = [own[: preset.max_references] for own in references]
    if name == "bleu":
        return _bleu(shortened, preset)
    if name == "nist":
        return _nist(shortened, preset)
    if name == "chrf":
        chrf = CHRF(lowercase=preset.lowercase, references=_streams(references))
        return Metric(_extract(chrf), _chrf_scores, chrf.get_signature().format())
    if name == "ter":
        prepared = [[preset.prepared(text) for text in own] for own in shortened]
        ter = TER(references=_streams(prepared))
        extract = _extract(ter)
        return Metric(
            lambda outputs: extract([preset.prepared(text) for text in outputs]),
            lambda sums: 100 * _shares(sums[:, 0], sums[:, 1], empty=(sums[:, 0] > 0).astype(float)),
            ter.get_signature().format() + preset.signature,
        )
    if name == "meteor":
        program = stack.enter_context(Meteor())
        prepared = [[preset.prepared(text) for text in own] for own in shortened]
        of = program.statistics(prepared)
        return Metric(
            lambda outputs: of([preset.prepared(text) for text in outputs]),
            lambda sums: 100 * program.scores(sums),
            f"meteor|{_counted(shortened)}|lang:en|norm:yes|tok:ptb|jar:1.5{preset.signature}",
        )
    if name in _ROUGE:
        return _rouge(name, references)
    if name == "rougeL_coco":
        return _mean(
            lambda outputs: 100 * coco.rouge_l(outputs, references),
            f"rougeL_coco|{_counted(references)}|beta:1.2|tok:ptb|case:lc",
        )
    if name == "cider":
        alone = "CIDEr weighs words by how few records have them, so it is 0 where there is one record; use chrf."
        signature = f"cider|{_counted(references)}|n:4|sigma:6|df:test|tok:ptb|case:lc"
        return _mean(coco.cider(references), signature, alone if len(references) == 1 else None)
    if name == "exact_match":
        wanted = [{_same(text) for text in own} for own in references]
        return _mean(
            lambda outputs: np.array([100.0 * (_same(text) in own) for text, own in zip(outputs, wanted, strict=True)]),
            f"exact_match|{_counted(references)}|case:mixed|norm:NFC+blanks",
        )
    if name == "slot_error_rate":
        return _slot_error_rate(references, inputs or [])
    if name in ("distinct1", "distinct2"):
        n = int(name[-1])
        return Metric(
            lambda outputs: _distinct(outputs, n),
            lambda sums: _shares(sums[:, 0], sums[:, 1]),
            f"{name}|tok:13a|case:lc|interval:jackknife",
            of_parts=False,
        )
    raise EvaluationError(f"unknown metric {name!r}. Known: {', '.join(METRICS)}.")


def perplexity() -> Metric:
    """Perplexity from losses: rows of (nats, tokens), summed over a record's references."""

    def no_texts(outputs: Sequence[str]) -> np.ndarray:
        raise NotImplementedError("perplexity is computed of losses")

    def scores(sums: np.ndarray) -> np.ndarray:
        # Beyond 50 nats a token the figure means nothing, and infinity cannot be subtracted or written as JSON.
        found: np.ndarray = np.exp(np.minimum(_shares(sums[:, 0], sums[:, 1]), 50))
        return found

    return Metric(no_texts, scores, "perplexity|refs:all|per:token|tok:base")


def _mean(of_records: Callable[[Sequence[str]], np.ndarray], signature: str, note: str | None = None) -> Metric:
    """A metric whose corpus score is the mean over the records."""

    def statistics(outputs: Sequence[str]) -> np.ndarray:
        values = of_records(outputs)
        return np.stack([values, np.ones(len(values))], axis=1)

    return Metric(statistics, lambda sums: _shares(sums[:, 0], sums[:, 1]), signature, note)


def _shares(parts: np.ndarray, wholes: np.ndarray, empty: np.ndarray | float = 0.0) -> np.ndarray:
    """parts / wholes, and `empty` where there is nothing to divide by."""
    found: np.ndarray = np.where(wholes > 0, parts / np.where(wholes > 0, wholes, 1), empty)
    return found


def _counted(references: Sequence[Sequence[str]]) -> str:
    counts = {len(own) for own in references}
    return f"nrefs:{counts.pop() if len(counts) == 1 else 'var'}"


def _streams(references: Sequence[Sequence[str]], padding: str | None = None) -> list[list[str]]:
    """References record by record -> sacrebleu's layout, stream by stream; `padding` where a record has fewer than the others."""
    streams = [[own[i] if i < len(own) else padding for own in references] for i in range(max(map(len, references)))]
    return cast(list[list[str]], streams)  # sacrebleu takes None and says so in its documentation, not in its type hints


def _extract(metric: BLEU | CHRF | TER) -> Callable[[Sequence[str]], np.ndarray]:
    # The statistics have no public name in sacrebleu 2.6.0, but its own bootstrap (`sacrebleu.significance`) goes through this
    # method. `references` were given to the constructor: they are read once for all systems.
    return lambda outputs: np.array(metric._extract_corpus_statistics(outputs, None), dtype=np.float64)


def _bleu(references: Sequence[Sequence[str]], preset: Preset) -> Metric:
    prepared = [[preset.prepared(text) for text in own] for own in references]
    streams = _streams(prepared, "" if preset.pad_references else None)
    bleu = BLEU(lowercase=preset.lowercase, tokenize=preset.tokenize, smooth_method=preset.smooth, force=True, references=streams)
    extract = _extract(bleu)
    judges = any(len(bleu.tokenizer(text).split()) >= MAX_NGRAM_ORDER for own in prepared for text in own)
    return Metric(
        statistics=lambda outputs: extract([preset.prepared(text) for text in outputs]),
        score_of=lambda sums: _bleu_scores(sums, smooth=preset.smooth == "exp"),
        signature=bleu.get_signature().format() + preset.signature,
        note=None if judges else "BLEU counts runs of four words and no reference holds one; use chrf for such texts.",
    )


def _bleu_scores(sums: np.ndarray, smooth: bool) -> np.ndarray:
    """sacrebleu's `compute_bleu` for many sums at once: [R, 10] -> [R]. Its loop takes longer than all else of a bootstrap."""
    length, wanted = sums[:, 0], sums[:, 1]
    correct, total = sums[:, 2:6], sums[:, 6:10]
    missed = np.cumsum((correct == 0) & (total > 0), axis=1)
    instead = 2.0**-missed if smooth else np.zeros_like(total)
    precisions = _shares(np.where(correct > 0, correct, instead), total)
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(precisions).mean(axis=1))
    brevity = np.exp(np.minimum(0.0, 1 - _shares(wanted, length)))
    scores: np.ndarray = np.where(correct.any(axis=1), 100 * brevity * mean, 0.0)
    return scores


def _chrf_scores(sums: np.ndarray) -> np.ndarray:
    """sacrebleu's chrF (beta 2) for many sums at once: [R, 18] -> [R], columns (output, reference, matched) of each order."""
    output, reference, matched = (sums[:, i::3] for i in range(3))
    used = (output > 0) & (reference > 0)
    orders = used.sum(axis=1)
    precision, recall = (_shares((_shares(matched, whole) * used).sum(axis=1), orders) for whole in (output, reference))
    return 100 * _shares(5 * precision * recall, 4 * precision + recall)


def _nist(references: Sequence[Sequence[str]], preset: Preset) -> Metric:
    tokenise = Tokenizer13a()

    def words(text: str) -> list[str]:
        return str(tokenise(preset.prepared(text).lower())).split()

    of = nist([[words(text) for text in own] for own in references])
    return Metric(
        statistics=lambda outputs: of([words(text) for text in outputs]),
        score_of=lambda sums: np.array([nist_score(row) for row in sums]),
        signature=f"nist|{_counted(references)}|case:lc|n:5|tok:13a|as:mteval-v13a{preset.signature}",
    )


def _rouge(name: str, references: Sequence[Sequence[str]]) -> Metric:
    from pipeline.evaluation import rouge  # not at the top: see there

    scorer = rouge.scorer(name)

    def best(outputs: Sequence[str]) -> np.ndarray:
        found = (scorer.score_multi(own, output)[name].fmeasure for output, own in zip(outputs, references, strict=True))
        return np.array([100 * value for value in found])

    judges = any(rouge.tokens(text) for own in references for text in own)
    return _mean(
        best,
        f"{name}|{_counted(references)}|refs:best|stem:yes|package:rouge-score|version:{version('rouge-score')}",
        None if judges else f"{name} sees only a-z and digits and no reference holds any; use chrf for such texts.",
    )


def _same(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _no_slots() -> EvaluationError:
    return EvaluationError(
        "slot_error_rate: no input of the test split has slots, as `name : value | name : value`. Remove it from evaluation.metrics."
    )


def _slot_error_rate(references: Sequence[Sequence[str]], inputs: Sequence[str]) -> Metric:
    errors = slot_errors(inputs)
    if errors is None:
        raise _no_slots()

    def scores(sums: np.ndarray) -> np.ndarray:
        return 100 * _shares(sums[:, :3].sum(axis=1), sums[:, 3])

    own = float(scores(errors([texts[0] for texts in references]).sum(axis=0, keepdims=True))[0])
    return Metric(
        statistics=errors,
        score_of=scores,
        signature="slot_error_rate|errors:missing+added+repeated|added:values-of-all-inputs|match:words|case:lc|yes/no:left-out",
        note=f"Values are looked for word by word. The first references themselves have a slot error rate of {own:.1f}.",
    )


def _distinct(outputs: Sequence[str], n: int) -> np.ndarray:
    """Statistics [N, 2] of distinct-n (Li et al. 2016): different n-grams of all outputs as a share of all n-grams, in points.

    A resample holds outputs twice, which alone makes it less varied; so the rows are the jackknife's pseudo-values, whose mean is the
    score and whose spread is its variance.
    """
    tokenise = Tokenizer13a()
    counted = []
    for text in outputs:
        words = str(tokenise(text.lower())).split()
        counted.append(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)))
    everywhere = Counter(ngram for counts in counted for ngram in counts)
    total = sum(sum(counts.values()) for counts in counted)
    score = 100 * len(everywhere) / total if total else 0.0
    without = []
    for counts in counted:
        left = total - sum(counts.values())
        only_here = sum(everywhere[ngram] == 1 for ngram in counts)
        without.append(100 * (len(everywhere) - only_here) / left if left else score)
    pseudo = len(outputs) * score - (len(outputs) - 1) * np.array(without)
    return np.stack([pseudo - pseudo.mean() + score, np.ones(len(outputs))], axis=1)
