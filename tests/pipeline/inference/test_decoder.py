"""The decoding loop against transformers' own `generate`, one row at a time, for rows that come and go at random."""

import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.errors import ConfigError, PrefixError
from pipeline.inference.choose import draw
from pipeline.inference.decoder import Decoder
from pipeline.inference.engine import PrefixEngine
from pipeline.inference.request import NO_PREFIX, Decoding, Loaded, Members, Request
from pipeline.prefix import FrozenBase, PrefixBank, attach
from pipeline.prefix.initialise import from_random

from ..prefix.families import VOCABULARY, tiny_double, tiny_model


class Tokens:
    """A tokenizer whose text is the numbers of the tokens."""

    pad_token_id, bos_token_id, eos_token_id = 1, 0, 2

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def strong_prefixes(base: FrozenBase, count: int) -> list[Loaded]:
    """Prefixes of different lengths, each of which changes what the base says."""
    made = []
    for seed in range(count):
        prefix = {s: (k * 60, v * 60) for s, (k, v) in from_random(base.sites, 2 + 2 * seed, seed).items()}
        made.append(
            Loaded({site: (key.to(base.model.dtype), value.to(base.model.dtype)) for site, (key, value) in prefix.items()})
        )
    return made


def by_transformers(base: FrozenBase, prompt: list[int], prefix: Loaded, how: Decoding) -> list[int]:
    """The tokens that `generate` gives for this row alone."""
    bank = PrefixBank(base.sites, 1, prefix.length, dtype=base.model.dtype)
    if prefix.prefix:
        bank.put(0, prefix.prefix, prefix.infix)
    given = {name: value for name in ("length_penalty", "early_stopping") if (value := getattr(how, name)) is not None}
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens, num_beams=how.num_beams, do_sample=False, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=base.model.generation_config.decoder_start_token_id, **given,
    )  # fmt: skip
    ids = torch.tensor([prompt])
    with torch.inference_mode(), base.prefixes(bank, torch.zeros(1, dtype=torch.int64)):
        base.prompts_end_at(torch.tensor([len(prompt) - 1]))
        out = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
    out = out[1:] if base.is_encoder_decoder else out[len(prompt) :]
    return out[: out.index(2)] if 2 in out else out


def run_at_random(decoder: Decoder, requests: list[Request], seed: int) -> None:
    """Submit requests between steps, some at once and some much later."""
    drawn = random.Random(seed)
    waiting = list(requests)
    while waiting or decoder.busy:
        for _ in range(min(len(waiting), drawn.choice([0, 0, 1, 1, 4]))):
            decoder.submit(waiting.pop())
        decoder.step()


def some_requests(prefixes: list[Loaded], count: int, which: int, **how: Any) -> list[Request]:
    drawn = random.Random(which)
    return [
        Request(
            [drawn.randrange(10, VOCABULARY) for _ in range(drawn.randrange(1, 14))],
            Members((drawn.choice(prefixes),)),
            Decoding(**{"max_new_tokens": drawn.randrange(1, 12), **how}),
        )
        for _ in range(count)
    ]


# What differs between them: learned and rotary positions, sliding windows with heads of two sizes, two kinds of encoder-decoders.
_QUICK = ["gpt2", "llama", "gemma4", "bart", "t5"]
_MORE = ["opt", "mistral", "qwen2", "phi3", "gemma2", "gemma3", "gpt_oss", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", [*_QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in _MORE)])
def test_rows_that_come_and_go_get_the_tokens_that_generate_gives_them_alone(family: str) -> None:
    base = attach(tiny_double(family), max_positions=None if family == "t5" else 64)
    prefixes = [NO_PREFIX, *strong_prefixes(base, 3)]
    requests = [*some_requests(prefixes, 8, 1), *some_requests(prefixes, 3, 2, num_beams=3)]
    requests += some_requests(prefixes, 2, 3, num_beams=4, length_penalty=2.0, early_stopping=True)
    requests += some_requests(prefixes, 2, 4, num_beams=2, length_penalty=-0.5, early_stopping="never")
    random.Random(5).shuffle(requests)
    decoder = Decoder(base, Tokens(), max_rows=12, max_tokens=2000)
    run_at_random(decoder, requests, 6)
    for request in requests:
        alone = by_transformers(base, list(request.prompt_ids), request.members.prefixes[0], request.decoding)
        assert request.tokens == alone, request
        assert request.finish_reason == ("length" if len(alone) == request.decoding.max_new_tokens else "stop")
    assert decoder.row_steps > 2 * decoder.steps  # they did share batches
    assert decoder.rows == decoder.running == decoder.cache_bytes == 0


def test_an_infix_is_seen_from_the_last_prompt_token_on_also_in_a_mixed_batch() -> None:
    base = attach(tiny_double("llama"), max_positions=64)
    prefixes = strong_prefixes(base, 3)
    prefixes[1].infix = True
    requests = [*some_requests(prefixes, 8, 1), *some_requests(prefixes, 3, 2, num_beams=2)]
    run_at_random(Decoder(base, Tokens(), max_rows=12, max_tokens=2000), requests, 6)
    assert len({tuple(request.tokens) for request in requests}) > 6
    for request in requests:
        assert request.tokens == by_transformers(base, list(request.prompt_ids), request.members.prefixes[0], request.decoding)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_what_the_bases_own_generation_config_asks_for_is_done(family: str) -> None:
    model = tiny_double(family)
    settings = model.generation_config
    settings.no_repeat_ngram_size, settings.min_new_tokens, settings.repetition_penalty = 2, 4, 1.3
    settings.length_penalty, settings.early_stopping = 2.0, True
    if family == "bart":
        settings.forced_bos_token_id, settings.forced_eos_token_id = 7, 2
    base = attach(model, max_positions=64)
    prefixes = [NO_PREFIX, *strong_prefixes(base, 2)]
    requests = [*some_requests(prefixes, 6, 1), *some_requests(prefixes, 4, 2, num_beams=3)]
    run_at_random(Decoder(base, Tokens(), max_rows=12, max_tokens=2000), requests, 6)
    for request in requests:
        assert request.tokens == by_transformers(base, list(request.prompt_ids), request.members.prefixes[0], request.decoding)
        if family == "bart" and request.decoding.max_new_tokens > 1:
            assert request.tokens[0] == 7


def test_a_row_that_draws_gets_the_same_tokens_alone_and_in_any_company() -> None:
    base = attach(tiny_double("llama"), max_positions=64)
    prefixes = [NO_PREFIX, *strong_prefixes(base, 2)]
    how = {"temperature": 1.5, "top_p": 0.9, "top_k": 20}

    def asked() -> list[Request]:
        return [r for seed in range(8) for r in some_requests(prefixes, 1, 1, **how, seed=seed)]

    together, alone = asked(), asked()
    run_at_random(Decoder(base, Tokens(), max_rows=5, max_tokens=2000), [*together, *some_requests(prefixes, 6, 3)], 4)
    for request in alone:
        run_at_random(Decoder(base, Tokens(), max_rows=5, max_tokens=2000), [request], 0)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({tuple(r.tokens) for r in together}) > 4  # the seed decides


def test_drawn_tokens_are_distributed_as_transformers_draws_them() -> None:
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    for how in (
        Decoding(1, temperature=0.7),
        Decoding(1, temperature=1.3, top_k=5),
        Decoding(1, temperature=2.0, top_p=0.8, top_k=9),
    ):
        warped = TemperatureLogitsWarper(how.temperature)(None, scores)
        warped = TopKLogitsWarper(how.top_k)(None, warped) if how.top_k else warped
        expected = TopPLogitsWarper(how.top_p)(None, warped).softmax(-1)[0].double()
        # Numbers at equal distances draw every token as often as it is likely.
        count = 4000
        drawn = draw(scores.expand(count, -1), [how] * count, [(i + 0.5) / count for i in range(count)])
        found = torch.bincount(torch.tensor(drawn), minlength=12).double() / count
        assert torch.allclose(found, expected, atol=1.5 / count)


def test_a_prefix_without_numbers_ends_its_own_answer_and_nobody_elses() -> None:
    base = attach(tiny_double("llama"), max_positions=64)
    good, broken = strong_prefixes(base, 2)
    for key, _ in broken.prefix.values():
        key.fill_(float("nan"))
    mixed = some_requests([good], 6, 1)
    beside = [
        *some_requests([broken], 2, 2),
        *some_requests([broken], 1, 2, num_beams=2),
        *some_requests([broken], 1, 2, temperature=1.0),
    ]
    decoder = Decoder(base, Tokens(), max_rows=20, max_tokens=2000)
    run_at_random(decoder, [*mixed, *beside], 3)
    assert {(r.finish_reason, "no numbers" in str(r.error)) for r in beside} == {("error", True)}
    for request in mixed:
        assert request.tokens == by_transformers(base, list(request.prompt_ids), good, request.decoding)


def test_an_ensembles_next_token_is_that_of_the_averaged_distributions() -> None:
    base = attach(tiny_double("llama"), max_positions=64)
    prefixes = strong_prefixes(base, 3)

    def distributions(prompt: list[int]) -> torch.Tensor:
        """Of the next token behind each prefix, [3, vocabulary], by passes of their own."""
        found = []
        for prefix in prefixes:
            bank = PrefixBank(base.sites, 1, prefix.length, dtype=torch.float64)
            bank.put(0, prefix.prefix)
            with torch.inference_mode(), base.prefixes(bank, torch.zeros(1, dtype=torch.int64)):
                found.append(base.model(torch.tensor([prompt])).logits[0, -1].softmax(-1))
        return torch.stack(found)

    for average in ("probabilities", "log_probabilities"):
        asked = some_requests(prefixes, 4, 1, max_new_tokens=6)
        asked = [Request(r.prompt_ids, Members(tuple(prefixes), average), r.decoding) for r in asked]
        run_at_random(Decoder(base, Tokens(), max_rows=8, max_tokens=2000), [*asked, *some_requests(prefixes, 5, 2)], 3)
        for request in asked:
            sequence, by_hand = list(request.prompt_ids), []
            for _ in range(6):
                each = distributions(sequence)
                token = int((each.mean(0) if average == "probabilities" else each.log().mean(0)).argmax())
                if token == 2:
                    break
                by_hand.append(token)
                sequence.append(token)
            assert request.tokens == by_hand


def test_beams_of_an_ensemble_of_one_prefix_twice_are_those_of_the_prefix() -> None:
    base = attach(tiny_double("gpt2"), max_positions=64)
    (prefix,) = strong_prefixes(base, 1)
    same = Loaded(dict(prefix.prefix))
    how = Decoding(8, num_beams=3)
    request = Request([11, 12, 13], Members((prefix, same)), how)
    run_at_random(Decoder(base, Tokens(), max_rows=8, max_tokens=2000), [request, *some_requests([prefix], 5, 2)], 3)
    assert request.tokens == by_transformers(base, [11, 12, 13], prefix, how)


def test_cancelled_answers_free_their_rows_whether_they_run_or_wait() -> None:
    base = attach(tiny_model("llama"), max_positions=64)
    decoder = Decoder(base, Tokens(), max_rows=2, max_tokens=2000)
    asked = some_requests(strong_prefixes(base, 2), 4, 1, max_new_tokens=30)
    decoder.ends = []
    for request in asked:
        decoder.submit(request)
    decoder.step()
    assert (decoder.rows, decoder.waiting) == (2, 2)
    decoder.cancel(asked[0])
    decoder.cancel(asked[2])
    decoder.step()
    assert [r.finish_reason for r in asked] == ["cancelled", None, "cancelled", None]
    assert (decoder.rows, decoder.waiting) == (2, 0)
    while decoder.busy:
        decoder.step()
    assert [len(asked[i].tokens) for i in (1, 3)] == [30, 30]


def test_a_prefix_is_held_once_for_all_rows_of_its_customer_and_in_no_rows_cache() -> None:
    base = attach(tiny_model("llama"), max_positions=64)
    prefixes = strong_prefixes(base, 2)

    def sizes(members: list[Loaded]) -> tuple[int, int]:
        decoder = Decoder(base, Tokens(), max_rows=16, max_tokens=9999)
        decoder.ends = []
        for member in members:
            decoder.submit(Request([11, 12, 13], Members((member,)), Decoding(5)))
        decoder.step()
        return sum(tensor.nbytes for tensor in decoder._bank.tensors.values()), decoder.cache_bytes

    one, eight, none = sizes(prefixes[1:]), sizes([prefixes[1]] * 8), sizes([NO_PREFIX] * 8)
    assert one[0] == eight[0] == 2 * prefixes[1].bytes  # slot 0 is the base alone
    assert eight[1] == none[1]
    assert sizes([prefixes[1]] * 4 + [prefixes[0]] * 4)[0] == 3 * prefixes[1].bytes


def test_the_bank_takes_what_is_foretold_and_nothing_when_nobody_runs() -> None:
    base = attach(tiny_model("llama"), max_positions=64)
    prefixes = strong_prefixes(base, 9)
    numbers = random.Random(4)
    decoder = Decoder(base, Tokens(), max_rows=6, max_tokens=9999)
    running: list[Request] = []
    for _ in range(60):
        comes = numbers.random() < 0.5 and len(running) < 6
        if comes:
            running.append(Request([11, 12], Members((numbers.choice(prefixes),)), Decoding(numbers.randint(1, 9))))
            decoder.submit(running[-1])
        foretold = decoder.bank_bytes([request.members.prefixes[0] for request in running]) if running else 0
        decoder.step()
        running = [request for request in running if request.finish_reason is None]
        taken = sum(tensor.nbytes for tensor in decoder._bank.tensors.values())
        if not running:
            assert taken == 0
        elif comes:  # which is when it is laid out anew, unless that would save less than half of its width
            assert taken <= 2 * foretold


def test_rows_that_would_change_one_another_run_alone() -> None:
    base = attach(tiny_double("llama"), max_positions=64)
    base.model.is_loaded_in_8bit = True
    prefixes = strong_prefixes(base, 2)
    asked = some_requests(prefixes, 8, 1)
    decoder = Decoder(base, Tokens(), max_rows=12, max_tokens=2000)
    run_at_random(decoder, asked, 6)
    assert decoder.row_steps == decoder.steps
    for request in asked:
        assert request.tokens == by_transformers(base, list(request.prompt_ids), request.members.prefixes[0], request.decoding)


@torch.no_grad()
def test_on_a_base_that_turns_positions_by_the_longest_row_no_row_gets_so_long_that_it_changes_another() -> None:
    base = attach(tiny_double("phi3-longrope"), max_positions=64)
    assert base.max_positions == base.rotary_limit == 24
    engine = PrefixEngine(base, Tokens(), "digest")
    engine._members += [Members((member,)) for member in strong_prefixes(base, 2)]
    short, long = [11, 12, 13], [14] * 15
    answers = engine.generate([short, long], [1, 2], max_new_tokens=40)
    assert answers[0] == engine.generate([short], [1], max_new_tokens=40)[0]
    for prompt, slot, answer in zip((short, long), (1, 2), answers, strict=True):
        assert len(prompt) + engine._members[slot].length + len(answer.split()) <= 24
    losses = engine.losses([short, long], [[5, 6]] * 2, [1, 2])
    assert losses[0] == pytest.approx(engine.losses([short], [[5, 6]], [1])[0], abs=1e-12)
    too_long = [14] * 40
    for refused in (
        lambda: engine.generate([short, too_long], [1, 2], max_new_tokens=4),
        lambda: engine.losses([short, too_long], [[5, 6]] * 2, [1, 2]),
        lambda: engine.decoder().submit(Request(long, engine._members[1], Decoding(20))),
    ):
        with pytest.raises(PrefixError, match=r"pass the 24 positions of the base \(from there on.*Shorten"):
            refused()
    # Why: transformers turns the short row by the long one. Without the limit its loss is another.
    base.max_positions = 64
    beside = engine.losses([short, too_long], [[5, 6]] * 2, [1, 2])[0]
    assert abs(beside - losses[0]) > 1e-3, "if transformers turned rows one by one, the limit could go"


def test_the_smallest_temperatures_choose_what_greedy_search_chooses() -> None:
    scores = torch.tensor([[-3.0, 80.0, 79.9, 0.0]] * 3)
    for more in ({}, {"top_p": 0.9}, {"top_k": 2}):
        hows = [Decoding(1, temperature=temperature, **more) for temperature in (1e-6, 1e-40, 5e-324)]
        assert draw(scores, hows, [0.0, 0.5, 0.999999]) == [1, 1, 1]


def test_a_seed_and_its_negative_draw_different_tokens() -> None:
    base = attach(tiny_model("gpt2"), max_positions=64)
    decoder = Decoder(base, Tokens(), max_rows=4, max_tokens=999)
    decoder.ends = []
    asked = [Request([11, 12], Members((NO_PREFIX,)), Decoding(12, temperature=1.0, seed=seed)) for seed in (-3, 3, -3)]
    for request in asked:
        decoder.submit(request)
    while decoder.busy:
        decoder.step()
    assert asked[0].tokens == asked[2].tokens != asked[1].tokens


@pytest.mark.parametrize("where", ["its settings", "its prefix", "its prompt"])
def test_a_request_that_cannot_begin_ends_alone(where: str) -> None:
    base = attach(tiny_double("gpt2"), max_positions=64)
    prefixes = strong_prefixes(base, 4)
    broken = Loaded({site: (key[:, :, :-1], value) for site, (key, value) in prefixes[2].prefix.items()})
    members = [prefixes[0], prefixes[1], broken if where == "its prefix" else prefixes[2], prefixes[3]]
    ended: list[int] = []
    asked = [
        Request([11, 12 + number], Members((member,)), Decoding(6), on_end=lambda number=number: ended.append(number))
        for number, member in enumerate(members)
    ]
    decoder = Decoder(base, Tokens(), max_rows=9, max_tokens=999)
    decoder.ends = []
    lane, prompts = decoder._lane, decoder._run_prompts

    def failing_lane(request: Request, columns: int) -> Any:
        return 1 / 0 if where == "its settings" and request is asked[2] else lane(request, columns)

    def failing_prompts(ids: list[list[int]], slots: torch.Tensor) -> Any:
        return 1 / 0 if where == "its prompt" and [11, 14] in ids else prompts(ids, slots)

    decoder._lane, decoder._run_prompts = failing_lane, failing_prompts  # type: ignore[method-assign]
    decoder.submit(asked[0])
    decoder.step()  # one runs when the others come
    for request in asked[1:]:
        decoder.submit(request)
    decoder.step()
    assert ended == [2] and asked[2].finish_reason == "error" and "was to begin" in str(asked[2].error)
    while decoder.busy:
        decoder.step()
    assert decoder.failures == 1 and isinstance(asked[2].cause, PrefixError if where == "its prefix" else ZeroDivisionError)
    assert not decoder._in_bank and decoder.rows == 0
    for request, member in zip(asked, members, strict=True):
        if request is not asked[2]:
            assert request.tokens == by_transformers(base, list(request.prompt_ids), member, request.decoding)


def test_requests_that_had_no_turn_when_a_step_failed_wait_again() -> None:
    base = attach(tiny_double("gpt2"), max_positions=64)
    prefixes = strong_prefixes(base, 3)
    asked = [Request([11, 12 + number], Members((prefix,)), Decoding(3)) for number, prefix in enumerate(prefixes)]
    decoder = Decoder(base, Tokens(), max_rows=9, max_tokens=999)
    decoder.ends = []
    prompts = decoder._run_prompts
    for request in asked:
        decoder.submit(request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_run_prompts", lambda ids, slots: 1 / 0 if len(ids) > 1 else prompts(ids, slots))
        patch.setattr(decoder, "_choose", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.step()
    decoder.fail("a step failed")
    assert [request.finish_reason for request in asked] == ["error", None, None] and decoder.waiting == 2
    while decoder.busy:
        decoder.step()
    for request, prefix in zip(asked[1:], prefixes[1:], strict=True):
        assert request.tokens == by_transformers(base, list(request.prompt_ids), prefix, request.decoding)


def test_settings_that_make_no_sense_are_refused_in_words() -> None:
    for wrong in (
        {"num_beams": 2, "temperature": 1.0},
        {"top_p": 0.0},
        {"temperature": float("nan")},
        {"stop": ("",)},
        {"top_logprobs": 21},
    ):
        with pytest.raises(ConfigError):
            Decoding(3, **wrong)
    base = attach(tiny_model("gpt2"), max_positions=64)
    with pytest.raises(PrefixError, match="64 positions"):
        Decoder(base, Tokens(), max_rows=2, max_tokens=99).submit(Request([5] * 60, Members((NO_PREFIX,)), Decoding(5)))
    bart = attach(tiny_model("bart"), max_positions=64)
    with pytest.raises(PrefixError, match="64 positions"):  # of the encoder
        Decoder(bart, Tokens(), max_rows=2, max_tokens=99).submit(Request([5] * 65, Members((NO_PREFIX,)), Decoding(5)))
