"""The frozen base with the prefix hook attached: loading, finding its attention sites, shifting positions.

In: a job's base. Out: a `FrozenBase` whose forward pass takes prefixes inside `with base.prefixes(bank, rows)`. Knows nothing of losses.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from pipeline.base import resolve_base, rotary_limit, weight_files
from pipeline.errors import BaseModelError, PrefixError
from pipeline.prefix.attention import IMPLEMENTATION, IMPLEMENTATION_PACKED, ActivePrefix
from pipeline.prefix.bank import PrefixBank, Site
from pipeline.prefix.kernels import GPU_ONLY, KERNELS
from pipeline.prefix.norms import lighten
from pipeline.prefix.placing import Place, Placed, whole_where_it_is
from pipeline.prefix.proof import prove
from pipeline.training.job import JobBase


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base: `auto` is bfloat16 where the hardware multiplies in it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass
class FrozenBase:
    """A base model that never changes, ready for prefixes.

    Attributes:
        model: the transformers model; no parameter requires gradients, dropout is zero.
        sites: its attention sites in the order of the forward pass (`decoder.self.0`, …; for encoder-decoders also `encoder.self.*`,
            `decoder.cross.*`).
        folder: where it was loaded from; its tokenizer is there too.
        max_positions: the longest decoder sequence, prefix included; None if unlimited. Never above `rotary_limit`.
        placed: where its weights lie.
        hooks: what `attach` put on the model, each with `remove()`.
    """

    model: Any
    folder: Path
    sites: dict[str, Site]
    active: ActivePrefix
    is_encoder_decoder: bool
    max_positions: int | None
    lock: threading.RLock
    placed: Placed
    hooks: list[Any] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.placed.device

    @contextlib.contextmanager
    def prefixes(self, bank: PrefixBank, rows: torch.Tensor) -> Iterator[None]:
        """Run the model with row i of the batch behind the prefix of slot `rows[i]`.

        `backward` belongs inside too: with gradient checkpointing it runs the forward pass again. One thread at a time. Inside another
        `prefixes`, the outer one holds again afterwards.

        Raises:
            PrefixError: an infix on flash attention or an encoder-decoder.
        """
        if bank.has_infix:
            self.check_infix()
        with self.lock:
            active = self.active
            outer = active.bank, active.rows, active.prompt_ends, active.logits_at, active.starts
            active.bank, active.rows, active.prompt_ends, active.logits_at, active.starts = bank, rows, None, None, None
            active.made.clear()
            try:
                yield
            finally:
                active.bank, active.rows, active.prompt_ends, active.logits_at, active.starts = outer
                active.made.clear()

    def prompts_end_at(self, columns: torch.Tensor) -> None:
        """Inside `prefixes`, before the model is called: the column (padding counted) of each row's last prompt token, int64 [B].

        Infix prefixes stand behind it; others do not ask.
        """
        self.active.prompt_ends = columns

    def rows_start_at(self, columns: torch.Tensor) -> None:
        """Inside `prefixes`, before the model is called: the column at which each row of an encoder-decoder's decoder begins, int64 [B].

        Needed where rows that began at different steps are decoded together, padded in front: their positions are counted from there.
        """
        self.active.starts = columns

    def logits_only_at(self, positions: torch.Tensor) -> None:
        """Inside `prefixes`, before the model is called: compute logits for some positions of the flattened batch [B * T] only, int64 [N].

        The model then gives logits [1, N, vocabulary]. Logits and softmax over the vocabulary cost more than all other products of a small model.
        """
        self.active.logits_at = positions

    @contextlib.contextmanager
    def capturing(self) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Collect the keys and values [B, heads_kv, T, head_dim] that each site computes in the forward pass run inside, without prefixes."""
        with self.lock:
            # Also inside `prefixes`: an embedding-only prefix computes its keys and values again in a batch's backward pass.
            held, self.active.bank = self.active.bank, None
            self.active.captured, self.active.called = {}, []
            try:
                yield self.active.captured
            finally:
                self.active.captured, self.active.called, self.active.bank = None, [], held

    def digest(self) -> str:
        """SHA-256 over names and bytes of all parameters and buffers in memory: equal before and after training."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def check_infix(self) -> None:
        """Refuse an infix on flash attention and on encoder-decoders.

        Raises:
            PrefixError: it is one of them.
        """
        if self.is_encoder_decoder:
            raise PrefixError(
                "placement: infix stands between prompt and target, which an encoder-decoder has in different parts. Choose placement: prefix."
            )
        if self.active.kernel == "flash_attention_2":
            raise PrefixError(
                "placement: infix hides the prefix from part of the prompt, which flash_attention_2 cannot. Choose placement: prefix, or "
                "base_model.attention: sdpa or flex_attention."
            )

    def versions(self) -> list[tuple[int, int]]:
        """Where each weight of this process lies and how often it was written to: cheap to compare, whatever the size of the base.

        Does not see what goes round PyTorch's count of writes (`weight.data.mul_(…)`, kernels of other libraries); `digest` does.
        """
        return [(tensor.data_ptr(), tensor._version) for tensor in self.placed.kept()]

    @torch.no_grad()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The input embeddings [T, hidden size] of tokens [T], as the model itself looks them up: a split table is only there while it runs."""
        found: list[torch.Tensor] = []
        embeddings = self.model.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda _, __, output: found.append(output))
        inputs = {"input_ids": token_ids[None]}
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = token_ids[None, :1]
        try:
            self.model(**inputs, use_cache=False)
        finally:
            hook.remove()
        return found[0][0].clone()

    def checkpoint_gradients(self) -> None:
        """Keep no activations for `backward` but the blocks' inputs, and compute the rest again."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # It acts in train() mode only; what that mode draws random numbers for was switched off by `attach`.
        self.model.train()

    @property
    def rotary_limit(self) -> int | None:
        """The positions up to which rows turn alike whatever the length of their neighbours, see `pipeline.base.rotary_limit`."""
        return rotary_limit(self.model.config.get_text_config().to_dict())

    def _why_no_more(self) -> str:
        if self.max_positions is None or self.max_positions != self.rotary_limit:
            return ""
        return (
            " (from there on it turns the positions of all rows of a batch by the longest one, so rows would change one another)"
        )

    def check_length(self, prefix: int, sequence: int) -> None:
        """Refuse what passes the model's positions.

        Raises:
            PrefixError: prefix plus sequence is too long.
        """
        if self.max_positions is not None and prefix + sequence > self.max_positions:
            raise PrefixError(
                f"prefix of {prefix} and sequence of {sequence} tokens pass the {self.max_positions} positions of the base{self._why_no_more()}. "
                "Shorten the prefix, the input or the target."
            )

    def check_positions(self, sequence: int, positions: torch.Tensor) -> None:
        """Refuse a forward pass that passes the model's positions: rotary ones would go on silently, learned ones would not be found.

        Args:
            sequence: length of the sequence, cache and padding included.
            positions: int64 [B or 1, T], shifted.

        Raises:
            PrefixError: one is too large.
        """
        limit, bank = self.max_positions, self.active.bank
        # Only a sequence that may be too long is worth asking the device for.
        if limit is not None and bank is not None and sequence + bank.length > limit and int(positions.max()) >= limit:
            raise PrefixError(
                f"prefix and sequence reach position {int(positions.max()) + 1} and pass the {limit} positions of the base{self._why_no_more()}. "
                "Shorten the prefix, the input or the answer."
            )


def load_base(base: JobBase, device: torch.device | None = None, place: Place | None = None) -> FrozenBase:
    """Load a base, check that it is the one the job means, freeze it and attach the prefix hook.

    Args:
        base: which one.
        device: where it computes; by default the GPU if there is one.
        place: what puts its weights there in parts (`pipeline.training.engines`). By default `device` gets all of them.

    Raises:
        BaseModelError: not found, another digest than `base.digest`, attention that takes no prefix, or a kernel that this machine or this base
            does not have.
    """
    info = resolve_base(base.path if Path(base.path).exists() else base.id, base.revision)
    if info.digest != base.digest:
        raise BaseModelError(
            f"base model {base.path}: its digest is {info.digest[:16]}, the job is for {base.digest[:16]}. "
            "Its weights or configuration were changed: run the fleet again to train prefixes for the new base."
        )
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if base.attention in GPU_ONLY and device.type != "cuda":
        raise BaseModelError(
            f"base_model.attention: {base.attention} needs a GPU, and this machine has none. Choose auto or sdpa."
        )
    disable_progress_bar()  # of loading weights: noise in a log
    kind = AutoModelForSeq2SeqLM if info.is_encoder_decoder else AutoModelForCausalLM
    if place is not None and base.quantization is not None:
        raise BaseModelError(
            f"base_model.quantization: {base.quantization} is for bases that each process has whole. Remove it, or launch with multi_gpu_ddp."
        )
    try:
        model: Any = kind.from_pretrained(
            info.path,
            # In the type of its file a model is a view of that file: no memory of ours until a part of it is copied.
            dtype=choose_dtype(base.dtype, device) if place is None else _dtype_of_file(info.path),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,  # unsaid, transformers would ask at the terminal
            **_quantized(base.quantization, choose_dtype(base.dtype, device), device),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"base model {base.path}: cannot be loaded ({error}).") from error
    if base.quantization is None and place is None:  # bitsandbytes puts its weights where they belong while loading
        model = model.to(device)
    for module in model.modules():
        # bitsandbytes (0.50) repacks 4-bit weights at the first inference on some processors, which rounds their scales: a base never changes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    attention = "sdpa" if base.attention == "auto" else base.attention
    return attach(model, info.max_positions, attention, place or whole_where_it_is)


def _dtype_of_file(folder: Path) -> torch.dtype:
    """What most weights of a model folder are stored in."""
    with safe_open(max(weight_files(folder), key=lambda file: file.stat().st_size), framework="pt") as file:
        kinds = Counter(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118  # no mapping
    stored = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next((stored[kind] for kind, _ in kinds.most_common() if kind in stored), torch.float32)


def _quantized(quantization: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` must be told to load the linear layers in 8 or 4 bit.

    Raises:
        BaseModelError: bitsandbytes is not installed.
    """
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseModelError(
            f"base_model.quantization: {quantization} needs bitsandbytes: `pip install 'prefixfleet[quantization]'`, or remove the setting."
        )
    if quantization == "int8":
        # bitsandbytes (0.50) says at every product that it casts a float32 base's activations: hundreds of lines a step.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def attach(model: Any, max_positions: int | None = None, attention: str = "sdpa", place: Place = whole_where_it_is) -> FrozenBase:
    """Freeze a transformers model, attach the prefix hook to each of its attention modules, and prove that it works.

    Args:
        model: a causal or encoder-decoder language model.
        max_positions: see `FrozenBase`.
        attention: what computes attention behind the hook, see `pipeline.prefix.kernels`. Where SDPA lacks something that the model needs (soft
            caps, attention sinks), the model's own eager function is taken all the same.
        place: what puts its weights where they belong, once the model has its hooks.

    Raises:
        BaseModelError: its attention does not go through transformers' attention interface, so a prefix would be ignored silently; the kernel
            does not compute what the model needs; or the check found that a prefix is not seen as it must be. The model has no hook then, and
            its own attention, but stays frozen and without dropout.
    """
    if attention not in KERNELS:
        raise BaseModelError(f"attention: {attention!r} is no kernel. Choose {', '.join(KERNELS)}.")
    if any(isinstance(getattr(module, "_prefixfleet", None), ActivePrefix) for module in model.modules()):
        # Its modules would stand for two bases, and its positions would be shifted twice.
        raise BaseModelError(
            f"model type {model.config.model_type!r}: this model has the prefix hook already. Use the base that attach() returned, or load the model "
            "again."
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise BaseModelError(
            f"model type {model.config.model_type!r}: {type(model).__name__} is neither a causal nor an encoder-decoder language model, "
            "or has no head. Load it with AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )
    model.requires_grad_(False)
    # Dropout would make a row depend on the random numbers its neighbours drew; and gradient checkpointing needs train() mode.
    for module in model.modules():
        for name in (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "layerdrop",
            "attn_dropout",
            "resid_dropout",
            "jitter_noise",  # of a mixture of experts
            "router_jitter_noise",
            "input_jitter_noise",
        ):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    if not model._can_set_attn_implementation():
        raise _refusal(model)
    active = ActivePrefix(kernel="eager" if attention == "sdpa" and not model._supports_sdpa else attention)
    if attention == "flex_attention":
        # PyTorch (2.13) compiles it anew for each kind of call (encoder, decoder, one token, with gradients, ...): some 6 to 12. Beyond 8 it would
        # give up and materialise all scores, without a word.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION_PACKED if attention == "flash_attention_2" else IMPLEMENTATION)
    for module in model.modules():
        module._prefixfleet = active
    base = FrozenBase(
        model=model,
        folder=Path(model.name_or_path),
        sites={},
        active=active,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        max_positions=min(
            (n for n in (max_positions, rotary_limit(model.config.get_text_config().to_dict())) if n is not None), default=None
        ),
        lock=threading.RLock(),
        placed=whole_where_it_is(model),
    )
    head = model.get_output_embeddings()
    base.hooks.append(head.register_forward_pre_hook(lambda _, inputs: (_chosen(active, inputs[0]),)))
    try:
        _attached(base, place, attention)
    except BaseException:
        _detach(base, before)
        raise
    return base


def _attached(base: FrozenBase, place: Place, attention: str) -> None:
    """The part of `attach` that meets the model's own code."""
    model = base.model
    try:
        _shift_positions(base)
        # Behind all hooks of ours: those of DeepSpeed that let go of a module's weights come after them.
        base.placed = place(model)
        base.active.heads = base.placed.heads
        base.sites = _find_sites(base)
        if place is whole_where_it_is and base.device.type == "cpu" and model.dtype.itemsize == 2:
            base.hooks += lighten(model)
        prove(base)
    except (TypeError, AttributeError, KeyError) as error:
        raise BaseModelError(
            f"model type {model.config.model_type!r}: its attention cannot be told apart ({type(error).__name__}: {error}), so it takes no prefix. "
            "Supported are GPT-2, OPT, Llama, Mistral, Qwen, Phi, Gemma, BART, T5 and many more."
        ) from error
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if attention not in GPU_ONLY:
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)  # compilers say whole programs
        raise BaseModelError(
            f"model type {model.config.model_type!r}: {attention} cannot compute its attention here ({said}). "
            "Choose base_model.attention: sdpa."
        ) from error


def _detach(base: FrozenBase, implementation: str) -> None:
    """Take off the model what `attach` put on it, so that it can be attached again, with another kernel say."""
    for hook in base.hooks:
        hook.remove()
    for module in base.model.modules():
        for name in ("_prefixfleet", "_prefixfleet_site", "_prefixfleet_bias_source"):
            vars(module).pop(name, None)
    base.model.set_attn_implementation(implementation)


def _chosen(active: ActivePrefix, hidden: torch.Tensor) -> torch.Tensor:
    """The hidden states [B, T, hidden size] that go through the output embeddings, or those of the chosen positions, [1, N, hidden size]."""
    if active.logits_at is not None:
        return hidden.flatten(0, 1).index_select(0, active.logits_at)[None]
    # A slice of the last positions is not contiguous, and torch (2.13) then multiplies by a copy of the vocabulary matrix for every row.
    return hidden.contiguous()


def _refusal(model: Any) -> BaseModelError:
    return BaseModelError(
        f"model type {model.config.model_type!r}: its attention does not go through transformers' attention interface in every layer, so it "
        "takes no prefix. Supported are the models that do: GPT-2, OPT, Llama, Mistral, Qwen, Phi, Gemma, BART, T5 and many more."
    )


@torch.no_grad()
def _find_sites(base: FrozenBase) -> dict[str, Site]:
    """Run a few tokens through the model and see which modules ask for attention, in order.

    Encoder and decoder get inputs of different lengths, so the shapes tell self-attention of either from cross-attention.
    """
    encoder_length, decoder_length = 5, 3
    ids = torch.ones(1, encoder_length if base.is_encoder_decoder else decoder_length, dtype=torch.int64, device=base.device)
    inputs = {"input_ids": ids}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :decoder_length]
    with base.capturing():
        base.model(**inputs, use_cache=False)
        calls = list(base.active.called)
    sites: dict[str, Site] = {}
    counts: dict[str, int] = {}
    bias_sources: dict[str, nn.Module] = {}
    for module, query, key, value in calls:
        if key != value or hasattr(module, "_prefixfleet_site"):
            # Keys and values of different sizes (DeepSeek's latent attention), or a layer that is used more than once.
            raise _refusal(base.model)
        of_decoder, to_decoder = query[2] == decoder_length, key[2] == decoder_length
        kind = {(False, False): "encoder.self", (True, True): "decoder.self", (True, False): "decoder.cross"}[
            of_decoder, to_decoder
        ]
        name = f"{kind}.{counts.setdefault(kind, 0)}"
        counts[kind] += 1
        module._prefixfleet_site = name  # type: ignore[assignment]
        if getattr(module, "has_relative_attention_bias", False):
            bias_sources[kind] = module
        if kind == "decoder.self" and kind in bias_sources:
            # The table lives in the first layer only; keep it out of the module tree, for it is no child.
            object.__setattr__(module, "_prefixfleet_bias_source", bias_sources[kind])
        sites[name] = Site(heads=key[1] * base.active.heads.parts, head_dim=key[3])
    config = base.model.config if base.is_encoder_decoder else base.model.config.get_text_config()
    # T5 and BART count the layers of their two parts apart.
    decoder_layers = _first_of(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")
    expected = {"decoder.self": decoder_layers}
    if base.is_encoder_decoder:
        expected["decoder.cross"] = decoder_layers
        expected["encoder.self"] = _first_of(config, "encoder_layers", "num_layers", "num_hidden_layers")
    if counts != expected:
        raise _refusal(base.model)
    return sites


def _first_of(config: Any, *names: str) -> int:
    return next(int(value) for name in names if (value := getattr(config, name, None)) is not None)


def _shift_positions(base: FrozenBase) -> None:
    """Make each row's decoder positions begin after its prefix, as the original code and PEFT do."""
    active = base.active
    # Each forward pass makes its own masks. The hook of checkpointing's second pass finds those of the first.
    base.hooks.append(base.model.register_forward_pre_hook(lambda *_: active.made.clear()))
    # On the decoder itself, which may also be called without the head.
    decoder = base.model.get_decoder()
    named = list(inspect.signature(type(decoder).forward).parameters)[1:]

    if not base.is_encoder_decoder:

        def shift_ids(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            kwargs = {**dict(zip(named, args, strict=False)), **kwargs}
            given = kwargs.get("input_ids")
            given = kwargs["inputs_embeds"] if given is None else given
            batch, length = given.shape[:2]
            cache = kwargs.get("past_key_values")
            active.seen = cache.get_seq_length() if cache is not None else 0
            shift = active.shift(batch, length)
            if shift is None:
                return None
            positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
            if mask is None and active.bank is not None and active.bank.has_infix:
                # transformers (5.23) would take the jump behind the prompt for the start of another sequence in the same row.
                mask = torch.ones(batch, active.seen + length, dtype=torch.int64, device=given.device)
                kwargs = {**kwargs, "attention_mask": mask}
            if positions is None:
                if mask is not None and mask.dim() == 2:
                    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
                else:
                    positions = active.columns_of_pass(length)[None, :]
            positions = positions + shift
            base.check_positions(active.seen + length, positions)
            return (), {**kwargs, "position_ids": positions}

        base.hooks.append(decoder.register_forward_pre_hook(shift_ids, with_kwargs=True))
        return

    positions = getattr(decoder, "embed_positions", None)
    if positions is None:
        if any(hasattr(module, "relative_attention_bias") for module in decoder.modules()):
            return  # relative positions (T5): the bias is taken in the attention function
        raise BaseModelError(
            f"model type {base.model.config.model_type!r}: its decoder positions cannot be shifted behind a prefix. "
            "Choose a BART- or T5-like encoder-decoder."
        )
    if not isinstance(positions, nn.Embedding) or not hasattr(positions, "offset"):
        raise BaseModelError(
            f"model type {base.model.config.model_type!r}: its decoder positions cannot be shifted behind a prefix. "
            "Choose a BART- or T5-like encoder-decoder."
        )

    offset: Any = positions.offset
    table: int = positions.num_embeddings - offset
    base.max_positions = min(base.max_positions or table, table)

    # BART's decoder takes no position_ids that differ by row (transformers 5.23), so the embeddings themselves are looked up again.
    def shift_embeddings(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        shift = active.shift(args[0].shape[0], output.shape[-2])
        if shift is None:
            return output
        seen = args[1] if len(args) > 1 else kwargs.get("past_key_values_length", 0)
        ids = torch.arange(seen, seen + output.shape[-2], device=output.device)[None, :] + shift
        if active.starts is not None:
            ids = (ids - active.starts[:, None]).clamp(min=0)
        # Padding may stand beyond the end, see `check`.
        return nn.functional.embedding(ids.clamp(max=table - 1) + module.offset, module.weight)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = {**dict(zip(named, args, strict=False)), **kwargs}
        given = kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        batch, length = given.shape[:2]
        shift = active.shift(batch, length)
        if shift is None:
            return
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        columns = torch.arange((cache.get_seq_length() if cache is not None else 0) + length, device=shift.device)[None, :]
        # Of each row the last column that is a token.
        last = columns[:, -1:] if mask is None or mask.dim() != 2 else (columns * mask.bool()).amax(1, keepdim=True)
        if active.starts is not None:
            last = last - active.starts[:, None]
        base.check_positions(columns.shape[1], last + shift)

    base.hooks.append(decoder.register_forward_pre_hook(check, with_kwargs=True))
    base.hooks.append(positions.register_forward_hook(shift_embeddings, with_kwargs=True))
