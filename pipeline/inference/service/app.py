"""How a request goes through the service: who asks, how often, for whom, with which prefix; then it waits for the decoding thread.

In: HTTP. Out: JSON or server-sent events as OpenAI's API has them. Nothing of prompts or answers is logged unless `log_texts` is set.
"""

import asyncio
import contextlib
import copy
import json
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.data.prompt import encode_prompts, surely_longer
from pipeline.errors import BusyError, ConfigError, PrefixError, PrefixFleetError
from pipeline.inference import request as asked
from pipeline.inference.engine import PrefixEngine
from pipeline.inference.prefixes import PrefixMemory
from pipeline.inference.service.hosts import names_loopback
from pipeline.inference.service.keys import ApiKey, KeyRing
from pipeline.inference.service.limits import RateLimit
from pipeline.inference.service.loop import DecodingLoop
from pipeline.inference.service.metrics import Metrics
from pipeline.inference.service.protocol import (
    ApiError,
    Body,
    ChatBody,
    Choice,
    CompletionBody,
    Wording,
    parse_body,
    usage_of,
)
from pipeline.inference.service.registered import ModelName, Served, UnknownModelError, find_registered, model_id, open_registered
from pipeline.inference.service.turns import Turns
from pipeline.registry import ModelStatus, status
from pipeline.training.job import JobPrompt

log = logging.getLogger(__name__)

# Blocking work beside the event loop: the registry and files. Some of them wait for memory, so no key has more than half of them.
_THREADS = 32
# And tokenizing, which one key must not keep another from: each has one text at a time here.
_TOKENIZERS = 2
_MODELS_SECONDS = 5.0  # the list of models is not read from the registry more often
_UNKNOWN = "The model does not exist or you do not have access to it."


@dataclass(frozen=True)
class Limits:
    """What one service and one client may take.

    Attributes:
        rows: of a batch; a beam, or a member of an ensemble, is a row.
        cache_tokens: prompt and answer tokens of all rows together, as far as they may come.
        prompt_tokens: of one prompt; its attention grows with their square.
        prefix_bytes: of all prefixes in memory, with the copies that running rows read.
        queue: answers under way, waiting ones included; further requests get 429. Of several keys none may have all of it.
        per_minute: answers that one key asks for, a request for none being one; None for no limit.
        body_bytes: of one request.
        body_seconds: in which it must have come.
        request_seconds: in which the answer must be through.
        patience_seconds: to wait for memory for a prefix while all that is there is in use.
    """

    rows: int = 64
    cache_tokens: int = 65_536
    prompt_tokens: int = 8192
    prefix_bytes: int = 1 << 30
    queue: int = 256
    per_minute: int | None = None
    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    request_seconds: float = 120.0
    patience_seconds: float = 5.0


@dataclass(eq=False)
class _UnderWay:
    """The answers to one HTTP request; what they hold is given back when the last has ended, whoever still waits for it."""

    requests: list[asked.Request]
    served: Served
    given_back: Callable[[], None]
    left: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    def ended(self) -> None:
        """One has ended; in the thread that decodes."""
        with self.guard:
            self.left -= 1
            if self.left:
                return
        self.served.release()
        self.given_back()


class Service:
    """The service behind the routes.

    Args:
        engine: with the base that prefixes must have been trained on.
        keys: who may ask; without any key everybody may, which `pipeline.inference.service.run` allows on this machine only.
        limits: see `Limits`.
        log_texts: write prompts and answers to the log.
    """

    def __init__(self, engine: PrefixEngine, keys: KeyRing, limits: Limits, *, log_texts: bool = False) -> None:
        self.engine, self.keys, self.limits, self.log_texts = engine, keys, limits, log_texts
        self.loop = DecodingLoop(engine.decoder(limits.rows, limits.cache_tokens))
        self.memory = PrefixMemory(engine.load, limits.prefix_bytes, self.loop.decoder.bank_bytes)
        self.metrics = Metrics(self.loop, self.memory)
        self.draining = False
        self.answers = 0  # under way
        self._held: Counter[str] = Counter()  # of these, of each key
        self._connections = 0  # requests under way, to the last byte of their answers
        self._rate = RateLimit(limits.per_minute)
        self._threads = Turns(_THREADS, _THREADS // 2, "service")
        self._tokenizing = Turns(_TOKENIZERS, 1, "tokenizing")
        # One for each thread: a tokenizer that two threads use at once raises "Already borrowed".
        self._tokenizers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(_TOKENIZERS):
            self._tokenizers.put(copy.deepcopy(engine.tokenizer))
        # And one for the event loop, which must not wait until another thread has tokenized a long text.
        self._wording_tokenizer = copy.deepcopy(engine.tokenizer)
        self._listed: tuple[float, list[ModelStatus]] | None = None  # since when, and what
        self._listing: asyncio.Future[list[ModelStatus]] | None = None
        self._open = len(keys) == 0
        self._warned: set[str] = set()  # prefixes that were judged in another precision

    def warm(self) -> None:
        """Ask the registry for the first time, which imports MLflow. Blocks; what goes wrong is logged, and `/readyz` asks again."""
        with contextlib.suppress(PrefixFleetError):
            self._list()

    def start(self) -> None:
        """Begin to decode."""
        self.loop.start()

    def stop(self) -> None:
        """End; answers under way end with an error."""
        self.loop.stop()
        self._threads.shutdown()
        self._tokenizing.shutdown()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self.answers == 0 and self._connections == 0

    # Routes

    def app(self) -> ASGIApp:
        """The ASGI application."""
        app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name}", self._model),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={ApiError: _told, 404: _no_route, 405: _no_route, ClientDisconnect: _nobody, Exception: _failed},
        )
        # A path that is nearly right is a wrong one: a redirect would name whatever host the client had named.
        app.router.redirect_slashes = False
        return _Counted(app, self)

    async def _completions(self, request: Request) -> Response:
        return await self._complete(request, CompletionBody)

    async def _chat(self, request: Request) -> Response:
        return await self._complete(request, ChatBody)

    async def _healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok") if self.loop.alive else PlainTextResponse("the decoding thread has ended", 500)

    async def _readyz(self, request: Request) -> Response:
        if self.draining or not self.loop.alive:
            return PlainTextResponse("stopping" if self.draining else "the decoding thread has ended", 503)
        if self._listed is None:  # later on customers keep what they have if the registry is away
            try:
                await self._listed_models()
            except ApiError as error:
                return PlainTextResponse(str(error), error.status)
        return PlainTextResponse("ready")

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        key = self._enter(request)
        listed = await self._listed_models()
        shown = [m for m in listed if m.champion_version is not None and (key is None or key.opens(m.key.customer))]
        return JSONResponse(
            {"object": "list", "data": [_model_object(model_id(m.key), int(m.created_at.timestamp())) for m in shown]}
        )

    async def _model(self, request: Request) -> Response:
        key = self._enter(request)
        name = self._name(request.path_params["name"], key)
        holder = _holder(key)
        # It takes a place in the queue and a turn as answers do, for the registry is asked; but no prefix is loaded, and none let go for it.
        self._check_count(holder, 1)
        self._take(holder, 1)
        try:
            with _refusals(name):
                await self._threads.run(holder, find_registered, name, self.engine.base_digest)
        finally:
            self._take(holder, -1)
        return JSONResponse(_model_object(request.path_params["name"], 0))

    async def _listed_models(self) -> list[ModelStatus]:
        """What is registered, as of `_MODELS_SECONDS` ago at most. The registry is asked once, however many wait for it."""
        if self._listed is not None and time.monotonic() - self._listed[0] < _MODELS_SECONDS:
            return self._listed[1]
        if self._listing is None or self._listing.done():
            self._listing = self._threads.submit(self._list)
        try:
            return list(await asyncio.shield(self._listing))
        except PrefixFleetError as error:
            raise ApiError(503, "the registry does not answer", "registry_unavailable", retry_after=5) from error

    def _list(self) -> list[ModelStatus]:
        """Read the list. Blocks: not for the event loop."""
        try:
            found = status()
        except PrefixFleetError as error:
            log.error("listing models: %s", error)
            raise
        self._listed = time.monotonic(), found
        return found

    # A completion

    async def _complete(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        arrived = time.monotonic()
        key = self._enter(request)
        if self.draining:
            raise ApiError(503, "the service is stopping", "stopping", retry_after=5)
        body = parse_body(kind, await self._body(request))
        name = self._name(body.model, key)
        count = len(body.inputs) * body.choices
        holder = _holder(key)
        self._check_count(holder, count)
        self._take(holder, count)
        kept = False  # whether the answers have begun, and give back themselves what they hold
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.limits.request_seconds):
                served = await self._open_prefix(name, holder)
                try:
                    requests = await self._tokenizing.run(holder, self._requests, body, served)
                except BaseException:
                    served.release()
                    raise
                under_way = self._begin(body, requests, served, lambda: self._take(holder, -count))
                kept = True
                wording = Wording(isinstance(body, ChatBody), body.model, self._token_text, body.top_logprobs_wanted is not None)
                if body.stream:
                    deadline = arrived + self.limits.request_seconds
                    events = self._stream(body, under_way, wording, arrived, deadline)
                    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
                return await self._whole(request, under_way, wording, arrived)
        except TimeoutError as error:
            raise ApiError(504, "the answer took too long", "timeout") from error
        finally:
            if not kept:
                self._take(holder, -count)

    def _check_count(self, holder: str, count: int) -> None:
        """Whether so many further answers of a key may begin.

        With several keys none may have more than are then left for the others, so one alone gets half of the queue, the next half of the rest, and
        there is a place for whoever comes, however many keys there are. The last place is anybody's who has none.
        """
        queue, alone = self.limits.queue, len(self.keys) < 2
        most = min(queue if alone else max(1, queue // 2), self.limits.per_minute or queue)
        if count > most:
            raise ApiError(400, f"{count} answers are asked for, and one request may ask for {most} here", "too_many_answers")
        left = queue - self.answers - count
        if left < 0:
            raise ApiError(429, "too many requests are waiting", "queue_full", retry_after=1)
        if not alone and self._held[holder] + count > max(1, left):
            raise ApiError(429, "too many requests of this key are waiting", "queue_full", retry_after=1)
        wait = self._rate.take(holder, count, counted=1)
        if wait:
            raise ApiError(429, "too many answers in a minute", "rate_limit_exceeded", retry_after=wait)

    def _take(self, holder: str, count: int) -> None:
        """Count answers of a key as under way; a negative number gives them back."""
        self.answers += count
        self._held[holder] += count
        if not self._held[holder]:
            del self._held[holder]

    def _enter(self, request: Request) -> ApiKey | None:
        """Who asks, if keys are wanted; and whether they may ask now."""
        # What a proxy in front may have read in another way than it is read here.
        if len(request.headers.getlist("authorization")) > 1:
            raise ApiError(400, "the header Authorization stands twice", "ambiguous_request")
        if "content-length" in request.headers and "transfer-encoding" in request.headers:
            raise ApiError(400, "a body has a Content-Length or comes in chunks, not both", "ambiguous_request")
        key = None
        if not self._open or self.keys.wanted:
            scheme, _, secret = request.headers.get("authorization", "").partition(" ")
            key = self.keys.find(secret.strip()) if scheme.lower() == "bearer" else None
            if key is None:
                raise ApiError(401, "no valid API key was given in the header Authorization: Bearer …", "invalid_api_key")
        elif not names_loopback(request.headers.get("host", "")):
            # A page in somebody's browser can have its own name lead to this machine, and then reads answers as its own (DNS rebinding).
            raise ApiError(403, "without API keys the header Host must be localhost or a loopback address", "host_not_allowed")
        wait = self._rate.take("" if key is None else key.id)
        if wait:
            raise ApiError(429, "too many requests in a minute", "rate_limit_exceeded", retry_after=wait)
        return key

    async def _body(self, request: Request) -> bytes:
        """The whole body."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also keeps pages in somebody's browser from asking a service on their own machine: they cannot send this type unasked.
            raise ApiError(415, "the header Content-Type must be application/json", "unsupported_media_type")
        limit = self.limits.body_bytes
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes", "request_too_large")
        announced = request.headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced[:20]) > limit:
            raise too_large
        got = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    got += part
                    if len(got) > limit:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not come within {self.limits.body_seconds:g} seconds", "request_timeout"
            ) from error
        return bytes(got)

    def _name(self, text: str, key: ApiKey | None) -> ModelName:
        try:
            name = ModelName.parse(text)
        except UnknownModelError as error:
            raise ApiError(404, _UNKNOWN, "model_not_found", "model") from error
        # Whom a key does not open is for its holder no different from whom there is not.
        if key is not None and not key.opens(name.key.customer):
            raise ApiError(404, _UNKNOWN, "model_not_found", "model")
        return name

    async def _open_prefix(self, name: ModelName, holder: str) -> Served:
        with _refusals(name):
            served: Served = await self._threads.run(
                holder, open_registered, self.memory, name, self.limits.patience_seconds, unwanted=Served.release
            )
        self._compare_precision(served)
        return served

    def _compare_precision(self, served: Served) -> None:
        judged, digest = self.engine.other_precision(served.config), str(served.config["digest"])
        if judged is not None and digest not in self._warned:
            self._warned.add(digest)
            log.warning(
                "%s version %d was judged in %s and is served in %s: its answers may be others than those that were judged. Set dtype and "
                "quantization of base_model in the fleet file to what it was judged in, or train it anew.",
                served.key,
                served.version,
                judged,
                self.engine.precision,
            )

    def _requests(self, body: Body, served: Served) -> list[asked.Request]:
        """What the decoder is asked. In a thread, for long texts take long to tokenize."""
        config, chat = served.config, isinstance(body, ChatBody)
        prompts = self._prompts(body, config, chat)
        judged = config["generation"]
        temperature = body.drawn_at
        seed = secrets.randbits(48) if body.seed is None else body.seed
        made: list[asked.Request] = []
        for prompt in prompts:
            if len(prompt) > self.limits.prompt_tokens:
                raise self._too_long(str(len(prompt)))
            for _ in range(body.choices):
                try:
                    room = self.engine.room(served.members.length, len(prompt), body.most_tokens or judged["max_new_tokens"])
                except PrefixError as error:
                    raise ApiError(400, f"the prompt is too long: {error}", "context_length_exceeded", "prompt") from error
                if body.most_tokens is not None and room < body.most_tokens:
                    raise ApiError(
                        400,
                        f"after a prompt of {len(prompt)} tokens and the prefix the base has room for {room} more, not for {body.most_tokens}",
                        "context_length_exceeded",
                        "max_tokens",
                    )
                try:
                    how = asked.Decoding(
                        room,
                        # As the version was judged, unless the client says otherwise.
                        num_beams=judged["num_beams"] if temperature is None else 1,
                        temperature=temperature or 0.0,
                        top_p=body.top_p or 1.0,
                        top_k=body.top_k or 0,
                        seed=asked.seed_of(seed, len(made)),
                        stop=body.stops,
                        top_logprobs=body.top_logprobs_wanted,
                    )
                except ConfigError as error:
                    raise ApiError(400, str(error), "invalid_value") from error
                one = asked.Request(prompt, served.members, how)
                if one.rows * (len(prompt) + room) > self.limits.cache_tokens:
                    raise ApiError(
                        400,
                        f"prompt and answer may have {self.limits.cache_tokens // one.rows} tokens here",
                        "context_length_exceeded",
                    )
                made.append(one)
        return made

    def _too_long(self, tokens: str) -> ApiError:
        most = self.limits.prompt_tokens
        return ApiError(400, f"the prompt has {tokens} tokens, and may have {most} here", "context_length_exceeded", "prompt")

    def _prompts(self, body: Body, config: dict[str, Any], chat: bool) -> list[list[int]]:
        if chat and not self.engine.tokenizer.chat_template:
            raise ApiError(
                400, "the base has no chat template, so there are no chat completions: use /v1/completions", "no_chat_template"
            )
        if chat and not config["chat"]:
            raise ApiError(
                400, "this model was trained on texts, not on conversations: use /v1/completions", "not_a_chat_model", "model"
            )
        ids: list[list[int]] = [item for item in body.inputs if isinstance(item, list) and item and isinstance(item[0], int)]
        if ids:
            vocabulary = self.engine.base.model.get_input_embeddings().num_embeddings
            if max(max(prompt) for prompt in ids) >= vocabulary:
                raise ApiError(400, f"the base knows tokens 0 to {vocabulary - 1}", "invalid_value", "prompt")
            return ids
        inputs: Any = body.inputs  # texts or conversations, by the lines above
        prompt, most, tokenizer = JobPrompt(**config["prompt"]), self.limits.prompt_tokens, self._tokenizers.get()
        try:
            if any(surely_longer(tokenizer, prompt, config["chat"], item, most) for item in inputs):
                raise self._too_long(f"more than {most}")
            prompts = encode_prompts(tokenizer, prompt, config["chat"], inputs, self.engine.base.is_encoder_decoder)
        except TemplateError as error:
            raise ApiError(400, "the base's chat template refuses this conversation", "invalid_messages", "messages") from error
        finally:
            self._tokenizers.put(tokenizer)
        if not all(prompts):
            raise ApiError(400, "the prompt has no tokens", "invalid_value", "prompt")
        return prompts

    def _begin(self, body: Body, requests: list[asked.Request], served: Served, give_back: Callable[[], None]) -> _UnderWay:
        loop = asyncio.get_running_loop()
        under_way = _UnderWay(requests, served, lambda: _tell(loop, give_back), len(requests))
        if self.log_texts:
            log.info("asked %s version %d: %s", served.key, served.version, body.inputs)
        return under_way

    def _submit(self, under_way: _UnderWay, place: int, on_text: Callable[[str], None] | None, ended: Callable[[], None]) -> None:
        request = under_way.requests[place]

        def on_end() -> None:
            under_way.ended()
            self._note(request, under_way.served)
            ended()

        request.on_text, request.on_end = on_text, on_end
        try:
            self.loop.submit(request)
        except PrefixFleetError as error:
            # `_requests` lets nothing through that does not fit; were it otherwise, what the others hold must be given back all the same.
            request.error, request.finish_reason = str(error), "error"
            on_end()

    def _note(self, request: asked.Request, served: Served) -> None:
        if request.cause is not None:
            log.error("an answer could not begin and ended with an error", exc_info=request.cause)
            request.cause = None  # whose frames hold tensors
        self.metrics.answers.labels(request.finish_reason).inc()
        self.metrics.tokens.labels("prompt").inc(len(request.prompt_ids))
        self.metrics.tokens.labels("completion").inc(len(request.tokens))
        if self.log_texts:
            log.info("answered %s version %d: %r (%s)", served.key, served.version, request.text, request.finish_reason)

    def _cancel(self, under_way: _UnderWay) -> None:
        for request in under_way.requests:
            if request.finish_reason is None:
                self.loop.cancel(request)

    async def _whole(self, request: Request, under_way: _UnderWay, wording: Wording, arrived: float) -> Response:
        """Wait for all answers, unless the client leaves."""
        loop = asyncio.get_running_loop()
        through = asyncio.Event()
        left = len(under_way.requests)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if not left:
                through.set()

        for place in range(len(under_way.requests)):
            self._submit(under_way, place, None, lambda: _tell(loop, one_less))
        waiting, gone = asyncio.ensure_future(through.wait()), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            gone.cancel()
            self._cancel(under_way)
        if not through.is_set():
            raise ClientDisconnect
        self._see_errors(under_way.requests)
        self._note_first(under_way.requests, arrived)
        choices = [Choice(i, r.text, r.finish_reason, r.logprobs) for i, r in enumerate(under_way.requests)]
        return JSONResponse(wording.whole(choices, self._usage(under_way.requests)))

    def _stream(
        self, body: Body, under_way: _UnderWay, wording: Wording, arrived: float, deadline: float
    ) -> AsyncIterator[bytes]:
        """Begin, and give the events as they come."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        for place in range(len(under_way.requests)):

            def on_text(piece: str, place: int = place) -> None:
                _tell(loop, lambda: pieces.put_nowait((place, piece)))

            def on_end(place: int = place) -> None:
                _tell(loop, lambda: pieces.put_nowait((place, None)))

            self._submit(under_way, place, on_text, on_end)
        return self._events(body, under_way, wording, pieces, arrived, deadline)

    async def _events(
        self,
        body: Body,
        under_way: _UnderWay,
        wording: Wording,
        pieces: "asyncio.Queue[tuple[int, str | None]]",
        arrived: float,
        deadline: float,
    ) -> AsyncIterator[bytes]:
        """Pieces as they come, the counts if they were asked for, and the end mark."""
        requests = under_way.requests
        offsets, noted = [0] * len(requests), [0] * len(requests)
        begun: set[int] = set()
        left = len(requests)
        try:
            while left:
                if (
                    time.monotonic() >= deadline
                ):  # pieces that wait for a client who reads slowly give the timeout below no occasion
                    raise TimeoutError
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    place, piece = await pieces.get()
                request = requests[place]
                if piece is None:
                    left -= 1
                    if request.finish_reason == "error":
                        raise ApiError(500, str(request.error), "generation_failed")
                choice = Choice(place, piece or "", None if piece is not None else request.finish_reason)
                if wording.with_logprobs:
                    known = len(request.logprobs)
                    choice.logprobs = request.logprobs[noted[place] : known]
                    noted[place] = known
                yield _event(wording.piece(choice, offsets[place], place not in begun))
                begun.add(place)
                offsets[place] += len(choice.text)
            self._note_first(requests, arrived)
            if body.with_usage:
                yield _event(wording.counts(self._usage(requests)))
            yield b"data: [DONE]\n\n"
        except TimeoutError:
            yield _event(ApiError(504, "the answer took too long", "timeout").body())
        except ApiError as error:
            yield _event(error.body())
        finally:
            # The client has left, or all is through.
            self._cancel(under_way)

    @staticmethod
    def _see_errors(requests: Sequence[asked.Request]) -> None:
        for request in requests:
            if request.finish_reason == "error":
                raise ApiError(500, str(request.error), "generation_failed")

    def _note_first(self, requests: Sequence[asked.Request], arrived: float) -> None:
        for request in requests:
            if request.first_token_at is not None:
                self.metrics.first_token.observe(request.first_token_at - arrived)

    @staticmethod
    def _usage(requests: Sequence[asked.Request]) -> dict[str, int]:
        distinct = {id(request.prompt_ids): len(request.prompt_ids) for request in requests}
        return usage_of(sum(distinct.values()), sum(len(request.tokens) for request in requests))

    def _token_text(self, token: int) -> str:
        return str(self._wording_tokenizer.decode([token]))  # in the event loop only


class _Counted:
    """Counts requests and says one line of each, without anything that the client has chosen but the route."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, code = time.monotonic(), 0
        path = scope["path"]
        route = path if path in _ROUTES else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"

        async def noting(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        counts = route not in _QUIET
        self.service._connections += counts
        try:
            await self.app(scope, receive, noting)
        finally:
            self.service._connections -= counts
            code = code or _LEFT
            self.service.metrics.requests.labels(route, str(code)).inc()
            if counts:
                seconds = time.monotonic() - started
                self.service.metrics.duration.observe(seconds)
                log.info("%s %s %d %.0f ms", scope["method"] if route != "other" else "-", route, code, 1000 * seconds)


_LEFT = 499  # the client left before the answer; nginx says so too
_QUIET = ("/healthz", "/readyz", "/metrics")
_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", *_QUIET)


@contextlib.contextmanager
def _refusals(name: ModelName) -> Iterator[None]:
    """What the client is told of a model that cannot be had."""
    try:
        yield
    except UnknownModelError as error:
        raise ApiError(404, _UNKNOWN, "model_not_found", "model") from error
    except BusyError as error:
        log.warning("%s", error)
        raise ApiError(429, "all memory for prefixes is in use", "prefixes_busy", retry_after=1) from error
    except PrefixFleetError as error:
        log.error("%s: %s", name.key, error)
        raise ApiError(503, "the model cannot be loaded now", "model_unavailable", retry_after=5) from error


def _holder(key: ApiKey | None) -> str:
    """Under which name a key's share is counted; without keys all are one."""
    return "" if key is None else key.id


def _model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "prefixfleet"}


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """Have the event loop do something, from the thread that decodes."""
    with contextlib.suppress(RuntimeError):  # it has ended, and nobody waits any more
        loop.call_soon_threadsafe(what)


async def _left(request: Request) -> None:
    """Until the client closes the connection. Its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    code = getattr(error, "status_code", 404)
    words = "there is no such route" if code == 404 else "this route has another method"
    return JSONResponse(ApiError(code, words, "unknown_route").body(), code)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the service failed", "internal_error").body(), 500)
