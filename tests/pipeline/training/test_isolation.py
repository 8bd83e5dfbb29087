"""The invariant: a customer trained in a mixed batch ends with the prefix that it would have had alone, whatever its neighbours are.

In float64, where only the order of additions can differ. The reference is plain: one customer, one row at a time, torch's own AdamW, no slots.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.data import Record
from pipeline.errors import PrefixError
from pipeline.prefix import FrozenBase, PrefixBank
from pipeline.prefix.base import attach
from pipeline.training.mixed import Mixed

from .crowd import SETTINGS, VOCABULARY, Wanted, attached, by_hand, difference, final, llama, mixtral, records, t5, trained


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return attached()


@pytest.mark.parametrize(
    ("kind", "infix"),
    [("direct", False), ("mlp", False), ("embedding", False), ("top", False), ("direct", True), ("mlp", True), ("top", True)],
)
def test_alone_in_a_slot_it_is_trained_as_by_a_plain_loop(base: FrozenBase, kind: str, infix: bool) -> None:
    wanted = Wanted(
        1,
        kind=kind,
        infix=infix,
        settings=replace(SETTINGS, gradient_accumulation_steps=2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.01),
    )
    [resident], _ = trained(base, [wanted.resident(base)], slots=1)
    keys_and_values, dev_loss, norms = by_hand(base, wanted)
    assert difference(final(resident), keys_and_values) < 1e-10
    assert resident.history[-1]["dev_loss"] == pytest.approx(dev_loss, abs=1e-10)
    assert [entry["grad_norm"] for entry in resident.history if "grad_norm" in entry] == pytest.approx(norms, abs=1e-9)
    assert norms[0] > wanted.settings.max_grad_norm, "the claim is about clipping too"


NEIGHBOURS = [
    Wanted(10, length=6),
    Wanted(11, length=1, rows=2, settings=replace(SETTINGS, max_steps=3)),
    Wanted(12, kind="mlp", settings=replace(SETTINGS, lr=0.01, batch_size=7, max_grad_norm=0.1)),
    Wanted(13, kind="embedding", settings=replace(SETTINGS, schedule="cosine", eval_every=1)),
    Wanted(14, infix=True, settings=replace(SETTINGS, gradient_accumulation_steps=3)),
    Wanted(15, kind="top", longest=60, settings=replace(SETTINGS, early_stopping=1, eval_every=1, lr=5.0)),
]


@pytest.mark.parametrize("make", [llama, mixtral, t5])
def test_neighbours_of_every_kind_change_nothing(make: Callable[[], Any]) -> None:
    base = attached(make)
    others = [n for n in NEIGHBOURS if not base.is_encoder_decoder or (n.kind != "embedding" and not n.infix)]
    wanted = Wanted(1)
    keys_and_values, _, _ = by_hand(base, wanted)
    residents, _ = trained(base, [w.resident(base) for w in [*others[:3], wanted, *others[3:]]], slots=len(others) + 1)
    assert difference(final(residents[3]), keys_and_values) < 1e-10


def test_each_of_the_neighbours_is_trained_as_alone_too(base: FrozenBase) -> None:
    residents, _ = trained(base, [w.resident(base) for w in NEIGHBOURS], slots=4, budget=200)
    for wanted, resident in zip(NEIGHBOURS, residents, strict=True):
        [alone], _ = trained(base, [wanted.resident(base)], slots=1, budget=70)
        assert difference(final(resident), final(alone)) < 1e-10
        assert resident.step == alone.step and resident.best_step == alone.best_step
        for ours, theirs in zip(resident.history, alone.history, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)


def test_thirty_neighbours_and_any_order_of_the_queue_change_nothing(base: FrozenBase) -> None:
    wanted = Wanted(1)
    keys_and_values, _, _ = by_hand(base, wanted)
    crowd = [replace(NEIGHBOURS[i % 3], seed=100 + i, settings=replace(SETTINGS, max_steps=4 + i % 9)) for i in range(30)]
    for place, slots in ((0, 31), (30, 8), (15, 5)):
        everybody = [w.resident(base) for w in crowd]
        everybody.insert(place, wanted.resident(base))
        residents, _ = trained(base, everybody, slots=slots, budget=400)
        assert difference(final(residents[place]), keys_and_values) < 1e-10


class Broken(nn.Module):
    """A prefix that goes wrong at its n-th use."""

    def __init__(self, inner: nn.Module, at: int, how: str) -> None:
        super().__init__()
        self.inner, self.at, self.how, self.uses = inner, at, how, 0

    def forward(self) -> Any:
        self.uses += 1
        flat = self.inner()
        if self.uses < self.at:
            return flat
        if self.how == "raises":
            raise RuntimeError("the parameterisation broke")
        bad = {"nan": math.nan, "inf": math.inf, "huge": 1e200}[self.how]
        return {site: tensor * bad for site, tensor in flat.items()}


@pytest.mark.parametrize("how", ["nan", "inf", "huge", "raises"])
@pytest.mark.parametrize("make", [llama, mixtral])
def test_a_neighbour_that_breaks_is_given_up_and_changes_nothing(make: Callable[[], Any], how: str) -> None:
    base = attached(make)
    wanted = Wanted(1)
    keys_and_values, _, _ = by_hand(base, wanted)
    broken = Wanted(2, longest=40).resident(base)
    broken.method = Broken(broken.method, at=5, how=how)
    late = Wanted(3)
    residents, failed = trained(base, [broken, wanted.resident(base), late.resident(base)], slots=2)
    if how != "huge":  # a softmax bears huge keys; huge values may or may not overflow
        assert failed[0] is not None and ("not finite" in failed[0] or "broke" in failed[0])
    assert failed[1:] == [None, None]
    assert difference(final(residents[1]), keys_and_values) < 1e-10
    # The slot that the broken one left is clean.
    [alone], _ = trained(base, [late.resident(base)], slots=1)
    assert difference(final(residents[2]), final(alone)) < 1e-10


def test_a_neighbours_learning_rate_that_explodes_changes_nothing(base: FrozenBase) -> None:
    wanted = Wanted(1)
    keys_and_values, _, _ = by_hand(base, wanted)
    wild = Wanted(2, settings=replace(SETTINGS, lr=1e160, max_grad_norm=1e300, max_steps=40))
    residents, failed = trained(base, [wild.resident(base), wanted.resident(base)], slots=2)
    assert difference(final(residents[1]), keys_and_values) < 1e-10
    assert failed[1] is None


def test_a_step_that_is_not_finite_is_skipped_with_half_the_learning_rate_and_three_in_a_row_are_the_end(
    base: FrozenBase,
) -> None:
    class Flickers(Broken):
        def forward(self) -> Any:
            self.uses += 1
            flat = self.inner()
            return {k: t * math.nan for k, t in flat.items()} if self.uses in (3, 4, 7, 8, 9) else flat

    resident = Wanted(1, settings=replace(SETTINGS, eval_every=1000, max_steps=1000, schedule="constant")).resident(base)
    resident.method = Flickers(resident.method, 0, "")
    _, [reason] = trained(base, [resident], slots=1)  # the first use is for the dev loss before training
    assert reason is not None and "3rd time in a row" in reason and "training.lr" in reason
    steps = [entry for entry in resident.history if "dev_loss" not in entry]
    assert ["skipped" in entry for entry in steps] == [False, True, True, False, False, True, True, True]
    assert [entry["lr"] / 0.05 for entry in steps] == [1, 1, 0.5, 0.25, 0.25, 0.25, 0.125, 0.0625]


def test_a_skipped_step_leaves_parameters_and_optimiser_as_they_were(base: FrozenBase) -> None:
    resident = Wanted(1).resident(base)
    mixed = Mixed(base, 1, 6, 1, 100, Accelerator(cpu=True))
    mixed.residents[0] = resident
    mixed.judge()
    mixed.step()
    before, _ = resident.state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    resident.method = Broken(resident.method, 1, "inf")
    mixed.step()
    resident.method = resident.method.inner
    after, _ = resident.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (resident.step, resident.drawn, resident.diverged, resident.lr_factor) == (2, 6, 1, 0.5)


def test_no_gradient_reaches_a_slot_whose_customer_has_no_row_in_the_batch(base: FrozenBase) -> None:
    """By the definition of the gather: the gradient of one customer's loss with respect to all slots is zero but for its own."""
    from pipeline.training.batches import row_losses

    mixed = Mixed(base, 3, 6, 1, 100, Accelerator(cpu=True))
    for slot, wanted in enumerate([Wanted(1), Wanted(2, length=6), Wanted(3, kind="mlp")]):
        mixed.bank.fill(slot, wanted.method(base)(), False)
    rows = [*records(1, 3), *records(2, 3)]
    slots = torch.tensor([0, 0, 0, 1, 1, 1])
    with base.prefixes(mixed.bank, slots):
        losses = row_losses(base, rows, 1)
        for gradient in torch.autograd.grad(losses[:3].sum(), list(mixed.bank.tensors.values())):
            assert gradient[0].abs().max() > 0
            assert gradient[1:].abs().max() == 0
            assert gradient[0, :, :, 3:].abs().max() == 0, "columns that the slot does not use"


def test_gradient_checkpointing_gives_the_same_prefix(base: FrozenBase) -> None:
    wanted = [Wanted(1), Wanted(2, kind="embedding"), Wanted(3, kind="mlp")]
    plain, _ = trained(base, [w.resident(base) for w in wanted], slots=3)
    checkpointing = attached()
    checkpointing.checkpoint_gradients()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    checkpointing.model.model.layers[0].register_forward_hook(count)
    again, _ = trained(checkpointing, [w.resident(checkpointing) for w in wanted], slots=3)
    for a, b in zip(plain, again, strict=True):
        assert difference(final(a), final(b)) < 1e-10
    assert calls > 2 * 12, "the blocks were not run again in backward"


def test_out_of_memory_halves_the_budget_and_loses_nothing(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import mixed as module

    wanted = [Wanted(1), Wanted(2, length=6), Wanted(3)]
    plain, _ = trained(base, [w.resident(base) for w in wanted], slots=3)
    real, failures = module.row_losses, 0

    def small_device(base: FrozenBase, rows: Any, pad: int) -> torch.Tensor:
        nonlocal failures
        losses = real(base, rows, pad)
        if len(rows) * max(len(r.prompt_ids) + len(r.target_ids) for r in rows) > 45:
            failures += 1
            # Half of backward is through when memory ends.
            if losses.requires_grad:
                torch.autograd.grad(losses.sum(), list(base.active.bank.tensors.values())[:1], retain_graph=True)  # type: ignore[union-attr]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(module, "row_losses", small_device)
    said: list[str] = []
    monkeypatch.setattr(module.Mixed.__init__, "__defaults__", (lambda: False, said.append, None))
    squeezed, failed = trained(base, [w.resident(base) for w in wanted], slots=3, budget=2000)
    assert failures >= 2 and failed == [None] * 3
    assert len(said) == 1 and "out of device memory" in said[0]
    for a, b in zip(plain, squeezed, strict=True):
        assert difference(final(a), final(b)) < 1e-10


def test_a_row_that_fits_in_no_memory_fails_its_customer_alone(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import mixed as module

    real = module.row_losses

    def small_device(base: FrozenBase, rows: Any, pad: int) -> torch.Tensor:
        if max(len(r.prompt_ids) + len(r.target_ids) for r in rows) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, rows, pad)

    monkeypatch.setattr(module, "row_losses", small_device)
    wanted = Wanted(1)
    keys_and_values, _, _ = by_hand(base, wanted)
    residents, failed = trained(base, [Wanted(2, longest=60).resident(base), wanted.resident(base)], slots=2)
    assert failed[0] is not None and "max_input_tokens" in failed[0] and failed[1] is None
    assert difference(final(residents[1]), keys_and_values) < 1e-10


def test_dropout_of_the_base_is_off_even_in_train_mode() -> None:
    """Dropout would draw one random mask for the batch: what a row gets would depend on its neighbours."""
    torch.manual_seed(0)
    model = llama()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    base = attach(model.double())
    base.checkpoint_gradients()
    runs = [trained(base, [Wanted(1).resident(base)], slots=1)[0][0] for _ in range(2)]
    assert difference(final(runs[0]), final(runs[1])) == 0


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_turn_by_the_longest_row_are_known(rope_type: str) -> None:
    """Such a base turns a row's positions otherwise beside a long neighbour: jobs refuse rows beyond the limit that it names."""
    from pipeline.training.batches import row_losses

    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 32}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128 if rope_type == "longrope" else 32, rope_parameters=parameters,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    base = attach(model.double())
    assert base.rotary_limit == base.max_positions == 32
    bank = PrefixBank.of(base.sites, [Wanted(1).method(base)()], [False])
    row, neighbour = Record([5, 6, 7, 8], [9, 10, 0], "", [""]), Record(list(range(2, 42)), [9, 0], "", [""])

    def loss(rows: list[Record]) -> float:
        with torch.no_grad(), base.prefixes(bank, torch.zeros(len(rows), dtype=torch.int64)):
            return float(row_losses(base, rows, 1)[0])

    alone = loss([row])
    assert abs(loss([row, Record([3] * 20, [9, 0], "", [""])]) - alone) < 1e-12, "below the limit rows are their own"
    with pytest.raises(PrefixError, match=r"pass the 32 positions of the base \(from there on"):
        loss([row, neighbour])
    base.max_positions = None
    assert abs(loss([row, neighbour]) - alone) > 1e-6, "if transformers turned rows one by one, the refusal could go"
    assert attached().rotary_limit is None
