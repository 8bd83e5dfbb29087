"""Each baseline trains what it says and nothing else, on every kind of model, and begins as the base."""

import importlib.util

import pytest
import torch

from pipeline.compare import weights
from pipeline.errors import ConfigError
from pipeline.prefix import FrozenBase, PrefixBank, load_base
from pipeline.training.batches import row_losses

from .rows import Row, job_base

ROWS = [Row([5, 6, 7], [8, 9, 0]), Row([7], [4, 0])]


@pytest.fixture(params=["tiny_base", "tiny_encoder_decoder"])
def base(request: pytest.FixtureRequest) -> FrozenBase:
    return load_base(job_base(request.getfixturevalue(request.param)))


def losses(base: FrozenBase) -> torch.Tensor:
    with base.prefixes(PrefixBank(base.sites, slots=1, length=0), torch.zeros(len(ROWS), dtype=torch.int64)):
        return row_losses(base, ROWS, 1)


def count(parameters: list[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def step(base: FrozenBase, parameters: list[torch.nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses(base).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    optimizer.step()


def test_full_fine_tuning_trains_every_weight(base: FrozenBase) -> None:
    parameters = weights.full(base)
    assert count(parameters) == sum(p.numel() for p in base.model.parameters())
    before = losses(base).sum().item()
    step(base, parameters)
    assert losses(base).sum().item() < before


def test_top_layers_are_the_last_two_of_the_decoder(base: FrozenBase) -> None:
    parameters = weights.top_layers(base)
    named = {name for name, parameter in base.model.named_parameters() if parameter.requires_grad}
    assert len(named) == len(parameters)
    stack = "decoder.block." if base.is_encoder_decoder else "model.layers."
    assert all(stack in name for name in named)
    # The tiny bases have two layers in all.
    assert {name.split(stack)[1].split(".")[0] for name in named} == {"0", "1"}


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_adapters_begin_as_the_identity_and_have_the_share_asked_for(base: FrozenBase, share: float) -> None:
    before, weights_before = losses(base), base.digest()
    of_base = sum(p.numel() for p in base.model.parameters())
    parameters = weights.adapters(base, share, seed=0)
    assert torch.equal(losses(base), before)
    assert 0.5 * share < count(parameters) / of_base <= share
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses(base).sum().backward()
    optimizer.step()
    assert not torch.equal(losses(base), before)
    assert base.digest() == weights_before


def test_a_base_without_a_known_feed_forward_part_is_refused(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_FEED_FORWARD", ("other",))
    with pytest.raises(ConfigError, match="no feed-forward module named other"):
        weights.adapters(base, 0.1, seed=0)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
def test_lora_begins_as_the_base_and_leaves_its_weights(base: FrozenBase) -> None:
    before = losses(base)
    kept = {name: p.clone() for name, p in base.model.named_parameters()}
    parameters = weights.lora(base)
    assert torch.allclose(losses(base), before, atol=1e-5)
    assert 0 < count(parameters) < sum(p.numel() for p in kept.values()) / 2
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses(base).sum().backward()
    optimizer.step()
    assert not torch.allclose(losses(base), before, atol=1e-5)
    after = {name.replace(".base_layer", ""): p for name, p in base.model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(after[name], value) for name, value in kept.items())


def test_without_peft_lora_says_what_to_install(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.compare.weights.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"prefixfleet\[compare\]"):
        weights.lora(base)
