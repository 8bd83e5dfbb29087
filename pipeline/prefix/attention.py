"""Where the prefix enters a block: an attention function that puts each row's prefix before the keys and values of the sequence.

It is registered with transformers' `AttentionInterface`, so the model itself is unchanged (Li & Liang 2021, equation 2: `h_i` is a trained
parameter where i stands in the prefix, and the frozen LM's own activation elsewhere). Knows nothing of training or generation: which prefix
belongs to which row is what `ActivePrefix` holds for the forward (and backward) pass under way.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.prefix.bank import PrefixBank

IMPLEMENTATION = "prefixfleet"


@dataclass
class ActivePrefix:
    """What the attention function needs to know about the batch under way. One object per base, shared by its attention modules.

    Attributes:
        bank: the prefixes, or None for a plain forward pass.
        rows: slot of each row of the batch, int64 [B].
        captured: if not None, every attention module records its (key, value) here under its site's name.
    """

    bank: PrefixBank | None = None
    rows: torch.Tensor | None = None
    captured: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    called: list[tuple[nn.Module, torch.Size, torch.Size]] = field(default_factory=list)

    def shift(self, batch: int) -> torch.Tensor | None:
        """By how much the positions of each of `batch` rows move: the length of its prefix, int64 [B]; None if nothing is attached."""
        if self.bank is None or self.rows is None:
            return None
        return self.bank.lengths[self._rows_for(batch)]

    def _rows_for(self, batch: int) -> torch.Tensor:
        assert self.rows is not None
        # Beam search repeats each row `num_beams` times, beams of a row side by side.
        beams, rest = divmod(batch, len(self.rows))
        assert rest == 0, f"{batch} rows do not stand for {len(self.rows)} prefixes"
        return self.rows if beams == 1 else self.rows.repeat_interleave(beams)


def _active(module: nn.Module) -> ActivePrefix:
    return module._prefixfleet  # type: ignore[return-value]  # set by pipeline.prefix.base.attach


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
    active = _active(module)
    active.called.append((module, query.shape, key.shape)) if active.captured is not None else None
    site = getattr(module, "_prefixfleet_site", None)
    if active.captured is not None and site is not None:
        active.captured[site] = (key, value)
    if active.bank is None or site is None or site not in active.bank.sites:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    batch, length = query.shape[0], query.shape[2]
    rows = active._rows_for(batch)
    prefix_key, prefix_value, visible = active.bank.gather(site, rows, key.dtype)  # 2 x [B, heads_kv, P, head_dim], [B, P]
    key = torch.cat([prefix_key, key], dim=2)
    value = torch.cat([prefix_value, value], dim=2)
    seen = visible[:, None, None, :].expand(batch, 1, length, -1)  # every query sees the whole prefix
    if attention_mask is None:  # an encoder or cross-attention without padding
        attention_mask = seen.new_ones(batch, 1, length, key.shape[2] - seen.shape[-1])
    attention_mask = torch.cat([seen, attention_mask.expand(batch, -1, -1, -1)], dim=-1)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = _bias_of_prefix(module, kwargs["position_bias"], active.bank.lengths[rows], seen.shape[-1])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _bias_of_prefix(module: nn.Module, bias: torch.Tensor, lengths: torch.Tensor, columns: int) -> torch.Tensor:
    """T5's relative bias [1, heads, T, K] with the prefix's columns put before it: [B, heads, T, P + K].

    In decoder self-attention the prefix stands at positions -P..-1, as in PEFT; encoder and cross-attention give it no bias.
    """
    batch, length, keys = len(lengths), bias.shape[2], bias.shape[3]
    source = getattr(module, "_prefixfleet_bias_source", None)
    if source is None:
        ours = bias.new_zeros(batch, bias.shape[1], length, columns)
    else:
        # Keys include the cache, so the first query stands at position K - T.
        query_position = torch.arange(keys - length, keys, device=bias.device)
        prefix_position = torch.arange(columns, device=bias.device)[None, :] - lengths[:, None]  # [B, P]
        bucket = source._relative_position_bucket(
            prefix_position[:, None, :] - query_position[None, :, None],
            bidirectional=False,
            num_buckets=source.relative_attention_num_buckets,
            max_distance=source.relative_attention_max_distance,
        )
        ours = source.relative_attention_bias(bucket).permute(0, 3, 1, 2)
    return torch.cat([ours, bias.expand(batch, -1, -1, -1)], dim=-1)


def explicit_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' SDPA mask, never left out: without a mask its SDPA function aligns the causal triangle to the prefix and crops keys."""
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, prefix_attention)
AttentionMaskInterface.register(IMPLEMENTATION, explicit_mask)
