"""The RMSNorm that a base gets on a processor in 16 bit."""

from collections.abc import Callable

import pytest
import torch

from pipeline.errors import BaseModelError
from pipeline.prefix import PrefixBank, attach, base

from .families import some_ids, tiny_model


def test_the_16_bit_norm_gives_the_models_own_output_and_a_gradient_as_near_to_float64() -> None:
    norm = attach(tiny_model("llama").bfloat16()).model.model.norm
    assert "forward" in vars(norm)
    generator = torch.Generator().manual_seed(0)
    norm.weight.copy_(torch.rand(32, generator=generator) + 0.5)
    hidden, of_output = (torch.randn(3, 20, 32, generator=generator).bfloat16() for _ in range(2))

    def gradient(function: object, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        given = hidden.to(dtype).requires_grad_()
        output = function(norm.to(dtype), given)  # type: ignore[operator]
        return output.detach(), torch.autograd.grad(output, given, of_output.to(dtype))[0].double()

    own, ours = gradient(type(norm).forward, torch.bfloat16), gradient(lambda module, given: module(given), torch.bfloat16)
    exact = gradient(
        lambda module, given: torch.nn.functional.rms_norm(given, (32,), module.weight, module.variance_epsilon), torch.float64
    )
    assert torch.equal(ours[0], own[0])
    assert (ours[1] - exact[1]).norm() <= 2 * (own[1] - exact[1]).norm()
    assert not torch.equal(ours[1], own[1]), "the model's own backward pass ran"


def test_gradients_of_a_prefix_through_twelve_layers_are_as_near_to_float32_with_the_16_bit_norm(
    bank_of_text: Callable[..., PrefixBank],
) -> None:
    """Errors of one norm would add up, layer by layer."""

    def gradients(dtype: torch.dtype, own_norms: bool) -> dict[str, torch.Tensor]:
        attached = attach(tiny_model("llama", num_hidden_layers=12).to(dtype).eval())
        if own_norms:
            for module in attached.model.modules():
                vars(module).pop("forward", None)
        lightened = [name for name, module in attached.model.named_modules() if "forward" in vars(module)]
        assert len(lightened) == (0 if own_norms or dtype == torch.float32 else 25)
        bank = bank_of_text(attached, [5, 6, 7, 8, 9], torch.float32)
        for tensor in bank.tensors.values():
            tensor.requires_grad_()
        ids = some_ids(2, 20)
        with attached.prefixes(bank, torch.tensor([1, 2])):
            logits = attached.model(input_ids=ids, use_cache=False).logits.float()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        found = {name: tensor.grad for name, tensor in bank.tensors.items()}
        return {name: gradient.double() for name, gradient in found.items() if gradient is not None}

    exact = gradients(torch.float32, True)
    assert len(exact) == 12
    own, ours = gradients(torch.bfloat16, True), gradients(torch.bfloat16, False)
    for name, true in exact.items():
        assert (ours[name] - true).norm() <= 1.25 * (own[name] - true).norm(), name


@pytest.mark.parametrize(("family", "dtype"), [("gemma2", torch.bfloat16), ("llama", torch.float32)])
def test_norms_of_another_formula_or_type_are_left_alone(family: str, dtype: torch.dtype) -> None:
    model = attach(tiny_model(family).to(dtype)).model
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_base_that_is_refused_has_its_own_norms_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise BaseModelError("no")

    monkeypatch.setattr(base, "prove", refuse)
    model = tiny_model("llama").bfloat16()
    with pytest.raises(BaseModelError):
        attach(model)
    assert not any("forward" in vars(module) for module in model.modules())
