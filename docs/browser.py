"""Pictures of pages for the docs, by a headless Chromium that is told what to do through its debugging protocol. Used by make_*_picture.py."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from pipeline.errors import PrefixFleetError

MLFLOW_ASSISTANT = 452  # on the right a fresh browser has MLflow's assistant open, so wide, which is cut off
QUIET_SECONDS = 4.0  # without a request, after which a page is taken to be complete
SECONDS = 90.0


@dataclass(frozen=True)
class Page:
    """A page to take a picture of: its address, the picture's size in pixels, how much more there is on the right, and `user:password`."""

    url: str
    width: int
    height: int
    cut: int = 0
    password: str | None = None


async def _photograph(page: ClientConnection, wanted: Page, path: Path) -> None:
    """Open a page and take a picture of it once it asks for nothing more."""
    number, last = 0, time.monotonic()

    async def tell(method: str, **parameters: Any) -> Any:
        nonlocal number, last
        number += 1
        await page.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(await asyncio.wait_for(page.recv(), SECONDS))
            if answer.get("id") == number:
                return answer.get("result", {})
            if answer.get("method", "").startswith("Network."):
                last = time.monotonic()

    await tell("Network.enable")
    await tell("Page.enable")
    await tell(
        "Emulation.setDeviceMetricsOverride",
        width=wanted.width + wanted.cut,
        height=wanted.height,
        deviceScaleFactor=1,
        mobile=False,
    )
    if wanted.password is not None:
        authorization = base64.b64encode(wanted.password.encode()).decode()
        await tell("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {authorization}"})
        # Where Prefect's page keeps what was typed into its form.
        remember = f"try {{ localStorage.setItem('prefect-password', '{authorization}') }} catch {{}}"
        await tell("Page.addScriptToEvaluateOnNewDocument", source=remember)
    await tell("Page.navigate", url=wanted.url)

    async def settle(quiet: float) -> None:
        nonlocal last
        begun = last = time.monotonic()
        while time.monotonic() - last < quiet and time.monotonic() - begun < SECONDS:
            await asyncio.sleep(0.3)
            await tell("Runtime.evaluate", expression="1")

    await settle(QUIET_SECONDS)
    # Away with what greets whoever comes for the first time.
    for kind in ("keyDown", "keyUp"):
        await tell("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
    await settle(1.0)
    shot = await tell(
        "Page.captureScreenshot", format="png", clip={"x": 0, "y": 0, "width": wanted.width, "height": wanted.height, "scale": 1}
    )
    path.write_bytes(base64.b64decode(shot["data"]))


def browser() -> str:
    """The program.

    Raises:
        PrefixFleetError: there is none.
    """
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        raise PrefixFleetError("no Chromium was found. Install one, such as with `apt-get install chromium`.")
    return found


async def _take(pages: dict[Path, Page]) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
        ]
        where = [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        child = subprocess.Popen([browser(), *options, *where], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            note, deadline = Path(profile) / "DevToolsActivePort", time.monotonic() + SECONDS
            while not note.exists() or not note.read_text().strip():
                if child.poll() is not None or time.monotonic() > deadline:
                    raise PrefixFleetError("Chromium did not start.")
                await asyncio.sleep(0.2)
            port = note.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                address = next(one["webSocketDebuggerUrl"] for one in json.load(answer) if one["type"] == "page")
            for file, wanted in pages.items():
                async with connect(address, max_size=None) as page:
                    await _photograph(page, wanted, file)
        finally:
            child.terminate()
            child.wait(20)


def take(pages: dict[Path, Page]) -> None:
    """Take a picture of each page into its file, as PNG.

    Raises:
        PrefixFleetError: there is no Chromium, or it does not start.
    """
    asyncio.run(_take(pages))
