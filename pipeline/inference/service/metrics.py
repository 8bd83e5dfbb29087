"""What Prometheus is told. No customer's name, no text: names would be thousands of series, and whoever reads the figures need not know them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from pipeline.inference.prefixes import PrefixMemory
from pipeline.inference.service.loop import DecodingLoop

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one service."""

    def __init__(self, loop: DecodingLoop, memory: PrefixMemory) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "prefixfleet_requests", "Requests by route and HTTP status.", ["route", "status"], registry=self.registry
        )
        self.answers = Counter("prefixfleet_answers", "Answers by how they ended.", ["finish_reason"], registry=self.registry)
        self.tokens = Counter("prefixfleet_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.first_token = Histogram(
            "prefixfleet_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "prefixfleet_request_seconds", "From a request's arrival to its last byte.", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_State(loop, memory))

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _State:
    """What is read off the decoder and the memory when somebody asks."""

    def __init__(self, loop: DecodingLoop, memory: PrefixMemory) -> None:
        self.loop, self.memory = loop, memory

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """All figures now."""
        decoder, memory = self.loop.decoder, self.memory
        for name, text, value in (
            ("running_answers", "Answers that have rows in the batch.", decoder.running),
            ("waiting_answers", "Answers that wait for a row.", decoder.waiting),
            ("rows", "Rows of the batch; a beam is a row.", decoder.rows),
            ("cache_bytes", "Keys and values of rows, prefixes apart.", decoder.cache_bytes),
            ("prefixes_loaded", "Prefixes in memory.", memory.count),
            ("prefix_bytes", "What they take.", memory.bytes),
            ("prefix_budget_bytes", "What they may take.", memory.budget),
        ):
            yield GaugeMetricFamily(f"prefixfleet_{name}", text, value=value)
        for name, text, value in (
            ("prefix_loads", "Prefixes read into memory.", memory.loads),
            ("prefix_evictions", "Prefixes let go to make room.", memory.evictions),
            ("steps", "Passes over running rows.", decoder.steps),
            ("row_steps", "Rows of all passes together; divided by steps, the mean batch.", decoder.row_steps),
            ("prefills", "Passes over prompts.", decoder.prefills),
            ("failed_steps", "Passes, and beginnings of answers, that failed.", self.loop.failures),
        ):
            yield CounterMetricFamily(f"prefixfleet_{name}", text, value=value)
