"""Register a trained and judged prefix as a version of its customer's MLflow model.

In: a prefix folder and the folder of its evaluation. Out: a version with prefix, report, scores and lineage, and the alias
`champion` if the evaluation says promote. The same prefix is registered once, however often and from however many processes:
versions are found by the tag `prefixfleet.fingerprint`, under a lock for each customer. Order makes it safe to die anywhere:
everything is uploaded first, then the version appears with all its tags at once, then the alias moves; the next run goes on with
what it finds.
"""

import contextlib
import importlib.metadata
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import __version__
from pipeline.errors import RegistryError
from pipeline.files import digest_of, file_digest, read_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry.store import connect, ensure_store, experiment_id, lock, quiet, translated

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

CHAMPION = "champion"
TAG = "prefixfleet."
PREFIX_FILES = ("prefix.json", "prefix.safetensors")
_EVALUATION_FILES = ("report.html", "metrics.json", "decision.json")
_GENERATIONS = "generations.jsonl"
# MLflow takes 8,000 characters in a run's tag and more in a version's; nobody reads that many.
_MAX_TAG = 2000
# What decides the answer of a prefix, pinned for whoever builds an environment from the model.
_REQUIREMENTS = ("torch", "transformers", "tokenizers", "safetensors", "mlflow", "pandas")


@dataclass(frozen=True)
class Registration:
    """What became of a prefix.

    Attributes:
        name: the MLflow registered model.
        alias: `champion` if this version holds it now.
        created: False if the version was there already.
        run_id: the MLflow run that carries its training and scores.
    """

    name: str
    version: int
    alias: Literal["champion"] | None
    created: bool
    run_id: str | None


@dataclass(frozen=True)
class _Candidate:
    """A prefix and its evaluation, read and found to belong together; an imported prefix has no evaluation."""

    key: CustomerKey
    prefix_dir: Path
    evaluation_dir: Path | None
    prefix: dict[str, Any]
    metrics: dict[str, Any]
    decision: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.prefix["digest"])


def register(prefix_dir: Path, evaluation_dir: Path) -> Registration:
    """Register a prefix with its evaluation; give it the alias `champion`, or take it away, as the evaluation decided.

    A rejected prefix is registered too, so that it can be looked at, but never takes the alias from the champion of before.

    Raises:
        StorageError: a file is damaged, or prefix.json is missing.
        RegistryError: a file of the evaluation is missing, prefix and evaluation do not belong together, the weights are not those
            that were trained, or MLflow failed.
    """
    candidate = _read(Path(prefix_dir), Path(evaluation_dir))
    home = Home.current()
    ensure_store(home)
    name = candidate.key.model_name
    with lock(home, name), translated(f"registering customer {candidate.key}"):
        client = connect()
        version = find_version(client, name, candidate.fingerprint)
        created = version is None
        if version is None:
            version = _create(client, candidate, experiment_id(home=home))
        else:
            _update(client, candidate, version)
        run_id = client.get_model_version(name, str(version)).run_id or None
        alias = _move_alias(client, name, version, promote=candidate.decision["decision"] == "promote")
    return Registration(name=name, version=version, alias=alias, created=created, run_id=run_id)


def register_imported(prefix_dir: Path, source: str, *, champion: bool) -> Registration:
    """Register a prefix that was made elsewhere and judged by nobody here.

    Args:
        prefix_dir: the prefix folder.
        source: where it came from, for the tag that says why it is there.
        champion: whether it becomes champion, which nothing but the caller's word supports; otherwise no alias moves.

    Raises:
        StorageError, RegistryError: see `register`.
    """
    prefix = read_json(prefix_dir / "prefix.json", format=1)
    nothing: dict[str, Any] = {"prefix": {}, "base": {}}
    candidate = _Candidate(
        CustomerKey(prefix["customer"], prefix["task"]),
        prefix_dir,
        None,
        prefix,
        {"digest": "", "scores": nothing},
        {"decision": "imported", "reasons": [f"imported from {source}; not evaluated"]},
    )
    home = Home.current()
    ensure_store(home)
    name = candidate.key.model_name
    with lock(home, name), translated(f"registering customer {candidate.key}"):
        client = connect()
        version = find_version(client, name, candidate.fingerprint)
        created = version is None
        if version is None:
            version = _create(client, candidate, experiment_id(home=home))
        run_id = client.get_model_version(name, str(version)).run_id or None
        alias = _move_alias(client, name, version, promote=True) if champion else None
    return Registration(name=name, version=version, alias=alias, created=created, run_id=run_id)


def find(key: CustomerKey, fingerprint: str) -> int | None:
    """The version that holds the prefix with this fingerprint (its training digest), or None."""
    ensure_store()
    with translated(f"looking for a version of customer {key}"):
        return find_version(connect(), key.model_name, fingerprint)


def find_version(client: "MlflowClient", name: str, fingerprint: str) -> int | None:
    """As `find`, for a registered model's name."""
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise RegistryError(f"{name}: {fingerprint[:80]!r} is no fingerprint (64 hex digits). Train the prefix again.")
    found = client.search_model_versions(f"name = '{name}' and tags.`{TAG}fingerprint` = '{fingerprint}'")
    return max((int(version.version) for version in found), default=None)


def content_digest(folder: Path) -> str:
    """SHA-256 over the digests of the files of a prefix folder: what a downloaded copy must have."""
    return digest_of({name: file_digest(folder / name) for name in PREFIX_FILES})


def _read(prefix_dir: Path, evaluation_dir: Path) -> _Candidate:
    prefix = read_json(prefix_dir / "prefix.json", format=1)
    for name in (*_EVALUATION_FILES, _GENERATIONS):
        if not (evaluation_dir / name).is_file():
            raise RegistryError(
                f"{evaluation_dir / name}: is missing. Delete {evaluation_dir} and run the same command again: the prefix is evaluated anew."
            )
    metrics = read_json(evaluation_dir / "metrics.json", format=1)
    decision = read_json(evaluation_dir / "decision.json", format=1)
    key = CustomerKey(prefix["customer"], prefix["task"])
    judged = (metrics["customer"], metrics["task"], metrics["prefix_digest"])
    if judged != (key.customer, key.task, prefix["digest"]):
        raise RegistryError(
            f"{evaluation_dir}: is the evaluation of {judged[0]}/{judged[1]} {str(judged[2])[:16]}, not of "
            f"{key.customer}/{key.task} {prefix['digest'][:16]} in {prefix_dir}. Evaluate this prefix first."
        )
    weights = prefix_dir / "prefix.safetensors"
    if not weights.exists() or file_digest(weights) != prefix["weights_sha256"]:
        raise RegistryError(f"{weights}: is missing or not what was trained for {key}. Delete {prefix_dir} and train again.")
    if decision["decision"] not in ("promote", "keep", "reject"):
        raise RegistryError(
            f"{evaluation_dir}: its decision is {decision['decision']!r}, not promote, keep or reject. Evaluate again."
        )
    return _Candidate(key, prefix_dir, evaluation_dir, prefix, metrics, decision)


def _create(client: "MlflowClient", candidate: _Candidate, experiment: str) -> int:
    """Upload, then let the version appear with all its tags. Returns its number."""
    from mlflow.exceptions import MlflowException

    name, tags = candidate.key.model_name, _tags(candidate)
    run_id, own_run = _run(client, candidate, experiment)
    model = _logged_model(client, candidate, run_id)
    with _model_folder(candidate, run_id, model) as folder:
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    _log_scores(client, candidate, run_id, model.model_id)
    if own_run:
        client.set_terminated(run_id)
    try:
        client.create_registered_model(name, tags={f"{TAG}customer": candidate.key.customer, f"{TAG}task": candidate.key.task})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # `models:/ID` is resolved where the registry runs (MLflow 3.17), and a registry server of its own does not know the tracking
    # server's models.
    one_server = client.tracking_uri == client._registry_uri
    source = f"models:/{model.model_id}" if one_server else model.artifact_location
    with quiet():
        version = client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model.model_id)
    # As `mlflow.register_model` does: the model's page in MLflow's UI names its versions by this tag.
    versions = json.dumps([{"name": name, "version": int(version.version)}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": versions})
    return int(version.version)


def _update(client: "MlflowClient", candidate: _Candidate, version: int) -> None:
    """The version is there: bring report, scores and tags up to date if the prefix was judged anew since."""
    name, tags = candidate.key.model_name, _tags(candidate)
    known = client.get_model_version(name, str(version))
    changed = {tag: value for tag, value in tags.items() if known.tags.get(tag) != value}
    model = _known_model(client, candidate, known.run_id) if changed and known.run_id else None
    if model is not None and known.run_id and candidate.evaluation_dir is not None:
        with tempfile.TemporaryDirectory() as folder:
            staged = _staged_evaluation(candidate.evaluation_dir, Path(folder))
            client.log_model_artifacts(model.model_id, str(staged), "artifacts/evaluation")
        _log_scores(client, candidate, known.run_id, model.model_id)
    # The tag that says which evaluation this is comes last: a run that dies before it is repeated.
    for tag in sorted(changed, key=lambda tag: tag == f"{TAG}evaluation"):
        client.set_model_version_tag(name, str(version), tag, changed[tag])


def _move_alias(client: "MlflowClient", name: str, version: int, *, promote: bool) -> Literal["champion"] | None:
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    holds = champion is not None and int(champion) == version
    if promote and not holds:
        client.set_registered_model_alias(name, CHAMPION, str(version))
    elif not promote and holds:
        client.delete_registered_model_alias(name, CHAMPION)
    return "champion" if promote else None


def _tags(candidate: _Candidate) -> dict[str, str]:
    """The lineage of a version. Every value is data of others: text, cut to a readable length."""
    prefix, scores = candidate.prefix, candidate.metrics["scores"]
    lineage, base = prefix["lineage"], prefix["base"]
    made = prefix.get("ensemble")
    members = (
        {} if made is None else {"ensemble": f"{made['average']} of {', '.join(str(one['name']) for one in made['members'])}"}
    )
    values = {
        "customer": candidate.key.customer,
        "task": candidate.key.task,
        "fingerprint": candidate.fingerprint,
        "config_digest": lineage["config_digest"],
        "data_fingerprint": lineage["data_fingerprint"],
        "base_id": base["id"],
        "base_revision": base["revision"],
        "base_digest": base["digest"],
        "code_version": lineage["code_version"],
        "seed": lineage["seed"],
        "weights_sha256": prefix["weights_sha256"],
        "content_digest": content_digest(candidate.prefix_dir),
        "decision": candidate.decision["decision"],
        "reasons": "; ".join(str(reason) for reason in candidate.decision["reasons"]),
        "evaluation": candidate.metrics["digest"],
        **members,
        **{f"score.{metric}": f"{value['score']:.4f}" for metric, value in scores["prefix"].items()},
        **{f"base_score.{metric}": f"{value['score']:.4f}" for metric, value in scores["base"].items()},
    }
    return {TAG + name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    """`value` as text that every store takes: no NUL (PostgreSQL), no lone surrogates (all), not endless; nothing for None."""
    text = "" if value is None else str(value)
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")[:_MAX_TAG]


def _run(client: "MlflowClient", candidate: _Candidate, experiment: str) -> tuple[str, bool]:
    """The run that training logged to, or one made here if this store does not have it: its id, and whether it was made here."""
    from mlflow.exceptions import MlflowException

    trained = candidate.prefix["run_id"]
    if trained and re.fullmatch("[0-9a-f]{32}", trained):
        try:
            if client.get_run(trained).info.lifecycle_stage == "active":
                return trained, False
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    ours = client.search_runs([experiment], _is(candidate), max_results=1)
    if ours:
        return str(ours[0].info.run_id), True
    run = client.create_run(experiment, run_name=str(candidate.key), tags=_tags(candidate))
    return str(run.info.run_id), True


def _logged_model(client: "MlflowClient", candidate: _Candidate, run_id: str) -> "LoggedModel":
    """MLflow's record of the files: the one that a registration left which died before its version appeared, or a new one."""
    from mlflow.entities import LoggedModelOutput

    known = _known_model(client, candidate, run_id)
    if known is not None:
        return known
    model = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=candidate.key.model_name.replace(".", "-"),
        source_run_id=run_id,
        tags=_tags(candidate),
        params=_params(candidate),
        model_type="prefix",
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model


def _known_model(client: "MlflowClient", candidate: _Candidate, run_id: str) -> "LoggedModel | None":
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], _is(candidate))
    return next((model for model in found if model.source_run_id == run_id), None)


def _is(candidate: _Candidate) -> str:
    """What MLflow is asked to find this prefix. Two customers may hold the same one: with the same data, or the same adapter imported."""
    known = {"fingerprint": candidate.fingerprint, "customer": candidate.key.customer, "task": candidate.key.task}
    return " and ".join(f"tags.`{TAG}{name}` = '{value}'" for name, value in known.items())


def _params(candidate: _Candidate) -> dict[str, str]:
    """The settings of the training, for MLflow's tables."""
    return {
        f"{section}.{name}": _text(value)
        for section in ("prefix", "training")
        for name, value in candidate.prefix[section].items()
        if value is None or isinstance(value, str | int | float)
    }


def _log_scores(client: "MlflowClient", candidate: _Candidate, run_id: str, model_id: str) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    scores = candidate.metrics["scores"]
    values = {
        ("" if who == "prefix" else "base_") + "score." + metric + suffix: float(value[part])
        for who in ("prefix", "base")
        for metric, value in scores[who].items()
        for part, suffix in (("score", ""), ("low", ".low"), ("high", ".high"))
    }
    client.log_batch(run_id, metrics=[Metric(k, v, now, 0, model_id=model_id, run_id=run_id) for k, v in values.items()])


@contextlib.contextmanager
def _model_folder(candidate: _Candidate, run_id: str, model: "LoggedModel") -> Iterator[Path]:
    """Yield a temporary folder in MLflow's pyfunc format: code, prefix, report; nothing pickled.

    `mlflow.pyfunc.log_model` would run the model on the input example, which means loading the base; so the folder is made and
    uploaded apart.
    """
    import mlflow.pyfunc
    import pandas  # type: ignore[import-untyped]  # pandas ships no types
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "prefix"
        staged.mkdir()
        for name in PREFIX_FILES:
            shutil.copyfile(candidate.prefix_dir / name, staged / name)
        folder = Path(temporary) / "model"
        artifacts = {"prefix": str(staged)}
        if candidate.evaluation_dir is not None:
            artifacts["evaluation"] = str(_staged_evaluation(candidate.evaluation_dir, Path(temporary)))
        with quiet():
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts=artifacts,
                pip_requirements=_requirements(),
                signature=ModelSignature(inputs=Schema([ColSpec("string", "input")]), outputs=Schema([ColSpec("string")])),
                input_example=pandas.DataFrame({"input": [_example(candidate.evaluation_dir)]}),
                mlflow_model=Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id),
            )
        yield folder


def _staged_evaluation(evaluation_dir: Path, temporary: Path) -> Path:
    """The part of the evaluation that goes with the version. The generations stay here: the report shows some of them."""
    staged = temporary / "evaluation"
    staged.mkdir()
    for name in _EVALUATION_FILES:
        shutil.copyfile(evaluation_dir / name, staged / name)
    return staged


def _requirements() -> list[str]:
    # A local version such as 2.13.0+cpu is on no index.
    pinned = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]
    return [f"prefixfleet=={__version__}", *pinned]


def _example(evaluation_dir: Path | None) -> str:
    """The first input of the test set."""
    if evaluation_dir is None:
        return ""
    with (evaluation_dir / _GENERATIONS).open(encoding="utf-8") as file:
        first = file.readline()
    return str(json.loads(first)["input"]) if first.strip() else ""
