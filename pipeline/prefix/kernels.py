"""What computes attention behind the hook: SDPA, the model's own eager function, flex attention, flash attention.

In: queries [B, heads, T, head_dim], keys and values [B, heads_kv, K, head_dim] with the prefix already in front, and who sees whom. Out: what the
model's attention module expects of a function of transformers' `AttentionInterface`. Knows nothing of prefixes.

flash-attn and flex attention want masks in forms of their own, which are made once for all layers of a forward pass:
- flex: a block mask made from the boolean mask; soft caps, sinks, windows and infixes all work.
- flash: rows without padding, one behind the other, with their lengths. Its causal triangle is aligned to the last query and the last key of
  each row, so a row whose keys are [prefix; sequence] needs no mask at all: every query sees the whole prefix. What a triangle cannot say
  (sliding windows, infixes) or the kernel does not add (relative biases, sinks) is refused.
"""

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.errors import BaseModelError

KERNELS = ("sdpa", "eager", "flash_attention_2", "flex_attention")
# Those that run on a GPU only: flex attention has no backward pass on a CPU (PyTorch 2.13).
GPU_ONLY = ("flash_attention_2", "flex_attention")
FLASH_DTYPES = (torch.float16, torch.bfloat16)

Output = tuple[torch.Tensor, torch.Tensor | None]

# Up to how many columns the shares of attention are kept for the backward pass: they take as much memory as the queries times this over head_dim.
_KEPT_COLUMNS = 256


class Seen:
    """Who sees whom, for all layers of a forward pass: what kernels make of it is made once.

    Attributes:
        mask: bool [B or 1, 1, T, K], True where seen.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        self._added: dict[torch.dtype, torch.Tensor] = {}

    def added(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, of the mask's shape: 0 or nearly minus infinity."""
        if dtype not in self._added:
            # Eager functions take the softmax in float32 even of float64 (Gemma 2), where float64's lowest is minus infinity.
            lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
            self._added[dtype] = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device).masked_fill_(
                ~self.mask, lowest
            )
        return self._added[dtype]

    @cached_property
    def blind(self) -> torch.Tensor | None:
        """Queries that see nothing, bool [B or 1, 1, T, 1]; None if all see something."""
        blind = ~self.mask.any(-1, keepdim=True)
        return blind if bool(blind.any()) else None


def sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Seen | None, kwargs: dict[str, Any]
) -> Output:
    """PyTorch's scaled dot product attention; where it lacks something (soft caps, attention sinks), `eager`."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return eager(module, query, key, value, seen, kwargs)
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    plain = (
        value.shape[-1] == query.shape[-1]
        and kwargs.get("position_bias") is None
        and not kwargs.get("dropout")
        and (seen is not None or not is_causal(module, kwargs))
    )
    if learns and plain and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        scale: float | None = kwargs.get("scaling")
        output: torch.Tensor = _ByProducts.apply(query, key, value, seen, query.shape[-1] ** -0.5 if scale is None else scale)
        return output.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, None if seen is None else seen.mask, **kwargs)


class _ByProducts(torch.autograd.Function):
    """SDPA on a processor in bfloat16, by batched matrix products.

    PyTorch's own backward pass (2.13) makes no use of the processor's 16-bit matrix unit: at 32 rows of 128 tokens it takes three times as long,
    which was a third of a training step. Over few columns the forward pass is by products too, and what each query takes of each column (its share)
    is kept; over many, PyTorch's forward pass is faster and keeps less, and the shares are computed again.

    A product gives scores in bfloat16, where one of 100 is a quarter off, though the softmax only looks at their differences. So the keys of a row
    are taken less their mean, which shifts all scores of a query alike: what biases of the projections (Qwen2's, say) add to all keys is gone, and
    what is left is rounded as in transformers' eager attention. The trick is that of SageAttention (Zhang et al. 2024).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Seen | None, scale: float
    ) -> torch.Tensor:
        """Attention [B, heads, T, head_dim] of query [B, heads, T, head_dim] over key and value [B, heads_kv, K, head_dim]."""
        batch, heads, length, size = query.shape
        kv, columns = key.shape[1:3]
        ctx.seen, ctx.scale = seen, scale
        # The heads of a group share their keys: one behind the other they make one matrix [batch * kv, heads / kv * T, head_dim].
        queries = (query * scale).reshape(batch * kv, heads // kv * length, size)
        keys = (key - key.mean(2, keepdim=True)).reshape(batch * kv, columns, size)
        values = value.reshape(batch * kv, columns, size)
        if columns > _KEPT_COLUMNS:
            ctx.save_for_backward(queries, keys, values)
            mask = None if seen is None else seen.added(query.dtype)
            output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        else:
            shares = _shares(queries, keys, seen, query.shape)
            ctx.save_for_backward(queries, keys, values, shares)
            output = torch.bmm(shares, values).view(query.shape)
        # Who sees nothing has an output of zeros, which depends on nothing.
        return output if seen is None or seen.blind is None else output.masked_fill_(seen.blind, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of what `forward` takes, from that of what it gives."""
        queries, keys, values, *kept = ctx.saved_tensors
        of_output, seen = gradients[0], ctx.seen
        shape = of_output.shape
        shares = kept[0] if kept else _shares(queries, keys, seen, shape)
        if seen is not None and seen.blind is not None:
            of_output = of_output.masked_fill(seen.blind, 0)
        of_output = of_output.reshape(queries.shape)
        of_query = of_key = of_value = None
        of_columns = (shape[0], -1, *keys.shape[1:])
        if ctx.needs_input_grad[2]:
            of_value = torch.bmm(shares.transpose(1, 2), of_output).view(of_columns)
        of_scores = torch._softmax_backward_data(torch.bmm(of_output, values.transpose(1, 2)), shares, -1, shares.dtype)
        if ctx.needs_input_grad[0]:
            of_query = torch.bmm(of_scores, keys).mul_(ctx.scale).view(shape)
        if ctx.needs_input_grad[1]:
            of_key = torch.bmm(of_scores.transpose(1, 2), queries).view(of_columns)
        return of_query, of_key, of_value, None, None


def _shares(queries: torch.Tensor, keys: torch.Tensor, seen: Seen | None, shape: torch.Size) -> torch.Tensor:
    """The softmax of the scores, [B * heads_kv, heads / heads_kv * T, K], of queries [B, heads, T, head_dim], scaled and grouped."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if seen is not None:
        grouped = scores.view(shape[0], -1, queries.shape[1] // shape[2], shape[2], keys.shape[1])
        grouped.add_(seen.added(scores.dtype)[:, :, None])
    return torch.softmax(scores, dim=-1)


def eager(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Seen | None, kwargs: dict[str, Any]
) -> Output:
    """The model's own eager function."""
    # Eager functions add their mask.
    mask = None if seen is None else seen.added(query.dtype)
    function = sys.modules[type(module).__module__].eager_attention_forward
    return function(module, query, key, value, mask, **{"dropout": 0.0, **kwargs})


def block_mask(mask: torch.Tensor) -> BlockMask:
    """The form that flex attention wants of a mask bool [B, 1, T, K]."""
    batch, _, length, keys = mask.shape

    def sees(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask[row, 0, query, key]

    return create_block_mask(sees, B=batch, H=None, Q_LEN=length, KV_LEN=keys, device=mask.device)


def flex(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask | None, kwargs: dict[str, Any]
) -> Output:
    """Flex attention, through transformers' function.

    Args:
        mask: see `block_mask`.
    """
    bias = kwargs.get("position_bias")
    if bias is not None:
        # transformers' function (5.23) looks each row's bias up; the base is frozen, so no gradient is wanted.
        kwargs = {**kwargs, "position_bias": bias.detach().expand(query.shape[0], -1, -1, -1)}
    return AttentionInterface()["flex_attention"](module, query, key, value, mask, **kwargs)


@dataclass(frozen=True)
class Packing:
    """Where the tokens that are no padding stand, for a batch whose rows are laid one behind the other.

    Attributes:
        queries, keys: their places among the [B * T] queries and [B * K] keys, row by row, int64.
        query_ends, key_ends: int32 [B + 1], where each row begins and ends.
        longest_query, longest_key: the longest row.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int


def pack(queries: torch.Tensor, keys: torch.Tensor) -> Packing:
    """Find the places.

    Args:
        queries: bool [B, T], False for padding.
        keys: bool [B, K], False for what no query of the row sees; under a causal triangle the last key of a row is its last query's own.
    """
    ends, longest = [], []
    for real in (queries, keys):
        lengths = real.sum(1)
        ends.append(nn.functional.pad(lengths.cumsum(0), (1, 0)).int())
        longest.append(int(lengths.max()))
    return Packing(queries.flatten().nonzero()[:, 0], keys.flatten().nonzero()[:, 0], ends[0], ends[1], longest[0], longest[1])


def flash(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, kwargs: dict[str, Any]
) -> Output:
    """Flash attention over rows without padding: the flash-attn package's kernel if it is installed, else the one inside PyTorch.

    transformers' own function is not used, for it takes the kernel's name from the model's configuration, which names the hook.

    Raises:
        BaseModelError: the model needs what the kernel does not compute.
    """
    _check_flash(query, kwargs)
    batch, heads, length, size = query.shape

    def packed(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).flatten(0, 1).index_select(0, places)  # [tokens, heads, head_dim]

    scale: float | None = kwargs.get("scaling")
    mixed = (_of_package if _has_flash_attn() else _of_torch)(
        packed(query, packing.queries),
        packed(key, packing.keys),
        packed(value, packing.keys),
        packing,
        is_causal(module, kwargs),
        size**-0.5 if scale is None else scale,
        kwargs.get("softcap"),
    )
    output = mixed.new_zeros(batch * length, heads, size).index_copy(0, packing.queries, mixed)
    return output.view(batch, length, heads, size), None


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this call is causal, as transformers' functions decide it."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _check_flash(query: torch.Tensor, kwargs: dict[str, Any]) -> None:
    reason = None
    if query.dtype not in FLASH_DTYPES:
        reason = f"computes in 16 bit and the base is in {query.dtype}: set base_model.dtype: bfloat16"
    elif kwargs.get("position_bias") is not None:
        reason = "adds no relative position bias, which the base has"
    elif kwargs.get("s_aux") is not None:
        reason = "has no attention sinks, which the base has"
    elif kwargs.get("softcap") is not None and not _has_flash_attn():
        reason = "has soft caps, which the base has, only in the package flash-attn: install that"
    elif query.shape[-1] % 8 or query.shape[-1] > 256:
        reason = f"takes head sizes up to 256 in steps of 8, and the base has {query.shape[-1]}"
    if reason is not None:
        raise flash_refusal(reason)


def flash_refusal(reason: str) -> BaseModelError:
    """The error for a base whose attention flash attention does not compute."""
    return BaseModelError(f"base_model.attention: flash_attention_2 {reason}. Or choose sdpa, or flex_attention.")


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _of_package(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: Packing, causal: bool, scale: float, softcap: float | None
) -> torch.Tensor:
    """flash-attn 2.6 and later."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        at.query_ends,
        at.key_ends,
        at.longest_query,
        at.longest_key,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap or 0.0,
    )


def _of_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: Packing, causal: bool, scale: float, softcap: float | None
) -> torch.Tensor:
    """The kernel inside PyTorch, which is flash-attn's without soft caps. Argument names changed from 2.10 to 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    assert softcap is None  # refused by `_check_flash`
    takes = inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)} if "window_size" in takes else {"is_causal": causal}
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in takes:
        how["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return cast(
        torch.Tensor,
        varlen_attn(query, key, value, at.query_ends, at.key_ends, at.longest_query, at.longest_key, scale=scale, **how),
    )
