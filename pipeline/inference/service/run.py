"""The process of the service: what it listens on, and how it stops.

On SIGTERM or Ctrl-C `/readyz` says 503 and further requests are refused, while what is under way is finished; a second one ends at once.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from pipeline.errors import ConfigError, ServiceError
from pipeline.inference.service.app import Service
from pipeline.inference.service.connection import ImpatientProtocol
from pipeline.inference.service.hosts import is_loopback

log = logging.getLogger(__name__)


def check_binding(host: str, keys: int) -> None:
    """Refuse to listen to other machines as long as nobody needs a key.

    Raises:
        ConfigError: `host` is not this machine alone, and there is no key.
    """
    if not is_loopback(host) and not keys:
        raise ConfigError(
            f"--host {host}: other machines could ask for every customer, for there is no API key. Make one with `prefixfleet keys create`, or "
            "listen on 127.0.0.1."
        )


class Server(uvicorn.Server):
    """uvicorn that finishes what is under way before it closes its door.

    Args:
        config: of uvicorn.
        service: what it serves.
        grace_seconds: to finish what is under way.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace_seconds: float) -> None:
        super().__init__(config)
        self.service, self.grace_seconds = service, grace_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Asked to stop: at the second time, or before it has begun, at once."""
        if self.service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._hang_up)
            return
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Take no more requests, and stop when those under way are through."""
        self.service.draining = True
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        log.info("stopping: %d answers are under way", self.service.answers)
        end = asyncio.get_running_loop().time() + self.grace_seconds
        while not self.service.idle and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        if not self.service.idle:
            log.warning(
                "stopping: %d answers are not through after %g s and end with an error", self.service.answers, self.grace_seconds
            )
            await asyncio.to_thread(self.service.loop.stop)
            await asyncio.sleep(0.2)  # in which the errors go out
            self._hang_up()
        self.should_exit = True

    def _hang_up(self) -> None:
        """End whatever is still open, so that nothing has to be torn from its task."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(service: Service, host: str, port: int, grace_seconds: float) -> tuple[Server, socket.socket]:
    """A server and the socket that it listens on.

    Raises:
        ServiceError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(512)
    except OSError as error:
        listening.close()
        raise ServiceError(
            f"{host}:{port}: cannot be listened on ({error.strerror}). Choose another --host or --port."
        ) from error
    config = uvicorn.Config(
        service.app(),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        http=ImpatientProtocol,
        ws="none",
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
    )
    return Server(config, service, grace_seconds), listening


def serve(service: Service, host: str, port: int, grace_seconds: float, ready: Callable[[str], None]) -> None:
    """Serve until asked to stop.

    Args:
        service: is started and stopped.
        host, port: to listen on; port 0 takes a free one.
        grace_seconds: see `Server`.
        ready: is told the address.

    Raises:
        ServiceError: the address cannot be had.
    """
    server, listening = make_server(service, host, port, grace_seconds)
    service.warm()  # before anybody is told that it answers: the first question to the registry takes seconds
    service.start()
    shown = f"[{host}]" if ":" in host else host
    try:
        ready(f"http://{shown}:{listening.getsockname()[1]}")
        before = signal.getsignal(signal.SIGTERM)
        server.run(sockets=[listening])
        signal.signal(signal.SIGTERM, before)
    finally:
        service.stop()
        listening.close()
