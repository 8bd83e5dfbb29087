"""The files of a version: a folder in MLflow's pyfunc format with the code that answers, the prefix, and the report. Nothing is pickled.

In: a prefix folder, perhaps an evaluation folder. Out: a folder to upload. Knows nothing of versions, tags and aliases.
"""

import contextlib
import functools
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import __version__
from pipeline.registry.loaded import CONTENT_DIGEST
from pipeline.registry.store import quiet
from pipeline.registry.versions import PREFIX_FILES, content_digest

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

EVALUATION_FILES = ("report.html", "metrics.json", "decision.json")
GENERATIONS = "generations.jsonl"
# Where they lie in a version.
PREFIX_PATH, EVALUATION_PATH = "artifacts/prefix", "artifacts/evaluation"
# What decides the answer of a prefix, pinned for whoever builds an environment from the model.
_REQUIREMENTS = ("torch", "transformers", "tokenizers", "safetensors", "mlflow", "pandas")


def build(folder: Path, prefix_dir: Path, evaluation_dir: Path | None, run_id: str, model: "LoggedModel") -> None:
    """Make the folder of a version.

    `mlflow.pyfunc.log_model` would run the model on the input example, which means loading the base; so the folder is made and uploaded apart.

    Args:
        folder: is made; its parent must be there.
        prefix_dir: the prefix folder.
        evaluation_dir: the folder of its evaluation, if there is one.
        run_id, model: MLflow's run and record that the files will belong to.
    """
    import mlflow.pyfunc
    import pandas  # type: ignore[import-untyped]  # pandas ships no types
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    staged = folder.parent / "prefix"
    staged.mkdir()
    for name in PREFIX_FILES:
        shutil.copyfile(prefix_dir / name, staged / name)
    artifacts = {"prefix": str(staged)}
    if evaluation_dir is not None:
        artifacts["evaluation"] = str(stage_evaluation(evaluation_dir, folder.parent))
    with quiet():
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts=artifacts,
            pip_requirements=_requirements(),
            signature=ModelSignature(inputs=Schema([ColSpec("string", "input")]), outputs=Schema([ColSpec("string")])),
            model_config={CONTENT_DIGEST: content_digest(staged)},
            input_example=pandas.DataFrame({"input": [_example(evaluation_dir)]}),
            mlflow_model=Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id),
        )


def stage_evaluation(evaluation_dir: Path, parent: Path) -> Path:
    """Copy the part of the evaluation that goes with the version. The generations stay here: the report shows some of them."""
    staged = parent / "evaluation"
    staged.mkdir()
    for name in EVALUATION_FILES:
        shutil.copyfile(evaluation_dir / name, staged / name)
    return staged


@contextlib.contextmanager
def staging(place: Path) -> Iterator[Path]:
    """Yield an empty folder to build in, removed afterwards, and by the next call if this process is killed. Nobody else may be in `place`.

    Below PREFIXFLEET_HOME, not in the system's temporary folder: what lies in it is a customer's.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@functools.cache  # reading what is installed takes as long as writing the rest of the folder
def _requirements() -> list[str]:
    # A local version such as 2.13.0+cpu is on no index.
    pinned = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]
    return [f"prefixfleet=={__version__}", *pinned]


def _example(evaluation_dir: Path | None) -> str:
    """The first input of the test set."""
    if evaluation_dir is None:
        return ""
    with (evaluation_dir / GENERATIONS).open(encoding="utf-8") as file:
        first = file.readline()
    return str(json.loads(first)["input"]) if first.strip() else ""
