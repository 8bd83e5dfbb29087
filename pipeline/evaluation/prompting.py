"""The prompt baseline: the base without prefix, told in words what a prefix would tell it.

In: an instruction, or training rows to show instead. Out: prompts as token ids. What a customer could have without any training is the fair
measure of what training gives.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from pipeline.data import Record
from pipeline.data.prompt import encode_prompts
from pipeline.training.job import JobCustomer, JobPrompt


@dataclass(frozen=True)
class Text:
    """What stands in front of every prompt.

    Attributes:
        instruction: words, or None.
        examples: training rows instead of words, the first ones first.
    """

    instruction: str | None
    examples: list[Record]

    @property
    def described(self) -> str:
        """For the report."""
        return (
            f"instruction: {self.instruction}"
            if self.instruction is not None
            else f"{len(self.examples)} training rows as examples"
        )

    @property
    def content(self) -> list[Any]:
        """For a digest."""
        return [self.instruction, [[record.prompt_ids, record.target_ids] for record in self.examples]]


def text_in_front(customer: JobCustomer, train: Sequence[Record]) -> Text:
    """The instruction of the settings, else the initial text of the prefix, else training rows drawn with the training's seed."""
    settings = customer.evaluation
    given = settings.instruction or customer.prefix.init_text
    if given is not None:
        return Text(given, [])
    drawn = random.Random(customer.training.seed).sample(range(len(train)), min(settings.prompt_examples, len(train)))
    return Text(None, [train[i] for i in drawn])


def conversation(record: Record, chat: bool) -> str | list[dict[str, str]]:
    """A record's input as `encode_prompts` takes it."""
    messages = record.fields.get("messages") if chat else None
    return messages if isinstance(messages, list) and messages else record.input


def with_text(
    text: Text,
    records: Sequence[Record],
    prompt: JobPrompt,
    chat: bool,
    tokenizer: Any,
    is_encoder_decoder: bool,
    longest: int | None,
) -> tuple[list[list[int]], int]:
    """Prompts with `text` in front.

    An instruction stands before the template, in a line of its own, or is the system message of a chat. Examples stand before the prompt as
    the model would have read and written them, with a line end between. Where all do not fit, as many as do are shown; where nothing fits,
    the plain prompt stands alone.

    Args:
        longest: tokens that a prompt may have.

    Returns:
        token ids of each record, and how many records have the plain prompt.
    """
    if text.instruction is not None:
        prompts = _instructed(text.instruction, records, prompt, chat, tokenizer, is_encoder_decoder)
        fitting = [
            own if longest is None or len(own) <= longest else r.prompt_ids for own, r in zip(prompts, records, strict=True)
        ]
        return fitting, sum(own is r.prompt_ids for own, r in zip(fitting, records, strict=True))
    shown = [_example(record, chat, tokenizer) for record in text.examples]
    prompts = []
    plain = 0
    for record in records:
        start = 1 if record.prompt_ids[:1] == [tokenizer.bos_token_id] else 0
        front: list[int] = []
        for example in shown:
            if longest is None or len(front) + len(example) + len(record.prompt_ids) <= longest:
                front += example
        plain += not front
        prompts.append([*record.prompt_ids[:start], *front, *record.prompt_ids[start:]])
    return prompts, plain


def _instructed(
    instruction: str, records: Sequence[Record], prompt: JobPrompt, chat: bool, tokenizer: Any, is_encoder_decoder: bool
) -> list[list[int]]:
    instruction = instruction.replace("{input}", "the input")  # the template's place for it is one
    more = len(tokenizer(instruction)["input_ids"]) + 8
    # The instruction is no reason to cut more of the input.
    roomy = dataclasses.replace(prompt, max_input_tokens=prompt.max_input_tokens + more)
    inputs = [conversation(record, chat) for record in records]
    if chat:
        system = [{"role": "system", "content": instruction}]
        chats = [system + (own if isinstance(own, list) else [{"role": "user", "content": own}]) for own in inputs]
        try:
            return encode_prompts(tokenizer, roomy, chat, chats, is_encoder_decoder)
        except jinja2.TemplateError:  # a template without system messages (Gemma): the first turn says it
            merged = [[{**own[1], "content": f"{instruction}\n\n{own[1]['content']}"}, *own[2:]] for own in chats]
            return encode_prompts(tokenizer, roomy, chat, merged, is_encoder_decoder)
    told = dataclasses.replace(roomy, template=f"{instruction}\n{prompt.template}")
    return encode_prompts(tokenizer, told, chat, inputs, is_encoder_decoder)


def _example(record: Record, chat: bool, tokenizer: Any) -> list[int]:
    """A training row as text: without the tokens that begin and end a sequence, and with a line end."""
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    asked, answered = record.prompt_ids, record.target_ids
    if chat:  # the template's own marks say where a turn ends
        return [*(asked[1:] if asked[:1] == [tokenizer.bos_token_id] else asked), *answered]
    line_end = [token for token in tokenizer("\n", add_special_tokens=False)["input_ids"] if token != tokenizer.unk_token_id]
    return [*(token for token in asked if token not in ends), *(token for token in answered if token not in ends), *line_end]
