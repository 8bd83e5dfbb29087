"""Connections that hold on to the server without using it are closed: no request comes, its body does not, or nobody reads the answer.

In: bytes, as uvicorn gets them. Out: the same, with the deadlines that uvicorn has not (it has one for idle connections that had a request, which a
single byte every few seconds puts off for ever). Knows nothing of what is asked.
"""

import asyncio
from typing import Any, ClassVar

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.inference.service.protocol import ApiError


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP with deadlines for the client.

    When `most` connections are open, a further one takes the place of the one that has owed a request for longest, so that silent connections shut
    nobody out; if all are being answered, it is answered 503.

    Attributes:
        head_seconds: in which the whole head of a request must have come, from the connection's beginning or the end of the answer before.
        body_seconds: in which its body must have come, from then on; more than `Limits.body_seconds`, after which the service answers 408.
        write_seconds: in which the client must take what was written for it.
        most: connections at a time.
    """

    head_seconds: ClassVar[float] = 10.0
    body_seconds: ClassVar[float] = 15.0
    write_seconds: ClassVar[float] = 30.0
    most: ClassVar[int] = 1000

    _owed: tuple[Any, Any] | None = None  # what the client owes: the head or the body of which request
    _read: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    @property
    def silent_until(self) -> float | None:
        """When the connection will be closed for want of a request; None: it has one that is not answered yet."""
        waits = self.cycle is not None and not self.cycle.response_complete
        return None if waits or self._read is None else self._read.when()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """See uvicorn."""
        if len(self.connections) >= self.most:
            silent = [(until, one) for one in self.connections if (until := one.silent_until) is not None]  # type: ignore[union-attr]
            if silent:
                # Gone from the list at once, or the next newcomer would find it there again.
                longest = min(silent, key=lambda pair: pair[0])[1]
                self.connections.discard(longest)
                longest.transport.abort()
            else:
                self.app = _full
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of the first byte that the client does not take
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See uvicorn."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._watch()

    def _unsupported_upgrade_warning(self) -> None:
        """See uvicorn, which tells whoever runs it to install WebSockets whenever a client asks for an upgrade. There are none here, and the request
        is answered as if it had not asked, as HTTP has it.
        """

    def _watch(self) -> None:
        """Set the deadline for what the client owes now."""
        state = self.conn.their_state
        owed = (state, self.cycle) if state in (h11.IDLE, h11.SEND_BODY) else None
        if owed == self._owed:
            return
        self._owed = owed
        _stop(self._read)
        self._read = None
        if owed is not None:
            seconds = self.head_seconds if state is h11.IDLE else self.body_seconds
            self._read = self.loop.call_later(seconds, self.transport.abort)

    def pause_writing(self) -> None:
        """See uvicorn. Whoever writes waits from here on, until the client has taken all or is thrown out."""
        super().pause_writing()
        self._write = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """See uvicorn."""
        super().resume_writing()
        _stop(self._write)

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn."""
        _stop(self._read)
        _stop(self._write)
        super().connection_lost(exc)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in place of the service while it has no connections to spare."""
    error = ApiError(503, "too many connections are open", "too_many_connections", retry_after=1)
    await JSONResponse(error.body(), error.status, {**error.headers, "Connection": "close"})(scope, receive, send)
