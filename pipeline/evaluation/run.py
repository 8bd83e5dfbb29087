"""Evaluates every customer of a job: generate for the test split with and without the prefix, score, decide, report.

In: a job, the prepared data and the prefix folders that it names. Out: for each customer an evaluation folder, whole or not at
all, and `eval_result.json` below the job's folder. The base is loaded once, and customers are generated for in mixed batches,
each row with its own customer's prefix or none. Whatever goes wrong with one customer is that customer's result; the others go
on.
"""

import contextlib
import dataclasses
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

from pipeline.data import Record, read_card, read_split
from pipeline.errors import EvaluationError, PrefixFleetError
from pipeline.evaluation.gate import decide
from pipeline.evaluation.metrics import SEED, score_systems
from pipeline.evaluation.report import customer_report
from pipeline.evaluation.tracking import log_evaluation
from pipeline.files import digest_of, read_json, whole_folder, write_json
from pipeline.progress import Progress
from pipeline.training.job import Job, JobBase, JobCustomer
from pipeline.training.results import EVALUATION_FILES, is_whole, result_path, write_result

FORMAT = 1

# Rows of one call of the engine: enough for full mixed batches, few enough that a crash costs minutes, for folders are written
# after each call.
_ROWS_PER_CALL = 4096

# The engine's slot of "no prefix".
_NO_PREFIX = 0


class Engine(Protocol):
    """What evaluation needs of `pipeline.inference.PrefixEngine`."""

    def add(self, prefix_dir: Path) -> int:
        """Load a prefix and return its slot."""

    def generate(
        self,
        prompts: list[list[int]],
        slots: list[int],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Texts in the order of `prompts`, each with the prefix in its slot."""


@dataclass
class _Candidate:
    """A customer to evaluate, with all that was read for it.

    Attributes:
        prefix: content of prefix.json.
        base_digest: names everything that the base's outputs depend on.
        base_outputs: the base's outputs where an earlier evaluation has the same `base_digest`, else None.
        seconds: spent on this customer so far.
    """

    customer: JobCustomer
    prefix: dict[str, Any]
    records: list[Record]
    base_digest: str
    base_outputs: list[str] | None
    seconds: float

    @property
    def rows(self) -> int:
        """Rows to generate."""
        return len(self.records) * (1 if self.base_outputs is not None else 2)


# A candidate, the base's outputs and the prefix's, in the order of its records.
_Generated = tuple[_Candidate, list[str], list[str]]


def evaluate_job(job: Job, load_engine: Callable[[JobBase], Engine]) -> None:
    """Evaluate every customer of `job` whose evaluation folder does not exist yet, and write a result for each customer.

    Args:
        job: what to do.
        load_engine: called once, and only if there is something to generate.

    Raises:
        BaseModelError: the base is missing or not the one that the job names.
        StorageError: not even the results can be written.
    """
    due = []
    for customer in job.customers:
        if is_whole(Path(customer.evaluation_dir), EVALUATION_FILES):
            write_result(job, customer, "eval", time.monotonic())
        else:
            # A result of an earlier attempt must not be taken for this one's if this one is killed.
            result_path(job, customer.key, "eval").unlink(missing_ok=True)
            due.append(customer)
    if not due:
        return
    candidates: list[_Candidate] = []
    unusable: list[tuple[JobCustomer, Exception]] = []
    for customer in due:
        try:
            candidates.append(_open(customer, job.base))
        except Exception as found:
            unusable.append((customer, found))
    with Progress("evaluate", sum(candidate.rows for candidate in candidates), "rows") as progress:
        for customer, error in unusable:
            _fail(job, customer, error, progress)
        if not candidates:
            return
        engine = load_engine(job.base)
        store_answers = bool(os.environ.get("MLFLOW_TRACKING_URI"))
        for batch in _batches(candidates):
            for candidate, base, ours in _generate(job, engine, batch, progress):
                with _own_failure(job, candidate.customer, progress):
                    metrics = _finish(candidate, base, ours)
                    if store_answers and candidate.prefix["run_id"] is not None:
                        store_answers = _logged(candidate, metrics, progress)
                    write_result(job, candidate.customer, "eval", time.monotonic() - candidate.seconds)


@contextlib.contextmanager
def _own_failure(job: Job, customer: JobCustomer, progress: Progress) -> Iterator[None]:
    """Whatever fails within becomes the customer's result, and the others go on."""
    try:
        yield
    except Exception as error:
        _fail(job, customer, error, progress)


def _fail(job: Job, customer: JobCustomer, error: Exception, progress: Progress) -> None:
    if not isinstance(error, PrefixFleetError):
        traceback.print_exception(error)  # a bug, or a library's error that nobody foresaw: the log must show where
    reason = _in_words(error)
    write_result(job, customer, "eval", time.monotonic(), reason)
    progress.message(str(customer.key), "failed", reason)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, PrefixFleetError) else f"{type(error).__name__}: {error}"


def _open(customer: JobCustomer, base: JobBase) -> _Candidate:
    """Read and check everything that the evaluation of one customer needs, so that nothing is generated in vain."""
    started = time.monotonic()
    prefix = read_json(Path(customer.prefix_dir) / "prefix.json", FORMAT)
    if prefix["digest"] != customer.train_digest:
        raise EvaluationError(
            f"{customer.prefix_dir}: holds another prefix than the job names. Delete the folder and train again."
        )
    card = read_card(Path(customer.prepared))
    if card["fingerprint"] != customer.data_fingerprint:
        raise EvaluationError(
            f"{customer.prepared}: was prepared anew since the job was written. Run the fleet again: it writes a new job."
        )
    records = read_split(Path(customer.prepared), "test")
    if not records:
        raise EvaluationError(
            f"{customer.prepared}: the test split is empty. Give the customer a `test` file, or more rows to split from."
        )
    settings = customer.evaluation
    base_digest = digest_of(
        [
            base.digest,
            base.dtype,
            base.quantization,
            settings.num_beams,
            settings.max_new_tokens,
            card["tokenizer_digest"],
            [record.prompt_ids for record in records],
        ]
    )
    return _Candidate(
        customer,
        prefix,
        records,
        base_digest,
        _earlier_base_outputs(customer, base_digest, len(records)),
        time.monotonic() - started,
    )


def _earlier_base_outputs(customer: JobCustomer, base_digest: str, records: int) -> list[str] | None:
    """The base's outputs from an earlier evaluation of this customer, if it was the same base, test split and settings."""
    folder = Path(customer.evaluation_dir).parent
    for earlier in sorted(folder.glob("[0-9a-f]*/metrics.json")):
        try:
            if read_json(earlier, FORMAT).get("base_generation_digest") != base_digest:
                continue
            lines = (earlier.parent / "generations.jsonl").read_text(encoding="utf-8").split("\n")
            outputs = [json.loads(line)["base"] for line in lines if line]
        except (PrefixFleetError, OSError, ValueError, KeyError):
            continue  # only a saving: a damaged earlier evaluation means generating again
        if len(outputs) == records:
            return outputs
    return None


def _batches(candidates: Sequence[_Candidate]) -> Iterator[list[_Candidate]]:
    """Candidates that can be generated for in one call of the engine, for they share its settings."""

    def settings(candidate: _Candidate) -> tuple[int, int]:
        return candidate.customer.evaluation.max_new_tokens, candidate.customer.evaluation.num_beams

    for _, alike in groupby(sorted(candidates, key=settings), key=settings):
        batch: list[_Candidate] = []
        for candidate in alike:
            if batch and sum(c.rows for c in [*batch, candidate]) > _ROWS_PER_CALL:
                yield batch
                batch = []
            batch.append(candidate)
        yield batch


def _generate(job: Job, engine: Engine, batch: Sequence[_Candidate], progress: Progress) -> Iterator[_Generated]:
    """The outputs for all of `batch` that can be generated for."""
    ready: list[tuple[_Candidate, int]] = []
    for candidate in batch:
        with _own_failure(job, candidate.customer, progress):
            ready.append((candidate, engine.add(Path(candidate.customer.prefix_dir))))
    if len(ready) > 1:
        before = progress.done
        try:
            together = _generate_together(engine, ready, progress)
        except Exception as error:
            # Somebody's rows cannot be generated for. Alone, each customer's failure is its own.
            progress.message(
                "all", "warning", f"generating for {len(ready)} customers at once failed, trying each alone: {_in_words(error)}"
            )
            progress.update(before - progress.done)
        else:
            yield from together
            return
    for candidate, slot in ready:
        alone: list[_Generated] = []
        with _own_failure(job, candidate.customer, progress):
            alone = _generate_together(engine, [(candidate, slot)], progress)
        yield from alone


def _generate_together(engine: Engine, ready: Sequence[tuple[_Candidate, int]], progress: Progress) -> list[_Generated]:
    """One call of the engine for the test records of all candidates, with their prefixes and, where it is not known, without."""
    started = time.monotonic()
    prompts: list[list[int]] = []
    slots: list[int] = []
    for candidate, slot in ready:
        own = [record.prompt_ids for record in candidate.records]
        for of_rows in [slot] if candidate.base_outputs is not None else [slot, _NO_PREFIX]:
            prompts += own
            slots += [of_rows] * len(own)
    settings = ready[0][0].customer.evaluation
    texts = iter(
        engine.generate(
            prompts, slots, max_new_tokens=settings.max_new_tokens, num_beams=settings.num_beams, progress=progress.update
        )
    )
    seconds = time.monotonic() - started
    generated = []
    for candidate, _ in ready:
        candidate.seconds += seconds * candidate.rows / len(prompts)
        ours = list(islice(texts, len(candidate.records)))
        base = candidate.base_outputs if candidate.base_outputs is not None else list(islice(texts, len(candidate.records)))
        generated.append((candidate, base, ours))
    return generated


def _finish(candidate: _Candidate, base: list[str], ours: list[str]) -> dict[str, Any]:
    """Score, decide and write the evaluation folder. Returns the content of metrics.json."""
    started = time.monotonic()
    customer, settings = candidate.customer, candidate.customer.evaluation
    scores = score_systems(
        {"base": base, "prefix": ours},
        [record.references for record in candidate.records],
        settings.metrics,
        resamples=settings.bootstrap_resamples,
    )
    outcome = decide(scores.systems, settings.gate)
    generations = [
        {"input": record.input, "references": record.references, "base": without, "prefix": own, "fields": record.fields}
        for record, without, own in zip(candidate.records, base, ours, strict=True)
    ]
    metrics = {
        "format": FORMAT,
        "customer": customer.customer,
        "task": customer.task,
        "digest": customer.evaluate_digest,
        "prefix_digest": customer.train_digest,
        "base_generation_digest": candidate.base_digest,
        "records": len(candidate.records),
        "settings": {
            "num_beams": settings.num_beams,
            "max_new_tokens": settings.max_new_tokens,
            "bootstrap_resamples": settings.bootstrap_resamples,
            "seed": SEED,
        },
        "signatures": scores.signatures,
        "notes": scores.notes,
        "scores": {
            system: {name: dataclasses.asdict(score) for name, score in own.items()} for system, own in scores.systems.items()
        },
        "seconds": round(candidate.seconds + time.monotonic() - started, 3),
    }
    # A gate on a metric that cannot judge these texts is worth a word where the decision is read.
    remarks = [scores.notes[settings.gate.metric]] if settings.gate.metric in scores.notes else []
    decision = {
        "format": FORMAT,
        "decision": outcome.decision,
        "reasons": outcome.reasons + remarks,
        "gate": dataclasses.asdict(settings.gate),
    }
    with whole_folder(Path(customer.evaluation_dir)) as folder:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in generations)
        (folder / "generations.jsonl").write_text(lines, encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "decision.json", decision)
        (folder / "report.html").write_text(customer_report(candidate.prefix, metrics, decision, generations), encoding="utf-8")
    candidate.seconds += time.monotonic() - started
    return metrics


def _logged(candidate: _Candidate, metrics: dict[str, Any], progress: Progress) -> bool:
    """Log to MLflow if that can be done; False if the store does not answer, so that the next customers need not wait for it."""
    try:
        log_evaluation(candidate.prefix["run_id"], metrics, Path(candidate.customer.evaluation_dir))
    except EvaluationError as error:
        progress.message(str(candidate.customer.key), "warning", str(error))
    except Exception as error:  # MLflow's own, SQLAlchemy's or an artifact store's; the evaluation is on disk and stands
        progress.message(
            str(candidate.customer.key), "warning", f"{_in_words(error)} No more evaluations of this job are logged there."
        )
        return False
    return True
