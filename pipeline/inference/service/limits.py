"""How many answers a key may ask for in a minute: a bucket of tokens for each, filled at a steady rate."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

# Buckets kept; those that were not used for longest go, and are full again by the time they come back.
_MOST = 10_000


class RateLimit:
    """At most `per_minute` answers a minute for each name, in any distribution over that minute.

    Args:
        per_minute: None for no limit.
        clock: seconds.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when that was
        self._guard = threading.Lock()

    def take(self, name: str, count: int = 1, counted: int = 0) -> int:
        """Count a request.

        Args:
            name: whose.
            count: of the answers that it asks for, at most `per_minute`; a request that asks for none counts as one.
            counted: of these, what was counted when it came and was not read yet.

        Returns:
            0 if it may go on, else the seconds after which the same may.
        """
        if self.per_minute is None:
            return 0
        now, rate = self._clock(), self.per_minute / 60
        with self._guard:
            left, since = self._buckets.pop(name, (float(self.per_minute), now))
            left = min(float(self.per_minute), left + (now - since) * rate)
            allowed = left >= count - counted
            self._buckets[name] = (left - count + counted if allowed else left, now)
            if len(self._buckets) > _MOST:
                self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((count - left) / rate))
