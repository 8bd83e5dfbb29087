"""The prompt baseline says what a fair prompt would say, in texts and in chats, and never more than fits."""

import dataclasses
from typing import Any

import jinja2
import pytest

from pipeline.data.records import Record
from pipeline.evaluation.prompting import Text, conversation, text_in_front, with_text
from pipeline.training.job import JobPrompt

PROMPT = JobPrompt("Q: {input} A:", True, "left", 6, 10)


class Words:
    """A token for each word, its text; a chat template that can refuse system messages."""

    bos_token_id, eos_token_id, unk_token_id = "<s>", "</s>", "<unk>"

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        split = [text.replace("\n", " \n ").split(" ") for text in ([texts] if isinstance(texts, str) else texts)]
        ids = [[word for word in words if word] for words in split]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        if self.chat_template == "no system" and messages[0]["role"] == "system":
            raise jinja2.TemplateError("no system role")
        return " ".join(f"[{m['role']}] {m['content']}" for m in messages)


def told(text: Text, records: list[Record], chat: bool = False, template: str | None = None, longest: int | None = None) -> Any:
    prompts, plain = with_text(text, records, PROMPT, chat, Words(template), False, longest)
    return [" ".join(map(str, ids)) for ids in prompts], plain


def test_an_instruction_stands_before_the_template_and_cuts_nothing_of_the_input() -> None:
    record = Record([], [], "one two three four", ["x"])
    prompts, plain = told(Text("Answer this at some length please", []), [record])
    assert (prompts, plain) == (["Answer this at some length please \n Q: one two three four A:"], 0)


def test_an_instruction_is_the_system_message_of_a_chat_or_stands_in_the_first_turn() -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "now"}]
    record = Record([], [], "user: hello", ["x"], {"messages": messages})
    assert conversation(record, chat=True) == messages and conversation(record, chat=False) == "user: hello"
    roomy = dataclasses.replace(PROMPT, max_input_tokens=99)
    for template, expected in (
        ("any", "[system] Be kind [user] hello [assistant] hi [user] now"),
        ("no system", "[user] Be kind \n \n hello [assistant] hi [user] now"),
    ):
        prompts, _ = with_text(Text("Be kind", []), [record], roomy, True, Words(template), False, None)
        assert " ".join(map(str, prompts[0])) == expected


def test_examples_lose_their_ends_and_the_beginning_of_the_sequence_stays_in_front() -> None:
    examples = [Record(["<s>", "a"], ["b", "</s>"], "a", ["b"]), Record(["<s>", "c"], ["d", "e", "</s>"], "c", ["d e"])]
    record = Record(["<s>", "ask"], [], "ask", ["x"])
    assert told(Text(None, examples), [record]) == (["<s> a b \n c d e \n ask"], 0)
    assert told(Text(None, examples), [record], longest=5) == (["<s> a b \n ask"], 0)
    assert told(Text(None, examples), [record], longest=4) == (["<s> ask"], 1)


@pytest.mark.parametrize(
    ("instruction", "init_text", "expected"),
    [("say it", "old text", "instruction: say it"), (None, "old text", "instruction: old text"), (None, None, "2 training rows")],
)
def test_the_instruction_is_the_settings_else_the_initial_text_else_training_rows(
    make_job: Any, instruction: str | None, init_text: str | None, expected: str
) -> None:
    (customer,) = make_job("acme").customers
    customer = dataclasses.replace(
        customer,
        prefix=dataclasses.replace(customer.prefix, init_text=init_text),
        evaluation=dataclasses.replace(customer.evaluation, instruction=instruction),
    )
    train = [Record([1], [2], "a", ["b"]), Record([3], [4], "c", ["d"])]
    found = text_in_front(customer, train)
    assert expected in found.described
    assert text_in_front(customer, train) == found  # drawn with the seed
