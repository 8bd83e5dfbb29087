"""What prefixes start as, and the parameterisations that start so."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import PrefixSettings
from pipeline.errors import PrefixError
from pipeline.prefix import FrozenBase, PrefixBank, attach, save_prefix
from pipeline.prefix.bank import Flat
from pipeline.prefix.direct import Direct
from pipeline.prefix.embedding import EmbeddingOnly, embeddings_of_text, random_embeddings
from pipeline.prefix.initialise import from_random, from_text, from_zeros
from pipeline.prefix.mlp import Reparameterised
from pipeline.prefix.parameterise import parameterise
from pipeline.training.job import JobPrefix

from .families import some_ids, tiny_double, tiny_model

TEXT = [5, 6, 7, 8, 9]
DIGEST = "b" * 64


@dataclasses.dataclass
class Row:
    prompt_ids: list[int]
    target_ids: list[int]


ROWS = [Row([i, i + 1], [i + 2]) for i in range(10, 40, 3)]


def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": [5 + len(word) for word in text.split()]}


def start(base: FrozenBase, task: str = "default", seed: int = 0, **settings: Any) -> tuple[torch.nn.Module, str | None]:
    """`parameterise` as training calls it, with settings from the fleet file."""
    prefix = JobPrefix(**PrefixSettings(length=4, **settings).model_dump(mode="json"))

    class Customer:
        pass

    customer: Any = Customer()
    customer.prefix, customer.task, customer.training = prefix, task, Customer()
    customer.training.seed = seed
    return parameterise(base, DIGEST, customer, tokenizer, ROWS)


def same(found: Flat, expected: dict[str, Any], atol: float = 0.0) -> bool:
    return list(found) == list(expected) and all(
        torch.allclose(found[s], torch.stack(list(expected[s])), atol=atol, rtol=0) for s in expected
    )


def test_random_prefix_depends_on_the_seed_alone_and_zeros_are_zeros() -> None:
    sites = attach(tiny_model("llama")).sites
    a, b, c = (from_random(sites, 3, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[s][0], b[s][0]) and not torch.equal(a[s][0], c[s][0]) for s in sites)
    assert not any(t.any() for pair in from_zeros(sites, 3).values() for t in pair)


def test_longer_text_is_cut_and_shorter_text_is_repeated_as_tokens() -> None:
    base = attach(tiny_model("gpt2"))
    cut, whole = from_text(base, TEXT, 3), from_text(base, TEXT[:3], 3)
    assert all(torch.equal(cut[s][0], whole[s][0]) for s in base.sites)
    twice, by_hand = from_text(base, TEXT[:2], 4), from_text(base, [5, 6, 5, 6], 4)
    assert all(torch.equal(twice[s][1], by_hand[s][1]) for s in base.sites)
    with pytest.raises(PrefixError, match="at least one token"):
        from_text(base, [], 3)


@pytest.mark.parametrize("reparam", ["none", "mlp", "embedding"])
def test_every_parameterisation_can_start_from_every_text(reparam: str) -> None:
    base = attach(tiny_model("llama"))
    by_text = {"init_text": "a bb", "init": "text"}, [6, 7, 6, 7]
    by_task = {"init": "task"}, [12, 10, 9, 12]  # "reviews short text"
    sampled = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()[:2]
    by_rows = {"init": "text"}, [t for i in sampled for t in (*ROWS[i].prompt_ids, *ROWS[i].target_ids)]
    for settings, ids in (by_text, by_task, by_rows):
        method, parent = start(base, task="reviews-short_text", reparam=reparam, mid_dim=16, **settings)
        assert parent is None
        assert same(method(), from_text(base, ids, 4), atol=1e-5)


@pytest.mark.parametrize("reparam", ["none", "mlp"])
def test_zeros_random_and_chosen_sites_and_layers(reparam: str) -> None:
    base = attach(tiny_model("bart"))
    method, _ = start(base, reparam=reparam, init="zeros", sites=["decoder.cross", "encoder.self"], layers=1)
    assert {name: tuple(t.shape) for name, t in method().items()} == {
        "encoder.self.1": (2, 2, 4, 16),
        "decoder.cross.2": (2, 4, 4, 8),
    }
    assert not any(t.any() for t in method().values())
    a, b, c = (start(base, reparam=reparam, init="random", seed=seed)[0]() for seed in (1, 1, 2))
    assert list(a) == list(base.sites)
    assert all(torch.equal(a[s], b[s]) and not torch.equal(a[s], c[s]) and a[s].std() > 0.01 for s in a)


def test_mlp_has_the_paper_s_form_and_its_output_is_all_that_remains() -> None:
    base = attach(tiny_model("bart"))
    method, _ = start(base, reparam="mlp", mid_dim=24, init="random")
    assert isinstance(method, Reparameterised)
    assert method.kinds == ["encoder.self", "decoder.self", "decoder.cross"]
    given, network = method.inputs[1], method.networks[1]
    assert given.shape == (4, 32)
    weights = [dict(network.named_parameters())[n] for n in ("0.weight", "0.bias", "2.weight", "2.bias")]
    by_hand = torch.tanh(given @ weights[0].T + weights[1]) @ weights[2].T + weights[3]  # [P, layers * 2 * heads * head_dim]
    of_layers = by_hand.view(4, 3, 2, 4, 8).permute(1, 2, 3, 0, 4)
    for layer in range(3):
        torch.testing.assert_close(method()[f"decoder.self.{layer}"], of_layers[layer])
    sum(t.sum() for t in method().values()).backward()
    assert all(p.grad is not None for p in method.parameters())


@torch.no_grad()
def test_embedding_only_gives_the_logits_of_those_embeddings_in_front() -> None:
    for family in ("gpt2", "llama", "gemma2", "gemma3"):
        model = tiny_double(family)
        base = attach(model)
        method = EmbeddingOnly(base, random_embeddings(base, 4, seed=0))
        ids = some_ids(1, 5)
        words = model.get_input_embeddings()(ids)
        front = torch.cat([method.embeddings[None].double(), words], dim=1)
        expected = model(inputs_embeds=front).logits[:, 4:]
        with base.prefixes(PrefixBank.of(base.sites, [method()], [False]), torch.tensor([0])):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)  # keys and values are kept in float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_embedding_only_gets_the_gradient_of_the_prefill(checkpointing: bool) -> None:
    """Compared with finite differences along one direction."""
    model = tiny_double("llama")
    base = attach(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    method = EmbeddingOnly(base, embeddings_of_text(base, TEXT, 3)).double()
    direction = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss() -> torch.Tensor:
        bank = PrefixBank.of(base.sites, [method()], [False])
        with base.prefixes(bank, torch.tensor([0, 0])):
            value = model(input_ids=some_ids(2, 4), use_cache=False).logits.square().mean()
            if torch.is_grad_enabled():
                value.backward()
        return value.detach()

    loss()
    assert method.embeddings.grad is not None
    slope = (method.embeddings.grad * direction).sum()
    step = 1e-3  # Llama's norms compute in float32, which a smaller step would measure
    with torch.no_grad():
        method.embeddings.add_(direction, alpha=step)
        above = loss()
        method.embeddings.sub_(direction, alpha=2 * step)
        below = loss()
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=2e-3, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def saved(folder: Path, base: FrozenBase, length: int = 4, digest: str = DIGEST) -> Path:
    of_base = {"id": "some/base", "revision": None, "digest": digest, "is_encoder_decoder": base.is_encoder_decoder}
    content = {"base": of_base, "prefix": {"length": length, "placement": "prefix"}}
    save_prefix(folder, from_random(base.sites, length, seed=5), content)
    return folder


@pytest.mark.parametrize("reparam", ["none", "mlp"])
def test_warm_start_begins_as_the_other_prefix_and_names_it(tmp_path: Path, reparam: str) -> None:
    base = attach(tiny_model("llama"))
    folder = saved(tmp_path / "p", base)
    method, parent = start(base, reparam=reparam, init="prefix", init_prefix=str(folder))
    assert same(method(), from_random(base.sites, 4, seed=5), atol=1e-6)
    assert parent is not None and len(parent) == 64


def test_warm_start_from_a_champion_that_is_not_there_yet_starts_from_text() -> None:
    base = attach(tiny_model("llama"))
    method, parent = start(base, init="prefix", init_prefix="champion", init_text="a bb")
    assert same(method(), from_text(base, [6, 7], 4)) and parent is None


def test_warm_start_from_what_does_not_fit_is_refused_with_what_it_is(tmp_path: Path) -> None:
    base = attach(tiny_model("llama"))
    other = saved(tmp_path / "other", base, digest="c" * 64)
    with pytest.raises(PrefixError, match=f"digest {'c' * 16}.*has {'b' * 16}"):
        start(base, init="prefix", init_prefix=str(other))
    longer = saved(tmp_path / "longer", base, length=6)
    with pytest.raises(PrefixError, match=r"length 6.*asked for are length 4"):
        start(base, init="prefix", init_prefix=str(longer))
    whole = saved(tmp_path / "whole", base)
    with pytest.raises(PrefixError, match=r"3 sites.*asked for are length 4, 1 sites"):
        start(base, init="prefix", init_prefix=str(whole), layers=1)


def test_encoder_decoders_refuse_what_is_for_decoders_alone() -> None:
    base = attach(tiny_model("t5"))
    with pytest.raises(PrefixError, match="infix is for decoder-only"):
        start(base, placement="infix")
    with pytest.raises(PrefixError, match="embedding-only prefixes are for decoder-only"):
        start(base, reparam="embedding")


def test_an_infix_on_flash_attention_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    base = attach(tiny_model("llama"))
    monkeypatch.setattr(base.active, "kernel", "flash_attention_2")
    with pytest.raises(PrefixError, match=r"infix.*flash_attention_2 cannot.*placement: prefix"):
        start(base, placement="infix", init="zeros")


def test_a_bank_for_training_holds_prefixes_of_different_methods_and_lengths_side_by_side() -> None:
    """Rows gathered by slot, each with its own gradient, as with a bank of its own."""
    base = attach(tiny_double("llama"))
    text = {s: (k.float(), v.float()) for s, (k, v) in from_text(base, TEXT, 5).items()}
    methods: list[torch.nn.Module] = [
        Direct({"decoder.self.2": text["decoder.self.2"]}, base.device),
        Reparameterised(base.sites, 3, 32, 8, 0, base.device, None),
        EmbeddingOnly(base, embeddings_of_text(base, TEXT, 4)),
    ]
    infix = [False, True, False]
    ids, ends = some_ids(3, 6), torch.tensor([3, 2, 4])

    def logits(chosen: list[int]) -> torch.Tensor:
        bank = PrefixBank.of(base.sites, [methods[i]() for i in chosen], [infix[i] for i in chosen])
        with base.prefixes(bank, torch.arange(len(chosen))):
            base.prompts_end_at(ends[chosen])
            return base.model(input_ids=ids[chosen], use_cache=False).logits

    together = logits([0, 1, 2])
    together.square().mean((1, 2)).sum().backward()
    gradients = [[p.grad for p in m.parameters()] for m in methods]
    for i, method in enumerate(methods):
        method.zero_grad()
        alone = logits([i])
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=0)
        alone.square().mean().backward()
        for found, expected in zip(gradients[i], method.parameters(), strict=True):
            torch.testing.assert_close(found, expected.grad, atol=1e-6, rtol=1e-4)
