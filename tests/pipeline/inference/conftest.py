"""A registry with customers whose prefixes force distinct answers, and the service in front of it, on loopback."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.base import resolve_base
from pipeline.files import digest_of
from pipeline.home import Home
from pipeline.inference import PrefixEngine, load_engine
from pipeline.inference.service.app import Limits, Service
from pipeline.inference.service.keys import KeyRing, create_key
from pipeline.inference.service.run import Server, make_server
from pipeline.prefix import FrozenBase, save_prefix
from pipeline.prefix.initialise import from_random
from pipeline.registry import ensure_store, register_imported, store
from pipeline.training.job import JobBase

TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}say :"


def write_prefix(
    folder: Path,
    base: FrozenBase,
    digest: str,
    customer: str,
    seed: int,
    *,
    length: int = 3,
    chat: bool = False,
    task: str = "default",
    **generation: int,
) -> Path:
    """A strong random prefix, as training would have left one."""
    prefix = {site: (key * 100, value * 100) for site, (key, value) in from_random(base.sites, length, seed).items()}
    config = {
        "customer": customer,
        "task": task,
        "digest": digest_of([customer, task, seed, length, chat]),
        "prefix": {
            "length": length,
            "sites": {name: vars(site) for name, site in base.sites.items()},
            "placement": "prefix",
            "parameters": sum(k.numel() + v.numel() for k, v in prefix.values()),
        },
        "prompt": {"template": "{input}\n", "eos": True, "truncation_side": "none", "max_input_tokens": 40, "max_target_tokens": 16},
        "chat": chat,
        "generation": {"num_beams": 1, "max_new_tokens": 8, **generation},
        "base": {
            "id": "tiny", "path": str(base.folder), "revision": None, "digest": digest,
            "model_type": base.model.config.model_type, "is_encoder_decoder": base.is_encoder_decoder,
            "tokenizer_digest": resolve_base(str(base.folder)).tokenizer_digest, "dtype": "float32", "quantization": None,
        },
        "training": {},
        "lineage": {"data_fingerprint": "d", "config_digest": "c", "seed": seed, "code_version": "test", "parent": None},
        "run_id": None,
    }  # fmt: skip
    save_prefix(folder, prefix, config)
    return folder


@dataclass
class Fleet:
    """A registry in `home`, and an engine for the base of its prefixes; nothing but `answer` uses the engine's own slots."""

    home: Home
    base: JobBase
    engine: PrefixEngine
    root: Path
    made: int = 0

    def register(self, customer: str, seed: int, **how: Any) -> tuple[int, Path]:
        """A version of its own for every seed, champion."""
        self.made += 1
        folder = write_prefix(self.root / f"made{self.made}", self.engine.base, self.base.digest, customer, seed, **how)
        return register_imported(folder, "a test", champion=True).version, folder

    def answer(self, folder: Path, text: Any) -> str:
        """What the customer gets, computed alone."""
        return self.engine.answer([text], self.engine.add(folder))[0]


@pytest.fixture(scope="session")
def fleet(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three customers with distinct answers and one that was trained on conversations."""
    root = tmp_path_factory.mktemp("fleet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFIXFLEET_HOME", str(root / "home"))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            patch.delenv(name, raising=False)
        patch.setattr(store, "_uri_set_here", None)
        patch.setattr(store, "_ready", set())
        ensure_store(Home.current())
        info = resolve_base(str(tiny_base))
        job_base = JobBase("tiny", str(tiny_base), None, info.digest, "float32", None, "auto")
        engine = load_engine(job_base)
        engine.tokenizer.chat_template = TEMPLATE
        made = Fleet(Home.current(), job_base, engine, root)
        for seed, customer in enumerate(("acme", "bistro", "harbour")):
            made.register(customer, seed, length=2 + seed)
        made.register("chatty", 9, chat=True)
        yield made


@dataclass
class Running:
    """A service on loopback."""

    service: Service
    server: Server
    url: str

    def client(self, key: str = "") -> httpx.Client:
        """An HTTP client."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)


@pytest.fixture
def serving(fleet: Fleet, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`serving(customers=…, limits…)` starts a service; with `keys`, a list of customers for each key, its keys are `.keys`."""
    stops: list[Callable[[], None]] = []

    def start(
        keys: list[list[str]] | None = None, log_texts: bool = False, engine: PrefixEngine = fleet.engine, **limits: Any
    ) -> Any:
        file = tmp_path / "keys.json"
        secrets = [create_key(file, customers)[1] for customers in keys or []]
        service = Service(engine, KeyRing(file), Limits(**limits), log_texts=log_texts)
        server, listening = make_server(service, "127.0.0.1", 0, grace_seconds=20)
        service.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(30)
            service.stop()
            listening.close()

        stops.append(stop)
        running = Running(service, server, f"http://127.0.0.1:{listening.getsockname()[1]}")
        return (running, *secrets) if keys else running

    yield start
    for stop in stops:
        stop()
