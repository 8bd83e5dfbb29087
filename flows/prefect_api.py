"""Where the Prefect API is: the server that `PREFECT_API_URL` names, or one of our own for the length of a run.

In: the environment and the home folder. Out: an API that answers, or an error that names it. Everything that must be set before Prefect is
imported is set here; call `set_environment` before importing `prefect`.
"""

import base64
import contextlib
import fcntl
import http.client
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import ConfigError, PrefixFleetError
from pipeline.home import Home

_ANSWER_SECONDS = 5.0
# A server answers with so many at most, unless it is set otherwise.
_PAGE = 200


def set_environment(home: Home, verbose: bool = False) -> None:
    """Set what Prefect reads when it is imported, where the user has not set it: our own database, a quiet terminal.

    `flows/__init__.py` has turned telemetry off.
    """
    # The default of 20 s is too short for the first start, which makes the database.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
    if not verbose:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        # MLflow's advice to programmers, in colour.
        warnings.filterwarnings("ignore", module="mlflow")
    # The run's log gets everything. The terminal gets our own words: what fails is in the table, with its reason.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if verbose else "CRITICAL")
    if not verbose:
        # Of a server that is away Prefect (3.8.8) writes to the terminal every event that it could not send, in full.
        os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    if not os.environ.get("PREFECT_API_URL"):
        os.environ.pop("PREFECT_API_URL", None)
        os.environ["PREFECT_HOME"] = str(home.prefect)
        # An API of our own needs no user interface, no schedules and no warnings that there are none.
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")


def check_server() -> None:
    """See that the server of `PREFECT_API_URL` answers.

    Raises:
        ConfigError: it does not.
    """
    url, headers = _address()
    try:
        request = urllib.request.Request(f"{url}/health", headers=headers)
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            if "json" in answer.headers.get("Content-Type", ""):
                return
        raise _no_server(url, "what answers is no Prefect server")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise _no_server(url, "nothing is known at /health there; the address of a Prefect API ends in /api") from error
        return  # something answers; whether it lets us in is Prefect's to say
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _no_server(url, getattr(error, "reason", error)) from error


def _no_server(url: str, reason: object) -> ConfigError:
    return ConfigError(
        f"PREFECT_API_URL={url}: no Prefect server answers ({reason}). Start it (`prefect server start`), correct the address, "
        "or unset PREFECT_API_URL to run without a server."
    )


def _address() -> tuple[str, dict[str, str]]:
    """`PREFECT_API_URL` without user and password, which nobody is to read in a message, and the header that says them to the server."""
    whole = os.environ["PREFECT_API_URL"].rstrip("/")
    scheme, separator, rest = whole.partition("://")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    if not at:
        return whole, {}
    secret = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return f"{scheme}{separator}{host}{slash}{path}", {"Authorization": f"Basic {secret}"}


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what Prefect raises for a server that does not serve it into a `ConfigError`."""
    try:
        yield
    except Exception as error:
        from prefect.exceptions import PrefectHTTPStatusError

        # Prefect 3.8.8 has no class of its own for the first of these.
        if "Failed to reach API" not in str(error) and not isinstance(error, PrefectHTTPStatusError):
            raise
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise _no_server(_address()[0], re.sub(r"://[^/@\s]*@", "://", reason)) from error


@contextlib.contextmanager
def prefect_api(home: Home) -> Iterator[None]:
    """Have a Prefect API meanwhile. Our own is stopped at the end, and ends by itself should this process be killed.

    Raises:
        ConfigError: the server that the environment names does not answer.
        PrefixFleetError: our own did not start.
    """
    if os.environ.get("PREFECT_API_URL"):
        check_server()
        with _translated():
            yield
        return
    # Prefect takes a second to import, and reads its settings then.
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    home.prefect.mkdir(parents=True, exist_ok=True)
    server = _own_server()
    try:
        # Processes that make a fresh database at the same time hinder one another.
        with (home.prefect / "start.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            server.start()
    except RuntimeError as error:
        server.stop()
        raise PrefixFleetError(
            f"Prefect's in-process API did not start ({error}). If {home.prefect} is damaged, delete it."
        ) from error
    try:
        # Nobody watches heartbeats here, and joining their thread costs every flow a second (Prefect 3.8.8).
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        _send_what_is_left()
        server.stop()


def pages(read: Callable[..., list[Any]], **arguments: Any) -> list[Any]:
    """All that a query of Prefect's client finds. Read whole before anything is deleted, which would move the pages."""
    found: list[Any] = []
    while True:
        page = read(limit=_PAGE, offset=len(found), **arguments)
        found += page
        if len(page) < _PAGE:
            return found


def _send_what_is_left() -> None:
    """Wait until log lines and events of the run have arrived: Prefect itself sends the last of them when the interpreter exits."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=3)


def _own_server() -> Any:
    """Prefect's own ephemeral server, its process started so that it outlives Ctrl-C (we still report the run's end to it) but not us."""
    import prefect
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    class Server(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
            app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
            # Our own clients' open connections are no reason to wait at the end.
            where = [
                "--timeout-graceful-shutdown",
                "1",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--log-level",
                "critical",
                "--lifespan",
                "on",
            ]
            env = {
                **os.environ,
                # As Prefect's own method of this name sets them: no UI, only the services that a run needs.
                "PREFECT_UI_ENABLED": "0",
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
                **get_current_settings().to_environment_variables(exclude_unset=True),
                "PREFIXFLEET_EXIT_WITH_PARENT": "1",
            }
            return subprocess.Popen(
                [sys.executable, "-m", "flows.api_server", *app, *where], env=env, stdin=subprocess.PIPE, start_new_session=True
            )

    # The instances are kept by port in one dictionary of the base class: Prefect's client finds this one there and starts none of its own.
    return Server()
