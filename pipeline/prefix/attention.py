"""Where the prefix enters a block: an attention function that puts each row's prefix before the keys and values of the sequence.

It is registered with transformers' `AttentionInterface`, so the model itself is unchanged (Li & Liang 2021, equation 2: `h_i` is a trained
parameter where i stands in the prefix, and the frozen LM's own activation elsewhere). Knows nothing of training or generation: which prefix
belongs to which row is what `ActivePrefix` holds for the forward (and backward) pass under way.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.errors import PrefixError
from pipeline.prefix.bank import PrefixBank

IMPLEMENTATION = "prefixfleet"


@dataclass
class ActivePrefix:
    """What the attention function needs to know about the batch under way. One object per base, shared by its attention modules.

    Attributes:
        bank: the prefixes, or None for a plain forward pass.
        rows: slot of each row of the batch, int64 [B].
        prompt_ends: for infix prefixes, the column (padding counted) of each row's last prompt token, int64 [B].
        seen: how many columns the cache holds before those of this pass; kept by the hook that shifts positions.
        eager: whether the model's own eager function computes attention instead of SDPA.
        captured: if not None, every attention module records its (key, value) here under its site's name.
        logits_at: if not None, the positions of the flattened batch [B * T] whose logits are computed, int64 [N].
        called: with `captured`, the attention modules in the order of their calls, with the shapes of query, key and value.
        deviations: if not None, every call is computed by hand too, and the difference noted: largest in this call / largest output.
    """

    bank: PrefixBank | None = None
    rows: torch.Tensor | None = None
    prompt_ends: torch.Tensor | None = None
    seen: int = 0
    eager: bool = False
    captured: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    logits_at: torch.Tensor | None = None
    called: list[tuple[nn.Module, torch.Size, torch.Size, torch.Size]] = field(default_factory=list)
    deviations: list[float] | None = None

    def shift(self, batch: int, length: int) -> torch.Tensor | None:
        """By how much the positions of this pass's tokens move, int64 [B, 1 or T]; None if nothing is attached.

        A prefix moves all of its row, an infix only what comes after the prompt.
        """
        if self.bank is None or self.rows is None:
            return None
        rows = self.rows_for(batch)
        shift = self.bank.shifts[rows][:, None]
        if not self.bank.has_infix:
            return shift
        # The last prompt token sees the infix but stands before it.
        after = self.columns_of_pass(length)[None, :] > self._ends_for(batch)[:, None]
        return torch.where(self.bank.infix[rows][:, None] & ~after, 0, shift)

    def may_see(self, batch: int, length: int) -> torch.Tensor | None:
        """Which tokens of this pass see their row's columns, bool [B, T]; None if all do, as with every prefix that is no infix."""
        assert self.bank is not None
        if not self.bank.has_infix:
            return None
        late = self.columns_of_pass(length)[None, :] >= self._ends_for(batch)[:, None]
        return late | ~self.bank.infix[self.rows_for(batch)][:, None]

    def columns_of_pass(self, length: int) -> torch.Tensor:
        """The columns of this pass's tokens in the whole sequence, int64 [T]."""
        assert self.rows is not None
        return torch.arange(self.seen, self.seen + length, device=self.rows.device)

    def rows_for(self, batch: int) -> torch.Tensor:
        """The slot of each row, int64 [batch]."""
        assert self.rows is not None
        return _repeated(self.rows, batch)

    def _ends_for(self, batch: int) -> torch.Tensor:
        if self.prompt_ends is None:
            raise PrefixError(
                "an infix needs to know where the prompts end: call base.prompts_end_at(columns) inside base.prefixes(…)"
            )
        return _repeated(self.prompt_ends, batch)


def _repeated(values: torch.Tensor, batch: int) -> torch.Tensor:
    # Beam search repeats each row `num_beams` times, beams of a row side by side.
    beams, rest = divmod(batch, len(values))
    assert rest == 0, f"{batch} rows do not stand for {len(values)} prefixes"
    return values if beams == 1 else values.repeat_interleave(beams)


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over prefix and sequence.

    Args:
        module: the attention module; its site says which keys and values of the bank are its own.
        query: [B, heads, T, head_dim].
        key, value: [B, heads_kv, K, head_dim], the cache included.
        attention_mask: bool [B or 1, 1, T, K], never None for a module that masks (see `explicit_mask`).
    """
    active: ActivePrefix = module._prefixfleet  # type: ignore[assignment]  # set by pipeline.prefix.base.attach
    site = getattr(module, "_prefixfleet_site", None)
    if active.captured is not None:
        active.called.append((module, query.shape, key.shape, value.shape))
        if site is not None:
            active.captured[site] = (key, value)
    if active.bank is None or site is None or site not in active.bank.sites:
        return _attend(active, module, query, key, value, attention_mask, kwargs)

    batch, length = query.shape[0], query.shape[2]
    rows = active.rows_for(batch)
    prefix_key, prefix_value, visible = active.bank.gather(site, rows, key.dtype)  # 2 x [B, heads_kv, P, head_dim], [B, P]
    seen = visible[:, None, None, :].expand(batch, 1, length, -1)  # every query sees the whole prefix, however narrow its window
    may_see = active.may_see(batch, length)
    if may_see is not None:
        seen = seen & may_see[:, None, :, None]
    sequence_mask = attention_mask
    if sequence_mask is None:  # an encoder or cross-attention without padding
        sequence_mask = seen.new_ones(batch, 1, length, key.shape[2])
    mask = torch.cat([seen, sequence_mask.expand(batch, -1, -1, -1)], dim=-1)
    bias = kwargs.get("position_bias")
    prefix_bias = None
    if bias is not None:
        prefix_bias = _bias_of_prefix(module, bias, active.bank.columns[site][rows], visible.shape[-1])
        kwargs["position_bias"] = torch.cat([prefix_bias, bias.expand(batch, -1, -1, -1)], dim=-1)
    output, weights = _attend(
        active, module, query, torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2), mask, kwargs
    )
    if active.deviations is not None:
        kwargs["position_bias"] = bias
        expected = by_hand(module, query, (prefix_key, prefix_value, seen), (key, value, attention_mask), prefix_bias, kwargs)
        error = (output.float() - expected.float()).abs().amax() / expected.float().abs().amax().clamp(min=1e-12)
        active.deviations.append(float(error))
    return output, weights


def _attend(
    active: ActivePrefix,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA, or the model's own eager function where SDPA lacks something: soft caps (Gemma 2) and attention sinks (gpt-oss)."""
    if not active.eager and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if mask is not None:
        # Eager functions add their mask, and take the softmax in float32 even of float64 (Gemma 2), where float64's lowest is minus infinity.
        lowest = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **{"dropout": 0.0, **kwargs})


def by_hand(
    module: nn.Module,
    query: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sequence: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    prefix_bias: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """What `prefix_attention` must give, from the definition: scores of prefix and sequence apart, one softmax over both.

    No kernel, no concatenation, no implied alignment of a causal triangle: what the check at attach time compares with.

    Args:
        query: [B, heads, T, head_dim].
        prefix: keys and values [B, heads_kv, P, head_dim] and bool [B, 1, T, P].
        sequence: keys and values [B, heads_kv, K, head_dim] and bool [B or 1, 1, T, K], or None where the model masks nothing.
        prefix_bias: [B, heads, T, P] or None.
        kwargs: of the attention function: scaling, softcap, position_bias [1, heads, T, K], s_aux [heads].

    Returns:
        [B, T, heads, head_dim].
    """
    work = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // prefix[0].shape[1]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores, values = [], []
    for (key, value, visible), bias in ((prefix, prefix_bias), (sequence, kwargs.get("position_bias"))):
        heads_key, heads_value = (t.to(work).repeat_interleave(groups, dim=1) for t in (key, value))
        score = torch.einsum("bhtd,bhkd->bhtk", query.to(work), heads_key) * scaling
        if kwargs.get("softcap") is not None:
            score = kwargs["softcap"] * torch.tanh(score / kwargs["softcap"])
        if bias is not None:
            score = score + bias
        if visible is None and getattr(module, "is_causal", False):
            # Nothing is masked out only if every key of the sequence stands before or at its query.
            visible = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril(score.shape[-1] - score.shape[-2])
        scores.append(score if visible is None else score.masked_fill(~visible, -torch.inf))
        values.append(heads_value)
    peak = torch.maximum(scores[0].amax(-1, keepdim=True), scores[1].amax(-1, keepdim=True)).clamp(min=torch.finfo(work).min)
    weights = [torch.exp(score - peak) for score in scores]
    total = weights[0].sum(-1, keepdim=True) + weights[1].sum(-1, keepdim=True)
    if kwargs.get("s_aux") is not None:
        total = total + torch.exp(kwargs["s_aux"].to(work)[None, :, None, None] - peak)
    mixed = sum(torch.einsum("bhtk,bhkd->bhtd", weight, value) for weight, value in zip(weights, values, strict=True))
    return (mixed / total).transpose(1, 2)


def _bias_of_prefix(module: nn.Module, bias: torch.Tensor, lengths: torch.Tensor, columns: int) -> torch.Tensor:
    """The prefix's part of T5's relative bias, [B, heads, T, P], for a sequence whose own is [1, heads, T, K].

    In decoder self-attention the prefix stands at positions -P..-1, as in PEFT; encoder and cross-attention give it no bias.
    """
    batch, length, keys = len(lengths), bias.shape[2], bias.shape[3]
    source = getattr(module, "_prefixfleet_bias_source", None)
    if source is None:
        return bias.new_zeros(batch, bias.shape[1], length, columns)
    # Keys include the cache, so the first query stands at position K - T.
    query_position = torch.arange(keys - length, keys, device=bias.device)
    prefix_position = torch.arange(columns, device=bias.device)[None, :] - lengths[:, None]  # [B, P]
    bucket = source._relative_position_bucket(
        prefix_position[:, None, :] - query_position[None, :, None],
        bidirectional=False,
        num_buckets=source.relative_attention_num_buckets,
        max_distance=source.relative_attention_max_distance,
    )
    return source.relative_attention_bias(bucket).permute(0, 3, 1, 2)


def explicit_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' SDPA mask, never left out: without a mask its SDPA function aligns the causal triangle to the prefix and crops keys."""
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, prefix_attention)
AttentionMaskInterface.register(IMPLEMENTATION, explicit_mask)
