"""A prefix on disk: `prefix.safetensors` and `prefix.json`, written as one folder or not at all.

Tensors are named `<site>.key` and `<site>.value`, float32 `[heads_kv, P, head_dim]`. Nothing is pickled.
"""

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pipeline.errors import PrefixError, StorageError
from pipeline.files import file_digest, read_json, whole_folder, write_json
from pipeline.prefix.bank import Prefix

FORMAT = 1

# What is asked of prefix.json by whoever reads or uses a prefix, and what it may be.
_KINDS: dict[str, tuple[type, ...]] = {
    "weights_sha256": (str,),
    "customer": (str,),
    "prefix.length": (int,),
    "prefix.placement": (str,),
    "prompt": (dict,),
    "chat": (bool,),
    "generation": (dict,),
    "generation.num_beams": (int,),
    "generation.max_new_tokens": (int,),
    "ensemble.average": (str,),
    "ensemble.members": (list,),
    "base.id": (str,),
    "base.revision": (str, type(None)),
    "base.digest": (str,),
    "base.is_encoder_decoder": (bool,),
    "base.path": (str,),
    "base.tokenizer_digest": (str,),
    "base.dtype": (str,),
}
PLACEMENTS = ("prefix", "infix")


def save_prefix(folder: Path, prefix: Prefix, config: dict[str, Any]) -> None:
    """Write a prefix folder. `config` is the content of prefix.json; format and digest of the weights are added.

    Raises:
        StorageError: it cannot be written.
    """
    with whole_folder(folder) as temporary:
        tensors = {}
        for site, (key, value) in prefix.items():
            tensors[f"{site}.key"], tensors[f"{site}.value"] = key.contiguous(), value.contiguous()
        weights = temporary / "prefix.safetensors"
        # Not save_file, which raises errors of its own where the disk is full.
        weights.write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(temporary / "prefix.json", {"format": FORMAT, **config, "weights_sha256": file_digest(weights)})


def read_config(folder: Path) -> dict[str, Any]:
    """The content of prefix.json.

    Raises:
        StorageError: missing or damaged, or it does not say which base and weights it belongs to.
    """
    config = read_json(folder / "prefix.json", FORMAT)
    require(folder, config, "weights_sha256", "base.digest")
    if "ensemble" in config:
        require(folder, config, "ensemble.average", "ensemble.members")
    return config


def require(folder: Path, config: dict[str, Any], *names: str) -> None:
    """Refuse a prefix.json without what is needed of it; names are `section.key`.

    Raises:
        StorageError: one of them is missing or of another kind.
    """
    for name in names:
        section, _, key = name.rpartition(".")
        whole = config if isinstance(config, dict) else {}
        held: Any = whole.get(section) if section else whole
        right = isinstance(held, dict) and key in held and isinstance(held[key], _KINDS[name])
        if not right or (name == "prefix.placement" and held[key] not in PLACEMENTS):
            raise StorageError(
                f"{folder / 'prefix.json'}: has no {name}, or not of the right kind. It was damaged or changed: train or download it again."
            )


def weights_digest(prefix: Prefix) -> str:
    """SHA-256 over a prefix's sites, shapes and numbers, whether it lies in a file or not."""
    total = hashlib.sha256()
    for site, pair in sorted(prefix.items()):
        for tensor in pair:
            total.update(f"{site} {list(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def is_infix(config: dict[str, Any]) -> bool:
    """Whether the prefix with this prefix.json, which `load_prefix` has read, stands between prompt and target."""
    return bool(config["prefix"]["placement"] == "infix")


def is_ensemble(config: dict[str, Any]) -> bool:
    """Whether the folder with this prefix.json holds several prefixes that answer together (see `pipeline.inference.ensemble`)."""
    return config.get("ensemble", {}).get("average", "parameters") != "parameters"


def load_prefix(folder: Path) -> tuple[Prefix, dict[str, Any]]:
    """Read a prefix folder and check its weights against the digest in prefix.json.

    Raises:
        StorageError: prefix.json is missing or damaged, or does not say where the prefix stands.
        PrefixError: the weights are missing, damaged or not those that were saved, or are an ensemble's.
    """
    config = read_config(folder)
    if is_ensemble(config):
        count = len(config["ensemble"]["members"])
        raise PrefixError(f"{folder}: is an ensemble of {count} prefixes, and one is wanted here. Take one of its members.")
    require(folder, config, "prefix.placement")
    return _read(folder, config), config


def load_ensemble(folder: Path) -> tuple[list[Prefix], dict[str, Any]]:
    """As `load_prefix`, for the folder of an ensemble: its members in order.

    Raises:
        StorageError, PrefixError: see `load_prefix`.
    """
    config = read_config(folder)
    for member in config["ensemble"]["members"]:
        require(folder, member, "prefix.placement")
    members: dict[int, Prefix] = {}
    for name, pair in _read(folder, config).items():
        number, _, site = name.partition(".")
        if not number.isdecimal():
            raise PrefixError(f"{folder / 'prefix.safetensors'}: {name!r} is of no member. Make the ensemble again.")
        members.setdefault(int(number), {})[site] = pair
    return [members[number] for number in sorted(members)], config


def _read(folder: Path, config: dict[str, Any]) -> Prefix:
    file = folder / "prefix.safetensors"
    try:
        if file_digest(file) != config["weights_sha256"]:
            raise PrefixError(
                f"{file}: its digest is not the one in prefix.json. It was damaged or changed: train or download it again."
            )
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise PrefixError(f"{file}: cannot be read ({error}). Train or download it again.") from error
    sites = [name.removesuffix(".key") for name in tensors if name.endswith(".key")]
    if not sites or any(f"{site}.value" not in tensors for site in sites):
        raise PrefixError(f"{file}: has keys without values, or nothing. Train or download it again.")
    return {site: (tensors[f"{site}.key"], tensors[f"{site}.value"]) for site in sites}
