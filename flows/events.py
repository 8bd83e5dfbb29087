"""Progress events of the stages on their way to whoever draws them. An event is a mapping as `pipeline.progress` prints it.

Prefect runs tasks in threads and wants plain parameters, so the listener is found here instead of being passed along.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Listener = Callable[[dict[str, Any]], None]

_listeners: list[Listener] = []


def emit(event: dict[str, Any]) -> None:
    """Hand an event to every listener."""
    for listener in _listeners:
        listener(event)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hand every event to `listener` meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
