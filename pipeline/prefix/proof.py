"""The proof at attach time that this very model sees a prefix rightly, with this very kernel.

In: a base with the hook on. Out: nothing, or an error. Three passes over a few tokens are compared with what is computed without the hook's kernel,
concatenation and masks: each attention output and the logits with attention worked by hand from the definition, and the logits behind a text's
prefix with those of the model's own eager attention that has the text in front as a prompt. The last also proves positions; where experts make
logits too rough for that, queries and keys do. An encoder-decoder has no prompt in front of its decoder: there, what enters the decoder's first
layer proves learned positions, and attention by hand takes relative ones (T5) from the model's own table, as for one sequence of P + T tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import BaseModelError
from pipeline.prefix import kernels
from pipeline.prefix.attention import IMPLEMENTATION, Call, Check
from pipeline.prefix.bank import PrefixBank

if TYPE_CHECKING:
    from pipeline.prefix.base import FrozenBase

# Columns of the prefix and tokens behind it, where the base has as many positions.
COLUMNS, TOKENS = 3, 4

# How far one attention output may be from the computation by hand, as a part of its largest entry.
ATTENTION = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# How far logits may be, as a part of their length (Euclidean). Measured on models of 24 layers: 1e-6 in float32, 1e-2 in bfloat16; positions that
# are not shifted give 0.2 to 0.6 on every family that is tested, no prefix at all 1 and more.
LOGITS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
# In 16 bit, rounding sends a token to other experts now and then: up to 0.5. What that hides is looked for in queries and keys, see `_placed`.
LOGITS_OF_EXPERTS = 0.7
# How far those may be, as a part of their length: from equal inputs, equal positions give equal ones, up to the rounding of one matrix product.
# Positions that are not shifted turn them by 0.3 and more.
PLACED = 0.05


@torch.no_grad()
def prove(base: "FrozenBase") -> None:
    """Run the check.

    Raises:
        BaseModelError: a prefix is not seen as it must be, or by not all sites, or changes nothing.
    """
    model = base.model
    _, tokens = _sizes(base)
    ids = torch.arange(2 * tokens, device=base.device).view(2, tokens) % model.get_input_embeddings().num_embeddings
    real = torch.ones_like(ids)
    real[1, : tokens // 2] = 0
    inputs = {"input_ids": ids, "attention_mask": real}
    if base.is_encoder_decoder:
        # Another length than the encoder's.
        inputs["decoder_input_ids"] = ids[:, 1:]
        real = torch.ones_like(ids[:, 1:])
    table = _bias_table(base)
    bank, rows = _random_bank(base), torch.zeros(2, dtype=torch.int64, device=base.device)

    def logits() -> torch.Tensor:
        return model(**inputs, use_cache=False).logits.float()[real.bool()]

    deviations: list[float] = []
    plain = logits()
    with base.prefixes(bank, rows):
        with _checking(base, lambda call, output: _noted(call, table, output, deviations)):
            found = logits()
        with (
            _checking(base, lambda call, output: by_hand(call, table).to(output.dtype)),
            _implementation(base, IMPLEMENTATION, "sdpa"),
        ):
            expected = logits()
    errors = {"logits with attention by hand": _distance(found, expected)}
    if not base.is_encoder_decoder:
        errors["logits with the text as a prompt"] = _distance(*_behind_a_text(base))

    # Quantised layers round activations to 8 bit, and TensorFloat-32 to less than float32, whatever the dtype.
    rough = getattr(model, "is_quantized", False) or torch.get_float32_matmul_precision() != "highest"
    dtype = torch.bfloat16 if rough else model.dtype
    misplaced = _placed_in_decoder(base) if base.is_encoder_decoder else 0.0
    at_most, allowed = ATTENTION.get(model.dtype, 5e-2), LOGITS.get(dtype, 0.1)
    if dtype.itemsize == 2 and _has_experts(model):
        allowed = LOGITS_OF_EXPERTS
        if not base.is_encoder_decoder:
            misplaced = _placed(base)
    worst, effect = max(deviations, default=math.inf), _distance(found, plain)
    wrong = [f"{error:.1e} off the {name}" for name, error in errors.items() if not error <= allowed]
    if not misplaced <= PLACED:
        wrong.append(
            f"{misplaced:.1e} off the {'decoder input' if base.is_encoder_decoder else 'queries'} with the text as a prompt"
        )
    if len(deviations) != len(base.sites):
        wrong.append(f"{len(deviations)} of {len(base.sites)} attention layers asked for their prefix")
    if not worst <= at_most:
        wrong.append(f"attention {worst:.1e} off the computation by hand, where {at_most:.0e} is allowed")
    if not effect > 1e-4:
        wrong.append(f"a prefix changes the logits by {effect:.1e} only")
    if wrong:
        raise BaseModelError(
            f"model type {model.config.model_type!r} with {base.active.kernel}: the check of the prefix hook failed ({'; '.join(wrong)}). "
            "Prefixes on this base would be wrong: choose another kernel (base_model.attention: eager is the plainest), another base, or the "
            "version of transformers that constraints.txt names."
        )


def _sizes(base: "FrozenBase") -> tuple[int, int]:
    """Columns and tokens of the check: so few that the base has positions for both, and that no window hides a prompt from the last token.

    Raises:
        BaseModelError: it has not.
    """
    config = base.model.config.get_text_config(decoder=True)
    limits = [base.max_positions, getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)]
    limit = min((n for n in limits if n), default=COLUMNS + TOKENS)
    columns = min(COLUMNS, limit // 2)
    tokens = min(TOKENS, limit - columns)
    if columns < 1 or tokens < 2:
        raise BaseModelError(
            f"model type {config.model_type!r}: has {limit} positions (or so narrow a window), too few for a prefix and a text. Choose another base."
        )
    return columns, tokens


def _bias_table(base: "FrozenBase") -> Any:
    """The decoder's module that has the table of relative positions (T5); None if there is none."""
    if not base.is_encoder_decoder:
        return None
    modules = base.model.get_decoder().modules()
    return next((module for module in modules if getattr(module, "has_relative_attention_bias", False)), None)


def _random_bank(base: "FrozenBase") -> PrefixBank:
    columns, _ = _sizes(base)
    generator = torch.Generator().manual_seed(0)
    bank = PrefixBank(base.sites, slots=1, length=columns, device=base.device)
    drawn = {name: torch.randn(2, s.heads, columns, s.head_dim, generator=generator) for name, s in base.sites.items()}
    bank.put(0, {name: (both[0], both[1]) for name, both in drawn.items()})
    return bank


def _behind_a_text(base: "FrozenBase") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, vocabulary] behind the prefix that a text gives, and those of the model's own eager attention after that text as a prompt."""
    columns, ids = _text_and_sequence(base)
    text, sequence = ids[:, :columns], ids[:, columns:]
    with base.capturing() as captured:
        base.model(input_ids=text, use_cache=False)
    bank = PrefixBank(base.sites, slots=1, length=columns, device=base.device)
    bank.put(0, {name: (key[0].float(), value[0].float()) for name, (key, value) in captured.items()})
    with base.prefixes(bank, torch.zeros(1, dtype=torch.int64, device=base.device)):
        found = base.model(input_ids=sequence, use_cache=False).logits[0]
    with _implementation(base, "eager", "eager"):
        expected = base.model(input_ids=ids, use_cache=False).logits[0, columns:]
    return found, expected


def _text_and_sequence(base: "FrozenBase") -> tuple[int, torch.Tensor]:
    """The length of a text, and the token ids [1, P + T] of that text and a sequence behind it."""
    columns, tokens = _sizes(base)
    return columns, torch.arange(1, columns + tokens + 1, device=base.device)[
        None
    ] % base.model.get_input_embeddings().num_embeddings


def _placed_in_decoder(base: "FrozenBase") -> float:
    """How far the input of an encoder-decoder's first decoder layer behind a prefix is from that of the same tokens behind as many others."""
    columns, ids = _text_and_sequence(base)
    bank = PrefixBank(base.sites, slots=2, length=columns, device=base.device)
    bank.put(1, _random_bank(base).take(0))
    layer = next(module for module in base.model.modules() if getattr(module, "_prefixfleet_site", None) == "decoder.self.0")
    met: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: met.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        for slot, tokens in ((0, ids), (1, ids[:, columns:])):
            with base.prefixes(bank, torch.tensor([slot], device=base.device)):
                base.model(input_ids=ids, decoder_input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return _distance(met[1], met[0][:, columns:])


def _placed(base: "FrozenBase") -> float:
    """How far the queries and keys of tokens behind a prefix are from those of the same tokens behind as many others, from equal inputs.

    Which experts a token is sent to makes no difference here: the second pass gets, in front of every attention layer, what the first one had
    there. What is left is where the tokens stand: learned positions are in the first layer's input, rotary ones in queries and keys.
    """
    text, ids = _text_and_sequence(base)
    sequence = ids.shape[1] - text
    bank = PrefixBank(base.sites, slots=2, length=text, device=base.device)
    bank.put(1, _random_bank(base).take(0))
    layers = [module for module in base.model.modules() if hasattr(module, "_prefixfleet_site")]
    passes: list[list[torch.Tensor]] = []
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    worst = 0.0

    def note(call: Call, output: torch.Tensor) -> torch.Tensor:
        both = (call.query, call.sequence[0])  # [1, heads, T, head_dim]
        passes[-1].extend(tensor[:, :, -sequence:] for tensor in both)
        return output

    def swap(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal worst
        given: torch.Tensor = args[0] if args else kwargs["hidden_states"]  # [1, T, hidden size]
        if len(passes) == 1:
            inputs[module] = given[:, text:].clone()
            return args, kwargs
        if module is next(iter(inputs)):
            worst = _distance(given, inputs[module])
        return ((inputs[module], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inputs[module]})

    hooks = [layer.register_forward_pre_hook(swap, with_kwargs=True) for layer in layers]
    try:
        for slot, tokens in ((0, ids), (1, ids[:, text:])):
            passes.append([])
            with base.prefixes(bank, torch.tensor([slot], device=base.device)), _checking(base, note):
                base.model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return max([worst, *(_distance(found, expected) for expected, found in zip(*passes, strict=True))])


def _has_experts(model: Any) -> bool:
    config = model.config.get_text_config(decoder=True)
    return any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    )


@contextmanager
def _checking(base: "FrozenBase", check: Check) -> Iterator[None]:
    base.active.check = check
    try:
        yield
    finally:
        base.active.check = None


@contextmanager
def _implementation(base: "FrozenBase", name: str, kernel: str) -> Iterator[None]:
    before = base.model.config._attn_implementation, base.active.kernel
    base.model.set_attn_implementation(name)
    base.active.kernel = kernel
    try:
        yield
    finally:
        base.model.set_attn_implementation(before[0])
        base.active.kernel = before[1]


def _noted(call: Call, table: Any, output: torch.Tensor, deviations: list[float]) -> torch.Tensor:
    expected, found = by_hand(call, table), output.float()
    mask = call.sequence[2]
    if mask is not None and mask.dim() == 2 and kernels.is_causal(call.module, call.kwargs):
        # Packed rows have no output for padding.
        real = mask[:, -call.query.shape[2] :, None, None]
        expected, found = expected.where(real, 0.0), found.where(real, 0.0)
    deviations.append(float((found - expected).abs().amax() / expected.abs().amax().clamp(min=1e-12)))
    return output


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def by_hand(call: Call, table: Any = None) -> torch.Tensor:
    """What attention must give, from the definition: scores of prefix and sequence apart, one softmax over both.

    No kernel, no concatenation, no implied alignment of a causal triangle.

    Args:
        call: all rows with as many columns.
        table: T5's decoder module that has the table of relative positions; None for models without.

    Returns:
        [B, T, heads, head_dim], in float32 or better.
    """
    query, kwargs = call.query, call.kwargs
    work = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // call.prefix[0].shape[1]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores, values = [], []
    of_prefix = None
    if kwargs.get("position_bias") is not None and getattr(call.module, "_prefixfleet_site", "").startswith("decoder.self."):
        # That of the first P keys of one sequence, for its last T queries.
        whole, columns = call.prefix[0].shape[2] + call.sequence[0].shape[2], call.prefix[0].shape[2]
        of_prefix = table.compute_bias(whole, whole)[:, :, whole - query.shape[2] :, :columns]
    for (key, value, visible), bias in ((call.prefix, of_prefix), (call.sequence, kwargs.get("position_bias"))):
        heads_key, heads_value = (t.to(work).repeat_interleave(groups, dim=1) for t in (key, value))
        score = torch.einsum("bhtd,bhkd->bhtk", query.to(work), heads_key) * scaling
        if kwargs.get("softcap") is not None:
            score = kwargs["softcap"] * torch.tanh(score / kwargs["softcap"])
        if bias is not None:
            score = score + bias
        if visible is None or visible.dim() == 2:
            # Every key that is not hidden stands before or at its query.
            shape, causal = score.shape[-2:], kernels.is_causal(call.module, kwargs)
            below = torch.ones(shape, dtype=torch.bool, device=score.device).tril(shape[1] - shape[0] if causal else shape[1])
            visible = below if visible is None else below & visible[:, None, None, :]
        scores.append(score.masked_fill(~visible, -torch.inf))
        values.append(heads_value)
    peak = torch.maximum(scores[0].amax(-1, keepdim=True), scores[1].amax(-1, keepdim=True)).clamp(min=torch.finfo(work).min)
    weights = [torch.exp(score - peak) for score in scores]
    total = weights[0].sum(-1, keepdim=True) + weights[1].sum(-1, keepdim=True)
    if kwargs.get("s_aux") is not None:
        total = total + torch.exp(kwargs["s_aux"].to(work)[None, :, None, None] - peak)
    mixed: Any = sum(torch.einsum("bhtk,bhkd->bhtd", weight, value) for weight, value in zip(weights, values, strict=True))
    return (mixed / total).transpose(1, 2)
