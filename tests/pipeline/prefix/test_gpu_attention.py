"""The kernels of a GPU behind the hook: flash attention (PyTorch's own kernel unless flash-attn is installed), flex attention, SDPA.

Needs nothing of the other rooms, so that it runs on a bare GPU node: `pytest -m gpu --noconftest tests/pipeline/prefix/test_gpu_attention.py`.
Each model is compared with itself under its own eager attention, in the same dtype on the same device; and before that, `attach` has compared each
attention output with the computation by hand.
"""

from typing import Any

import pytest
import torch

from pipeline.errors import BaseModelError
from pipeline.prefix import FrozenBase, PrefixBank, attach, kernels
from pipeline.prefix.direct import Direct
from pipeline.prefix.initialise import from_text
from pipeline.training.batches import row_losses

from .families import padded, some_ids, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DEVICE = torch.device("cuda")
TEXT = [5, 6, 7, 8, 9]
# Kernels on a GPU want heads of 16 numbers at least.
WIDER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64},
    "mistral": {"hidden_size": 64},
    "gemma2": {"head_dim": 32},
    "gpt_oss": {"head_dim": 16},
    "bart": {"d_model": 64},
    "t5": {"d_kv": 16},
}
FLOAT, BFLOAT = torch.float32, torch.bfloat16
CASES = [
    ("llama", "flash_attention_2", BFLOAT),
    ("gpt2", "flash_attention_2", BFLOAT),
    ("bart", "flash_attention_2", BFLOAT),
    ("llama", "flex_attention", FLOAT),
    ("llama", "flex_attention", BFLOAT),
    ("gemma2", "flex_attention", FLOAT),
    ("gemma2", "flex_attention", BFLOAT),
    ("mistral", "flex_attention", BFLOAT),
    ("gpt2", "flex_attention", FLOAT),
    ("bart", "flex_attention", BFLOAT),
    ("t5", "flex_attention", FLOAT),
    ("t5", "flex_attention", BFLOAT),
    ("llama", "sdpa", FLOAT),
    ("llama", "sdpa", BFLOAT),
    ("mistral", "sdpa", BFLOAT),
    ("gpt2", "sdpa", BFLOAT),
    ("bart", "sdpa", BFLOAT),
    ("t5", "sdpa", BFLOAT),
    ("gemma2", "sdpa", BFLOAT),
]


def on_gpu(family: str, kernel: str, dtype: torch.dtype, **changed: Any) -> FrozenBase:
    model = tiny_model(family, **{**WIDER[family], **changed}).to(DEVICE, dtype).eval()
    return attach(model, attention=kernel)


def bank_of(base: FrozenBase) -> PrefixBank:
    """Slot 0 empty, slot 1 of five columns, slot 2 of two."""
    prefix = from_text(base, TEXT, 5)
    bank = PrefixBank(base.sites, slots=3, length=5, device=DEVICE)
    bank.put(1, prefix)
    bank.put(2, {site: (key[:, :2] * 1.5, value[:, :2]) for site, (key, value) in prefix.items()})
    return bank


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """As a part of the expected length (Euclidean)."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def inputs_of(base: FrozenBase, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}
    return inputs | ({"decoder_input_ids": some_ids(3, 5).to(DEVICE)} if base.is_encoder_decoder else {})


def logits_of(base: FrozenBase, bank: PrefixBank, lengths: tuple[int, ...], left: bool) -> torch.Tensor:
    """Logits of three rows behind the bank's three prefixes, padding left out."""
    ids, mask, _ = padded([some_ids(1, n)[0] for n in lengths], left)
    with base.prefixes(bank, torch.tensor([1, 2, 0], device=DEVICE)):
        logits = base.model(**inputs_of(base, ids, mask), use_cache=False).logits
        logits = logits.flatten(0, 1) if base.is_encoder_decoder else logits[mask.bool().to(DEVICE)]
        if logits.requires_grad:
            logits.float().square().mean().backward()
    return logits.detach()


@pytest.mark.parametrize(("family", "kernel", "dtype"), CASES, ids=str)
def test_logits_gradients_and_generation_agree_with_eager_attention(family: str, kernel: str, dtype: torch.dtype) -> None:
    exact = dtype == FLOAT
    torch._dynamo.reset()
    # A kernel that is compiled over and over would fall back to one that is not, silently.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        eager, base = on_gpu(family, "eager", dtype), on_gpu(family, kernel, dtype)
        banks = [bank_of(each) for each in (eager, base)]
        with torch.no_grad():
            for lengths in ((7, 4, 6), (30, 9, 21), (13, 13, 13)):  # windows are 16 wide
                for left in (True, False):
                    expected, found = (
                        logits_of(each, bank, lengths, left) for each, bank in zip((eager, base), banks, strict=True)
                    )
                    assert distance(found, expected) < (1e-4 if exact else 3e-2), (lengths, left)

        gradients = []
        for each, bank, checkpointing in ((eager, banks[0], False), (base, banks[1], False), (base, banks[1], True)):
            for tensor in bank.tensors.values():
                tensor.requires_grad_()
                tensor.grad = None
            if checkpointing:
                each.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                each.model.train()
            logits_of(each, bank, (11, 4, 8), left=True)
            each.model.eval()
            gradients.append(torch.cat([tensor.grad.flatten() for tensor in bank.tensors.values() if tensor.grad is not None]))
            assert all(tensor.grad is not None and not tensor.grad[0].any() for tensor in bank.tensors.values())
            for tensor in bank.tensors.values():
                tensor.requires_grad_(False)
        assert gradients[0].norm() > 0
        assert distance(gradients[1], gradients[0]) < (1e-3 if exact else 6e-2)
        assert distance(gradients[2], gradients[1]) < (1e-5 if exact else 3e-2)

        ids, mask, _ = padded([some_ids(1, n)[0] for n in (7, 4, 6)], left=True)
        for beams in (1, 3):
            _generation_agrees_with_a_teacher_forced_pass(
                base, banks[1], ids.to(DEVICE), mask.to(DEVICE), beams, 1e-3 if exact else 0.15
            )


@torch.no_grad()
def _generation_agrees_with_a_teacher_forced_pass(
    base: FrozenBase, bank: PrefixBank, ids: torch.Tensor, mask: torch.Tensor, beams: int, atol: float
) -> None:
    if base.is_encoder_decoder:
        ids, mask = ids.flip(1), mask.flip(1)
    with base.prefixes(bank, torch.tensor([1, 2, 0], device=DEVICE)):
        out = base.model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=1,
                                  return_dict_in_generate=True, output_scores=True, output_logits=True)  # fmt: skip
        if base.is_encoder_decoder:
            logits = base.model(input_ids=ids, attention_mask=mask, decoder_input_ids=out.sequences[:, :-1]).logits
        else:
            full = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
            logits = base.model(input_ids=out.sequences, attention_mask=full).logits[:, 6:-1]
    chosen = out.sequences[:, -6:, None]
    if beams > 1:
        met, forced = out.sequences_scores * 6, logits.float().log_softmax(-1).gather(-1, chosen)[..., 0].sum(-1)
    else:
        met, forced = (
            part.float().log_softmax(-1).gather(-1, chosen)[..., 0].sum(-1) for part in (torch.stack(out.logits, 1), logits)
        )
    torch.testing.assert_close(met, forced, atol=atol, rtol=0)


@torch.no_grad()
def test_attention_sinks_on_flex_attention_agree_with_eager_ones() -> None:
    torch._dynamo.reset()
    # In float32, or rounding would send tokens to other experts.
    eager, base = (on_gpu("gpt_oss", kernel, FLOAT) for kernel in ("eager", "flex_attention"))
    for left in (True, False):
        expected, found = (logits_of(each, bank_of(each), (30, 9, 21), left) for each in (eager, base))
        assert distance(found, expected) < 1e-3


def test_flash_attention_runs_the_flash_kernel() -> None:
    base = on_gpu("llama", "flash_attention_2", BFLOAT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, torch.no_grad():
        logits_of(base, bank_of(base), (7, 4, 6), left=True)
    assert any("flash" in event.key.lower() for event in profile.key_averages())


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_the_check_at_attach_time_finds_a_sabotaged_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    if kernel == "flash_attention_2":
        monkeypatch.setattr(kernels, "is_causal", lambda module, kwargs: False)  # every query sees every key
        # The computation by hand would believe it too, so the logits of explicit masks must tell.
    else:
        block_mask = kernels.block_mask
        monkeypatch.setattr(kernels, "block_mask", lambda mask: block_mask(mask.roll(1, dims=-1)))
    with pytest.raises(BaseModelError, match=rf"llama.*{kernel}.*check of the prefix hook failed"):
        on_gpu("llama", kernel, BFLOAT)


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2", "flex_attention"])
def test_a_prefix_trained_with_a_kernel_learns_as_with_eager_attention(kernel: str) -> None:
    torch._dynamo.reset()

    class Row:
        def __init__(self, i: int) -> None:
            self.prompt_ids, self.target_ids = [10 + i % 7, 20 + i % 5, *range(30, 30 + i % 4)], [40 + i % 3, 50, 2]

    curves = []
    for name in ("eager", kernel):
        base = on_gpu("llama", name, BFLOAT)
        method = Direct(from_text(base, TEXT, 5), DEVICE)
        optimizer = torch.optim.AdamW(method.parameters(), lr=0.1)
        curve = []
        for step in range(40):
            rows = [Row(6 * step + i) for i in range(6)]
            bank = PrefixBank.of(base.sites, [method()], [False])
            with base.prefixes(bank, torch.zeros(6, dtype=torch.int64, device=DEVICE)):
                loss = row_losses(base, rows, pad=1).sum() / sum(len(row.target_ids) for row in rows)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        curves.append(curve)
    eager, found = curves
    assert found[-1] < found[0] - 0.5
    assert abs(found[0] - eager[0]) < 0.02 and abs(found[-1] - eager[-1]) < 0.1 * eager[-1] + 0.05
