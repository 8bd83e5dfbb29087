"""Take docs/stack-mlflow.png and docs/stack-prefect.png: the user interfaces of a stack after a fleet has run on it.

    docker/stack-local.sh start
    eval "$(docker/stack-local.sh env)"
    prefixfleet deploy examples/fleet.yaml && prefect deployment run fleet/fleet --watch
    python docs/make_stack_pictures.py

Needs a headless Chromium (`apt-get install chromium`)."""

import base64
import json
import os
import urllib.request
from pathlib import Path

from browser import MLFLOW_ASSISTANT, Page, take
from PIL import Image

HERE = Path(__file__).parent


def main() -> None:
    """Both pictures, each with few colours."""
    mlflow, prefect = os.environ["MLFLOW_TRACKING_URI"], os.environ["PREFECT_API_URL"].removesuffix("/api")
    admin = f"{os.environ['MLFLOW_TRACKING_USERNAME']}:{os.environ['MLFLOW_TRACKING_PASSWORD']}"
    # The newest run that came to its end.
    request = urllib.request.Request(
        f"{prefect}/api/flow_runs/filter",
        data=json.dumps(
            {"sort": "END_TIME_DESC", "limit": 1, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        ).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(os.environ['PREFECT_API_AUTH_STRING'].encode()).decode()}",
        },
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        run = json.load(answer)[0]["id"]
    pages = {
        HERE / "stack-mlflow.png": Page(f"{mlflow}/#/models", 1300, 560, MLFLOW_ASSISTANT, admin),
        HERE / "stack-prefect.png": Page(
            f"{prefect}/runs/flow-run/{run}", 1300, 900, password=os.environ["PREFECT_API_AUTH_STRING"]
        ),
    }
    take(pages)
    for file in pages:
        Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
