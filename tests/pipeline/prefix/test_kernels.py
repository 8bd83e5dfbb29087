"""Flash and flex attention behind the hook agree with eager attention: here on a CPU, with the real kernels in test_gpu_attention.py.

flex attention runs uncompiled. In place of the flash-attn package stands its `flash_attn_varlen_func` worked by hand from the package's description:
rows one behind the other, the causal triangle aligned to each row's last query and last key.
"""

import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from pipeline.errors import BaseModelError, PrefixError
from pipeline.prefix import FrozenBase, PrefixBank, attach, kernels
from pipeline.prefix.initialise import from_text, from_zeros

from .families import CAUSAL, ENCODER_DECODER, padded, some_ids, tiny_double, tiny_model

TEXT = [5, 6, 7, 8, 9]
Banks = Callable[..., PrefixBank]
# No sliding window in any layer, no relative bias, no sinks.
FLASH = ["gpt2", "opt", "llama", "qwen3", "phi3", "gemma2", "mixtral", "qwen3_moe", "bart"]
# What makes a family without windows of one that has them.
NO_WINDOWS: dict[str, dict[str, Any]] = {"gemma2": {"layer_types": ["full_attention"] * 3}}
# Sinks need the kernel's normaliser, which flex attention gives on a GPU only.
FLEX = [family for family in CAUSAL + ENCODER_DECODER if family != "gpt_oss"]


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    softcap: float,
) -> torch.Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    rows = []
    for row in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]].transpose(0, 1)  # [heads, T, head_dim]
        key, value = (
            t[cu_seqlens_k[row] : cu_seqlens_k[row + 1]].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], dim=0)
            for t in (k, v)
        )
        scores = query @ key.transpose(1, 2) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            queries, keys = scores.shape[1:]
            hidden = torch.arange(keys)[None, :] > torch.arange(queries)[:, None] + keys - queries
            scores = scores.masked_fill(hidden, -torch.inf)
        rows.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The package, and float64 for an equality that means equality."""
    package = types.ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(kernels, "FLASH_DTYPES", (torch.float64,))
    kernels._has_flash_attn.cache_clear()
    yield package
    kernels._has_flash_attn.cache_clear()


@pytest.fixture
def flex() -> Iterator[None]:
    """Without the compiler, which takes a minute."""
    before = torch.compiler.set_stance("force_eager")
    with before:
        yield


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> str:
    request.getfixturevalue("flash" if request.param == "flash_attention_2" else "flex")
    return str(request.param)


CASES = [(family, "flash_attention_2") for family in FLASH] + [(family, "flex_attention") for family in FLEX]


def both(family: str, kernel: str, **changed: Any) -> tuple[FrozenBase, FrozenBase]:
    """The same base with eager attention and with the kernel."""
    settings = NO_WINDOWS.get(family, {}) if kernel == "flash_attention_2" else {}
    eager, other = (attach(tiny_double(family, **settings, **changed), attention=kind) for kind in ("eager", kernel))
    assert other.active.kernel == kernel
    return eager, other


@pytest.mark.parametrize(("family", "kernel"), CASES, indirect=["kernel"])
@torch.no_grad()
def test_logits_and_generation_equal_eager_ones_whatever_prefix_and_padding(
    family: str, kernel: str, bank_of_text: Banks
) -> None:
    ids, mask, _ = padded([some_ids(1, n)[0] for n in (7, 4, 6)], left=True)
    rows = torch.tensor([1, 2, 0])  # five columns, two, none
    found, written = [], []
    for base in both(family, kernel):
        bank = bank_of_text(base, TEXT)
        shown = []
        for flipped in (False, True):  # padding in front, padding behind
            inputs = {"input_ids": ids.flip(1) if flipped else ids, "attention_mask": mask.flip(1) if flipped else mask}
            if base.is_encoder_decoder:
                inputs["decoder_input_ids"] = some_ids(3, 5)
            with base.prefixes(bank, rows):
                logits = base.model(**inputs, use_cache=False).logits
            shown.append(logits if base.is_encoder_decoder else logits[inputs["attention_mask"].bool()])
        found.append(torch.cat([part.flatten(0, -2) for part in shown]))
        for how in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
            with base.prefixes(bank, rows):
                out = base.model.generate(
                    ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=1, **how
                )
            written.append(out)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)  # eager functions take their softmax in float32
    for eager, other in zip(written[:3], written[3:], strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("family", FLASH)
def test_gradients_of_flash_attention_equal_eager_ones_with_and_without_checkpointing(
    family: str, flash: types.ModuleType, bank_of_text: Banks
) -> None:
    ids, mask, _ = padded([some_ids(1, n)[0] for n in (6, 4)], left=False)
    gradients = []
    for checkpointing in (False, True):
        for base in both(family, "flash_attention_2"):
            bank = bank_of_text(base, TEXT)
            for tensor in bank.tensors.values():
                tensor.requires_grad_()
            if checkpointing:
                base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                base.model.train()
            inputs = {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids} if base.is_encoder_decoder else {})
            with base.prefixes(bank, torch.tensor([1, 2])):
                base.model(**inputs, use_cache=False).logits[mask.bool()].square().mean().backward()
            gradients.append([tensor.grad for tensor in bank.tensors.values()])
    for other in gradients[1:]:
        for expected, found in zip(gradients[0], other, strict=True):
            assert expected.abs().max() > 0
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gemma3"])
@torch.no_grad()
def test_flex_attention_knows_infixes_and_sliding_windows(family: str, flex: None) -> None:
    ids, mask, _ = padded([some_ids(1, n)[0] for n in (25, 22)], left=True)  # windows are 16 wide
    found = []
    for base in both(family, "flex_attention"):
        bank = PrefixBank(base.sites, slots=2, length=5, dtype=torch.float64)
        prefix = from_text(base, TEXT, 5)
        bank.put(0, prefix, infix=True)
        bank.put(1, prefix)
        with base.prefixes(bank, torch.tensor([0, 1])):
            base.prompts_end_at(torch.tensor([12, 20]))
            found.append(base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_top_layers_and_prefixes_of_different_sites_share_no_mask(flash: types.ModuleType) -> None:
    found = []
    for base in both("llama", "flash_attention_2"):
        prefix = from_text(base, TEXT, 5)
        bank = PrefixBank(base.sites, slots=2, length=5, dtype=torch.float64)
        bank.put(0, {site: prefix[site] for site in list(prefix)[1:]})
        bank.put(1, {site: (k[:, :3], v[:, :3]) for site, (k, v) in list(prefix.items())[2:]})
        with base.prefixes(bank, torch.tensor([0, 1])):
            found.append(base.model(input_ids=some_ids(2, 6), use_cache=False).logits)
            assert len(base.active.made) == (3 if base.active.kernel == "flash_attention_2" else len(base.active.made))
        assert not base.active.made
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mistral", "sliding window"),
        ("gemma2", "sliding window"),
        ("gpt_oss", "sliding window|attention sinks"),
        ("t5", "relative position bias"),
    ],
)
def test_what_flash_attention_does_not_compute_is_refused_with_what_does(
    family: str, reason: str, flash: types.ModuleType
) -> None:
    with pytest.raises(BaseModelError, match=rf"flash_attention_2.*({reason}).*flex_attention"):
        attach(tiny_double(family), attention="flash_attention_2")


def test_flash_attention_refuses_sinks_float32_odd_heads_and_soft_caps_without_the_package(
    flash: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(reason: str, model: Any) -> None:
        with pytest.raises(BaseModelError, match=rf"flash_attention_2.*{reason}"):
            attach(model, attention="flash_attention_2")

    refused("attention sinks", tiny_double("gpt_oss", layer_types=["full_attention"] * 4))
    refused(r"head sizes.*has 12", tiny_double("llama", head_dim=12))
    monkeypatch.setattr(kernels, "FLASH_DTYPES", (torch.bfloat16,))
    refused(r"16 bit.*torch\.float32.*dtype: bfloat16", tiny_model("llama"))
    monkeypatch.setattr(kernels, "FLASH_DTYPES", (torch.float64,))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels._has_flash_attn.cache_clear()
    refused("soft caps.*install", tiny_double("gemma2", layer_types=["full_attention"] * 3))


def test_flash_attention_refuses_an_infix_when_it_is_used(flash: types.ModuleType) -> None:
    base = attach(tiny_double("llama"), attention="flash_attention_2")
    bank = PrefixBank(base.sites, slots=1, length=2)
    bank.put(0, from_zeros(base.sites, 2), infix=True)
    with pytest.raises(PrefixError, match=r"placement: infix.*placement: prefix.*sdpa"), base.prefixes(bank, torch.tensor([0])):
        pass


def test_the_check_at_attach_time_finds_a_flash_kernel_with_the_triangle_of_pytorch(
    flash: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def top_left(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *ends: Any, causal: bool, **kwargs: Any) -> torch.Tensor:
        """Keys behind a row's length are cropped, as transformers' SDPA function does."""
        (ends_q, ends_k, *_longest) = ends
        kept = torch.cat([torch.arange(ends_k[i], ends_k[i] + ends_q[i + 1] - ends_q[i]) for i in range(len(ends_q) - 1)])
        return flash_attn_varlen_func(q, k[kept], v[kept], ends_q, ends_q, ends[2], ends[2], causal=causal, **kwargs)

    monkeypatch.setattr(flash, "flash_attn_varlen_func", top_left)
    with pytest.raises(BaseModelError, match=r"llama.*flash_attention_2.*check of the prefix hook failed.*attention: eager"):
        attach(tiny_double("llama"), attention="flash_attention_2")


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_a_kernel_that_fails_is_a_refusal_with_a_remedy(
    name: str, flash: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(kernels, "flash" if name == "flash_attention_2" else "flex", broken)
    with pytest.raises(BaseModelError, match=rf"{name} cannot compute.*no kernel image.*attention: sdpa"):
        attach(tiny_double("llama"), attention=name)


def _attention(dtype: torch.dtype, heads: int, kv: int, length: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value and a gradient of the output, of three rows, rounded to bfloat16 first so that all types see the same numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, length, 16), (3, kv, keys, 16), (3, kv, keys, 16), (3, length, heads, 16)]
    made = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    return (*(tensor.requires_grad_(True) for tensor in made[:3]), made[3])


def _masked(length: int, keys: int) -> torch.Tensor:
    """A triangle behind a prefix that all see, two rows padded in front, one query of the last row seeing nothing: bool [3, 1, T, K]."""
    prefix = keys - length
    mask = torch.ones(length, keys, dtype=torch.bool).tril(prefix).expand(3, 1, length, keys).clone()
    mask[1, :, :, prefix : prefix + 4] = False
    mask[2, :, 2] = False
    return mask


@pytest.mark.parametrize(
    ("heads", "kv", "length", "keys", "masked"),
    [(6, 2, 24, 30, True), (4, 4, 9, 9, True), (4, 2, 5, 12, False), (6, 2, 24, kernels._KEPT_COLUMNS + 30, True)],
)
def test_the_16_bit_backward_pass_on_a_processor_is_no_more_than_two_and_a_half_times_as_far_from_float64_as_pytorchs(
    heads: int, kv: int, length: int, keys: int, masked: bool
) -> None:
    mask = _masked(length, keys) if masked else None
    module = torch.nn.Identity()
    module.num_key_value_groups = heads // kv
    exact = _gradients(_attention(torch.float64, heads, kv, length, keys), module, mask)
    ours = _gradients(_attention(torch.bfloat16, heads, kv, length, keys), module, mask)
    query, key, value, of_output = _attention(torch.bfloat16, heads, kv, length, keys)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torchs = torch.autograd.grad(output.transpose(1, 2), [query, key, value], of_output)
    for name, true, own, other in zip(
        ("output", "query", "key", "value"), exact, ours, (output.transpose(1, 2), *torchs), strict=True
    ):
        assert own.isfinite().all(), name
        allowed = 2.5 * (other.double() - true).norm() + 1e-12
        assert (own.double() - true).norm() <= allowed, name


@pytest.mark.parametrize(("offset", "size"), [(6.0, 1.0), (12.0, 1.0), (0.0, 3.2)])
def test_scores_of_30_to_700_are_no_further_off_in_16_bit_than_in_transformers_eager_attention(
    offset: float, size: float
) -> None:
    """Biases of the projections add an offset to all keys (Qwen2); what is left of scores behind it is no larger than it ever was."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0) * 4

    def given(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        query, key, value, of_output = (tensor.detach() for tensor in _attention(torch.float64, 6, 2, 24, 30))
        rounded = (query * size + offset * direction).bfloat16(), (key * size + offset * direction).bfloat16()
        return (*(tensor.to(dtype).requires_grad_(True) for tensor in (*rounded, value)), of_output.to(dtype))

    mask = _masked(24, 30)
    module = LlamaAttention(LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2), 0)
    query, key, *_ = given(torch.float64)
    assert 30 < (query @ key.repeat_interleave(3, 1).mT / 4).abs().max() < 800
    exact, ours = (_gradients(given(dtype), module, mask) for dtype in (torch.float64, torch.bfloat16))
    *inputs, of_output = given(torch.bfloat16)
    output, _ = kernels.eager(module, *inputs, kernels.Seen(mask), {"scaling": 0.25})  # type: ignore[arg-type]  # three of them
    output = output.masked_fill(~mask.any(-1)[:, 0, :, None, None], 0)
    eagers = (output, *torch.autograd.grad(output, inputs, of_output))
    for name, true, own, other in zip(("output", "query", "key", "value"), exact, ours, eagers, strict=True):
        error, others = ((tensor.double() - true).norm() / true.norm() for tensor in (own, other))
        assert error <= (others / 3 if offset else 1.5 * others), name
        assert error <= 0.04, name


def _gradients(given: tuple[torch.Tensor, ...], module: torch.nn.Module, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    *inputs, of_output = given
    seen = None if mask is None else kernels.Seen(mask)
    output, _ = kernels.sdpa(module, *inputs, seen, {"is_causal": False})  # type: ignore[arg-type]  # three of them
    return (output, *torch.autograd.grad(output, inputs, of_output))


def test_float16_is_left_to_pytorch_on_a_processor() -> None:
    """Scores beside its lowest number would overflow, and a query that sees nothing would have shares of NaN."""
    module = torch.nn.Identity()
    module.num_key_value_groups = 3
    *inputs, of_output = _attention(torch.float16, 6, 2, 24, 30)
    with torch.profiler.profile() as profile:
        output, _ = kernels.sdpa(module, *inputs, kernels.Seen(_masked(24, 30)), {})  # type: ignore[arg-type]  # three of them
    output.backward(of_output)
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs)
    assert not any(event.key == "_ByProducts" for event in profile.key_averages())


def test_what_learns_nothing_gets_no_gradient_in_16_bit() -> None:
    query, key, value, of_output = _attention(torch.bfloat16, 4, 2, 8, 12)
    query.requires_grad_(False)
    output, _ = kernels.sdpa(torch.nn.Identity(), query, key, value, kernels.Seen(_masked(8, 12)), {})
    output.backward(of_output)
    assert query.grad is None
    assert key.grad is not None and value.grad is not None
