"""The decoding loop against transformers' own `generate`, one row at a time, for rows that come and go at random."""

import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from pipeline.inference.decoder import Decoder
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
        made.append(Loaded({site: (key.to(base.model.dtype), value.to(base.model.dtype)) for site, (key, value) in prefix.items()}))
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


def some_requests(prefixes: list[Loaded], count: int, seed: int, **how: Any) -> list[Request]:
    drawn = random.Random(seed)
    return [
        Request(
            [drawn.randrange(10, VOCABULARY) for _ in range(drawn.randrange(1, 14))],
            Members((drawn.choice(prefixes),)),
            Decoding(**{"max_new_tokens": drawn.randrange(1, 12), **how}),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "qwen2", "gemma2", "gemma3", "gemma4", "gpt_oss", "mixtral", "bart", "t5"])
def test_rows_that_come_and_go_get_the_tokens_that_generate_gives_them_alone(family: str) -> None:
    base = attach(tiny_double(family), max_positions=None if family == "t5" else 64)
    prefixes = [NO_PREFIX, *strong_prefixes(base, 3)]
    requests = [*some_requests(prefixes, 10, 1), *some_requests(prefixes, 4, 2, num_beams=3)]
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
