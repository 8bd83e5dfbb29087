"""The HTTP service with real clients on loopback: the official `openai` client, and hostile ones."""

import asyncio
import contextlib
import json
import logging
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pipeline.base import resolve_base
from pipeline.errors import ConfigError, RegistryError
from pipeline.inference import load_engine
from pipeline.inference.service import app
from pipeline.inference.service.app import Service
from pipeline.inference.service.connection import ImpatientProtocol
from pipeline.inference.service.limits import RateLimit
from pipeline.inference.service.protocol import ApiError, ChatBody, CompletionBody, parse_body
from pipeline.inference.service.run import check_binding
from pipeline.training.job import JobBase

from .conftest import Fleet, Running

Serving = Callable[..., Any]
TEXT = "colour : red w1 w2"


def official(running: Running, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=30)


def newest(fleet: Fleet, customer: str) -> Any:
    from pipeline.registry import lookup

    return lookup(customer_key(customer)).prefix_dir


def customer_key(customer: str) -> Any:
    from pipeline.keys import CustomerKey

    return CustomerKey(customer)


def connected(running: Running, sent: bytes) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=10)
    opened.sendall(sent)
    return opened


def all_of(opened: socket.socket) -> bytes:
    """What comes until the server closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while more := opened.recv(4096):
            got += more
    return got


def posted(body: dict[str, Any], announced: int = 0) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {announced or len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def slowed(running: Running, seconds: float, endless: bool = False) -> None:
    """Every step of the decoder takes at least so long; `endless` answers have all the tokens that were asked for."""
    if endless:
        running.service.loop.decoder.ends = []
    step = running.service.loop.decoder.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    running.service.loop.decoder.step = slow  # type: ignore[method-assign]


def test_the_official_client_gets_what_each_customers_prefix_says(fleet: Fleet, serving: Serving) -> None:
    running = serving()
    client = official(running)
    expected = {name: fleet.answer(newest(fleet, name), TEXT) for name in ("acme", "bistro", "harbour")}
    assert len(set(expected.values())) == 3
    for name, text in expected.items():
        whole = client.completions.create(model=name, prompt=TEXT)
        assert whole.choices[0].text == text
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert whole.usage.prompt_tokens == len(fleet.engine.tokenizer(TEXT)["input_ids"])
        pieces = list(
            client.completions.create(model=f"{name}:1", prompt=TEXT, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(piece.choices[0].text for piece in pieces[:-1]) == text
        assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert pieces[-1].usage == whole.usage
    both = client.completions.create(model="acme@champion", prompt=[TEXT, "say it is"], max_tokens=2, n=2, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == " ".join(expected["acme"].split()[:2])
    assert {choice.finish_reason for choice in both.choices} <= {"length", "stop"}
    assert {model.id for model in client.models.list()} >= {"acme", "bistro", "harbour", "chatty"}
    assert client.models.retrieve("acme").id == "acme"


def test_an_encoder_decoder_is_served_in_company_as_alone(
    fleet: Fleet, serving: Serving, tiny_encoder_decoder: Path, tmp_path: Path
) -> None:
    base = JobBase("t5", str(tiny_encoder_decoder), None, resolve_base(str(tiny_encoder_decoder)).digest, "float32", None, "auto")
    second = Fleet(fleet.home, base, load_engine(base), tmp_path)
    expected = {}
    for seed, name in ((13, "twofold"), (19, "forked")):
        _, folder = second.register(name, seed)
        expected[name] = second.answer(folder, TEXT)
    assert len(set(expected.values()) - {""}) == 2
    running = serving(engine=second.engine)
    client = official(running)
    with ThreadPoolExecutor() as pool:
        asked = [(name, pool.submit(client.completions.create, model=name, prompt=TEXT)) for name in [*expected] * 3]
        assert all(answer.result().choices[0].text == expected[name] for name, answer in asked)
    for name, text in expected.items():
        pieces = client.completions.create(model=name, prompt=TEXT, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text
    with pytest.raises(openai.NotFoundError):  # of another base
        client.completions.create(model="acme", prompt=TEXT)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("acme")


def test_chat_completions_go_through_the_bases_chat_template(fleet: Fleet, serving: Serving) -> None:
    client = official(serving())
    messages = [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": "it is"},
        {"role": "user", "content": TEXT},
    ]
    expected = fleet.answer(newest(fleet, "chatty"), messages)
    whole = client.chat.completions.create(model="chatty", messages=messages, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected
    assert [t.token for t in whole.choices[0].logprobs.content] == expected.split()
    assert all(t.top_logprobs[0].logprob == t.logprob for t in whole.choices[0].logprobs.content)
    pieces = list(client.chat.completions.create(model="chatty", messages=messages, stream=True, max_completion_tokens=3))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == " ".join(expected.split()[:3])
    with pytest.raises(openai.BadRequestError, match="trained on texts"):
        client.chat.completions.create(model="acme", messages=messages)


def test_without_a_chat_template_there_are_no_chat_completions(
    fleet: Fleet, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serving()
    monkeypatch.setattr(fleet.engine.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        official(running).chat.completions.create(model="chatty", messages=[{"role": "user", "content": TEXT}])


def test_drawing_follows_the_seed_and_stop_strings_end_an_answer(fleet: Fleet, serving: Serving) -> None:
    client = official(serving())

    def drawn(seed: int) -> str:
        return client.completions.create(model="acme", prompt=TEXT, temperature=2.0, seed=seed, max_tokens=20).choices[0].text

    assert drawn(5) == drawn(5)
    assert len({drawn(seed) for seed in range(5)}) > 1
    several = [
        [
            choice.text
            for choice in client.completions.create(
                model="acme", prompt=TEXT, temperature=2.0, seed=seed, max_tokens=20, n=3
            ).choices
        ]
        for seed in (5, 6, 5)
    ]
    assert several[0] == several[2] and several[0][0] == drawn(5)
    assert not set(several[0]) & set(several[1])  # neighbouring seeds share no answer
    # Whoever asks for several answers, or names a seed, wants them drawn; without either the answer is the one that was judged.
    judged = fleet.answer(newest(fleet, "acme"), TEXT)
    assert {client.completions.create(model="acme", prompt=TEXT, n=1).choices[0].text for _ in range(2)} == {judged}
    assert len({choice.text for choice in client.completions.create(model="acme", prompt=TEXT, n=4).choices}) > 1
    plain = client.completions.create(model="acme", prompt=TEXT, seed=5, max_tokens=20).choices[0].text
    assert plain == client.completions.create(model="acme", prompt=TEXT, seed=5, max_tokens=20, temperature=1.0).choices[0].text
    words = fleet.answer(newest(fleet, "bistro"), TEXT).split()
    at = next(i for i, word in enumerate(words) if i and word not in words[:i])
    stopped = client.completions.create(model="bistro", prompt=TEXT, stop=[words[at], "nowhere"], logprobs=1)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" ".join(words[:at]), "stop")
    assert stopped.choices[0].logprobs.tokens == words[: at + 1]


def test_a_key_opens_its_own_customers_and_tells_nothing_of_others(fleet: Fleet, serving: Serving) -> None:
    running, acme, everybody = serving([["acme"], ["*"]])
    body = {"prompt": TEXT}
    with running.client() as stranger, running.client("pf-" + "x" * 43) as guesser:
        for client in (stranger, guesser):
            for path in ("/v1/models", "/v1/models/acme"):
                assert client.get(path).status_code == 401
            refused = client.post("/v1/completions", json={"model": "acme", **body})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    with running.client(acme) as client:
        assert client.post("/v1/completions", json={"model": "acme", **body}).status_code == 200
        assert {model["id"].split(".")[0] for model in client.get("/v1/models").json()["data"]} == {"acme"}
        answers = [
            client.post("/v1/completions", json={"model": name, **body})
            for name in (
                "bistro",
                "nobody",
                "acme@nothing",
                "acme:77",
                "acme.lunch",
                "../acme",
                "acme/menu",
                "ACME",
                "bistro:1",
                "",
                "a" * 290,
            )
        ]
        assert {answer.status_code for answer in answers} == {404}
        assert len({answer.text for answer in answers}) == 1
        assert {client.get(f"/v1/models/{name}").status_code for name in ("bistro", "nobody")} == {404}
    with running.client(everybody) as client:
        assert client.post("/v1/completions", json={"model": "bistro", **body}).status_code == 200


def test_a_revoked_key_is_refused_at_the_next_request(serving: Serving) -> None:
    from pipeline.inference.service.keys import read_keys, revoke_key

    running, first, second = serving([["acme"], ["bistro"]])
    file = running.service.keys.file
    assert first not in file.read_text() and second not in file.read_text()
    with running.client(first) as client:
        assert client.get("/v1/models").status_code == 200
        revoke_key(file, read_keys(file)[0].id)
        assert client.get("/v1/models").status_code == 401
        revoke_key(file, read_keys(file)[0].id)
        assert client.get("/v1/models").status_code == 401  # the last key is gone, and the door is not open


def test_a_damaged_key_file_is_logged_once_and_its_keys_end_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.inference.service.keys import KeyRing, create_key, read_keys, revoke_key

    file, other, now = tmp_path / "keys.json", tmp_path / "other.json", 0.0
    fixed = create_key(other, ["harbour"])[1]
    monkeypatch.setenv("PREFIXFLEET_API_KEYS", other.read_text())
    kept, revoked = (create_key(file, [name])[1] for name in ("acme", "bistro"))
    ring = KeyRing(file, lambda: now)
    whole = file.read_text()

    def valid() -> list[bool]:
        return [ring.find(secret) is not None for secret in (fixed, kept, revoked)]

    assert valid() == [True] * 3 and len(ring) == 3
    for damaged in ("{", '{"format": 1, "keys": [{}]}', "\udcff"):
        file.write_bytes(damaged.encode("utf-8", "surrogateescape"))
        now += 10
        assert valid() == valid() == [True] * 3
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    now += 39  # counted from the first damage on
    assert valid() == [True] * 3
    now += 1
    assert valid() == [True, False, False] and ring.wanted
    assert len(caplog.records) == 4 and "refused until" in caplog.messages[-1]
    file.write_text(whole)
    assert valid() == [True] * 3
    assert "can be read again, and holds 2 keys" in caplog.messages[-1]
    revoke_key(file, read_keys(file)[1].id)
    assert valid() == [True, True, False]
    file.write_text("{")
    assert valid() == [True, True, False]
    file.unlink()
    assert valid() == [True, False, False]
    assert caplog.messages[-1].endswith("keys.json: is gone, and so are its keys.")


def test_a_key_file_that_appears_damaged_closes_an_open_service(serving: Serving) -> None:
    running = serving()
    with running.client() as client:
        assert client.get("/v1/models").status_code == 200
        running.service.keys.file.write_text("{")
        assert client.get("/v1/models").status_code == 401
        running.service.keys.file.unlink()
        assert client.get("/v1/models").status_code == 200


def test_keys_from_the_environment_open_the_service(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.inference.service.keys import KeyRing, create_key

    _, secret = create_key(tmp_path / "elsewhere.json", ["acme"])
    monkeypatch.setenv("PREFIXFLEET_API_KEYS", (tmp_path / "elsewhere.json").read_text())
    running, of_file = serving([["bistro"]])
    asked = {"prompt": TEXT, "max_tokens": 1}
    for key, opened, closed in ((secret, "acme", "bistro"), (of_file, "bistro", "acme")):
        with running.client(key) as client:
            assert client.post("/v1/completions", json={"model": opened, **asked}).status_code == 200
            assert client.post("/v1/completions", json={"model": closed, **asked}).status_code == 404
    with running.client() as client:
        assert client.get("/v1/models").status_code == 401
    whole = {"id": "k", "sha256": "0" * 64}
    for wrong, said in (
        ("pf-secret", "is not JSON"),
        ('{"keys": []}', 'has no "format": 1'),
        ("[]", 'has no "format": 1'),
        ('{"format": 1, "keys": [{"id": 1}]}', "is no list of API keys"),
        *(
            (json.dumps({"format": 1, "keys": [{**whole, "customers": customers}]}), "key k opens nobody")
            for customers in ("acme", [], [7], {"acme": 1}, None)
        ),
    ):
        monkeypatch.setenv("PREFIXFLEET_API_KEYS", wrong)
        with pytest.raises(ConfigError, match=f"PREFIXFLEET_API_KEYS: {said}") as told:
            KeyRing(tmp_path / "none.json")
        assert "pf-secret" not in str(told.value)


def test_a_second_task_of_a_customer_is_served_under_its_own_name(fleet: Fleet, serving: Serving) -> None:
    _, folder = fleet.register("acme", 31, task="menu", length=4)
    expected = fleet.answer(folder, TEXT)
    assert expected != fleet.answer(newest(fleet, "acme"), TEXT)
    running, key, stranger = serving([["acme"], ["bistro"]])
    client = official(running, key)
    for name in ("acme.menu", "acme.menu@champion", "acme.menu:1"):
        assert client.completions.create(model=name, prompt=TEXT).choices[0].text == expected
    assert client.completions.create(model="acme", prompt=TEXT).choices[0].text == fleet.answer(newest(fleet, "acme"), TEXT)
    assert {model.id for model in client.models.list()} == {"acme", "acme.menu"}
    with pytest.raises(openai.NotFoundError):
        official(running, stranger).completions.create(model="acme.menu", prompt=TEXT)


def test_keys_made_and_revoked_at_once_are_neither_lost_nor_brought_back_and_the_file_is_private(tmp_path: Path) -> None:
    from pipeline.inference.service.keys import create_key, read_keys, revoke_key

    file = tmp_path / "new" / "keys.json"
    old = [create_key(file, [f"old{i}"])[0].id for i in range(6)]
    with ThreadPoolExecutor(12) as pool:
        made = [pool.submit(create_key, file, [f"new{i}"]) for i in range(6)]
        gone = [pool.submit(revoke_key, file, key_id) for key_id in old]
        ids = {one.result()[0].id for one in made}
        for one in gone:
            one.result()
    assert {key.id for key in read_keys(file)} == ids
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_registered_prefix_that_was_tampered_with_is_told_from_an_unknown_one_and_logged(
    fleet: Fleet, serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    version, _ = fleet.register("tampered", 71)
    stored = mlflow.MlflowClient().get_model_version_download_uri("prefixfleet.tampered", str(version)).removeprefix("file://")
    weights = next(Path(stored).rglob("prefix.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with serving().client() as client:
        refused = client.post("/v1/completions", json={"model": "tampered", "prompt": TEXT})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
    assert any(record.levelname == "ERROR" and "tampered with" in record.getMessage() for record in caplog.records)


def test_more_answers_than_the_queue_ever_takes_are_refused_for_good(serving: Serving) -> None:
    with serving(queue=3).client() as client:
        refused = client.post("/v1/completions", json={"model": "acme", "prompt": [TEXT, TEXT], "n": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_answers")
        assert "may ask for 3" in refused.json()["error"]["message"] and "Retry-After" not in refused.headers


def test_without_keys_only_names_of_this_machine_are_answered(serving: Serving) -> None:
    running, key = serving([["acme"]])
    with running.client(key) as client:
        assert client.get("/v1/models", headers={"Host": "models.example.org"}).status_code == 200
    running.service.keys._keys, running.service._open = [], True
    with running.client() as client:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80", "10.0.0.5", "[fe80::1]", "localhost:80:80"):
            refused = client.get("/v1/models", headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed"), host


def test_a_refusal_names_the_whole_place_and_nothing_is_dropped_silently() -> None:
    def place(kind: Any, **body: Any) -> str | None:
        with pytest.raises(ApiError) as refused:
            parse_body(kind, json.dumps({"model": "acme", **body}).encode())
        assert refused.value.status == 400
        return refused.value.param

    said = {"role": "user", "content": "a"}
    with pytest.raises(ApiError, match="stop: may be 4 strings at most, and there are 5"):
        parse_body(CompletionBody, json.dumps({"model": "a", "prompt": "a", "stop": list("abcde")}).encode())
    assert place(ChatBody, messages=[said, {**said, "content": 7}]) == "messages.1.content"
    assert place(ChatBody, messages=[{**said, "mood": "good"}]) == "messages.0.mood"
    assert place(ChatBody, messages=[{**said, "name": "Ann"}]) == "messages.0.name"
    assert place(ChatBody, messages=[said], top_logprobs=2) == "top_logprobs"
    assert place(ChatBody, messages=[said], logprobs=False, top_logprobs=2) == "top_logprobs"
    assert place(CompletionBody, prompt=["a", 7]) in ("prompt", "prompt.1")
    assert place(CompletionBody, prompt="a", stream_options={"stop": 1}) == "stream_options.stop"
    assert place(CompletionBody, prompt="a", logit_bias={"chosen": "much"}) == "logit_bias"
    with pytest.raises(ApiError, match="include_usage stands twice"):
        parse_body(
            CompletionBody, b'{"model": "a", "prompt": "a", "stream_options": {"include_usage": true, "include_usage": false}}'
        )
    parse_body(ChatBody, json.dumps({"model": "a", "messages": [said], "logprobs": True, "top_logprobs": 2}).encode())


def test_a_keys_long_texts_keep_only_itself_waiting(fleet: Fleet, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    running, greedy, other = serving([["*"], ["*"]])
    free, encode = threading.Event(), app.encode_prompts

    def held(tokenizer: Any, prompt: Any, chat: bool, inputs: Any, *more: Any) -> Any:
        assert "long" not in inputs or free.wait(20)
        return encode(tokenizer, prompt, chat, inputs, *more)

    monkeypatch.setattr(app, "encode_prompts", held)
    body = {"model": "acme", "logprobs": 1, "max_tokens": 2}
    with ThreadPoolExecutor() as pool, running.client(greedy) as one, running.client(other) as two:
        long = [pool.submit(one.post, "/v1/completions", json={**body, "prompt": "long"}) for _ in range(4)]
        until(lambda: sum(running.service._tokenizing._asked.values()) == 4)
        # Log-probabilities are worded in the event loop, by a tokenizer of its own.
        answers = [two.post("/v1/completions", json={**body, "prompt": TEXT}) for _ in range(2)]
        assert not any(answer.done() for answer in long)
        free.set()
        assert {answer.result().status_code for answer in long} == {200}
    assert [len(answer.json()["choices"][0]["logprobs"]["tokens"]) for answer in answers] == [2, 2]
    until(lambda: not running.service._tokenizing._asked)


def test_a_far_too_long_prompt_is_refused_by_its_beginning(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serving(prompt_tokens=50)
    monkeypatch.setattr(app, "encode_prompts", lambda *_: pytest.fail("it was tokenized as a whole"))
    with running.client() as client:
        refused = client.post("/v1/completions", json={"model": "acme", "prompt": "w1 " * 100_000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "more than 50 tokens" in refused.json()["error"]["message"]


def test_asking_about_models_loads_no_prefix_and_asks_the_registry_once_for_all(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, key, other = serving([["acme"], ["acme"]], queue=2)
    asked, ask, look = [], app.status, app.find_registered
    go_on = threading.Event()

    def slow() -> Any:
        asked.append(1)
        assert go_on.wait(20)
        return ask()

    def slow_look(*arguments: Any) -> Any:
        assert go_on.wait(20)
        return look(*arguments)

    monkeypatch.setattr(app, "status", slow)
    monkeypatch.setattr(app, "find_registered", slow_look)
    with ThreadPoolExecutor(8) as pool, running.client(key) as client, running.client(other) as second:
        lists = [pool.submit(client.get, "/v1/models") for _ in range(5)]
        one = pool.submit(client.get, "/v1/models/acme")
        until(lambda: len(asked) == 1 and running.service.answers == 1 and running.service._connections == 6)
        refused = client.get("/v1/models/acme")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        theirs = pool.submit(second.get, "/v1/models/acme:1")
        until(lambda: running.service.answers == 2)
        go_on.set()
        assert {answer.result().status_code for answer in (*lists, one, theirs)} == {200}
        assert client.get("/v1/models/acme:99").status_code == 404
    assert len(asked) == 1 and running.service.memory.loads == 0 and running.service.answers == 0


def test_the_service_is_ready_once_the_registry_could_be_read(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> Any:
        raise RegistryError("the registry is away.")

    running = serving()
    with running.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(app, "status", away)
            running.service.warm()
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200
        monkeypatch.setattr(app, "status", away)
        assert client.get("/readyz").status_code == 200
    assert [record.getMessage() for record in caplog.records] == ["listing models: the registry is away."] * 2


def test_a_prefix_that_was_judged_in_another_precision_is_told_once(
    fleet: Fleet, serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fleet.engine.precision == "float32"
    body = {"model": "acme", "prompt": TEXT, "max_tokens": 1}
    with serving().client() as client:
        client.post("/v1/completions", json=body)
        assert not caplog.records
        monkeypatch.setattr(fleet.engine, "quantization", "int8")
        for _ in range(2):
            assert client.post("/v1/completions", json=body).status_code == 200
    (told,) = caplog.messages
    assert "acme version 1 was judged in float32 and is served in float32 with int8 weights" in told


def test_what_a_proxy_may_have_read_in_another_way_is_refused(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    running, key, other = serving([["acme"], ["bistro"]])
    said = b"Host: localhost\r\nAuthorization: Bearer " + key.encode() + b"\r\n"
    twice = b"GET /v1/models HTTP/1.1\r\n" + said + b"Authorization: Bearer " + other.encode() + b"\r\n\r\n"
    both = b"POST /v1/completions HTTP/1.1\r\n" + said + b"Content-Type: application/json\r\nContent-Length: 5\r\n"
    both += b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + WHOLE
    for sent in (twice, both):
        with connected(running, sent) as opened:
            got = all_of(opened)
        assert got.startswith(b"HTTP/1.1 400") and b"ambiguous_request" in got and got.count(b"HTTP/1.1") == 1
    with running.client(key) as client:
        assert client.get("/v1/models/").status_code == 404
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
        assert client.get("/v1/models", headers=upgrade).status_code == 200
    assert not [record for record in caplog.records if record.name.startswith("uvicorn") and record.levelname == "WARNING"]


WHOLE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_connections_that_send_no_whole_request_are_closed(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImpatientProtocol, "head_seconds", 0.3)
    monkeypatch.setattr(ImpatientProtocol, "body_seconds", 0.3)
    running = serving()
    lacking = {
        b"": b"",
        WHOLE[:30]: b"",
        WHOLE + WHOLE[:30]: b"200 OK",
        WHOLE.replace(b"\r\n\r\n", b"\r\nContent-Length: 99\r\n\r\n"): b"200 OK",  # answered, and the body is still owed
        posted({"model": "acme"}, announced=99): b"",
    }
    opened = {connected(running, sent): answered for sent, answered in lacking.items()}
    started, stop = time.monotonic(), threading.Event()

    def trickle() -> None:
        while not stop.wait(0.05):
            for one in opened:
                with contextlib.suppress(OSError):
                    one.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        for one, answered in opened.items():
            got = all_of(one)
            assert answered in got and got.count(b"HTTP/1.1") == bool(answered)
    finally:
        stop.set()
        thread.join()
        for one in opened:
            one.close()
    assert time.monotonic() - started < 3
    until(lambda: not running.server.server_state.connections and running.service.idle)


def test_silent_connections_give_way_and_others_are_told_to_come_back(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImpatientProtocol, "most", 3)
    running = serving()
    slowed(running, 0.05, endless=True)
    busy = posted({"model": "acme", "prompt": TEXT, "max_tokens": 40, "temperature": 1.0, "stream": True})
    silent = [connected(running, b"") for _ in range(3)]
    streams = [connected(running, busy) for _ in range(3)]  # each takes the place of a silent one
    try:
        assert [all_of(one) for one in silent] == [b""] * 3
        until(lambda: running.service.loop.decoder.rows == 3)
        with connected(running, WHOLE) as late:
            refused = all_of(late)
        assert b" 503 " in refused and b"too_many_connections" in refused and b"retry-after: 1" in refused.lower()
        streams[0].close()
        until(lambda: len(running.server.server_state.connections) == 2)
        with running.client() as client:
            assert client.get("/v1/models").status_code == 200
    finally:
        for one in (*silent, *streams):
            one.close()


def test_a_stream_that_nobody_reads_is_ended_and_does_not_hold_up_the_stop(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImpatientProtocol, "write_seconds", 0.3)
    running = serving()
    slowed(running, 0.05, endless=True)
    given = 0

    async def flood(self: Service, body: Any, under_way: Any, *_: Any) -> Any:
        nonlocal given
        try:
            while True:
                given += 1
                await asyncio.sleep(0)
                yield b"data: " + b"x" * 100_000 + b"\n\n"
        finally:
            self._cancel(under_way)

    monkeypatch.setattr(Service, "_events", flood)  # a model would take long to fill the buffers of the kernel
    body = {"model": "acme", "prompt": TEXT, "max_tokens": 50, "temperature": 1.0, "stream": True}
    with connected(running, posted(body)):
        until(lambda: given > 1 and running.service.loop.decoder.rows == 1)
        running.server.handle_exit(15, None)
        until(lambda: running.server.should_exit)
    assert running.service.idle and running.service.loop.decoder.rows == 0
    assert given < 1000 and running.service.loop.decoder.steps < 45


def test_what_is_not_through_when_the_grace_is_over_ends_with_an_error(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    running = serving()
    slowed(running, 0.1, endless=True)
    running.server.grace_seconds = 0.1
    body = {"model": "acme", "prompt": TEXT, "max_tokens": 50, "temperature": 1.0}
    with ThreadPoolExecutor() as pool, running.client() as client:
        whole = pool.submit(client.post, "/v1/completions", json=body)
        stream = pool.submit(client.post, "/v1/completions", json={**body, "stream": True})
        until(lambda: running.service.loop.decoder.rows == 2)
        running.server.handle_exit(15, None)
        assert "was stopped" in whole.result().text and "was stopped" in stream.result().text
    until(lambda: running.server.should_exit)
    assert not any(record.exc_info for record in caplog.records)


def test_nobody_else_is_listened_to_without_a_key() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_binding(host, 0)
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.org"):
        with pytest.raises(ConfigError, match="prefixfleet keys create"):
            check_binding(host, 0)
        check_binding(host, 1)


HOSTILE = [
    (b"{", 400),
    (b"[" * 60_000, 400),
    (b'{"model": "acme", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    (b'{"model": "acme", "prompt": "a", "temperature": NaN}', 400),
    (b'{"model": "acme", "prompt": "a", "temperature": 1e400}', 400),
    (b'{"model": "acme", "prompt": "\\ud800"}', 400),
    (b'{"model": "acme", "prompt": "\xff"}', 400),
    (b'{"model": "acme", "prompt": "a", "max_tokens": 1' + b"0" * 30 + b"}", 400),
    (b'{"model": "acme", "prompt": "a", "max_tokens": 1000000}', 400),
    (b'{"model": "acme", "prompt": "a", "max_tokens": -1}', 400),
    (b'{"model": "acme", "prompt": "a", "max_tokens": 2.5}', 400),
    (b'{"model": "acme", "prompt": "a", "max_tokens": true}', 400),
    (b'{"model": "acme", "prompt": "a", "n": 1000}', 400),
    (b'{"model": "acme", "prompt": []}', 400),
    (b'{"model": "acme", "prompt": ""}', 400),
    (b'{"model": "acme", "prompt": [999999999]}', 400),
    (b'{"model": "acme", "prompt": [[1], ["a"]]}', 400),
    (b'{"model": "acme", "prompt": "' + b"w1 " * 100 + b'"}', 400),
    (b'{"model": "acme", "prompt": "a", "stop": ""}', 400),
    (b'{"model": "acme", "prompt": "a", "presence_penalty": 0.5}', 400),
    (b'{"model": "acme", "prompt": "a", "secret \\u0000 name": 1}', 400),
    (b'{"model": 7, "prompt": "a"}', 400),
    (b'{"model": "bistro", "prompt": "a", "model": "acme"}', 400),
    (b'{"model": "acme", "prompt": "a", "logit_bias": {"7": 0, "7": 0}}', 400),
    (b"null", 400),
    (b'{"model": "acme", "prompt": "' + b"a" * 70_000 + b'"}', 413),
]


def test_hostile_requests_are_refused_in_openais_words_and_harm_nobody(fleet: Fleet, serving: Serving) -> None:
    running = serving(body_bytes=65_536)
    with running.client() as client:
        for raw, code in HOSTILE:
            found = client.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
            assert found.status_code == code, (raw[:80], found.text)
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        assert client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        assert client.get("/v1/completions").status_code == 405
        assert client.get("/v2").status_code == 404
        good = client.post("/v1/completions", json={"model": "acme", "prompt": TEXT})
        assert good.json()["choices"][0]["text"] == fleet.answer(newest(fleet, "acme"), TEXT)
        assert running.service.loop.failures == 0 and running.service.answers == 0


def test_an_answer_that_would_need_more_than_the_whole_cache_is_refused(serving: Serving) -> None:
    running = serving(cache_tokens=30, prompt_tokens=20)
    with running.client() as client:
        assert client.post("/v1/completions", json={"model": "acme", "prompt": TEXT, "max_tokens": 8}).status_code == 200
        for body in ({"prompt": TEXT, "max_tokens": 40}, {"prompt": [5] * 21}):
            refused = client.post("/v1/completions", json={"model": "acme", **body})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_body_that_does_not_come_is_not_waited_for(serving: Serving) -> None:
    running = serving(body_seconds=0.2)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert b"408" in slow.recv(1000)


def test_requests_beyond_rate_and_queue_get_429_and_when_to_come_back(serving: Serving) -> None:
    limited, key = serving([["acme"]], per_minute=2)
    with limited.client(key) as client:
        codes = [client.get("/v1/models") for _ in range(3)]
    assert [answer.status_code for answer in codes] == [200, 200, 429]
    assert 1 <= int(codes[-1].headers["Retry-After"]) <= 30


def test_one_key_leaves_places_in_the_queue_for_others(serving: Serving) -> None:
    running, greedy, second, third = serving([["*"], ["*"], ["*"]], queue=4)
    slowed(running, 0.05, endless=True)
    body = {"model": "acme", "prompt": TEXT, "temperature": 1.0}
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.client(key)) for key in (greedy, second, third)]

        def ask(client: httpx.Client, **more: Any) -> Any:
            return pool.submit(client.post, "/v1/completions", json={**body, **more})

        assert ask(clients[0], n=3, max_tokens=1).result().status_code == 400  # for good
        first = ask(clients[0], n=2, max_tokens=20)
        until(lambda: running.service.answers == 2)
        refused = ask(clients[0]).result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full") and refused.headers[
            "Retry-After"
        ] == "1"
        more = ask(clients[1], max_tokens=20)
        until(lambda: running.service.answers == 3)
        assert ask(clients[1]).result().status_code == 429
        assert ask(clients[2], max_tokens=1).result().status_code == 200
        assert first.result().status_code == more.result().status_code == 200
    until(lambda: running.service.answers == 0 and not running.service._held)


def test_the_rate_counts_answers(serving: Serving) -> None:
    now = 0.0
    rate = RateLimit(60, lambda: now)
    assert rate.take("a") == 0 and rate.take("a", 41, counted=1) == 0  # 41 of 60
    assert rate.take("a") == 0
    assert rate.take("a", 30, counted=1) == 12  # for 18 are left
    now += 12
    assert rate.take("a") == 0 and rate.take("a", 30, counted=1) == 0
    assert rate.take("b") == 0
    limited, key = serving([["acme"]], per_minute=6)
    with limited.client(key) as client:
        body = {"model": "acme", "max_tokens": 1, "temperature": 1.0}
        assert client.post("/v1/completions", json={**body, "prompt": TEXT, "n": 7}).json()["error"]["code"] == "too_many_answers"
        assert client.post("/v1/completions", json={**body, "prompt": [TEXT] * 2, "n": 2}).status_code == 200  # 5 of 6
        refused = client.post("/v1/completions", json={**body, "prompt": TEXT, "n": 2})
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "20")


def test_a_full_queue_is_told_and_the_official_client_understands(serving: Serving) -> None:
    running = serving(queue=2)
    slowed(running, 0.05)
    client = official(running)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(client.completions.create, model="acme", prompt=TEXT, max_tokens=8) for _ in range(2)]
        until(lambda: running.service.answers == 2)
        with pytest.raises(openai.RateLimitError) as told:
            client.completions.create(model="bistro", prompt=TEXT)
        assert told.value.response.headers["Retry-After"] == "1"
        assert all(answer.result().choices[0].text for answer in waiting)
    until(lambda: running.service.answers == 0)


def test_a_client_that_leaves_frees_its_rows(serving: Serving) -> None:
    running = serving()
    slowed(running, 0.05, endless=True)
    decoder = running.service.loop.decoder
    body = {"model": "acme", "prompt": TEXT, "max_tokens": 50, "temperature": 1.0}
    with running.client() as client:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as events:
            next(events.iter_lines())
            assert decoder.rows == 1
        until(lambda: decoder.rows == 0 and running.service.answers == 0)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.3)
        until(lambda: decoder.rows == 0 and running.service.answers == 0)
        assert decoder.steps < 40
    until(lambda: running.service.memory._entries[next(iter(running.service.memory._entries))].users == 0)


def test_an_answer_that_takes_too_long_ends_in_an_error_and_frees_its_rows(serving: Serving) -> None:
    running = serving(request_seconds=0.3)
    slowed(running, 0.05, endless=True)
    client = official(running)
    with pytest.raises(openai.APIStatusError) as told:
        client.completions.create(model="acme", prompt=TEXT, max_tokens=50, temperature=1.0)
    assert told.value.status_code == 504
    with pytest.raises(openai.APIError, match="too long"):
        list(client.completions.create(model="acme", prompt=TEXT, max_tokens=50, temperature=1.0, stream=True))
    until(lambda: running.service.loop.decoder.rows == 0 and running.service.answers == 0)


def test_stopping_finishes_what_runs_refuses_what_comes_and_says_so(serving: Serving) -> None:
    running = serving()
    slowed(running, 0.05, endless=True)
    client = official(running)
    with ThreadPoolExecutor() as pool, running.client() as plain:
        assert plain.get("/readyz").status_code == plain.get("/healthz").status_code == 200
        under_way = pool.submit(client.completions.create, model="acme", prompt=TEXT, max_tokens=12, temperature=1.0, seed=3)
        until(lambda: running.service.loop.decoder.rows == 1)
        running.server.handle_exit(15, None)
        until(lambda: running.service.draining)
        assert plain.get("/readyz").status_code == 503
        refused = plain.post("/v1/completions", json={"model": "acme", "prompt": TEXT})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert under_way.result().choices[0].finish_reason in ("length", "stop")
    until(lambda: running.server.should_exit)


def test_a_prefix_that_cannot_begin_fails_alone_and_is_logged(
    serving: Serving, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = serving()
    client = official(running)
    with monkeypatch.context() as patch:
        patch.setattr(running.service.loop.decoder, "_run_prompts", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the service failed"):
            client.completions.create(model="acme", prompt=TEXT)
    assert running.service.loop.failures == 1
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]  # type: ignore[index]
    assert client.completions.create(model="acme", prompt=TEXT).choices[0].text == fleet.answer(newest(fleet, "acme"), TEXT)
    assert running.service.answers == 0


def test_a_step_that_fails_ends_its_answers_with_an_error_and_the_service_goes_on(
    serving: Serving, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = serving()
    client = official(running)
    with monkeypatch.context() as patch:
        patch.setattr(running.service.loop.decoder, "_choose", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the service failed"):
            client.completions.create(model="acme", prompt=TEXT)
    assert running.service.loop.failures == 1
    assert client.completions.create(model="acme", prompt=TEXT).choices[0].text == fleet.answer(newest(fleet, "acme"), TEXT)


def test_the_log_has_no_prompt_and_no_answer_unless_asked_for(
    fleet: Fleet, serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def logged() -> str:
        return "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith(("http", "asyncio")))

    prompt, answer = "colour : blue w7 w8", fleet.answer(newest(fleet, "acme"), "colour : blue w7 w8")
    with serving().client() as client:
        client.post("/v1/completions", json={"model": "acme", "prompt": prompt})
        client.post("/v1/completions", json={"model": "acme", "prompt": prompt, "temperature": "much"})
        client.post(f"/v1/{prompt}", content=prompt)
    assert "/v1/completions 200" in logged()
    assert "w7" not in logged() and answer not in logged()
    with serving(log_texts=True).client() as client:
        client.post("/v1/completions", json={"model": "acme", "prompt": prompt})
    assert prompt in logged() and answer in logged()


def test_metrics_count_what_happened_and_name_no_customer(serving: Serving) -> None:
    running = serving()
    with running.client() as client:
        client.post("/v1/completions", json={"model": "acme", "prompt": TEXT})
        client.post("/v1/completions", json={"model": "nobody", "prompt": TEXT})
        page = client.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(figures['prefixfleet_requests_total{route="/v1/completions",status="200"}']) == 1
    assert float(figures['prefixfleet_requests_total{route="/v1/completions",status="404"}']) == 1
    assert float(figures["prefixfleet_time_to_first_token_seconds_count"]) == 1
    assert float(figures["prefixfleet_prefixes_loaded"]) == 1
    assert float(figures['prefixfleet_tokens_total{kind="completion"}']) > 0
    assert "acme" not in page


def test_no_row_gets_another_customers_prefix_under_load_promotion_and_eviction(fleet: Fleet, serving: Serving) -> None:
    """Six clients at once, memory for four of eight prefixes, or for two in use, and champions that change meanwhile."""
    texts = [f"colour : red w{i} w{i + 1}" for i in range(3)]
    allowed: dict[str, list[dict[str, str]]] = {}
    later = {}
    for i in range(4):
        name = f"load{i}"
        _, folder = fleet.register(name, 20 + i, length=3)
        later[name] = fleet.root / f"later{i}"
        from .conftest import write_prefix

        write_prefix(later[name], fleet.engine.base, fleet.base.digest, name, 40 + i, length=3)
        allowed[name] = [{t: fleet.answer(where, t) for t in texts} for where in (folder, later[name])]
    every = [answers[texts[0]] for versions in allowed.values() for answers in versions]
    assert len(set(every)) == len(every)
    size = (later["load0"] / "prefix.safetensors").stat().st_size
    running = serving(prefix_bytes=7 * size, patience_seconds=20)
    wrong: list[Any] = []
    stop = threading.Event()
    seen: dict[str, set[int]] = {name: set() for name in allowed}

    def ask(number: int) -> None:
        names = list(allowed)
        with running.client() as client:
            i = number
            while not stop.is_set():
                i += 1
                name, text = names[i % 4], texts[i % 3]
                got = client.post("/v1/completions", json={"model": name, "prompt": text}).json()
                said = got["choices"][0]["text"] if "choices" in got else got
                which = [k for k, answers in enumerate(allowed[name]) if answers[text] == said]
                seen[name].update(which)
                if not which:
                    wrong.append((name, said))

    from pipeline.registry import register_imported

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: all(0 in s for s in seen.values()) or bool(wrong))
        for folder in later.values():
            register_imported(folder, "a test", champion=True)
        until(lambda: all(1 in s for s in seen.values()) or bool(wrong))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert running.service.memory.evictions > 0
    assert running.service.memory.bytes <= 7 * size


def test_a_running_answer_keeps_the_version_that_it_began_with(fleet: Fleet, serving: Serving) -> None:
    _, before = fleet.register("switch", 60)
    running = serving()
    slowed(running, 0.05)
    client = official(running)
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(client.completions.create, model="switch", prompt=TEXT)
        until(lambda: running.service.loop.decoder.rows == 1)
        _, after = fleet.register("switch", 61)
        expected = fleet.answer(before, TEXT), fleet.answer(after, TEXT)
        assert expected[0] != expected[1]
        assert under_way.result().choices[0].text == expected[0]
    until(lambda: client.completions.create(model="switch", prompt=TEXT).choices[0].text == expected[1])
