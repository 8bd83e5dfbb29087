"""Mixed training on a GPU: `pytest -m gpu tests/pipeline/training`."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from pipeline.prefix.base import attach
from pipeline.training.mixed import Mixed

from .crowd import SETTINGS, Wanted, attached, difference, final, llama, trained

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CROWD = [
    Wanted(10, length=6),
    Wanted(11, length=1, rows=2, settings=replace(SETTINGS, max_steps=3)),
    Wanted(12, kind="mlp", settings=replace(SETTINGS, lr=0.01, batch_size=7, max_grad_norm=0.1)),
    Wanted(13, kind="embedding", settings=replace(SETTINGS, schedule="cosine", eval_every=1)),
    Wanted(14, infix=True, settings=replace(SETTINGS, gradient_accumulation_steps=3)),
    Wanted(15, kind="top", longest=60, settings=replace(SETTINGS, lr=1e150, max_grad_norm=1e300)),
]


def test_in_a_crowd_it_is_trained_as_alone_and_as_on_the_processor() -> None:
    base = attached()
    base.model.cuda()
    residents, _ = trained(base, [w.resident(base) for w in [Wanted(1), *CROWD]], slots=5, budget=200, cpu=False)
    [alone], _ = trained(base, [Wanted(1).resident(base)], slots=1, cpu=False)
    assert difference(final(residents[0]), final(alone)) < 1e-8
    processor = attached()
    [there], _ = trained(processor, [Wanted(1).resident(processor)], slots=1, cpu=False)
    # Llama's norms and rotations are computed in float32, which the two devices round apart.
    assert difference({site: tensor.cpu() for site, tensor in final(alone).items()}, final(there)) < 1e-5


def test_real_lack_of_memory_halves_the_budget_and_loses_nothing() -> None:
    def run(budget: int) -> tuple[list[dict[str, torch.Tensor]], Mixed]:
        torch.manual_seed(0)
        base = attach(llama().float())
        base.model.cuda()
        settings = replace(SETTINGS, max_steps=2, batch_size=600)
        mixed = Mixed(base, 2, 6, 1, budget, Accelerator(), say=said.append)
        residents = [Wanted(i, rows=600, longest=60, settings=settings).resident(base) for i in range(2)]
        mixed.residents[:] = residents
        mixed.judge()
        for _ in range(2):
            report = mixed.step()
            assert not report.failed
        return [final(r) for r in residents], mixed

    said: list[str] = []
    plain, _ = run(2_000)
    assert not said
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60 * 2**20) / free)
    try:
        squeezed, mixed = run(1_000_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(said) == 1 and "out of device memory" in said[0] and mixed.budget < 1_000_000
    assert max(difference(a, b) for a, b in zip(plain, squeezed, strict=True)) < 1e-4
