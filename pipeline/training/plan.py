"""What a job takes of each device's memory, before anything is loaded.

In: a job, the number of devices and their memory. Out: bytes, by what they are for, for every engine with and without gradient checkpointing, and
which to take. Weights are counted from the base's configuration; activations by one forward pass of the base over tensors without data (PyTorch's
`meta` device), in which whatever autograd would keep is added up, attention as its kernels keep it. Knows nothing of time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.base import weight_files
from pipeline.errors import BaseModelError, ConfigError
from pipeline.sizes import gib
from pipeline.training.batches import ROUND_POSITIONS_TO, rounded
from pipeline.training.engines.tp import plan_of
from pipeline.training.engines.units import blocks
from pipeline.training.engines.zero3 import PERSISTENT
from pipeline.training.job import Job

GPU_CONTEXT = 600 * 2**20  # CUDA's context, cuBLAS's workspaces and NCCL's buffers; on no list of PyTorch's
# Copies of a prefix's numbers: parameters, gradient, two moments of AdamW; the bank, its gradients of a pass, their sum over passes.
OPTIMISER_COPIES, BANK_COPIES = 4, 3
_PROBE = "prefixfleet-plan"
_TP_SIZE = 8  # parallelism_config_tp_size of accelerate_configs/tp.yaml: GPUs that NVLink joins


@dataclass(frozen=True)
class Shape:
    """A micro-batch: its rows, and their tokens in and out."""

    rows: int
    input_tokens: int
    target_tokens: int


@dataclass(frozen=True)
class Need:
    """Bytes on one device.

    Attributes:
        engine: see `pipeline.training.engines`; `zero3_offload` has the split base in the machine's memory.
        checkpointing: `launch.gradient_checkpointing`.
        weights: what the device keeps of the base.
        gathered: what it has of others' parts at a time.
        activations: what autograd keeps of a micro-batch, and what its backward pass adds at a time.
        prefixes: keys and values of all slots with their gradients.
        optimiser: parameters of the prefixes, their gradients and AdamW's moments.
        buffers: of the exchange, and of the device itself.
        exchanged: what it sends in one optimiser step, and receives as much; no part of its memory.
    """

    engine: str
    checkpointing: bool
    weights: int
    gathered: int
    activations: int
    prefixes: int
    optimiser: int
    buffers: int
    exchanged: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gathered + self.activations + self.prefixes + self.optimiser + self.buffers


@dataclass(frozen=True)
class Plan:
    """What a job needs.

    Attributes:
        weights: bytes of the whole base.
        shape: the largest micro-batch of one process.
        needs: by engine and checkpointing, in the order in which one would take them.
        memory: bytes of a device.
        best: the first that fits, or None.
        wire_bytes: `best.exchanged`.
    """

    weights: int
    devices: int
    memory: int
    shape: Shape
    needs: list[Need]
    best: Need | None
    wire_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        needs = [{**asdict(need), "total": need.total, "fits": need.total <= self.memory} for need in self.needs]
        best = None if self.best is None else {"engine": self.best.engine, "checkpointing": self.best.checkpointing}
        return {"format": 1, **asdict(self), "needs": needs, "best": best}


def plan(job: Job, devices: int, memory: int, gpu: bool = True, config: Any | None = None) -> Plan:
    """Plan a job.

    Args:
        job: customers, slots and micro-batches are its own. Rows are taken to be as long as the customers' prompts allow.
        devices: over all machines.
        memory: bytes of each.
        gpu: count what a GPU takes for itself.
        config: of the base, a transformers configuration; by default the one in the job's folder.

    Raises:
        ConfigError: the base's configuration is missing, or it cannot be followed without data.
    """
    base = _Base(job, config)
    shape, longest = _largest_micro_batch(job, devices), max(c.prefix.length for c in job.customers)
    saved = base.activations(shape, longest)
    shared = _shared_out(job, devices, base.config)
    numbers = _prefix_numbers(job, base)
    bank, trained = numbers
    prefixes, optimiser = BANK_COPIES * bank * 4, OPTIMISER_COPIES * trained * 4
    exchange = bank * 4 if devices > 1 else 0
    buffers = exchange + (GPU_CONTEXT if gpu else 0)
    share = -(-base.weights // devices)
    engines = [("none" if devices == 1 else "ddp", base.weights, 0, saved)]
    # Measured with a base of 18 blocks (tests/pipeline/training/test_engines_slow.py): two to four blocks are together with FSDP2, as gathering and
    # running happen to overlap; with ZeRO-3 what is being gathered is there twice, in the buffer of the exchange and in its weights.
    modules = max(3 * base.block, 2 * base.largest + base.block)
    quantised = job.base.quantization is not None  # whole on every process: no engine splits it
    if devices > 1 and not quantised:
        engines.append(("fsdp2", share, base.rest + 3 * base.block, saved))
    if shared is not None:
        engines.append(("tp", shared.weights, 0, shared.activations(_largest_micro_batch(job, devices // shared.parts), longest)))
    if devices > 1 and not quantised:
        engines.append(("zero3", share, modules, saved))
    if not quantised:
        engines.append(("zero3_offload", 0, modules, saved))

    def exchanged(engine: str, checkpointing: bool) -> int:
        runs = devices // shared.parts if shared is not None and engine == "tp" else devices
        micro = _largest_micro_batch(job, runs)
        passes = -(-_rows_of_step(job) // (runs * micro.rows))
        reduced = 2 * (devices - 1) * bank * 4 // devices
        if engine in ("none", "ddp"):
            return reduced
        if shared is not None and engine == "tp":
            return reduced + passes * shared.exchanged(micro, checkpointing)
        of_others = base.weights * (devices - 1) // devices if devices > 1 else 0
        return reduced + 2 * passes * (of_others or base.weights)

    needs = [
        Need(
            engine, checkpointing, weights, gathered, kept.with_checkpointing if checkpointing else kept.plain, prefixes, optimiser, buffers,
            exchanged(engine, checkpointing),
        )
        for engine, weights, gathered, kept in engines
        for checkpointing in (False, True)
    ]  # fmt: skip
    best = next((need for need in needs if need.total <= memory), None)
    if best is not None and best.engine in ("fsdp2", "zero3"):
        # Sharing layers out moves what rows become, splitting them the weights: with few rows a step the former is less.
        fit = [n for n in needs if n.engine == "tp" and n.total <= memory and n.checkpointing <= best.checkpointing]
        best = min([best, *fit], key=lambda need: need.exchanged)
    return Plan(base.weights, devices, memory, shape, needs, best, 0 if best is None else best.exchanged)


def refuse_what_cannot_fit(folder: Path, dtype: torch.dtype, engine: str, parts: int, memory: int) -> None:
    """Stop before loading where not even the weights fit. Activations adapt themselves: micro-batches are halved when memory runs out.

    Args:
        folder: of the base.
        dtype: what it computes in.
        engine: `none`, `ddp`, `zero3`, `fsdp2`, `tp`.
        parts: over how many devices a split base is spread.
        memory: bytes of a device.

    Raises:
        ConfigError: they do not fit; the message says what would.
    """
    stored = sum(file.stat().st_size for file in weight_files(folder))
    wide = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}[_stored_as(folder)]
    weights = stored * dtype.itemsize // wide
    share = weights // parts if engine in ("zero3", "fsdp2", "tp") else weights
    if share > memory:
        least = math.ceil(weights / (0.8 * memory))
        raise ConfigError(
            f"the base has {gib(weights)} of weights as {str(dtype).removeprefix('torch.')}, and a device {gib(memory)}: with {engine} "
            f"each would keep {gib(share)} of them. Split the base over {least} devices or more (accelerate_config: fsdp2 or zero3, "
            f"num_processes: {least}), or keep it in the machine's memory (zero3_offload). `prefixfleet plan` computes the rest."
        )


def _stored_as(folder: Path) -> str:
    from safetensors import safe_open

    largest = max(weight_files(folder), key=lambda file: file.stat().st_size)
    with safe_open(largest, framework="pt") as file:
        kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118  # no mapping
    return next((kind for kind in kinds if kind in ("F64", "F32", "BF16", "F16")), "F32")


def _rows_of_step(job: Job) -> int:
    """Rows of one optimiser step of everybody in a slot."""
    each = sorted((c.training.batch_size * c.training.gradient_accumulation_steps for c in job.customers), reverse=True)
    return sum(each[: job.mixing.slots])


def _largest_micro_batch(job: Job, devices: int) -> Shape:
    inputs = max(c.prompt.max_input_tokens for c in job.customers)
    targets = max(c.prompt.max_target_tokens for c in job.customers)
    length = rounded(inputs + targets)
    share = -(-_rows_of_step(job) // devices)
    return Shape(max(1, min(share, job.mixing.max_tokens_per_micro_batch // length)), length - targets, targets)


def _prefix_numbers(job: Job, base: "_Base") -> tuple[int, int]:
    """Numbers in the bank, and parameters that are trained, of the customers that need most."""
    length = max(c.prefix.length for c in job.customers)
    slots = min(job.mixing.slots, len(job.customers))
    bank = slots * length * base.numbers_per_column
    each = []
    for customer in job.customers:
        flat = customer.prefix.length * base.numbers_per_column
        if customer.prefix.reparam == "mlp":
            mid, width = customer.prefix.mid_dim, base.width
            flat = customer.prefix.length * width + (width + 1) * mid + (mid + 1) * base.numbers_per_column
        elif customer.prefix.reparam == "embedding":
            flat = customer.prefix.length * base.width
        each.append(flat)
    return bank, sum(sorted(each, reverse=True)[:slots])


@dataclass(frozen=True)
class _Saved:
    plain: int
    with_checkpointing: int


def _shared_out(job: Job, devices: int, config: Any) -> "_SharedOut | None":
    """The base under tensor parallelism, as `accelerate_configs/tp.yaml` shares it out; None where it cannot."""
    parts = min(devices, _TP_SIZE)
    if parts == 1 or devices % parts or job.base.quantization is not None:
        return None
    try:
        return _SharedOut(job, config, parts)
    except (BaseModelError, ConfigError):
        return None


class _Base:
    """A base without data."""

    def __init__(self, job: Job, config: Any | None) -> None:
        try:
            self.config = AutoConfig.from_pretrained(job.base.path) if config is None else config
        except (OSError, ValueError) as error:
            raise ConfigError(f"base model {job.base.path}: its configuration cannot be read ({error}).") from error
        self.dtype = {"float32": torch.float32, "float64": torch.float64}.get(job.base.dtype, torch.bfloat16)
        self.encoder_decoder = bool(self.config.is_encoder_decoder)
        kind = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model: Any = kind.from_config(self.config, dtype=self.dtype, attn_implementation=_PROBE)
        self.model = model.requires_grad_(False).eval()
        self.width = int(model.get_input_embeddings().embedding_dim)
        numbers = {id(p): p.numel() * p.element_size() for p in model.parameters()}
        self.weights = sum(numbers.values())
        if job.base.quantization is not None:
            linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
            linear.pop(id(model.get_output_embeddings().weight), None)
            bits = {"int8": 8, "int4": 4.5}[job.base.quantization]
            self.weights -= sum(int(w.numel() * (w.element_size() - bits / 8)) for w in linear.values())
        units = blocks(model)
        sizes = [sum(numbers[id(p)] for p in unit.parameters()) for unit in units]
        self.block = max(sizes)
        self.rest = sum(numbers.values()) - sum(sizes)
        self.largest = max(
            size for size in numbers.values() if size > PERSISTENT * self.dtype.itemsize or size == max(numbers.values())
        )
        self.units = units
        self.numbers_per_column = 0

    def activations(self, shape: Shape, prefix: int) -> _Saved:
        """Bytes that autograd keeps of a micro-batch, and those that the backward pass adds at a time."""
        own = {t.untyped_storage()._cdata for t in [*self.model.parameters(), *self.model.buffers()]}
        kept: dict[int, tuple[int, torch.Tensor, int]] = {}
        place = -1

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in kept:
                kept[storage._cdata] = (place, tensor, storage.nbytes())  # held, so that no other storage gets its address
            return tensor

        def enter(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                nonlocal place
                place = index

            return hook

        hooks = [unit.register_forward_pre_hook(enter(i)) for i, unit in enumerate(self.units)]
        hooks += [unit.register_forward_hook(enter(-1)) for unit in self.units]
        decoder = shape.target_tokens if self.encoder_decoder else shape.input_tokens + shape.target_tokens
        count = -(-shape.rows * shape.target_tokens // ROUND_POSITIONS_TO) * ROUND_POSITIONS_TO
        count = min(count, shape.rows * decoder)
        head = self.model.get_output_embeddings()
        hooks.append(head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[:count].contiguous()[None],)))
        ids = torch.ones(shape.rows, shape.input_tokens if self.encoder_decoder else decoder, dtype=torch.int64, device="meta")
        # Masks are given, or transformers (5.23) would look into the positions for packed rows.
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :1].expand(-1, decoder)
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        try:
            with _probing(prefix) as sites, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                logits = self.model(use_cache=False, **inputs).logits[0]
        except (RuntimeError, NotImplementedError, TypeError) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"model type {self.config.model_type!r}: what it keeps cannot be followed without data ({said}), so it cannot be planned."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self.numbers_per_column = sum(sites)
        tokens = shape.rows * (shape.input_tokens + shape.target_tokens)
        per_place: dict[int, int] = {}
        for index, _, size in kept.values():
            per_place[index] = per_place.get(index, 0) + size
        in_blocks = sum(size for index, size in per_place.items() if index >= 0)
        one_block = max((size for index, size in per_place.items() if index >= 0), default=0)
        # `pipeline.training.loss` keeps the gradient of the logits in their own type, and for a moment there are the logits beside it. The backward
        # pass goes on from there; a block's gradients are about half of what it keeps.
        of_logits = count * int(logits.shape[-1]) * logits.element_size()
        outside = per_place.get(-1, 0) + of_logits
        adds = max(of_logits, one_block // 2)
        inputs_of_blocks = len(self.units) * tokens * self.width * self.dtype.itemsize
        return _Saved(outside + in_blocks + adds, outside + inputs_of_blocks + max(of_logits, one_block + one_block // 2))


class _SharedOut(_Base):
    """One of `parts` processes that share each layer out (`pipeline.training.engines.tp`): its weights cut as transformers' plan says.

    Raises:
        BaseModelError, ConfigError: there is no plan, or heads do not divide.
    """

    def __init__(self, job: Job, config: Any, parts: int) -> None:
        super().__init__(job, config)
        self.parts, self.plan = parts, plan_of(self.model, parts)
        modules = dict(self.model.named_modules())
        seen: set[int] = set()
        self.weights, self.sizes = 0, {name: _sizes(module) for name, module in modules.items()}
        for name, parameter in self.model.named_parameters():
            cut = _cut(self.plan.get(name, ""), parameter.dim())
            self.weights += parameter.numel() * parameter.element_size() // (1 if cut is None else parts)
        # Only what is kept cut between layers: what is put together again behind its layer is kept whole.
        for name, style in self.plan.items():
            module_name, _, weight = name.rpartition(".")
            module = modules.get(module_name)
            if name in modules or module is None or style not in _KEPT_CUT:
                continue
            parameter, cut = module._parameters[weight], _cut(style, module._parameters[weight].dim())
            if parameter is not None and cut is not None and id(parameter) not in seen:
                shape = [-(-size // parts) if i == cut else size for i, size in enumerate(parameter.shape)]
                module._parameters[weight] = smaller = nn.Parameter(parameter.new_empty(shape), requires_grad=False)
                seen.add(id(smaller))

    def exchanged(self, shape: Shape, checkpointing: bool) -> int:
        """Bytes that a process sends in one pass, forward and backward, in rings: twice what is summed, once what is put together."""
        decoder = shape.rows * (shape.input_tokens + shape.target_tokens)
        logits = -(-shape.rows * shape.target_tokens // ROUND_POSITIONS_TO) * ROUND_POSITIONS_TO
        head, total = self.model.get_output_embeddings(), 0
        names = {id(module): name for name, module in self.model.named_modules()}
        # Behind the embeddings nothing needs a gradient yet: what the first layer's queries, keys and values are made of.
        first_of = {name for name in self.plan if name in self.sizes and name.startswith(f"{names[id(self.units[0])]}.")}
        first = next((name for name in self.plan if name in first_of and self.plan[name].startswith("colwise")), "")
        for name, style in self.plan.items():
            if name not in self.sizes:
                continue
            tokens = logits if name == names.get(id(head)) else decoder
            into, out = self.sizes[name] or (self.width, self.width)
            forward = {"rowwise": 2 * out, "embedding_rowwise": 2 * out, "embedding_colwise": out, "moe_tp_experts": 2 * out}.get(
                style, 0
            )
            forward = 2 * out if style.startswith("rowwise") else out if style in _PUT_TOGETHER else forward
            backward = 2 * into if style.startswith(("colwise", "moe")) else into if style == "rowwise_split_input" else 0
            if name in first_of and name.rpartition(".")[0] == first.rpartition(".")[0] and style.startswith("colwise"):
                backward = 0
            again = 2 if checkpointing and ".layers." in f".{name}" else 1  # a layer's forward pass is computed again
            total += tokens * (again * forward + backward)
        return total * self.dtype.itemsize * (self.parts - 1) // self.parts


# Styles of transformers' plans (distributed/tensor_parallel.py, 5.23) that leave what a layer made cut for the next one, and those that do not.
_KEPT_CUT = ("colwise", "rowwise", "packed_colwise", "packed_rowwise")
_PUT_TOGETHER = ("colwise_gather_output", "colwise_rep")


def _cut(style: str, dimensions: int) -> int | None:
    """Along which dimension a style cuts a weight; None if not."""
    if style.startswith("colwise") or style == "packed_colwise":
        return max(0, dimensions - 2)
    if style.startswith("rowwise") or style == "packed_rowwise":
        return dimensions - 1 if dimensions > 1 else None
    return {"embedding_rowwise": 0, "embedding_colwise": 1}.get(style)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """What goes into a module, and what comes out, per token; None where that is for others to say."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (0, module.embedding_dim) if isinstance(module, nn.Embedding) else None


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps: query, keys and values (the prefix in front, a copy for each query head), mask, output, a number a row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, columns: int, prefix: torch.Tensor) -> torch.Tensor:
        batch, heads, length, size = query.shape
        whole = query.new_empty(2, batch, heads, columns + key.shape[2], size)
        output = query.new_empty(batch, length, heads, size)
        mask = query.new_empty(
            batch, 1, length, whole.shape[3]
        )  # of zeros and minus infinities, made of the one of true and false
        ctx.save_for_backward(query, whole, output, mask, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("nothing is computed here")


_columns = 0
_sites: list[int] = []


def _attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    _sites.append(2 * key.shape[1] * key.shape[3])
    prefix = torch.empty(1, device="meta", requires_grad=True)
    output: torch.Tensor = _Attention.apply(query, key, _columns, prefix)
    return output, None


@contextmanager
def _probing(columns: int) -> Iterator[Sequence[int]]:
    """Run a model with attention that computes nothing; gives the numbers that one prefix column has at each site."""
    global _columns
    _columns = columns
    _sites.clear()
    yield _sites


AttentionInterface.register(_PROBE, _attention)
AttentionMaskInterface.register(_PROBE, lambda *_, **__: None)
