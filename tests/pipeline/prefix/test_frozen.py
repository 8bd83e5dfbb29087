"""The base after real training is the base before: in memory, on disk, and as autograd sees it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base import resolve_base
from pipeline.errors import TrainingError
from pipeline.prefix import FrozenBase
from pipeline.training import run
from pipeline.training.job import Job

MakeJob = Callable[..., tuple[Job, Path]]


@pytest.mark.parametrize(
    ("prefix", "checkpointing"),
    [({}, False), ({"reparam": "mlp", "mid_dim": 16}, True), ({"reparam": "embedding"}, True)],
    ids=["direct", "mlp", "embedding"],
)
def test_training_leaves_every_weight_of_the_base_as_it_was(
    make_job: MakeJob, loaded: list[tuple[FrozenBase, str]], tiny_base: Path, prefix: dict[str, Any], checkpointing: bool
) -> None:
    on_disk = resolve_base(str(tiny_base)).digest
    job, _ = make_job(customers=2, max_steps=6, eval_every=3, prefix=prefix, mixing={"gradient_checkpointing": checkpointing})
    assert run.run_job(job) == 0
    ((base, before),) = loaded
    assert base.digest() == before
    assert resolve_base(str(tiny_base)).digest == on_disk
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


def test_the_digest_sees_a_single_bit_of_a_single_weight(make_job: MakeJob) -> None:
    base = run.load_base(make_job()[0].base)
    before = base.digest()
    bits = list(base.model.parameters())[-1].data.view(torch.uint8).flatten()
    bits[-1] ^= 1
    assert base.digest() != before
    bits[-1] ^= 1
    assert base.digest() == before


def test_a_run_that_changes_the_base_keeps_nothing(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = make_job(max_steps=2, eval_every=1)
    load = run.load_base

    def meddled(*given: Any, **named: Any) -> FrozenBase:
        base = load(*given, **named)

        @torch.no_grad()
        def change(module: torch.nn.Module, _: Any) -> None:
            next(module.parameters()).add_(1e-3)

        base.model.register_forward_pre_hook(change)
        return base

    monkeypatch.setattr(run, "load_base", meddled)
    with pytest.raises(TrainingError, match="weights of the base changed during training"):
        run.run_job(job)
    assert not Path(job.customers[0].prefix_dir).exists()
