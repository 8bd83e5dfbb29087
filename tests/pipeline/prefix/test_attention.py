"""The prefix is where the method puts it: compared with the text itself as a prompt, with PEFT, and with the plain model."""

from collections.abc import Callable

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from pipeline.errors import BaseModelError, PrefixError
from pipeline.prefix import PrefixBank, attach
from pipeline.prefix.initialise import from_random, from_zeros

from .conftest import CAUSAL, ENCODER_DECODER, VOCABULARY, tiny_model

TEXT = [5, 6, 7, 8, 9]
# Prefixes are kept in float32 while these models compute in float64.
TOLERANCE = 1e-7
Banks = Callable[..., PrefixBank]


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(10, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_untrained_text_prefix_gives_the_logits_of_that_text_as_prompt(kind: str, bank_of_text: Banks) -> None:
    model = tiny_model(kind).double().eval()
    base = attach(model)
    bank = bank_of_text(base, TEXT)
    ids = some_ids(1, 6)
    expected = model(input_ids=torch.cat([torch.tensor([TEXT]), ids], dim=1)).logits[:, len(TEXT) :]
    with base.prefixes(bank, torch.tensor([1])):
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_rows_of_a_batch_see_their_own_prefix_only_whatever_the_padding(kind: str, bank_of_text: Banks) -> None:
    model = tiny_model(kind).double().eval()
    base = attach(model)
    bank = bank_of_text(base, TEXT)
    rows = [some_ids(1, 4)[0], some_ids(1, 6)[0], some_ids(1, 5)[0]]
    slots = [1, 2, 0]
    alone = []
    for row, slot in zip(rows, slots, strict=True):
        with base.prefixes(bank, torch.tensor([slot])):
            alone.append(model(input_ids=row[None]).logits[0])
    ids = torch.full((3, 6), 1)
    for left in (True, False):
        mask = torch.zeros(3, 6, dtype=torch.int64)
        for i, row in enumerate(rows):
            where = slice(6 - len(row), 6) if left else slice(0, len(row))
            ids[i, where], mask[i, where] = row, 1
        with base.prefixes(bank, torch.tensor(slots)):
            together = model(input_ids=ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            where = slice(6 - len(row), 6) if left else slice(0, len(row))
            torch.testing.assert_close(together[i, where], alone[i], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_logits_equal_those_of_peft_prefix_tuning(kind: str) -> None:
    length, ids = 4, some_ids(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    theirs = (
        get_peft_model(tiny_model(kind), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)).double().eval()
    )
    expected = theirs(input_ids=ids, attention_mask=mask).logits[:, -6:]

    model = tiny_model(kind).double().eval()
    base = attach(model)
    # PEFT keeps [P, layers * 2 * heads * head_dim], key and value of a layer side by side.
    flat = theirs.prompt_encoder["default"].embedding.weight
    site = next(iter(base.sites.values()))
    per_layer = flat.view(length, len(base.sites), 2, site.heads, site.head_dim).permute(1, 2, 3, 0, 4)
    bank = PrefixBank(base.sites, slots=1, length=length).double()
    bank.put(0, {name: (layer[0], layer[1]) for name, layer in zip(base.sites, per_layer, strict=True)})
    # PEFT drops given positions and counts padding in front as positions; ours come from the mask unless given, so give what PEFT has.
    with base.prefixes(bank, torch.tensor([0, 0])):
        found = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(6)[None]).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", CAUSAL + ENCODER_DECODER)
@torch.no_grad()
def test_an_empty_slot_gives_the_plain_model_and_a_prefix_does_not(kind: str, bank_of_text: Banks) -> None:
    model = tiny_model(kind).double().eval()
    base = attach(model)
    bank = bank_of_text(base, TEXT)
    ids = some_ids(2, 6)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if base.is_encoder_decoder else {})
    plain = tiny_model(kind).double().eval()(**inputs).logits
    with base.prefixes(bank, torch.tensor([0, 1])):
        found = model(**inputs).logits
    torch.testing.assert_close(found[0], plain[0], atol=1e-12, rtol=0)
    assert (found[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", CAUSAL + ENCODER_DECODER)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_meets_the_same_logits_as_a_teacher_forced_pass(kind: str, beams: int, bank_of_text: Banks) -> None:
    model = tiny_model(kind).eval()  # generate keeps logits in float32
    base = attach(model)
    bank = bank_of_text(base, TEXT).float()
    ids, mask = some_ids(3, 6), torch.ones(3, 6, dtype=torch.int64)
    if not base.is_encoder_decoder:
        mask[0, :2] = 0
    slots = torch.tensor([1, 0, 2])
    with base.prefixes(bank, slots):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, pad_token_id=1,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
        if base.is_encoder_decoder:
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=out.sequences[:, :-1]).logits
        else:
            full = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
            logits = model(input_ids=out.sequences, attention_mask=full).logits[:, 5:-1]
    chosen = out.sequences[:, -5:]
    forced = logits.float().log_softmax(-1).gather(-1, chosen[..., None])[..., 0].sum(-1)
    if beams == 1:
        stepwise = torch.stack(out.scores, 1).log_softmax(-1)
        # min_new_tokens forbids the end token, which takes its share of the probability away from all others.
        forced = torch.stack([forced_without_end(logits[:, i], 2)[torch.arange(3), chosen[:, i]] for i in range(5)], 1).sum(-1)
        met = stepwise.gather(-1, chosen[..., None])[..., 0].sum(-1)
    else:
        met = out.sequences_scores * 5  # transformers divides by the length to the power of one
    torch.testing.assert_close(met, forced, atol=2e-4, rtol=0)


def forced_without_end(logits: torch.Tensor, end: int) -> torch.Tensor:
    logits = logits.float().clone()
    logits[:, end] = -torch.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize("kind", CAUSAL + ENCODER_DECODER)
def test_only_the_prefix_gets_gradient_and_checkpointing_does_not_change_it(kind: str, bank_of_text: Banks) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(kind).double()
        base = attach(model)
        bank = bank_of_text(base, TEXT)
        before = base.digest()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        ids = some_ids(2, 6)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if base.is_encoder_decoder else {})
        with base.prefixes(bank, torch.tensor([1, 2])):
            model(**inputs, use_cache=False).logits.square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        assert base.digest() == before
        assert all(p.grad is not None and p.grad[0].abs().max() == 0 and p.grad[1].abs().max() > 0 for p in bank.parameters())
        gradients.append([p.grad.clone() for p in bank.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-14, rtol=1e-12)


def test_a_model_whose_attention_takes_no_prefix_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(BaseModelError, match="bloom"):
        attach(model)


def test_a_prefix_that_passes_the_models_positions_is_refused() -> None:
    base = attach(tiny_model("llama"), max_positions=64)
    with pytest.raises(PrefixError, match="64 positions"):
        base.check_length(60, 5)
    base.check_length(60, 4)


def test_a_prefix_of_another_base_is_refused_with_both_shapes_named() -> None:
    base, other = attach(tiny_model("llama")), attach(tiny_model("gpt2"))
    bank = PrefixBank(base.sites, slots=1, length=3)
    with pytest.raises(PrefixError, match="another base"):
        bank.put(0, from_zeros(other, 3))
    wrong = {site: (key[:1], value[:1]) for site, (key, value) in from_zeros(base, 3).items()}
    with pytest.raises(PrefixError, match=r"\[1, 3, 8\].*\[2, 3, 8\]"):
        bank.put(0, wrong)
    with pytest.raises(PrefixError, match="at most 3"):
        bank.put(0, from_zeros(base, 4))


def test_random_prefix_depends_on_the_seed_alone() -> None:
    base = attach(tiny_model("llama"))
    a, b, c = (from_random(base, 3, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[s][0], b[s][0]) and not torch.equal(a[s][0], c[s][0]) for s in base.sites)


def test_what_is_put_into_a_slot_comes_out_again_and_old_columns_are_cleared() -> None:
    base = attach(tiny_model("llama"))
    bank = PrefixBank(base.sites, slots=2, length=5)
    bank.put(1, {s: (k + float("nan"), v + float("nan")) for s, (k, v) in from_zeros(base, 5).items()})
    short = from_random(base, 2, seed=3)
    bank.put(1, short)
    assert all(torch.equal(bank.take(1)[s][i], short[s][i]) for s in base.sites for i in (0, 1))
    assert not any(p.isnan().any() for p in bank.parameters())
