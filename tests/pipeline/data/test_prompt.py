"""Claims about prompts: chat templates, truncation, pad and end tokens."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import pipeline.data.prompt as prompt_module
from pipeline.config import PromptSettings
from pipeline.data import encode_prompt, load_tokenizer, prepare, read_split, stage
from pipeline.data.prompt import clean, encode_targets, surely_longer

TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def talk(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]


@pytest.fixture
def tokenizer(base):
    return load_tokenizer(base.path)[0]


def wordy(pad: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts <s> before and </s> behind every text, as BART's does."""
    words = ["<s>", "</s>", "<unk>", "a", "b", "c"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "<s>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def test_chat_goes_through_the_tokenizers_own_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    messages = [*talk(1), talk(2)[0]]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encode_prompt(tokenizer, PromptSettings(), True, messages, False) == expected
    assert encode_prompt(tokenizer, PromptSettings(), True, "Hi", False) == tokenizer("[user] Hi\n[assistant] ")["input_ids"]


def test_chat_without_a_template_is_role_and_content_lines(tokenizer):
    ids = encode_prompt(tokenizer, PromptSettings(template="{input}\nassistant:"), True, [*talk(1), talk(2)[0]], False)
    assert tokenizer.decode(ids) == "user: Question 1?\nassistant: Answer 1.\nuser: Question 2?\nassistant:"


def test_chat_rows_are_prepared_and_keep_their_messages(customer, base, tmp_path):
    rows = [{"messages": talk(i), "id": i} for i in range(8)]
    bad = [
        {"messages": talk(9)[:1]},
        {"messages": [*talk(9), talk(9)[0]]},
        {"messages": "hi"},
        {"messages": [{"role": "user"}, talk(9)[1]]},
    ]
    result = prepare(customer([*rows, *bad]), base, tmp_path / "p")
    assert result.card["prompt"]["chat"] is True
    reasons = [json.loads(line)["reason"] for line in (result.folder / "quarantine.jsonl").read_text().splitlines()]
    assert reasons == ["empty", "missing_field", "wrong_type", "missing_field"]
    for record in read_split(result.folder, "test"):
        n = record.fields["id"]
        assert record.fields["messages"] == talk(n)[:1]
        assert (record.input, record.references) == (f"user: Question {n}?", [f"Answer {n}."])


def test_a_conversation_that_the_template_refuses_costs_only_its_row(customer, base, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(base.path)[0]
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(stage, "_tokenizer", lambda path, digest: (tokenizer, False))
    rows = [{"messages": talk(i)} for i in range(5)] + [{"messages": [talk(7)[0], talk(8)[0], talk(8)[1]]}]
    result = prepare(customer(rows), base, tmp_path / "p")
    (line,) = (result.folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "wrong_type"
    assert "roles must alternate" in json.loads(line)["detail"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_the_input_on_its_side_and_keeps_the_template(side, tokenizer):
    text = " ".join(f"word{i}" for i in range(200))
    prompt = PromptSettings(template="Begin {input} end\n", truncation_side=side, max_input_tokens=50)
    ids = encode_prompt(tokenizer, prompt, False, text, False)
    shown = tokenizer.decode(ids)
    assert 45 <= len(ids) <= 50
    assert shown.startswith("Begin ")
    assert shown.endswith(" end\n")
    kept = shown.removeprefix("Begin ").removesuffix(" end\n")
    assert text.endswith(kept) if side == "left" else text.startswith(kept)


def test_a_long_chat_loses_its_oldest_turns_but_not_the_system_message(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, *(message for i in range(40) for message in talk(i)), talk(41)[0]]
    prompt = PromptSettings(truncation_side="left", max_input_tokens=40)
    ids = encode_prompt(tokenizer, prompt, True, messages, False)
    shown = tokenizer.decode(ids)
    assert len(ids) <= 40
    assert shown.startswith("system: Be kind.\nuser: ")
    assert shown.endswith("user: Question 41?\n")


def test_a_decoder_is_never_fed_an_end_token_before_its_target_but_an_encoder_is():
    tokenizer = wordy(pad=True)
    prompt = PromptSettings(template="{input}")
    assert encode_prompt(tokenizer, prompt, False, "a b", False) == [0, 3, 4]
    assert encode_prompt(tokenizer, prompt, False, "a b", True) == [0, 3, 4, 1]
    assert encode_targets(tokenizer, prompt, ["c"], False) == [[5, 1]]
    assert encode_targets(tokenizer, prompt, ["c"], True) == [[0, 5, 1]]
    assert encode_targets(tokenizer, PromptSettings(eos=False), ["c"], False) == [[5]]


def test_a_tokenizer_without_pad_token_gets_its_end_token_as_pad(tmp_path):
    wordy(pad=False).save_pretrained(tmp_path)
    tokenizer, added = load_tokenizer(tmp_path)
    assert added
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == 6


def test_what_a_long_text_costs_ends_where_it_is_too_long(tokenizer, monkeypatch):
    text = "name : The Green Door | food : Thai | " * 5000
    read = []

    def counted(tokenizer, texts, special, is_encoder_decoder):
        read.extend(map(len, texts))
        return encode(tokenizer, texts, special, is_encoder_decoder)

    encode = prompt_module._encode
    whole = encode(tokenizer, [clean(text) + "\n"], True, False)[0]
    monkeypatch.setattr(prompt_module, "_encode", counted)
    free = PromptSettings(truncation_side="none")
    assert surely_longer(tokenizer, free, False, text, 100)
    assert not surely_longer(tokenizer, free, False, text, len(whole))
    assert not surely_longer(tokenizer, free, False, " " * 100_000 + "Thai", 100)
    assert not surely_longer(tokenizer, PromptSettings(truncation_side="left"), False, text, 100)
    read.clear()
    for side in ("left", "right"):
        cut = PromptSettings(truncation_side=side, max_input_tokens=50)
        ids = encode_prompt(tokenizer, cut, False, text, False)
        assert 45 < len(ids) <= 50
    assert sum(read) < 10_000
