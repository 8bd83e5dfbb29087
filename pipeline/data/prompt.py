"""From a record's input to the token ids that the model reads: the one place, for training, evaluation and serving alike.

Knows templates, special tokens and truncation. Knows nothing of files, splits, or the prefix.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BaseModelError, ConfigError

if TYPE_CHECKING:  # pydantic is not at hand on a bare GPU node
    from pipeline.config import PromptSettings
    from pipeline.training.job import JobPrompt

    Prompt = PromptSettings | JobPrompt

Messages = list[dict[str, str]]

# Of usual texts, or fewer: where to begin to look for the place at which a text has too many tokens.
_CHARACTERS_PER_TOKEN = 4
# A cut through a word or a run of spaces makes fewer further tokens than this.
_BORDER_TOKENS = 64
# Characters for each token that an input may have, beyond which it will hardly fit.
_FAR_TOO_LONG = 64


def load_tokenizer(base_path: Path) -> tuple[Any, bool]:
    """The base's tokenizer, and whether a pad token had to be added.

    A tokenizer without pad token gets its end token as pad: padding is masked everywhere, so any known token serves and the
    vocabulary need not grow.

    Raises:
        BaseModelError: the files are damaged, or need code of their own to load, which is never run.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise plain Exceptions for damaged files
        raise BaseModelError(f"{base_path}: its tokenizer cannot be loaded ({error}). Download the base again.") from error
    if tokenizer.pad_token_id is not None:
        return tokenizer, False
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer, True


def clean(text: str) -> str:
    """`text` without surrounding white space and with plain line ends: what every input and target goes through."""
    return text.replace("\r\n", "\n").strip()


def chat_text(messages: Messages) -> str:
    """A conversation as `role: content` lines, for people and for tokenizers without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def encode_prompt(tokenizer: Any, prompt: "Prompt", chat: bool, text: str | Messages, is_encoder_decoder: bool) -> list[int]:
    """Token ids of one prompt: `encode_prompts` for one input."""
    return encode_prompts(tokenizer, prompt, chat, [text], is_encoder_decoder)[0]


def encode_prompts(
    tokenizer: Any, prompt: "Prompt", chat: bool, inputs: Sequence[str | Messages], is_encoder_decoder: bool
) -> list[list[int]]:
    """Token ids of prompts, tokenised in one batch.

    Args:
        tokenizer: of the base.
        prompt: template, truncation side and maximum.
        chat: whether inputs are conversations. They go through the tokenizer's chat template, which then stands in for
            `prompt.template`; without one they become `role: content` lines, put in as {input}. A text is then a conversation of
            one user message.
        inputs: texts, or lists of {"role", "content"} that end where the model should go on.
        is_encoder_decoder: an encoder's input keeps the end token that its tokenizer adds; a prompt that is to be continued does
            not.

    Returns:
        Ids per input. Longer than `prompt.max_input_tokens` only if `truncation_side` is `none`, or if the template alone is
        longer.

    Raises:
        jinja2.TemplateError: the chat template refuses a conversation (say, roles that do not alternate).
    """
    rendered = [_render(tokenizer, prompt, chat, item) for item in inputs]
    special = not _templated(tokenizer, chat)
    if prompt.truncation_side == "none":
        return _encode(tokenizer, rendered, special, is_encoder_decoder)
    # What is far too long is not tokenised as a whole, of which next to nothing would be kept.
    short = [text if len(text) <= _FAR_TOO_LONG * prompt.max_input_tokens else "" for text in rendered]
    encoded = _encode(tokenizer, short, special, is_encoder_decoder)
    return [
        ids
        if len(ids) <= prompt.max_input_tokens and kept == text
        else _shortened(tokenizer, prompt, chat, item, is_encoder_decoder)
        or _encode(tokenizer, [text], special, is_encoder_decoder)[0]
        for item, text, kept, ids in zip(inputs, rendered, short, encoded, strict=True)
    ]


def surely_longer(tokenizer: Any, prompt: "Prompt", chat: bool, text: str | Messages, limit: int) -> bool:
    """Whether a prompt has more than `limit` tokens, as far as its beginning alone tells: a text of any length costs what that many tokens cost.

    Tokens are counted in a beginning that doubles, since no number of characters is a measure for every tokenizer. Where it is cut a token may
    fall into several, so it takes some more than `limit` to be sure; False says nothing. A prompt that is truncated is never too long.

    Raises:
        jinja2.TemplateError: see `encode_prompts`.
    """
    if prompt.truncation_side != "none":
        return False
    size = _CHARACTERS_PER_TOKEN * limit
    whole = _render(tokenizer, prompt, chat, text)
    while size < len(whole):
        if len(_encode(tokenizer, [whole[:size]], not _templated(tokenizer, chat), True)[0]) > limit + _BORDER_TOKENS:
            return True
        size *= 2
    return False


def encode_targets(tokenizer: Any, prompt: "Prompt", targets: Sequence[str], is_encoder_decoder: bool) -> list[list[int]]:
    """Token ids of targets, tokenised in one batch, ending with the end token if `prompt.eos`.

    A decoder-only target gets no other special token. Labels of an encoder-decoder get those of its tokenizer, since that is what
    the frozen decoder was trained to write (BART: `<s> … </s>`).

    Raises:
        ConfigError: `prompt.eos` with a tokenizer that has no end token.
    """
    end = tokenizer.eos_token_id
    if prompt.eos and end is None:
        raise ConfigError("prompt.eos is true, but the base's tokenizer has no end-of-sequence token. Set prompt.eos: false.")
    if not targets:
        return []
    if is_encoder_decoder:
        encoded = tokenizer(text_target=list(targets), verbose=False)["input_ids"]
        encoded = [ids[:-1] if ids and ids[-1] == end else ids for ids in encoded]
    else:
        encoded = tokenizer(list(targets), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*ids, end] for ids in encoded] if prompt.eos else encoded


def _templated(tokenizer: Any, chat: bool) -> bool:
    return chat and bool(tokenizer.chat_template)


def _render(tokenizer: Any, prompt: "Prompt", chat: bool, item: str | Messages) -> str:
    if not chat and not isinstance(item, str):
        raise ConfigError("this prefix was trained on texts, not on chat messages. Give the input as one text.")
    if chat:
        messages = [{"role": "user", "content": item}] if isinstance(item, str) else item
        messages = [{"role": m["role"], "content": clean(m["content"])} for m in messages]
        if tokenizer.chat_template:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        item = chat_text(messages)
    # Not str.format: braces in a customer's text or template are just text.
    return prompt.template.replace("{input}", clean(str(item)))


def _encode(tokenizer: Any, texts: list[str], special: bool, is_encoder_decoder: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    if special and not is_encoder_decoder and tokenizer.eos_token_id is not None:
        # Some tokenizers of decoder-only models end every text with the end token: nothing would follow it.
        probe = tokenizer("x")["input_ids"]
        if probe[-1] == tokenizer.eos_token_id:
            encoded = [ids[:-1] for ids in encoded]
    return encoded


def _shortened(tokenizer: Any, prompt: "Prompt", chat: bool, item: str | Messages, is_encoder_decoder: bool) -> list[int] | None:
    """The ids with the most characters of the input that fit, or None. The template and system messages stay whole.

    By bisection over characters, since no other measure exists for every tokenizer, below the first that does not fit of lengths that double:
    so a text of any length costs what its part that fits costs.
    """
    import jinja2

    def fits(kept: int) -> list[int] | None:
        try:
            text = _render(tokenizer, prompt, chat, _cut(item, kept, prompt.truncation_side))
            ids = _encode(tokenizer, [text], not _templated(tokenizer, chat), is_encoder_decoder)[0]
        except jinja2.TemplateError:  # what is left is no conversation that the template takes
            return None
        return ids if len(ids) <= prompt.max_input_tokens else None

    fitting, low, longest = None, 1, _length(item)
    high = min(longest, _CHARACTERS_PER_TOKEN * prompt.max_input_tokens)
    while high and (ids := fits(high)) is not None:
        if high == longest:
            return ids
        fitting, low, high = ids, high + 1, min(2 * high, longest)
    high -= 1
    while low <= high:
        kept = (low + high) // 2
        ids = fits(kept)
        if ids is not None:
            fitting, low = ids, kept + 1
        else:
            high = kept - 1
    return fitting


def _length(item: str | Messages) -> int:
    return len(item) if isinstance(item, str) else sum(len(m["content"]) for m in item if m["role"] != "system")


def _cut(item: str | Messages, kept: int, side: str) -> str | Messages:
    """The last (side `left`) or first (`right`) `kept` characters of a text or of a conversation's messages."""
    if isinstance(item, str):
        return item[-kept:] if side == "left" else item[:kept]
    result: Messages = []
    for message in reversed(item) if side == "left" else item:
        if message["role"] == "system":
            result.append(message)
        elif kept > 0:
            content = str(_cut(message["content"], kept, side))
            kept -= len(content)
            if content:
                result.append({**message, "content": content})
    result = result[::-1] if side == "left" else result
    # A conversation that was cut in front may not begin with an answer: templates refuse that.
    while len(result) > 1 and side == "left" and result[0]["role"] == "assistant":
        result = result[1:]
    return result
