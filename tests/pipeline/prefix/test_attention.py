"""The prefix is where the method puts it: compared with its text as a prompt, with PEFT, with a computation by hand, with the plain model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from pipeline.errors import BaseModelError, PrefixError
from pipeline.prefix import FrozenBase, Prefix, PrefixBank, attach, attention, kernels
from pipeline.prefix import base as prefix_base
from pipeline.prefix.initialise import chosen_sites, from_random, from_text, from_zeros

from .families import (
    CAUSAL,
    EAGER_ONLY,
    ENCODER_DECODER,
    EXPERTS,
    ONE_SIZE,
    VOCABULARY,
    padded,
    some_ids,
    tiny_double,
    tiny_model,
)

TEXT = [5, 6, 7, 8, 9]
# Gemma 2's own eager attention takes its softmax in float32 even in a float64 model.
TOLERANCE = dict.fromkeys(CAUSAL + ENCODER_DECODER, 1e-12) | {"gemma2": 2e-6}
Banks = Callable[..., PrefixBank]


def inputs_for(base: FrozenBase, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if base.is_encoder_decoder else {})


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_untrained_text_prefix_gives_the_logits_of_that_text_as_prompt(family: str, bank_of_text: Banks) -> None:
    model = tiny_double(family)
    base = attach(model)
    bank = bank_of_text(base, TEXT)
    ids = some_ids(1, 6)
    expected = model(input_ids=torch.cat([torch.tensor([TEXT]), ids], dim=1)).logits[:, len(TEXT) :]
    with base.prefixes(bank, torch.tensor([1])):
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE[family], rtol=0)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_rows_of_a_batch_see_their_own_prefix_only_whatever_the_padding(family: str, bank_of_text: Banks) -> None:
    model = tiny_double(family)
    base = attach(model)
    bank = bank_of_text(base, TEXT)
    rows = [some_ids(1, 4)[0], some_ids(1, 6)[0], some_ids(1, 5)[0]]
    slots = [1, 2, 0]
    alone = []
    for row, slot in zip(rows, slots, strict=True):
        with base.prefixes(bank, torch.tensor([slot])):
            alone.append(model(input_ids=row[None]).logits[0])
    for left in (True, False):
        ids, mask, where = padded(rows, left)
        with base.prefixes(bank, torch.tensor(slots)):
            together = model(input_ids=ids, attention_mask=mask).logits
        for i in range(3):
            torch.testing.assert_close(together[i, where[i]], alone[i], atol=TOLERANCE[family], rtol=0)


@pytest.mark.parametrize("family", ONE_SIZE)
@torch.no_grad()
def test_logits_equal_those_of_peft_prefix_tuning(family: str) -> None:
    length = 4
    theirs = get_peft_model(tiny_double(family), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    theirs = theirs.double().eval()
    model = tiny_double(family)
    base = attach(model)
    # PEFT keeps [P, layers * 2 * heads * head_dim], key and value of a layer side by side.
    flat = theirs.prompt_encoder["default"].embedding.weight
    site = next(iter(base.sites.values()))
    per_layer = flat.view(length, len(base.sites), 2, site.heads, site.head_dim).permute(1, 2, 3, 0, 4)
    bank = PrefixBank(base.sites, slots=1, length=length, dtype=torch.float64)
    bank.put(0, {name: (layer[0], layer[1]) for name, layer in zip(base.sites, per_layer, strict=True)})
    for left in (True, False):
        ids, mask, _ = padded([some_ids(1, 6)[0], some_ids(1, 4)[0]], left)
        expected = theirs(input_ids=ids, attention_mask=mask).logits[:, -6:]
        # PEFT drops given positions and counts padding in front as positions; ours come from the mask unless given, so give what PEFT has.
        given = {} if family == "opt" else {"position_ids": torch.arange(6)[None]}
        with base.prefixes(bank, torch.tensor([0, 0])):
            found = model(input_ids=ids, attention_mask=mask, **given).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=TOLERANCE[family], rtol=0)


def concatenating(prefix: Prefix) -> Callable[..., Any]:
    """Attention by hand for an encoder-decoder in eval mode, in the order of its calls: keys and values concatenated, softmax, product."""
    pairs = list(prefix.values())
    calls = iter(range(10**6))

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> Any:
        number = next(calls)
        site, (ours_key, ours_value) = list(prefix)[number], pairs[number]
        batch, length, columns = len(query), query.shape[2], ours_key.shape[1]
        key = torch.cat([ours_key.expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([ours_value.expand(batch, -1, -1, -1), value], 2)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        scores = query @ key.transpose(2, 3) * scale
        bias = kwargs.get("position_bias")
        if bias is not None and site.startswith("decoder.self"):
            # T5: as if prefix and sequence were one sequence.
            first = next(m for m in attend.model.decoder.modules() if getattr(m, "has_relative_attention_bias", False))  # type: ignore[attr-defined]
            scores = scores + first.compute_bias(columns + length, columns + length)[:, :, columns:]
        elif bias is not None:
            scores[..., columns:] += bias
        if mask is not None:
            scores[..., columns:] += mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    return attend


@pytest.mark.parametrize("family", ENCODER_DECODER)
@torch.no_grad()
def test_encoder_decoder_equals_a_computation_by_hand(family: str) -> None:
    ids, mask, _ = padded([some_ids(1, 6)[0], some_ids(1, 4)[0]], left=False)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": some_ids(2, 5)}
    base = attach(tiny_double(family))
    prefix = {s: (k.double() * 30, v.double() * 30) for s, (k, v) in from_random(base.sites, 4, seed=1).items()}
    bank = PrefixBank(base.sites, slots=1, length=4, dtype=torch.float64)
    bank.put(0, prefix)
    with base.prefixes(bank, torch.tensor([0, 0])):
        found = base.model(**inputs).logits

    oracle = concatenating(prefix)
    AttentionInterface.register("concatenating", oracle)
    AttentionMaskInterface.register("concatenating", eager_mask)
    model = tiny_double(family)
    oracle.model = model  # type: ignore[attr-defined]
    model.set_attn_implementation("concatenating")
    if family == "bart":  # absolute positions of the decoder begin after the prefix
        table = model.model.decoder.embed_positions
        table.register_forward_hook(lambda m, *_: m.weight[torch.arange(5) + m.offset + 4][None])
    torch.testing.assert_close(found, model(**inputs).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", CAUSAL + ENCODER_DECODER)
@torch.no_grad()
def test_an_empty_slot_gives_the_plain_model_and_a_prefix_does_not(family: str, bank_of_text: Banks) -> None:
    model = tiny_double(family)
    base = attach(model)
    bank = bank_of_text(base, TEXT)
    inputs = inputs_for(base, some_ids(2, 6))
    plain = tiny_double(family)(**inputs).logits
    with base.prefixes(bank, torch.tensor([0, 1])):
        found = model(**inputs).logits
    torch.testing.assert_close(found[0], plain[0], atol=TOLERANCE[family], rtol=0)
    assert (found[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", [f for f in CAUSAL + ENCODER_DECODER if f not in EAGER_ONLY])
@torch.no_grad()
def test_eager_and_sdpa_agree(family: str, bank_of_text: Banks) -> None:
    found = []
    for kind in ("sdpa", "eager"):
        base = attach(tiny_double(family), attention=kind)
        assert base.active.kernel == kind
        with base.prefixes(bank_of_text(base, TEXT), torch.tensor([1, 2])):
            found.append(base.model(**inputs_for(base, some_ids(2, 6))).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)  # eager functions take their softmax in float32


@pytest.mark.parametrize("family", CAUSAL + ENCODER_DECODER)
@torch.no_grad()
def test_bfloat16_is_within_three_percent_of_float32(family: str, bank_of_text: Banks) -> None:
    # Of the largest logit; gemma4, which has twice the norms of others, six. In mixtures of experts every token goes to all, for rounding sends it
    # to another one now and then.
    everybody = {"num_experts_per_tok": 4} if family in EXPERTS else {}
    exact, rounded = (attach(tiny_model(family, **everybody).to(dtype).eval()) for dtype in (torch.float32, torch.bfloat16))
    prefix = from_text(exact, TEXT, 5)
    found = []
    for base in (exact, rounded):
        bank = PrefixBank(base.sites, slots=1, length=5)
        bank.put(0, prefix)
        with base.prefixes(bank, torch.tensor([0, 0])):
            found.append(base.model(**inputs_for(base, some_ids(2, 6))).logits.float())
    assert (found[0] - found[1]).abs().max() < (0.06 if family == "gemma4" else 0.03) * found[0].abs().max()


@pytest.mark.parametrize("family", CAUSAL + ENCODER_DECODER)
@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
@torch.no_grad()
def test_generation_meets_the_same_logits_as_a_teacher_forced_pass(family: str, how: str, bank_of_text: Banks) -> None:
    model = tiny_model(family).eval()  # generate keeps logits in float32
    base = attach(model)
    bank = bank_of_text(base, TEXT, torch.float32)
    ids, mask = some_ids(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[0, :2] = 0
    if base.is_encoder_decoder:
        ids, mask = ids.flip(1), mask.flip(1)
    torch.manual_seed(3)
    how_to = {"do_sample": how == "sampled", "top_k": 0, "num_beams": 3 if how == "beams" else 1}
    with base.prefixes(bank, torch.tensor([1, 0, 2])):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, **how_to, pad_token_id=1,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
        if base.is_encoder_decoder:
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=out.sequences[:, :-1]).logits
        else:
            full = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
            logits = model(input_ids=out.sequences, attention_mask=full).logits[:, 5:-1]
    chosen = out.sequences[:, -5:]
    forced = logits.float().log_softmax(-1).gather(-1, chosen[..., None])[..., 0].sum(-1)
    if how == "beams":
        met = out.sequences_scores * 5  # transformers divides by the length to the power of one
    else:
        # min_new_tokens forbids the end token, which takes its share of the probability away from all others.
        forced = without_end(logits, 2).log_softmax(-1).gather(-1, chosen[..., None])[..., 0].sum(-1)
        met = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, chosen[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(met, forced, atol=2e-4, rtol=0)


def without_end(logits: torch.Tensor, end: int) -> torch.Tensor:
    logits = logits.float().clone()
    logits[..., end] = -torch.inf
    return logits


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3", "gemma4", "gpt_oss"])
@torch.no_grad()
def test_a_prefix_stays_visible_beyond_a_sliding_window_and_generation_agrees(family: str) -> None:
    model = tiny_model(family).eval()
    base = attach(model)
    prefix = from_text(base, TEXT, 5)
    # Only a layer with a window, and no layer above it, so that nothing but its own attention can carry the prefix to the last token.
    windowed = base.model.config.layer_types.index("sliding_attention") if family != "mistral" else 0
    site = f"decoder.self.{windowed}"
    bank = PrefixBank(base.sites, slots=2, length=5)
    bank.put(0, {site: prefix[site]})
    bank.put(1, {site: (prefix[site][0], prefix[site][1] + 1.0)})
    ids = some_ids(1, 30)  # the window is 16
    outputs: list[torch.Tensor] = []
    layer = base.model.model.layers[windowed].self_attn
    layer.register_forward_hook(lambda _m, _a, output: outputs.append(output[0]))
    for slot in (0, 1):
        with base.prefixes(bank, torch.tensor([slot])):
            model(input_ids=ids)
    assert (outputs[0] - outputs[1]).abs().amax(-1).min() > 1e-3  # of every query, the last ones too
    with base.prefixes(bank, torch.tensor([0])):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
                             pad_token_id=1, return_dict_in_generate=True, output_logits=True)  # fmt: skip
        forced = model(input_ids=out.sequences).logits[:, 29:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), forced, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", CAUSAL + ENCODER_DECODER)
def test_only_the_prefix_gets_gradient_and_checkpointing_does_not_change_it(family: str, bank_of_text: Banks) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_double(family)
        base = attach(model)
        bank = bank_of_text(base, TEXT)
        for tensor in bank.tensors.values():
            tensor.requires_grad_()
        before = base.digest()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        with base.prefixes(bank, torch.tensor([1, 2])):
            model(**inputs_for(base, some_ids(2, 6)), use_cache=False).logits.square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        assert base.digest() == before
        grads = [tensor.grad for tensor in bank.tensors.values()]
        assert all(g is not None and g[0].abs().max() == 0 and g[1].abs().max() > 0 for g in grads)
        gradients.append(grads)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
@torch.no_grad()
def test_an_infix_is_seen_from_the_last_prompt_token_on_and_shifts_the_target_only(family: str) -> None:
    """By hand: the columns in the model's own cache, a mask that says who sees them, positions written out."""
    prompts, whole = [4, 2], [some_ids(1, 7)[0], some_ids(1, 5)[0]]
    ids, mask, where = padded(whole, left=True)
    model = tiny_double(family)
    base = attach(model)
    infix = from_text(base, TEXT, 5)
    bank = PrefixBank(base.sites, slots=1, length=5, dtype=torch.float64)
    bank.put(0, infix, infix=True)
    ends = torch.tensor([w.start + n - 1 for w, n in zip(where, prompts, strict=True)])
    with base.prefixes(bank, torch.tensor([0, 0])):
        base.prompts_end_at(ends)
        found = model(input_ids=ids, attention_mask=mask).logits
    plain = tiny_double(family)
    plain.set_attn_implementation("eager")
    for i, (row, n) in enumerate(zip(whole, prompts, strict=True)):
        cache = DynamicCache()
        for layer, (key, value) in enumerate(infix.values()):
            cache.update(key[None], value[None], layer)
        length = len(row)
        seen = torch.ones(length, 5 + length).tril(5).bool()
        seen[: n - 1, :5] = False
        additive = torch.zeros(1, 1, length, 5 + length, dtype=torch.float64).masked_fill(~seen, -1e9)
        per_kind = {"full_attention": additive, "sliding_attention": additive}
        positions = torch.cat([torch.arange(n), torch.arange(n, length) + 5])[None]
        expected = plain(input_ids=row[None], attention_mask=per_kind if family == "gemma3" else additive, position_ids=positions,
                         past_key_values=cache).logits[0]  # fmt: skip
        torch.testing.assert_close(found[i, where[i]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "gemma3"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_with_an_infix_agrees_with_a_teacher_forced_pass(family: str, beams: int) -> None:
    model = tiny_model(family).eval()
    base = attach(model)
    bank = PrefixBank(base.sites, slots=3, length=5)
    bank.put(1, from_text(base, TEXT, 5), infix=True)
    bank.put(2, from_text(base, TEXT[:3], 3))  # a customer with a plain prefix in the same batch
    ids, mask, _ = padded([some_ids(1, 20)[0], some_ids(1, 18)[0], some_ids(1, 19)[0]], left=True)
    with base.prefixes(bank, torch.tensor([1, 1, 2])):
        base.prompts_end_at(torch.full((3,), 19))
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams,
                             pad_token_id=1, return_dict_in_generate=True, output_scores=True)  # fmt: skip
        full = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
        logits = model(input_ids=out.sequences, attention_mask=full).logits[:, 19:-1]
    chosen = out.sequences[:, -5:, None]
    if beams == 1:
        met = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, chosen)[..., 0].sum(-1)
        forced = without_end(logits, 2).log_softmax(-1).gather(-1, chosen)[..., 0].sum(-1)
    else:
        met, forced = out.sequences_scores * 5, logits.float().log_softmax(-1).gather(-1, chosen)[..., 0].sum(-1)
    torch.testing.assert_close(met, forced, atol=2e-4, rtol=0)


def test_an_infix_without_the_ends_of_the_prompts_is_an_error() -> None:
    base = attach(tiny_model("gpt2"))
    bank = PrefixBank(base.sites, slots=1, length=2)
    bank.put(0, from_zeros(base.sites, 2), infix=True)
    with base.prefixes(bank, torch.tensor([0])), pytest.raises(PrefixError, match="prompts_end_at"):
        base.model(input_ids=some_ids(1, 3))


def test_a_number_of_rows_that_stands_for_no_prefixes_is_an_error_with_a_remedy() -> None:
    base = attach(tiny_model("llama"))
    bank = PrefixBank(base.sites, slots=1, length=2)
    bank.put(0, from_zeros(base.sites, 2))
    for rows in ([0, 0], []):
        said = rf"3 rows and .* given {len(rows)}: name one slot .* for each row"
        with base.prefixes(bank, torch.tensor(rows, dtype=torch.int64)), pytest.raises(PrefixError, match=said):
            base.model(input_ids=some_ids(3, 4))


def test_a_model_that_has_the_hook_is_refused_as_such_and_works_on() -> None:
    base = attach(tiny_model("llama"))
    before = base.model(input_ids=some_ids(1, 4)).logits
    with pytest.raises(BaseModelError, match=r"llama.*has the prefix hook already.*load the model again"):
        attach(base.model)
    assert torch.equal(base.model(input_ids=some_ids(1, 4)).logits, before)
    with pytest.raises(BaseModelError, match=r"attention: 'fast' is no kernel.*sdpa"):
        attach(tiny_model("llama"), attention="fast")


def test_heads_may_differ_in_number_and_size_from_layer_to_layer() -> None:
    shapes = {(site.heads, site.head_dim) for site in attach(tiny_model("gemma4")).sites.values()}
    assert shapes == {(2, 8), (1, 16)}
    of_bart = attach(tiny_model("bart")).sites
    assert (of_bart["encoder.self.0"].heads, of_bart["decoder.cross.0"].heads) == (2, 4)


@pytest.mark.parametrize("kind", ["decoder.self", "encoder.self", "decoder.cross"])
@pytest.mark.parametrize("family", ENCODER_DECODER)
@torch.no_grad()
def test_each_kind_of_attention_can_have_a_prefix_alone(family: str, kind: str) -> None:
    base = attach(tiny_double(family))
    sites = chosen_sites(base, [kind], "all")
    assert sites and all(name.startswith(kind) for name in sites)
    bank = PrefixBank(base.sites, slots=1, length=3, dtype=torch.float64)
    bank.put(0, {name: pair for name, pair in from_text(base, TEXT, 3).items() if name in sites})
    ids = some_ids(1, 6)
    with base.prefixes(bank, torch.tensor([0])):
        found = base.model(input_ids=ids, decoder_input_ids=ids[:, :4])
    plain = tiny_double(family)(input_ids=ids, decoder_input_ids=ids[:, :4])
    changed = (found.encoder_last_hidden_state - plain.encoder_last_hidden_state).abs().max()
    assert (changed > 1e-3) == (kind == "encoder.self")
    assert (found.logits - plain.logits).abs().max() > 1e-4


@torch.no_grad()
def test_only_the_top_layers_can_have_a_prefix() -> None:
    base = attach(tiny_double("llama"))
    assert list(chosen_sites(base, "all", 2)) == ["decoder.self.1", "decoder.self.2"]
    assert list(chosen_sites(attach(tiny_model("bart")), "all", 1)) == ["encoder.self.1", "decoder.self.2", "decoder.cross.2"]
    bank = PrefixBank(base.sites, slots=2, length=3, dtype=torch.float64)
    prefix = from_text(base, TEXT, 3)
    bank.put(0, {"decoder.self.2": prefix["decoder.self.2"]})
    bank.put(1, prefix)
    assert list(bank.take(0)) == ["decoder.self.2"]
    states = []
    for slot in (0, 1):
        with base.prefixes(bank, torch.tensor([slot])):
            states.append(base.model(input_ids=some_ids(1, 4), output_hidden_states=True).hidden_states)
    plain = tiny_double("llama")(input_ids=some_ids(1, 4), output_hidden_states=True).hidden_states
    # Below the top layer nothing changes, up to the rounding of rotary angles, which transformers takes in float32.
    torch.testing.assert_close(states[0][2], plain[2], atol=2e-6, rtol=0)
    assert (states[0][3] - plain[3]).abs().max() > 1e-3 and (states[1][1] - plain[1]).abs().max() > 1e-3
    with pytest.raises(PrefixError, match=r"layers is 4.*3 layers"):
        chosen_sites(base, "all", 4)
    with pytest.raises(PrefixError, match=r"no encoder\.self; it has decoder\.self"):
        chosen_sites(base, ["encoder.self"], "all")


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("GPTJConfig", "GPTJForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
        ("FalconConfig", "FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),  # ALiBi
    ],
)
def test_a_model_whose_attention_takes_no_prefix_is_refused(config: str, model: str, settings: dict[str, Any]) -> None:
    built = getattr(transformers, model)(getattr(transformers, config)(vocab_size=VOCABULARY, **settings))
    with pytest.raises(BaseModelError, match=rf"{built.config.model_type}.*Supported are.*Llama"):
        attach(built)


def test_a_model_whose_keys_and_values_differ_in_size_is_refused() -> None:
    # DeepSeek's latent attention: no Prefix of [heads, P, head_dim] twice can stand before it.
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(BaseModelError, match=r"deepseek_v3.*Supported are.*Llama"):
        attach(transformers.DeepseekV3ForCausalLM(config))


GEMMA_PART = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 16}  # fmt: skip
TINY = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 1, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        # The encoder does not dispatch, the decoder does: prefixes of the encoder would be left out without a word.
        ("LongT5Config", "LongT5ForConditionalGeneration", {**TINY, "num_layers": 2}),
        # Its bias function takes other arguments.
        ("UMT5Config", "UMT5ForConditionalGeneration", {**TINY, "num_layers": 2}),
        # Its masks are numbers.
        ("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration",
         {**TINY, "num_layers": 2, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
        # Rotary positions on both sides: those of the decoder alone cannot be shifted.
        ("T5GemmaConfig", "T5GemmaForConditionalGeneration", {"encoder": GEMMA_PART, "decoder": GEMMA_PART}),
    ],
)  # fmt: skip
def test_an_encoder_decoder_that_is_only_like_t5_is_refused(config: str, model: str, settings: dict[str, Any]) -> None:
    built = getattr(transformers, model)(getattr(transformers, config)(vocab_size=VOCABULARY, **settings))
    with pytest.raises(BaseModelError, match=rf"{built.config.model_type}.*(Supported are|Choose a BART- or T5-like)"):
        attach(built)


def test_a_t5_with_unequal_parts_takes_prefixes_everywhere() -> None:
    base = attach(
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=VOCABULARY, num_layers=2, num_decoder_layers=3, **TINY)
        )
    )
    kinds = [name.rpartition(".")[0] for name in base.sites]
    assert {kind: kinds.count(kind) for kind in kinds} == {"encoder.self": 2, "decoder.self": 3, "decoder.cross": 3}


def test_a_mask_that_is_added_to_the_scores_is_refused(bank_of_text: Callable[..., PrefixBank]) -> None:
    base = attach(tiny_double("llama"))
    bank = bank_of_text(base, [5, 6, 7])
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)
    with base.prefixes(bank, torch.tensor([1])), pytest.raises(PrefixError, match="added to the scores"):
        base.model(input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=mask)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_of_a_few_positions_are_those_of_the_whole_pass(
    family: str, checkpointing: bool, bank_of_text: Callable[..., PrefixBank]
) -> None:
    base = attach(tiny_double(family))
    if checkpointing:
        base.checkpoint_gradients()
    bank = bank_of_text(base, TEXT)
    for tensor in bank.tensors.values():
        tensor.requires_grad_()
    ids, positions = some_ids(2, 7), torch.tensor([2, 3, 9, 13])
    weights = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)
    found = []
    for few in (True, False):
        with base.prefixes(bank, torch.tensor([1, 2])):
            if few:
                # Some positions twice, as training fills them up.
                base.logits_only_at(torch.cat([positions, positions[:1].expand(4)]))
            logits = base.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            logits = logits[:4] if few else logits[positions]
            gradients = torch.autograd.grad((logits * weights).square().sum(), list(bank.tensors.values()))
        found.append([logits, *gradients])
    for of_few, of_all in zip(*found, strict=True):
        torch.testing.assert_close(of_few, of_all, atol=max(1e-9, TOLERANCE[family]), rtol=1e-9)


# What may go wrong in a hook, each caught by another part of the check at attach time.


def test_the_check_finds_a_kernel_that_aligns_its_triangle_to_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    # What transformers' SDPA function does when it gets no mask: a triangle aligned to the prefix, keys cropped.
    def without_mask(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, **kwargs: Any) -> Any:
        return sdpa(module, query, key, value, None, **kwargs)

    sdpa = kernels.sdpa_attention_forward
    monkeypatch.setattr(kernels, "sdpa_attention_forward", without_mask)
    with pytest.raises(BaseModelError, match=r"llama.*check of the prefix hook failed.*off the logits with attention by hand"):
        attach(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma2", *EXPERTS, "bart"])
def test_the_check_finds_positions_that_are_not_shifted(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_base, "_shift_positions", lambda base: None)
    with pytest.raises(
        BaseModelError, match=rf"{family}.*failed \(.*off the (logits|queries|decoder input) with the text as a prompt\)"
    ):
        attach(tiny_model(family).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["zeros", "constant", "one position off"])
def test_the_check_finds_relative_positions_that_are_wrong(
    wrong: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = attention._bias_of_prefix
    instead = {
        "zeros": lambda *given: torch.zeros_like(true(*given)),
        "constant": lambda *given: true(*given) + 7,
        "one position off": lambda module, bias, lengths, *rest: true(module, bias, lengths + 1, *rest),
    }
    monkeypatch.setattr(attention, "_bias_of_prefix", instead[wrong])
    with pytest.raises(BaseModelError, match=r"t5.*failed \(.*attention \S+ off the computation by hand"):
        attach(tiny_model("t5").to(dtype))


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bart"])
def test_the_check_finds_a_prefix_that_some_layers_never_see(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = prefix_base._find_sites

    def one_forgotten(base: FrozenBase) -> dict[str, Any]:
        sites = find(base)
        del next(module for module in base.model.modules() if hasattr(module, "_prefixfleet_site"))._prefixfleet_site
        return sites

    monkeypatch.setattr(prefix_base, "_find_sites", one_forgotten)
    with pytest.raises(BaseModelError, match=r"(\d+) of (?!\1)\d+ attention layers asked"):
        attach(tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_check_finds_a_prefix_without_effect_and_columns_in_the_wrong_rows(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = PrefixBank.gather

    def blind(self: PrefixBank, *args: Any) -> Any:
        key, value, visible = gather(self, *args)
        return key, value, torch.zeros_like(visible)

    with monkeypatch.context() as patched:
        patched.setattr(PrefixBank, "gather", blind)
        with pytest.raises(BaseModelError, match=r"changes the logits by .* only"):
            attach(tiny_model(family))
    # A bias (T5) or a mask that slips by one column: prefix and sequence change places at the seam.
    monkeypatch.setattr(
        kernels, "sdpa", lambda m, q, k, v, mask, kwargs: kernels.eager(m, q, k.roll(1, 2), v.roll(1, 2), mask, kwargs)
    )
    with pytest.raises(BaseModelError, match=r"attention \S+ off the computation by hand"):
        attach(tiny_model(family))


@torch.no_grad()
def test_an_infix_needs_no_attention_mask() -> None:
    """transformers takes a jump in positions for the start of another sequence in the same row, unless it gets a mask."""
    base = attach(tiny_double("llama"))
    bank = PrefixBank(base.sites, slots=1, length=5, dtype=torch.float64)
    bank.put(0, from_text(base, TEXT, 5), infix=True)
    ids = some_ids(2, 7)
    found = []
    for given in ({}, {"attention_mask": torch.ones_like(ids)}):
        with base.prefixes(bank, torch.tensor([0, 0])):
            base.prompts_end_at(torch.tensor([3, 4]))
            found.append(base.model(input_ids=ids, use_cache=False, **given).logits)
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_target_sees_the_keys_of_an_infix_as_far_away_as_those_of_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rotary base the distance is what counts: scores of the target's queries and the columns in the first layer are equal."""
    base = attach(tiny_double("llama"))
    prefix = from_text(base, TEXT, 5)
    ids, scores = some_ids(1, 8), []
    for infix in (False, True):
        bank = PrefixBank(base.sites, slots=1, length=5, dtype=torch.float64)
        bank.put(0, prefix, infix=infix)
        queries: list[torch.Tensor] = []
        base.active.check = lambda call, output, queries=queries: queries.append(call.query) or output
        with base.prefixes(bank, torch.tensor([0])):
            base.prompts_end_at(torch.tensor([4]))
            base.model(input_ids=ids)
        target = queries[0][:, :, 5:]  # [1, heads, 3, head_dim], after rotation
        scores.append(target @ prefix["decoder.self.0"][0].repeat_interleave(2, 0).transpose(1, 2))
    base.active.check = None
    torch.testing.assert_close(*scores, atol=1e-6, rtol=0)  # rotary angles are in float32


def test_a_prefix_that_passes_the_models_positions_is_refused() -> None:
    base = attach(tiny_model("llama"), max_positions=64)
    with pytest.raises(PrefixError, match="64 positions"):
        base.check_length(60, 5)
    base.check_length(60, 4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3", "bart"])
@torch.no_grad()
def test_a_forward_pass_or_generation_past_the_models_positions_is_refused_with_padding_not_counted(family: str) -> None:
    base = attach(tiny_model(family).eval(), max_positions=64)
    bank = PrefixBank(base.sites, slots=2, length=5)
    bank.put(1, from_text(base, TEXT, 5))
    ids = some_ids(2, 64)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    mask[1, :20] = 0
    for slots in ([1, 1], [0, 1]):
        with base.prefixes(bank, torch.tensor(slots)):
            if base.is_encoder_decoder:
                real = (torch.arange(64) < 59).long().expand(2, -1)  # the rest is what batches are padded with
                whole = base.model(input_ids=ids, decoder_input_ids=ids, decoder_attention_mask=real)
                cut = base.model(input_ids=ids, decoder_input_ids=ids[:, :59]).logits
                torch.testing.assert_close(whole.logits[:, :59], cut, atol=1e-5, rtol=0)
            else:
                base.model(input_ids=ids, attention_mask=mask)
    with base.prefixes(bank, torch.tensor([1, 0])), pytest.raises(PrefixError, match=r"pass the 64 positions.*[Ss]horten"):
        if base.is_encoder_decoder:
            base.model.generate(ids[:, :6], max_new_tokens=90, min_new_tokens=90, do_sample=False)
        else:
            base.model(input_ids=ids[:, :60])
    if not base.is_encoder_decoder:
        with base.prefixes(bank, torch.tensor([0, 1])), pytest.raises(PrefixError, match="position 65 "):
            base.model.generate(
                ids[:, :50], attention_mask=mask[:, 14:], max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=1
            )


@torch.no_grad()
def test_not_a_single_token_of_barts_decoder_passes_its_table() -> None:
    base = attach(tiny_model("bart").eval())  # which has 64 positions, whatever attach is told
    assert base.max_positions == 64
    bank = PrefixBank(base.sites, slots=2, length=5)
    bank.put(1, from_text(base, TEXT, 5))
    ids, one_too_many = some_ids(2, 64), (torch.arange(64) < 60).long().expand(2, -1)
    for slots, given in (([0, 1], {"decoder_attention_mask": one_too_many}), ([1, 1], {})):
        with base.prefixes(bank, torch.tensor(slots)), pytest.raises(PrefixError, match=r"pass the 64 positions"):
            base.model(input_ids=ids[:, :6], decoder_input_ids=ids, **given)
    with base.prefixes(bank, torch.tensor([1, 1])):
        base.model(input_ids=ids[:, :6], decoder_input_ids=ids[:, :59])
        with pytest.raises(PrefixError, match=r"pass the 64 positions"):
            base.model.generate(ids[:, :6], decoder_input_ids=ids[:, :60], max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bart"])
@torch.no_grad()
def test_positions_are_shifted_however_the_model_is_called(family: str, bank_of_text: Banks) -> None:
    base = attach(tiny_double(family))
    ids, mask = some_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    with base.prefixes(bank_of_text(base, TEXT), torch.tensor([1, 2])):
        if base.is_encoder_decoder:
            expected = base.model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4]).logits
            found = [base.model(ids, mask, ids[:, :4]).logits]
        else:
            expected = base.model(input_ids=ids, attention_mask=mask).logits
            states = base.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            found = [base.model(ids, attention_mask=mask).logits, base.model.get_output_embeddings()(states)]
            if family != "gpt2":  # whose second argument is the cache
                found.append(base.model(ids, mask).logits)
    for logits in found:
        assert torch.equal(logits, expected)


@torch.no_grad()
def test_after_an_inner_prefix_the_outer_one_holds_again(bank_of_text: Banks) -> None:
    base = attach(tiny_double("llama"))
    bank, ids = bank_of_text(base, TEXT), some_ids(1, 4)
    with base.prefixes(bank, torch.tensor([2])):
        of_inner = base.model(input_ids=ids).logits
    with base.prefixes(bank, torch.tensor([1])):
        before = base.model(input_ids=ids).logits
        with base.prefixes(bank, torch.tensor([2])):
            assert torch.equal(base.model(input_ids=ids).logits, of_inner)
        assert torch.equal(base.model(input_ids=ids).logits, before) and not torch.equal(before, of_inner)


def test_a_text_longer_than_the_base_has_positions_is_refused() -> None:
    for family, positions in (("gpt2", None), ("opt", None), ("bart", None), ("llama", 64)):
        with pytest.raises(PrefixError, match=r"positions of the base\. Shorten the prefix"):
            from_text(attach(tiny_model(family).eval(), max_positions=positions), TEXT, 100)


def test_an_infix_on_an_encoder_decoder_is_refused(bank_of_text: Banks) -> None:
    base = attach(tiny_double("bart"))
    bank = bank_of_text(base, TEXT)
    bank.put(1, bank.take(1), infix=True)
    with pytest.raises(PrefixError, match="Choose placement: prefix"), base.prefixes(bank, torch.tensor([1])):
        pass


@torch.no_grad()
def test_a_model_that_was_refused_is_as_before_and_can_be_attached_another_way() -> None:
    model, ids = tiny_double("mistral"), some_ids(1, 6)
    before = model(input_ids=ids).logits
    with pytest.raises(BaseModelError, match="flash_attention_2"):
        attach(model, attention="flash_attention_2")
    assert model.config._attn_implementation == "sdpa"
    assert not any("prefixfleet" in name for module in model.modules() for name in vars(module))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert attach(model, attention="eager").active.kernel == "eager"


def test_a_model_without_a_generating_head_is_refused_by_its_class() -> None:
    masked = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    for model in (transformers.LlamaModel(tiny_model("llama").config), transformers.BertForMaskedLM(masked)):
        with pytest.raises(BaseModelError, match=rf"{type(model).__name__} is neither.*AutoModelForCausalLM"):
            attach(model)


def test_narrow_windows_and_few_positions_take_a_prefix_as_long_as_there_is_room_for_one() -> None:
    for window in (3, 4, 6):
        attach(tiny_model("mistral", sliding_window=window))
    attach(tiny_model("gpt2", n_positions=6), max_positions=6)
    with pytest.raises(BaseModelError, match="2 positions"):
        attach(tiny_model("mistral", sliding_window=2))


def test_a_prefix_of_another_base_is_refused_with_both_shapes_named() -> None:
    base, other = attach(tiny_model("gpt2")), attach(tiny_model("llama"))
    bank = PrefixBank(base.sites, slots=1, length=3)
    with pytest.raises(PrefixError, match="another base"):
        bank.put(0, from_zeros(other.sites, 3))
    wrong = {site: (key[:1], value[:1]) for site, (key, value) in from_zeros(base.sites, 3).items()}
    with pytest.raises(PrefixError, match=r"\[1, 3, 8\].*\[4, 3, 8\]"):
        bank.put(0, wrong)
    with pytest.raises(PrefixError, match="at most 3"):
        bank.put(0, from_zeros(base.sites, 4))


def test_what_is_put_into_a_slot_comes_out_again_and_old_columns_are_cleared() -> None:
    base = attach(tiny_model("llama"))
    bank = PrefixBank(base.sites, slots=2, length=5)
    bank.put(1, {s: (k + float("nan"), v + float("nan")) for s, (k, v) in from_zeros(base.sites, 5).items()})
    short = from_random(base.sites, 2, seed=3)
    bank.put(1, short)
    assert all(torch.equal(bank.take(1)[s][i], short[s][i]) for s in base.sites for i in (0, 1))
    assert not any(tensor.isnan().any() for tensor in bank.tensors.values())
