"""Requests and answers as OpenAI's API has them: what may stand in a request, and the JSON that goes back. Pure; knows nothing of HTTP servers.

What is not supported is refused by name, for an option that is ignored changes answers silently.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from pipeline.inference.request import TOP_LOGPROBS, FinishReason, TokenLogprob

_MOST_CHOICES = 128
_MOST_STOPS = 4


class ApiError(Exception):
    """An error for the client.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs.
        param: the part of the request that is wrong.
        retry_after: seconds after which the same may succeed.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.code == "ambiguous_request":
            headers["Connection"] = "close"  # where its body ends, and the next request begins, is not sure
        return headers if self.status != 401 else {**headers, "WWW-Authenticate": "Bearer"}

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class _StreamOptions(_Body):
    include_usage: bool = False


class _Common(_Body):
    model: Annotated[str, Field(max_length=300)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None  # not OpenAI's, but usual
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: Annotated[str, Field(min_length=1, max_length=200)] | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=_MOST_STOPS)
    ] | None = None  # fmt: skip
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    # Known to OpenAI, and only with the value that changes nothing.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # For OpenAI's own bookkeeping.
    user: Annotated[str, Field(max_length=1000)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _few_stops(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > _MOST_STOPS:
            # Here, for of a union pydantic tells first that a list is no string.
            raise ValueError(f"may be {_MOST_STOPS} strings at most, and there are {len(value)}")
        return value

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _changes_nothing(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def drawn_at(self) -> float | None:
        """The temperature to draw with; None: search as the version was judged.

        Whoever names anything that means nothing without drawing draws with OpenAI's default temperature.
        """
        if self.temperature is not None:
            return self.temperature
        means_drawing = self.top_p is not None or self.top_k is not None or self.seed is not None or self.choices > 1
        return 1.0 if means_drawing else None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_Common):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_CHOICES)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]],
            Field(min_length=1, max_length=_MOST_CHOICES),
        ]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    @field_validator("echo", "suffix")
    @classmethod
    def _not_supported(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported")
        return value

    @field_validator("best_of")
    @classmethod
    def _only_one(cls, value: int | None) -> int | None:
        if value is not None and value != 1:
            raise ValueError("is not supported")
        return value

    @property
    def inputs(self) -> list[str | list[int]]:
        """The prompts: texts, or token ids that are taken as they are."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """See `Decoding.top_logprobs`."""
        return self.logprobs


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_TextPart], Field(min_length=1)]
    name: None = None  # templates have no place for it, so one that is given is refused

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates have it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _TextFormat(_Body):
    type: Literal["text"]


class ChatBody(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    response_format: _TextFormat | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value

    @property
    def inputs(self) -> list[list[dict[str, str]]]:
        """One conversation."""
        return [[message.plain for message in self.messages]]

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """See `Decoding.top_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


Body = CompletionBody | ChatBody

_PARAMETERS = {
    name for kind in (CompletionBody, ChatBody, _Message, _TextPart, _TextFormat, _StreamOptions) for name in kind.model_fields
}


def parse_body(kind: type[CompletionBody] | type[ChatBody], raw: bytes) -> Body:
    """A request's JSON.

    Raises:
        ApiError: it is not JSON, or not such a request. The message has nothing of its content.
    """
    try:
        body = kind.model_validate_json(raw)
        json.loads(raw, object_pairs_hook=_each_once)  # valid, so neither too deep nor of another encoding
        return body
    except ValidationError as error:
        # A union complains once for each of its kinds.
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, "the body is not valid JSON in UTF-8", "invalid_json") from None
        # Without pydantic's names for the kinds of a union, and without keys that the client has chosen.
        parts = [str(part) for part in first["loc"] if isinstance(part, int) or part in _PARAMETERS]
        if first["type"] == "extra_forbidden":
            # A name that the client has chosen, cut to what a parameter may be called.
            unknown = str(first["loc"][-1])[:50]
            whole = ".".join([*(parts[:-1] if first["loc"][-1] in _PARAMETERS else parts), unknown])
            raise ApiError(400, f"unknown parameter {whole!r}", "unknown_parameter", whole) from None
        place = ".".join(parts) or None
        text = str(first["msg"]).removeprefix("Value error, ")
        raise ApiError(400, f"{place or 'the body'}: {text[:1].lower() + text[1:]}", "invalid_value", place) from None


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    """Of a name that stands twice programs take the first or the last, and not all the same: a proxy may have checked the other one."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        place = twice if twice in _PARAMETERS else None  # the others are the client's own
        raise ApiError(400, f"{place or 'a name'} stands twice in one object", "duplicate_name", place)


@dataclass
class Choice:
    """One answer as far as it is there."""

    index: int
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Wording:
    """How answers to one request are worded.

    Args:
        chat: chat completions or completions.
        model: as the client named it.
        token_text: the text of a token.
        with_logprobs: whether they were asked for.
    """

    chat: bool
    model: str
    token_text: Any
    with_logprobs: bool
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def _front(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        listed = []
        for choice in choices:
            said = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.chat
                else {"text": choice.text}
            )
            logprobs = self._logprobs(choice.logprobs, 0)
            listed.append({"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason})
        return {**self._front(False), "choices": listed, "usage": usage}

    def piece(self, choice: Choice, offset: int, first: bool) -> dict[str, Any]:
        """A further piece of a choice; `offset` is where its text begins in the whole."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if choice.text or first:
                delta["content"] = choice.text
            said: dict[str, Any] = {"delta": delta}
        else:
            said = {"text": choice.text}
        logprobs = self._logprobs(choice.logprobs, offset)
        one = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        return {**self._front(True), "choices": [one]}

    def counts(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece of a stream whose client asked for the counts."""
        return {**self._front(True), "choices": [], "usage": usage}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **self._token(one.token, one.logprob),
                        "top_logprobs": [self._token(token, logprob) for token, logprob in one.top],
                    }
                    for one in tokens
                ]
            }
        texts = [self.token_text(one.token) for one in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self.token_text(token): logprob for token, logprob in one.top} for one in tokens],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
