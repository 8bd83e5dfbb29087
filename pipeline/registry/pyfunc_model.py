"""The code of every registered version: MLflow runs this file (models from code, nothing pickled) to make a model of a prefix.

`mlflow.pyfunc.load_model("models:/prefixfleet.acme@champion").predict(pandas.DataFrame({"input": […]}))` gives one text for each
input. The base is found by `PREFIXFLEET_BASE`, else where it was at training, and loaded once for all prefixes of a process.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas  # type: ignore[import-untyped]  # pandas ships no types
from mlflow.pyfunc import PythonModel, PythonModelContext


class PrefixModel(PythonModel):
    """One customer's prefix before the shared base."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base, if no prefix before did, and add the prefix.

        Raises:
            BaseModelError: the base is not found, or not the one that the prefix was trained on.
            RegistryError: the prefix is not the one that was registered.
        """
        # Imported here, for MLflow also runs this file when a prefix is registered, where no torch is needed.
        from pipeline.registry.base_lookup import open_prefix
        from pipeline.registry.loaded import check_loaded

        folder = Path(context.artifacts["prefix"])
        check_loaded(folder, context.model_config)
        self._answer = open_prefix(folder)

    # MLflow reads the type of `model_input`: for any other than a DataFrame it warns, or checks inputs by it and not the signature.
    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One text for each row of the column `input`. A plain list of texts will not do: MLflow checks inputs by the signature."""
        return self._answer([str(text) for text in model_input["input"]])


mlflow.models.set_model(PrefixModel())
