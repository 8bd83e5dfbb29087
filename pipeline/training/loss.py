"""Cross-entropy of the logits that a base gives, in its own type, without a copy of them in float32.

In: logits and tokens. Out: a loss for each, with gradients. Logits and what comes of them are the largest tensors of a small model's step, and with a
large vocabulary of a large one's. PyTorch's own function on logits in 16 bit keeps a copy in float32 and makes two more on the way back, 16 bytes a
logit in all. Here some rows at a time are taken to float32, so that they stay in the processor's cache, and what is kept is their gradient in the
logits' own type: 4 bytes. The idea is that of Liger Kernel (Hsu et al. 2024). Knows nothing of prefixes.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Numbers that are taken to float32 at a time: on a processor a megabyte for each thread, which a core's cache has room for; on a GPU more, and the
# 128 MiB of the two copies that there are meanwhile are little beside a large base.
_ON_CPU, _ON_GPU = 2**18, 2**24


def cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[wanted] of each row, as `torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")`.

    Args:
        logits: [N, vocabulary] in any floating-point type.
        wanted: int64 [N].

    Returns:
        [N], float32, or float64 where the logits are. One backward pass is possible, and no second derivative.
    """
    losses: torch.Tensor = _CrossEntropy.apply(logits, wanted, torch.is_grad_enabled() and logits.requires_grad)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, wanted: torch.Tensor, learns: bool) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_empty(len(logits), dtype=wide)
        gradient = torch.empty_like(logits) if learns else None
        numbers = _ON_CPU * torch.get_num_threads() if logits.device.type == "cpu" else _ON_GPU
        step = max(1, numbers // logits.shape[1])
        for at in range(0, len(logits), step):
            some, own = logits[at : at + step].to(wide), wanted[at : at + step, None]
            shares = torch.softmax(some, -1)
            # The largest share is 1 / sum(exp(logit - largest logit)), and never so small that its logarithm is lost.
            losses[at : at + step] = some.amax(-1) - shares.amax(-1).log() - some.gather(1, own)[:, 0]
            if gradient is not None:
                gradient[at : at + step] = shares.scatter_add_(1, own, shares.new_full(own.shape, -1))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        # In its place: a second backward pass would find it changed, and say so.
        return kept.mul_(gradients[0].to(kept.dtype)[:, None]), None, None
