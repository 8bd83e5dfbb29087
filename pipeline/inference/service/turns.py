"""Threads for work beside the event loop, shared fairly: one holder's jobs wait for one another before they wait for anybody else's.

In: blocking functions, and for whom each is run. Out: what they return. Knows nothing of what they do.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Turns:
    """A pool of threads in which each holder has so many jobs at a time. For one event loop.

    A holder's further jobs wait outside of the pool, so before any job of a holder stand at most `share` of each of the others.

    Args:
        threads: of the pool.
        share: jobs of one holder at a time.
        name: of the threads.
    """

    def __init__(self, threads: int, share: int, name: str) -> None:
        self._pool, self._share = ThreadPoolExecutor(threads, thread_name_prefix=name), share
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._asked: Counter[str] = Counter()  # jobs of each holder, waiting ones included

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        """Run a job of the service itself, which waits for no holder's turn."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def run(
        self, holder: str, function: Callable[..., Any], *arguments: Any, unwanted: Callable[[Any], object] | None = None
    ) -> Any:
        """Run a job when its holder has a turn.

        If whoever waits is cancelled, a job that has begun goes on and keeps its turn to its end; what it returns is then given to `unwanted`.
        """
        gate = self._gates.setdefault(holder, asyncio.Semaphore(self._share))
        self._asked[holder] += 1
        try:
            await gate.acquire()
        except asyncio.CancelledError:
            self._left(holder)
            raise

        def ended(_: object = None) -> None:
            gate.release()
            self._left(holder)

        try:
            job = self.submit(function, *arguments)
        except RuntimeError:  # the pool has been shut down
            ended()
            raise
        job.add_done_callback(ended)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            if unwanted is not None:
                job.add_done_callback(lambda done: None if done.cancelled() or done.exception() else unwanted(done.result()))
            raise

    def _left(self, holder: str) -> None:
        self._asked[holder] -= 1
        if not self._asked[holder]:
            del self._asked[holder], self._gates[holder]

    def shutdown(self) -> None:
        """Begin no more jobs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
