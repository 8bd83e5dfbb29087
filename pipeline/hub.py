"""Whether the Hugging Face hub answers, found out in a bounded time.

huggingface_hub alone waits half a minute or more for a network that is not there, and for ever for one that takes connections and
stays silent.
"""

import contextlib
import functools
import threading
import time

PROBE_SECONDS = 5.0


def hub_answers() -> bool:
    """Whether the hub (`HF_ENDPOINT`) answers a request within `PROBE_SECONDS`, whatever it says.

    False at once if `HF_HUB_OFFLINE` is set. Asked once a minute at most, so that many names do not each wait.
    """
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT, int(time.monotonic() // 60))


@functools.lru_cache(maxsize=1)
def _answers(endpoint: str, minute: int) -> bool:
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # no name, no route, no certificate, no HTTP: no answer
            get_session().head(endpoint, timeout=PROBE_SECONDS)
            answered.set()

    # In a thread, since looking up a name has no time-out of its own, and a time-out counts for each step of a request.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(PROBE_SECONDS)
