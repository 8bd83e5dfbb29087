"""When what runs: Prefect flows and tasks over the stages of `pipeline`, and the command `prefixfleet`. Imports no torch."""

import os

# Nobody is told that this runs, unless the user wants it so. Read by these libraries when they are imported, so it must be here, before Prefect is.
os.environ.setdefault("DO_NOT_TRACK", "true")  # the word: MLflow does not know 1
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
