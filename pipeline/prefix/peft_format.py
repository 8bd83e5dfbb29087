"""To and from the adapter folders of PEFT (0.21): `adapter_config.json` and `adapter_model.safetensors`.

PEFT knows prefixes of decoder self-attention, of one length and one head size in all layers, in front of the sequence. Its tensor
`prompt_embeddings` is `[P, layers * 2 * heads_kv * head_dim]`, key before value in each layer; for prompt tuning it is the input embeddings
`[P, width]`. Needs no PEFT. Nothing is unpickled: an adapter in `adapter_model.bin` is refused.

For encoder-decoders PEFT (0.21.2, `PeftModel.get_prompt`) doubles the tensor and takes four rows a layer where it means two and two for
cross-attention, which it then drops: of N stored layers, layer i gets the one numbered 2i modulo N. Both directions here do as PEFT does. An even N
would give two layers the same prefix, so an export of an even number of layers stores one more, of zeros.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import PrefixError
from pipeline.files import whole_folder
from pipeline.prefix.bank import Prefix, PrefixBank
from pipeline.prefix.base import FrozenBase
from pipeline.prefix.embedding import EmbeddingOnly
from pipeline.prefix.store import is_infix, load_prefix, require

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(prefix_dir: Path, out: Path) -> None:
    """Write a prefix folder as an adapter folder that `PeftModel.from_pretrained(base, out)` loads, with equal logits.

    Embedding-only and MLP prefixes are flat keys and values by now, so they go out as prefix tuning too.

    Raises:
        PrefixError: PEFT has no such prefix (the message says why), or `out` is there already.
        StorageError: the prefix is missing, or `out` cannot be written.
    """
    prefix, config = load_prefix(prefix_dir)
    require(prefix_dir, config, "base.id", "base.revision", "base.is_encoder_decoder")
    if out.exists():
        raise PrefixError(f"{out}: is there already. Choose another folder, or delete it.")
    reason = _unknown_to_peft(prefix, config)
    if reason:
        raise PrefixError(
            f"{prefix_dir}: cannot be exported to PEFT, {reason}. Use it with PrefixFleet, or train one that PEFT knows."
        )
    pairs = [prefix[f"decoder.self.{layer}"] for layer in range(len(prefix))]
    heads, length, head_dim = pairs[0][0].shape
    base = config["base"]
    if base["is_encoder_decoder"]:
        stored = len(pairs) | 1
        placed = {2 * i % stored: pair for i, pair in enumerate(pairs)}
        nothing = (torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][0]))
        pairs = [placed.get(i, nothing) for i in range(stored)]
    # [layers, 2, heads_kv, P, head_dim] -> [P, layers * 2 * heads_kv * head_dim]
    flat = torch.stack([torch.stack(pair) for pair in pairs]).permute(3, 0, 1, 2, 4).flatten(1).contiguous()
    content = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "SEQ_2_SEQ_LM" if base["is_encoder_decoder"] else "CAUSAL_LM",
        "base_model_name_or_path": base["id"],
        "revision": base["revision"],
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": len(pairs),
        # With grouped queries PEFT means the key-value heads here, and their width together.
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "encoder_hidden_size": heads * head_dim,
        "num_transformer_submodules": 2 if base["is_encoder_decoder"] else 1,
        "prefix_projection": False,
    }
    with whole_folder(out) as folder:
        save_file({"prompt_embeddings": flat}, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _unknown_to_peft(prefix: Prefix, config: dict[str, Any]) -> str | None:
    if is_infix(config):
        return "which knows no infix: its prefixes stand in front of the prompt"
    others = sorted({site.rpartition(".")[0] for site in prefix} - {"decoder.self"})
    if others:
        return f"which knows prefixes of decoder self-attention only; this one has {', '.join(others)} too (set prefix.sites: [decoder.self])"
    if any(f"decoder.self.{layer}" not in prefix for layer in range(len(prefix))):
        return "which puts a prefix before every layer; this one is for the top layers only"
    if len({key.shape for key, _ in prefix.values()}) != 1:
        return "which knows one number and one size of heads; in this base they differ from layer to layer"
    return None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        PrefixError: it is no adapter of a kind that can be imported.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrefixError(f"{file}: cannot be read ({error}). Give the folder that PEFT's save_pretrained wrote.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("PREFIX_TUNING", "PROMPT_TUNING"):
        raise PrefixError(f"{file}: is an adapter of type {kind}. PREFIX_TUNING and PROMPT_TUNING can be imported.")
    return dict(config)


def import_peft(folder: Path, base: FrozenBase) -> Prefix:
    """Read an adapter folder made by PEFT's PrefixTuning (with or without projection) or PromptTuning.

    A projection is computed, embeddings of prompt tuning are run through the base: what comes out is flat keys and values.

    Raises:
        PrefixError: damaged, pickled, of another type of adapter, with numbers that are not finite, too long, or not for this base.
    """
    config = read_adapter_config(folder)
    prompt = config["peft_type"] == "PROMPT_TUNING"
    if config.get("task_type") == ("CAUSAL_LM" if base.is_encoder_decoder else "SEQ_2_SEQ_LM"):
        raise PrefixError(
            f"{folder}: was made for {config['task_type']}, and {base.model.config.model_type} in {base.folder} is "
            f"{'an encoder-decoder' if base.is_encoder_decoder else 'decoder-only'}. It was made for another base "
            f"({config.get('base_model_name_or_path')})."
        )
    if prompt and base.is_encoder_decoder:
        raise PrefixError(
            f"{folder}: is prompt tuning for an encoder-decoder ({base.model.config.model_type}), which puts embeddings before the encoder's input: "
            "positions of a sequence, not keys and values of every layer, so no prefix is equal to it. Tune with PEFT's PrefixTuningConfig, "
            "or train a prefix here."
        )
    tensors = _tensors(folder)
    table = tensors.get("prompt_embeddings")
    flat = _one(tensors, folder) if prompt else table if table is not None else _projected(tensors, folder)
    _check_numbers(folder, flat, config, base)
    if prompt:
        return _of_embeddings(folder, flat, base)
    sites = {name: site for name, site in base.sites.items() if name.startswith("decoder.self.")}
    doubled = config.get("num_transformer_submodules") == 2
    width = 2 * sites["decoder.self.0"].heads * sites["decoder.self.0"].head_dim
    stored = flat.shape[-1] // width
    if flat.shape[1] != stored * width or stored not in (len(sites), len(sites) | doubled) or len(set(sites.values())) > 1:
        raise PrefixError(
            f"{folder}: holds {list(flat.shape)} numbers; a prefix for {base.model.config.model_type} in {base.folder} has {len(sites) * width} for "
            f"each of its virtual tokens ({len(sites)} layers). It was made for another base ({config.get('base_model_name_or_path')})."
        )
    site = sites["decoder.self.0"]
    layers = (
        flat.float().view(len(flat), stored, 2, site.heads, site.head_dim).permute(1, 2, 3, 0, 4)
    )  # [N, 2, heads_kv, P, head_dim]
    prefix: Prefix = {}
    for i, name in enumerate(sites):
        mine = layers[2 * i % stored if doubled else i]
        prefix[name] = (mine[0].contiguous(), mine[1].contiguous())
    PrefixBank(base.sites, slots=1, length=len(flat)).put(0, prefix)  # its checks
    return prefix


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise PrefixError(
            f"{folder / 'adapter_model.bin'}: is pickled, and pickles are never loaded. Save the adapter again with PEFT's "
            "save_pretrained(…, safe_serialization=True)."
        )
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise PrefixError(f"{file}: cannot be read ({error}). Save the adapter again.") from error


def _check_numbers(folder: Path, flat: torch.Tensor, config: dict[str, Any], base: FrozenBase) -> None:
    """Refuse what is no table [P, …] of finite numbers, or longer than the base.

    Raises:
        PrefixError: it is not.
    """
    place = f"{folder / WEIGHTS}"
    if flat.dim() != 2 or 0 in flat.shape:
        raise PrefixError(
            f"{place}: holds a tensor of shape {list(flat.shape)}, not one row for each virtual token. Save it again with PEFT."
        )
    if not flat.is_floating_point() or not bool(flat.isfinite().all()):
        raise PrefixError(
            f"{place}: holds numbers that are not finite, or none that can be trained ({flat.dtype}). Its training failed, or it was damaged: train "
            "it again."
        )
    if config.get("num_virtual_tokens", len(flat)) != len(flat):
        raise PrefixError(
            f"{place}: has {len(flat)} virtual tokens, {CONFIG} says {config['num_virtual_tokens']}. They are not of one adapter: save it again "
            "with PEFT."
        )
    limit = base.max_positions
    if limit is not None and len(flat) >= limit:
        raise PrefixError(
            f"{place}: has {len(flat)} virtual tokens, and {base.model.config.model_type} in {base.folder} has {limit} positions for prefix and "
            "sequence together. Train a shorter one."
        )


def _one(tensors: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    found = [t for name, t in tensors.items() if name == "prompt_embeddings" or name.endswith("embedding.weight")]
    if len(found) != 1:
        raise PrefixError(
            f"{folder / WEIGHTS}: holds {', '.join(tensors) or 'nothing'}, not one table of embeddings. Save it again with PEFT."
        )
    return found[0]


def _projected(tensors: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """The prefix of a `PrefixEncoder` that was saved with its MLP, or [P, …] of one saved whole without."""
    by_end = {end: [t for name, t in tensors.items() if name.endswith(end)] for end in _ENCODER}
    if len(by_end["embedding.weight"]) == 1 and all(len(found) == 1 for found in by_end.values()):
        (given,), (w0,), (b0,), (w2,), (b2,) = (by_end[end] for end in _ENCODER)
        try:
            return torch.tanh(given.float() @ w0.float().T + b0.float()) @ w2.float().T + b2.float()
        except RuntimeError as error:
            raise PrefixError(
                f"{folder / WEIGHTS}: the parts of its projection do not fit together ({error}). Save it again with PEFT."
            ) from error
    return _one(tensors, folder)


_ENCODER = ("embedding.weight", "transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias")


def _of_embeddings(folder: Path, embeddings: torch.Tensor, base: FrozenBase) -> Prefix:
    width = base.model.get_input_embeddings().weight.shape[1]
    if embeddings.shape[1] != width:
        raise PrefixError(
            f"{folder}: holds embeddings {list(embeddings.shape)}, those of {base.model.config.model_type} in {base.folder} are {width} wide. "
            "It was made for another base."
        )
    with torch.no_grad():
        flat = EmbeddingOnly(base, embeddings)()
    return {name: (both[0].cpu(), both[1].cpu()) for name, both in flat.items()}
