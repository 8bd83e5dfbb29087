"""The loss without a copy of the logits in float32, against PyTorch's own."""

import pytest
import torch

from pipeline.training import loss


def _both(dtype: torch.dtype, size: float) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Losses of 37 rows, and the gradients of their weighted sum: ours, and PyTorch's in float64 of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(37, 100, generator=generator) * size).to(dtype)
    wanted, weights = torch.randint(100, (37,), generator=generator), torch.rand(37, generator=generator)
    found = []
    for given, function in (
        (logits, loss.cross_entropy),
        (logits.double(), lambda x, y: torch.nn.functional.cross_entropy(x, y, reduction="none")),
    ):
        given = given.clone().requires_grad_()
        losses = function(given, wanted)
        found.append((losses, *torch.autograd.grad((losses * weights.to(losses.dtype)).sum(), given)))
    return found[0], found[1]


# A target's share of e^-300 is zero in float32, and its loss is 300 all the same.
@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("numbers", [2**18, 500, 1])  # in one go, some rows at a time (the last ones are fewer), row by row
def test_losses_and_gradients_are_those_of_pytorch_in_float64(size: float, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_ON_CPU", numbers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for dtype, of_losses, of_gradients in (
        (torch.float64, 1e-13, 1e-13), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 1.2 * 2**-8), (torch.float16, 1e-6, 1.2 * 2**-11),
    ):  # fmt: skip
        (losses, gradient), (expected, expected_gradient) = _both(dtype, size)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
        torch.testing.assert_close(losses.double(), expected, rtol=of_losses, atol=of_losses)
        assert (gradient.double() - expected_gradient).norm() <= of_gradients * expected_gradient.norm()


def test_a_row_without_a_finite_loss_leaves_the_others_theirs() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([1, 2, 3, 4])
    expected = loss.cross_entropy(logits, wanted)
    logits[1, 5] = float("nan")
    logits[2] = float("inf")
    found = loss.cross_entropy(logits.requires_grad_(), wanted)
    assert torch.equal(found[[0, 3]], expected[[0, 3]]) and found[[1, 2]].isnan().all()
    (gradient,) = torch.autograd.grad(found[[0, 3]].sum(), logits)
    assert gradient[[0, 3]].isfinite().all() and gradient[[0, 3]].abs().sum() > 0


def test_a_second_backward_pass_is_refused_and_without_gradients_nothing_is_kept() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    wanted = torch.zeros(4, dtype=torch.int64)
    total = loss.cross_entropy(logits, wanted).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    with torch.no_grad():
        assert loss.cross_entropy(logits, wanted).grad_fn is None
