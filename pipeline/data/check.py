"""From a row to an example, or to the reason why the row cannot be used. Knows columns and texts; nothing of files, tokens or
splits."""

import difflib
import json
import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.prompt import Messages, chat_text, clean
from pipeline.data.read import Row
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.config import ColumnSettings

REASONS = ("not_json", "missing_field", "empty", "wrong_type", "too_long", "control_characters", "duplicate")


class UnusableError(Exception):
    """A row cannot be used. Never leaves this room: it becomes a line of the quarantine file."""

    def __init__(self, reason: str, detail: str) -> None:
        """`reason` is one of `REASONS`."""
        assert reason in REASONS
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Example:
    """A usable row: cleaned, not yet tokenised.

    Attributes:
        row: where it comes from.
        source: the text, or the conversation before the target, that becomes the prompt.
        input: `source` as people read it.
        references: good answers, each once, at least one.
        fields: the other columns.
    """

    row: Row
    source: str | Messages
    input: str
    references: list[str]
    fields: dict[str, Any]


def is_chat(place: str, rows: Iterable[Row], columns: "ColumnSettings") -> bool:
    """Whether the rows of one source are conversations rather than inputs with targets.

    They are if the `messages` column is mapped by name, or is there and `input` with a target is not.

    Raises:
        DataError: a column that is needed stands in no row; the message names the nearest one and those there are.
    """
    there = list(dict.fromkeys(name for row in rows if row.values is not None for name in row.values))
    if not there:  # not one row could be parsed: the quarantine says more than a missing column
        return False
    pair = columns.input in there and (columns.target in there or columns.references in there)
    mapped = columns.model_fields_set
    if columns.messages in there and ("messages" in mapped or not pair):
        return True
    if pair:
        return False
    if "messages" in mapped:
        missing, setting = columns.messages, "messages"
    elif columns.input not in there:
        missing, setting = columns.input, "input"
    elif "references" in mapped and "target" not in mapped:
        missing, setting = columns.references, "references"
    else:
        missing, setting = columns.target, "target"
    near = difflib.get_close_matches(missing, there, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(repr(str(name)[:40]) for name in there[:20])
    raise DataError(
        f"{place}: no column {missing!r}.{hint} The columns there: {shown}. Set data.columns.{setting} to the one that holds it."
    )


def check_row(row: Row, columns: "ColumnSettings", chat: bool, special_tokens: list[str]) -> Example:
    """The example that a row holds.

    Args:
        row: any row.
        columns: names of the columns.
        chat: whether rows are conversations.
        special_tokens: texts that the tokenizer takes for control tokens: in a customer's text they would end or pad a sequence.

    Raises:
        UnusableError: with the reason.
    """
    if row.values is None:
        assert row.problem is not None
        raise UnusableError(*row.problem)
    used = {columns.messages} if chat else {columns.input, columns.target, columns.references}
    fields = {name: _plain(value) for name, value in row.values.items() if name not in used}
    source: str | Messages
    if chat:
        source, references = _conversation(row.values, columns.messages)
        text = chat_text(source)
        fields["messages"] = source
        named = [(f"message {i + 1}", f"{m['role']} {m['content']}") for i, m in enumerate(source)] + [
            ("the last message", references[0])
        ]
    else:
        source = text = _text(row.values.get(columns.input), columns.input)
        references = _references(row.values, columns)
        named = [(columns.input, text)] + [("a target", reference) for reference in references]
    for name, value in named:
        _check_characters(name, value, special_tokens)
    return Example(row, source, text, references, fields)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise UnusableError("missing_field", f"{name} is missing")
    if not isinstance(value, str):
        raise UnusableError("wrong_type", f"{name} is {type(value).__name__}, not a text")
    value = clean(value)
    if not value:
        raise UnusableError("empty", f"{name} is empty")
    return value


def _references(values: dict[str, Any], columns: "ColumnSettings") -> list[str]:
    """The target, then the references, each once."""
    target, references = values.get(columns.target), values.get(columns.references)
    if target is None and references is None:
        raise UnusableError("missing_field", f"neither {columns.target} nor {columns.references}")
    result = [] if target is None else [_text(target, columns.target)]
    if references is not None:
        if not isinstance(references, list):
            raise UnusableError("wrong_type", f"{columns.references} is {type(references).__name__}, not a list of texts")
        result += [_text(reference, f"{columns.references}[{i}]") for i, reference in enumerate(references)]
    if not result:
        raise UnusableError("empty", f"{columns.references} is an empty list")
    return list(dict.fromkeys(result))


def _conversation(values: dict[str, Any], name: str) -> tuple[Messages, list[str]]:
    """The messages before the last one, and the last one, which must be the assistant's."""
    messages = values.get(name)
    if messages is None:
        raise UnusableError("missing_field", f"{name} is missing")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UnusableError("wrong_type", f"{name} is not a list of objects with role and content")
    if len(messages) < 2:
        raise UnusableError("empty", f"{name} holds {len(messages)} messages; at least a question and an answer are needed")
    checked = [
        {key: _text(message.get(key), f"{key} of message {i + 1}") for key in ("role", "content")}
        for i, message in enumerate(messages)
    ]
    if checked[-1]["role"] != "assistant":
        raise UnusableError(
            "missing_field", f"the last message is by {checked[-1]['role']!r}; it must be the assistant's, which is the target"
        )
    return checked[:-1], [checked[-1]["content"]]


def _check_characters(name: str, text: str, special_tokens: list[str]) -> None:
    if not text.isprintable():  # the quick test that nearly every text passes; line breaks and rare spaces do not
        for character in text:
            category = unicodedata.category(character)
            if category == "Cs":
                raise UnusableError(
                    "control_characters", f"{name} holds bytes that are no UTF-8 text, or half of a surrogate pair"
                )
            if category == "Cc" and character not in "\t\n\r":
                raise UnusableError("control_characters", f"{name} holds the control character U+{ord(character):04X}")
    for token in special_tokens:
        if token in text:
            raise UnusableError(
                "control_characters", f"{name} holds {token}, which the base's tokenizer takes for a control token"
            )


def _plain(value: Any) -> Any:
    """`value` as something that JSON can hold in UTF-8: Parquet and hub tables also have dates, bytes, NaN and lone
    surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(_plain(str(name))): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int) else _plain(str(value))


def quarantine_line(row: Row, unusable: UnusableError) -> str:
    """One line of the quarantine file."""
    content = {
        "file": row.source,
        "line": row.line,
        "split": row.split,
        "reason": unusable.reason,
        "detail": unusable.detail,
        "row": row.raw,
    }
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"
