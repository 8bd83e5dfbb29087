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

# What is asked of prefix.json somewhere in this room, and what it may be.
_KINDS: dict[str, tuple[type, ...]] = {
    "weights_sha256": (str,),
    "prefix.length": (int,),
    "base.id": (str,),
    "base.revision": (str, type(None)),
    "base.digest": (str,),
    "base.is_encoder_decoder": (bool,),
}


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
    return config


def require(folder: Path, config: dict[str, Any], *names: str) -> None:
    """Refuse a prefix.json without what is needed of it; names are `section.key`.

    Raises:
        StorageError: one of them is missing or of another kind.
    """
    for name in names:
        section, _, key = name.rpartition(".")
        held = config.get(section) if section else config
        if not isinstance(held, dict) or key not in held or not isinstance(held[key], _KINDS[name]):
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
    """Whether the prefix with this prefix.json stands between prompt and target."""
    return bool(config.get("prefix", {}).get("placement") == "infix")


def load_prefix(folder: Path) -> tuple[Prefix, dict[str, Any]]:
    """Read a prefix folder and check its weights against the digest in prefix.json.

    Raises:
        StorageError: prefix.json is missing or damaged.
        PrefixError: the weights are missing, damaged or not those that were saved.
    """
    config = read_config(folder)
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
    return {site: (tensors[f"{site}.key"], tensors[f"{site}.value"]) for site in sites}, config
