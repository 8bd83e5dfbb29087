"""The Prefect server that the environment names, or what stands in its place."""

import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from flows import prefect_api
from pipeline.errors import ConfigError
from pipeline.home import Home


class Answering:
    """A server on this machine: `replies` are status, content type and body by path; `seen` the headers it got."""

    def __init__(self) -> None:
        self.replies: dict[str, tuple[int, str, bytes]] = {}
        self.seen: list[dict[str, str]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.seen.append(dict(self.headers))
                status, kind, body = owner.replies.get(self.path, (404, "text/html", b"nothing here"))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def answering() -> Iterator[Answering]:
    answering = Answering()
    yield answering
    answering.server.shutdown()
    answering.server.server_close()


def test_user_and_password_are_sent_to_the_server_and_shown_to_nobody(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://ann:p%40ss@{answering.place}/api")
    answering.replies["/api/health"] = (200, "application/json", b"true")
    prefect_api.check_server()
    assert answering.seen[0]["Authorization"] == "Basic " + base64.b64encode(b"ann:p@ss").decode()
    answering.replies.clear()
    with pytest.raises(ConfigError) as caught:
        prefect_api.check_server()
    assert f"PREFECT_API_URL=http://{answering.place}/api: " in str(caught.value)
    assert "ann" not in str(caught.value) and "p%40ss" not in str(caught.value) and "p@ss" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((404, "text/html", b"no such page"), "ends in /api"),
        ((200, "text/html; charset=utf-8", b"<p>welcome</p>"), "what answers is no Prefect server"),
    ],
    ids=["not found", "a page"],
)
def test_server_that_is_not_prefect_is_named_at_once(
    answering: Answering, reply: tuple[int, str, bytes], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://{answering.place}/")
    answering.replies["/health"] = reply
    started = time.monotonic()
    with pytest.raises(ConfigError, match=said):
        prefect_api.check_server()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://127.0.0.1:port/api", "http://ho st/api"])
def test_address_that_is_none_is_a_message(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(ConfigError, match="no Prefect server answers"):
        prefect_api.check_server()


def test_server_that_prefect_itself_cannot_use_is_a_message_without_password(
    answering: Answering, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://ann:secret@{answering.place}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    answering.replies["/api/health"] = (200, "application/json", b"true")
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(ConfigError, match="no Prefect server answers") as caught,
        prefect_api.prefect_api(home),
    ):
        flow(lambda: None, name="nothing")()
    assert "secret" not in str(caught.value)
