"""Which base model a name means, and whether it is the right one. Reads files only: no torch here, so flows may use it.

The base is identified by one digest of all that its outputs follow from, the tokenizer apart: the weight files, the architecture's
settings in config.json and the end tokens in generation_config.json. A prefix is valid for one digest only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BaseModelError
from pipeline.files import digest_of, file_digest, write_json
from pipeline.hub import hub_answers

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_SEQ2SEQ = ("ForConditionalGeneration", "ForSeq2SeqLM")
# Keys of config.json that do not change what the model computes; the dtype is a setting of the fleet file.
_NO_IDENTITY = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class BaseModelInfo:
    """A base that was found on this machine.

    Attributes:
        id: what the user wrote: a folder or a hub id.
        path: the folder that holds the files.
        revision: hub commit, or None for a folder.
        digest: SHA-256, 64 hex digits, over the weight files' digests, config.json (without the library's version, the name, dtype
            and use_cache) and `eos_token_id` of generation_config.json.
        tokenizer_digest: SHA-256 over the tokenizer's files, 64 hex digits.
        is_encoder_decoder: False for decoder-only models.
        model_type: transformers' name of the architecture.
        max_positions: the longest sequence, prefix included, that the model takes; None if unlimited. Where rows longer than some length
            would change other rows of their batch, that length (see `rotary_limit`).
    """

    id: str
    path: Path
    revision: str | None
    digest: str
    tokenizer_digest: str
    is_encoder_decoder: bool
    model_type: str
    max_positions: int | None


def resolve_base(name: str, revision: str | None = None, digests: Path | None = None) -> BaseModelInfo:
    """Find a base model by folder or hub id.

    Args:
        name: a folder, or a hub id (looked up in the local cache first, then on the hub unless `HF_HUB_OFFLINE` is set).
        revision: hub revision.
        digests: a JSON file that remembers digests by path, size and time, so that a large base is read once.

    Raises:
        BaseModelError: not found, damaged, or neither a causal nor an encoder-decoder language model.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return _inspect(name, folder.resolve(), None, digests)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise BaseModelError(
            f"base model {name}: no such folder. Set base_model.path to a folder with config.json and weights, or to a hub id."
        )
    path = Path(_download(name, revision))
    # The folder of a hub snapshot is named by its commit.
    return _inspect(name, path, path.name, digests)


def _download(name: str, revision: str | None) -> str:
    from huggingface_hub import constants, snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    start = f"base model {name}: no such folder beside the fleet file"
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
    except Exception as missing:  # huggingface_hub raises a family of errors for "not in the cache"
        if constants.HF_HUB_OFFLINE:
            raise BaseModelError(
                f"{start}, nor in the hub cache, and HF_HUB_OFFLINE is set. Download it first, or give a folder."
            ) from missing
        if not hub_answers():
            raise BaseModelError(
                f"{start}, nor in the hub cache, and the hub at {constants.ENDPOINT} does not answer. Correct base_model.path, or the "
                "network, its proxy or HF_ENDPOINT."
            ) from missing
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise BaseModelError(
            f"{start}, and the hub did not give it ({type(error).__name__}: {error}). Correct base_model.path or revision."
        ) from error


def _inspect(name: str, folder: Path, revision: str | None, digests: Path | None) -> BaseModelInfo:
    if not (folder / "config.json").exists():
        raise BaseModelError(f"base model {name}: {folder} holds no config.json, so it is no transformers model folder.")
    config = _read(name, folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = _read(name, generation_file) if generation_file.exists() else {}
    architectures = config.get("architectures") or []
    causal = any(a.endswith(_CAUSAL) for a in architectures)
    seq2seq = any(a.endswith(_SEQ2SEQ) for a in architectures) and bool(config.get("is_encoder_decoder"))
    if not causal and not seq2seq:
        if any(a.endswith(_SEQ2SEQ) for a in architectures):
            # …ForConditionalGeneration is also what transformers calls models that see or hear (Gemma 3, Qwen-VL).
            raise BaseModelError(
                f"base model {name}: {', '.join(architectures)} is no encoder-decoder (config.json does not say is_encoder_decoder): it takes images "
                "or sound besides text. Choose its text-only form (…ForCausalLM), or save one from it: the language model with its text_config."
            )
        raise BaseModelError(
            f"base model {name}: {', '.join(architectures) or 'no architecture named in config.json'} is neither a causal language model "
            "(…ForCausalLM) nor an encoder-decoder (…ForConditionalGeneration). Choose a generative base."
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BaseModelError(
            f"base model {name}: {folder} holds no .safetensors weights. Convert it (pickled weights are never loaded)."
        )
    tokenizer = [
        f
        for f in sorted(folder.iterdir())
        if f.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "spiece", "chat_template"))
    ]
    if not tokenizer:
        raise BaseModelError(f"base model {name}: {folder} holds no tokenizer files.")
    text = config.get("text_config") or config
    rotary = rotary_limit(text)
    positions = text.get("max_position_embeddings") or text.get("n_positions")
    # T5's n_positions is a training detail: relative biases have no limit.
    limited = config.get("model_type") not in ("t5", "mt5", "umt5", "longt5")
    return BaseModelInfo(
        id=name,
        path=folder,
        revision=revision,
        digest=digest_of([_remembered(weights, digests), _identity(config), generation.get("eos_token_id")]),
        tokenizer_digest=digest_of([[f.name, file_digest(f)] for f in tokenizer]),
        is_encoder_decoder=seq2seq,
        model_type=str(config.get("model_type")),
        max_positions=min(int(positions), rotary or int(positions)) if positions and limited else None,
    )


def rotary_limit(config: dict[str, Any]) -> int | None:
    """The positions up to which rows turn alike whatever the length of their neighbours; None if at any length.

    `dynamic` and `longrope` (Phi-3 with 128k) scale the rotation of the whole batch by its longest row, beyond the length of pretraining.

    Args:
        config: of the (text) model, as config.json has it or as transformers completes it.
    """
    kinds = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # One set of parameters, or one for each kind of layer (Gemma 3).
    each = [kinds] if "rope_type" in kinds or "type" in kinds else [kind for kind in kinds.values() if isinstance(kind, dict)]
    longest = config.get("max_position_embeddings")
    limits = []
    for kind in each:
        name = kind.get("rope_type") or kind.get("type")
        if name == "dynamic":
            limits.append(kind.get("original_max_position_embeddings") or longest)
        elif name in ("longrope", "su"):  # as Phi-3 called it first
            limits.append(
                kind.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or longest
            )
    return min((int(limit) for limit in limits if limit), default=None)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads of a model folder: some (Mistral's) hold the weights a second time, in a form of their maker's.

    Raises:
        BaseModelError: the index of the files cannot be read.
    """
    # The order in which transformers (5.23) looks: one whole file, then an index of parts.
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    places = _read(str(folder), index).get("weight_map")
    parts = sorted({Path(str(name)).name for name in places.values()}) if isinstance(places, dict) else []
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing or not parts:
        raise BaseModelError(
            f"base model {folder}: {index.name} names {', '.join(missing) or 'no files'}"
            f"{', which are not there' if missing else ''}. Download the model again."
        )
    return [folder / name for name in parts]


def _read(name: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base model {name}: {file} cannot be read ({error}).") from error


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What of config.json decides the outputs; models of several parts nest further configurations."""
    return {k: _identity(v) if isinstance(v, dict) else v for k, v in config.items() if k not in _NO_IDENTITY}


def _remembered(weights: list[Path], digests: Path | None) -> str:
    """The weight digest, from `digests` if the files have not changed since it was computed."""
    stamp = digest_of([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in weights])
    known: dict[str, str] = {}
    if digests is not None and digests.exists():
        try:
            known = json.loads(digests.read_text(encoding="utf-8"))["digests"]
        except (OSError, ValueError, KeyError, TypeError):
            known = {}  # only a cache: read the weights again
    if stamp not in known:
        known[stamp] = digest_of([[f.name, file_digest(f)] for f in weights])
        if digests is not None:
            write_json(digests, {"format": 1, "digests": known})
    return known[stamp]
