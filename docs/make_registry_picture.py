"""Take docs/registry.png: a customer's model and one of its versions, as MLflow's own user interface shows them.

    PREFIXFLEET_HOME=.prefixfleet python docs/make_registry_picture.py --customer bistro --version 2

Needs a headless Chromium (`apt-get install chromium`); shows the store that the environment names, through a server of its own if that is SQLite.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from browser import MLFLOW_ASSISTANT, Page, take
from PIL import Image

from pipeline.errors import PrefixFleetError
from pipeline.keys import CustomerKey
from pipeline.registry import ensure_store

WIDTH = 1300
HEIGHTS = (1700, 1000)
_SECONDS = 120.0


def wait_for(url: str) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PrefixFleetError(f"{url} does not answer within {_SECONDS:.0f} s ({error}).") from error
            time.sleep(0.2)


def main() -> None:
    """Start a server if need be, take the pictures, put one below the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customer", required=True)
    parser.add_argument("--version", type=int, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("registry.png"))
    arguments = parser.parse_args()
    name = CustomerKey.parse(arguments.customer).model_name
    ensure_store()
    url, server = os.environ["MLFLOW_TRACKING_URI"], None
    if not url.startswith("http"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--backend-store-uri", url]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url)
        with tempfile.TemporaryDirectory() as folder:
            pages = [f"/#/models/{name}", f"/#/models/{name}/versions/{arguments.version}"]
            whole, top = Image.new("RGB", (WIDTH, sum(HEIGHTS)), "white"), 0
            files = {
                Path(folder) / f"{i}.png": Page(url + page, WIDTH, height, MLFLOW_ASSISTANT)
                for i, (page, height) in enumerate(zip(pages, HEIGHTS, strict=True))
            }
            take(files)
            for file, page in files.items():
                whole.paste(Image.open(file).convert("RGB"), (0, top))
                top += page.height
            whole.quantize(64).save(arguments.out, optimize=True)
    finally:
        if server is not None:
            os.killpg(server.pid, 15)
            server.wait(20)


if __name__ == "__main__":
    main()
