"""The thread that decodes: takes requests from any thread, runs steps while there is something to do. Knows nothing of HTTP."""

import logging
import threading

from pipeline.inference.decoder import Decoder
from pipeline.inference.request import Request

log = logging.getLogger(__name__)


class DecodingLoop:
    """A decoder in a thread of its own.

    Attributes:
        decoder: read its counters freely; only the thread runs it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self._failures = decoder, 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def failures(self) -> int:
        """Steps that raised, each of which ended all answers under way with an error, and answers that could not begin."""
        return self._failures + self.decoder.failures

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            PrefixError: prompt, prefix and answer pass the positions of the base.
        """
        with self._changed:
            self.decoder.submit(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody waits for this answer any more."""
        with self._changed:
            self.decoder.cancel(request)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the step under way; what has not ended by then ends with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self.decoder.busy and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self.decoder.step()
            except Exception:
                # Whose fault it is nobody knows: all that run end with an error, and the service goes on.
                log.exception("a decoding step failed; the %d answers under way end with an error", self.decoder.running)
                self._failures += 1
                self.decoder.fail("the service failed while this was answered")
        self.decoder.fail("the service was stopped while this was answered", waiting=True)
