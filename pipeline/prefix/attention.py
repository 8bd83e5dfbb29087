"""Where the prefix enters a block: an attention function that puts each row's prefix before the keys and values of the sequence.

It is registered with transformers' `AttentionInterface`, so the model itself is unchanged (Li & Liang 2021, section 4.2: `h_i` is a trained
parameter where i stands in the prefix, and the frozen LM's own activation elsewhere). Knows nothing of training or generation: which prefix
belongs to which row is what `ActivePrefix` holds for the forward (and backward) pass under way.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from pipeline.errors import PrefixError
from pipeline.prefix import kernels
from pipeline.prefix.bank import PrefixBank
from pipeline.prefix.placing import Heads

# The hook under two names, for each form that transformers may give a mask: who sees whom, or which keys are no padding (flash attention).
IMPLEMENTATION = "prefixfleet"
IMPLEMENTATION_PACKED = "prefixfleet-packed"


@dataclass
class ActivePrefix:
    """What the attention function needs to know about the batch under way. One object per base, shared by its attention modules.

    Attributes:
        bank: the prefixes, or None for a plain forward pass.
        rows: slot of each row of the batch, int64 [B].
        prompt_ends: for infix prefixes, the column (padding counted) of each row's last prompt token, int64 [B].
        starts: for encoder-decoders whose decoder rows are padded in front, the column at which each row begins, int64 [B].
        seen: how many columns the cache holds before those of this pass; kept by the hook that shifts positions.
        kernel: what computes attention, one of `kernels.KERNELS`.
        captured: if not None, every attention module records its (key, value) here under its site's name.
        logits_at: if not None, the positions of the flattened batch [B * T] whose logits are computed, int64 [N].
        called: with `captured`, the attention modules in the order of their calls, with the shapes of query, key and value.
        check: if not None, is asked for every call behind a prefix: given what `by_hand` takes and the kernel's output, it returns what the model
            gets instead (see `pipeline.prefix.proof`).
        made: masks in the kernel's form that were made in this forward pass; layers share them.
        heads: which of the key-value heads the attention modules compute here; banks and what is captured have all of them.
    """

    bank: PrefixBank | None = None
    rows: torch.Tensor | None = None
    prompt_ends: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    seen: int = 0
    kernel: str = "sdpa"
    captured: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    logits_at: torch.Tensor | None = None
    called: list[tuple[nn.Module, torch.Size, torch.Size, torch.Size]] = field(default_factory=list)
    check: "Check | None" = None
    made: dict[Hashable, tuple[torch.Tensor | None, Any]] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)

    def once(self, mask: torch.Tensor | None, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives for the model's mask `mask` and `key`, made once a forward pass."""
        whole = (id(mask), key)
        if whole not in self.made:
            self.made[whole] = (mask, make())  # with the mask itself, or another one might get its id
        return self.made[whole][1]

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
    beams, rest = divmod(batch, len(values)) if len(values) else (0, batch)
    if rest:
        raise PrefixError(
            f"the batch has {batch} rows and base.prefixes(bank, rows) was given {len(values)}: name one slot of the bank for each row of the batch "
            "(or for each prompt, where generation makes several rows of one)."
        )
    return values if beams == 1 else values.repeat_interleave(beams)


@dataclass(frozen=True)
class Call:
    """One call of attention behind a prefix, the prefix still apart from the sequence.

    Attributes:
        query: [B, heads, T, head_dim].
        prefix: keys and values [B, heads_kv, P, head_dim] and who sees them, bool [B, 1, T, P].
        sequence: keys and values [B, heads_kv, K, head_dim] and the model's mask: bool [B or 1, 1, T, K], or [B, K] for packed rows, or None where
            the model masks nothing.
        kwargs: of the attention function: scaling, softcap, position_bias [1, heads, T, K], s_aux [heads].
    """

    module: nn.Module
    query: torch.Tensor
    prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    sequence: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    kwargs: dict[str, Any]


# A call and the kernel's output [B, T, heads, head_dim] -> what the model gets.
Check = Callable[[Call, torch.Tensor], torch.Tensor]


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> kernels.Output:
    """Attention over prefix and sequence.

    Args:
        module: the attention module; its site says which keys and values of the bank are its own.
        query: [B, heads, T, head_dim].
        key, value: [B, heads_kv, K, head_dim], the cache included.
        attention_mask: bool [B or 1, 1, T, K], never None for a module that masks (see `explicit_mask`); for packed rows bool [B, K], see
            `key_mask`.
    """
    active: ActivePrefix = module._prefixfleet  # type: ignore[assignment]  # set by pipeline.prefix.base.attach
    site = getattr(module, "_prefixfleet_site", None)
    if active.captured is not None:
        active.called.append((module, query.shape, key.shape, value.shape))
        if site is not None:
            active.captured[site] = (active.heads.whole(key), active.heads.whole(value))
    if attention_mask is not None and attention_mask.dim() == 2:
        # A static cache is longer than what it holds.
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    if active.bank is None or site is None or site not in active.bank.sites:
        return _attend(active, module, query, key, value, attention_mask, None, None, kwargs)

    batch, length = query.shape[0], query.shape[2]
    rows = active.rows_for(batch)
    # 2 x [B, heads_kv, P, head_dim], [B, P]
    prefix_key, prefix_value, visible = active.bank.gather(site, rows, key.dtype, active.heads.own(key.shape[1]))
    seen = visible[:, None, None, :].expand(batch, 1, length, -1)  # every query sees the whole prefix, however narrow its window
    may_see = active.may_see(batch, length)
    if may_see is not None:
        seen = seen & may_see[:, None, :, None]
    bias = kwargs.get("position_bias")
    whole_bias = {}
    if bias is not None:
        starts = None if active.starts is None else _repeated(active.starts, batch)
        prefix_bias = _bias_of_prefix(module, bias, active.bank.columns[site][rows], visible.shape[-1], starts)
        whole_bias = {"position_bias": torch.cat([prefix_bias, bias.expand(batch, -1, -1, -1)], dim=-1)}
    keys, values = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    # Sites with the same columns in every slot share their mask.
    layout = active.bank.layout(site)
    output, weights = _attend(active, module, query, keys, values, attention_mask, seen, layout, {**kwargs, **whole_bias})
    if active.check is not None:
        call = Call(module, query, (prefix_key, prefix_value, seen), (key, value, attention_mask), kwargs)
        output = active.check(call, output)
    return output, weights


def _attend(
    active: ActivePrefix,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    seen: torch.Tensor | None,
    layout: Hashable,
    kwargs: dict[str, Any],
) -> kernels.Output:
    """Have the kernel compute attention over keys [B, heads_kv, P + K, head_dim], P = 0 if `seen` is None; `mask` and `seen` as in `Call`."""
    batch, length, columns = query.shape[0], query.shape[2], 0 if seen is None else seen.shape[-1]
    sequence = key.shape[2] - columns

    def who_sees_whom() -> torch.Tensor | None:
        if seen is None:
            return mask
        if mask is not None and mask.dtype != torch.bool:
            raise PrefixError(
                "a mask that is added to the scores does not go with prefixes: give attention_mask as [B, T], or as booleans"
            )
        whole = (
            seen.new_ones(batch, 1, length, sequence) if mask is None else mask
        )  # an encoder or cross-attention without padding
        return torch.cat([seen, whole.expand(batch, -1, -1, -1)], dim=-1)

    def as_seen() -> Any:
        whole = who_sees_whom()
        return None if whole is None else kernels.Seen(whole)

    def blocks() -> Any:
        whole = who_sees_whom()
        return None if whole is None else kernels.block_mask(whole.expand(batch, -1, -1, -1))

    causal = kernels.is_causal(module, kwargs)

    def packing() -> kernels.Packing:
        if mask is not None and mask.dim() != 2:
            raise kernels.flash_refusal(
                "would hide the prefix beyond the base's sliding window (or knows no mask like the base's)"
            )
        real = mask if mask is not None else torch.ones(batch, sequence, dtype=torch.bool, device=query.device)
        # Queries are the last of the sequence. Without a triangle, it does no harm to compute padding too.
        queries = real[:, -length:] if causal else real.new_ones(batch, length)
        # Every query of a row sees the same columns: infixes are refused.
        return kernels.pack(queries, real if seen is None else torch.cat([seen[:, 0, 0], real], dim=-1))

    choices: dict[str, tuple[Callable[..., kernels.Output], Callable[[], Any]]] = {
        "sdpa": (kernels.sdpa, as_seen),
        "eager": (kernels.eager, as_seen),
        "flex_attention": (kernels.flex, blocks),
        "flash_attention_2": (kernels.flash, packing),
    }
    computed, form = choices[active.kernel]
    made = active.once(mask, (layout, batch, length, sequence, causal), form)
    return computed(module, query, key, value, made, kwargs)


def _bias_of_prefix(
    module: nn.Module, bias: torch.Tensor, lengths: torch.Tensor, columns: int, starts: torch.Tensor | None
) -> torch.Tensor:
    """The prefix's part of T5's relative bias, [B, heads, T, P], for a sequence whose own is [1, heads, T, K].

    In decoder self-attention the prefix stands at positions -P..-1, as in PEFT, counted from where the row begins (`starts`, int64 [B]; None:
    at column 0); encoder and cross-attention give it no bias.
    """
    batch, length, keys = len(lengths), bias.shape[2], bias.shape[3]
    source = getattr(module, "_prefixfleet_bias_source", None)
    if source is None:
        return bias.new_zeros(batch, bias.shape[1], length, columns)
    # Keys include the cache, so the first query stands at position K - T.
    query_position = torch.arange(keys - length, keys, device=bias.device)
    prefix_position = torch.arange(columns, device=bias.device)[None, :] - lengths[:, None]  # [B, P]
    if starts is not None:
        prefix_position = prefix_position + starts[:, None]
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


def key_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0, **kwargs: Any
) -> torch.Tensor | None:
    """Which keys are no padding, bool [B, K]: for flash attention, whose own triangle says the rest. The names are transformers'.

    What is more than a triangle (windows, chunks) comes as `explicit_mask`, and is refused where an attention module uses it: some models make
    masks for kinds of layers that they do not have.
    """
    function, mask = kwargs["mask_function"], kwargs["attention_mask"]
    if function not in (causal_mask_function, bidirectional_mask_function):
        return explicit_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, **kwargs)
    # Of a static cache, which is longer, what it holds after this pass.
    keys = kv_length if function is bidirectional_mask_function else int(q_offset) + q_length
    if mask is None:
        return torch.ones(batch_size, keys, dtype=torch.bool, device=kwargs["device"])
    return nn.functional.pad(mask[:, :keys], (0, max(0, keys - mask.shape[1])))


for _name, _mask in ((IMPLEMENTATION, explicit_mask), (IMPLEMENTATION_PACKED, key_mask)):
    AttentionInterface.register(_name, prefix_attention)
    AttentionMaskInterface.register(_name, _mask)
