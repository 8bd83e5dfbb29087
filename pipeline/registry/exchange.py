"""A prefix made elsewhere becomes a customer's: an adapter folder of PEFT in, a prefix folder and a registered version out.

The reverse, from a registered version to an adapter folder, is `lookup` and `pipeline.prefix.peft_format.export_peft`.
"""

import dataclasses
from pathlib import Path

from pipeline.base import BaseModelInfo, resolve_base
from pipeline.errors import BaseModelError, PrefixError
from pipeline.files import digest_of
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.process import code_version
from pipeline.registry.register import Registration, register_imported
from pipeline.registry.store import connect, ensure_store, translated
from pipeline.registry.tombstones import refuse_forgotten
from pipeline.training.job import JobBase, JobPrompt


def check_named_base(folder: Path, base: BaseModelInfo, home: Home | None = None) -> None:
    """Refuse an adapter that names another base than the one that was found for it.

    Names of one folder, of folders with the same weights, or of one hub id are no difference; nor is a revision that one of them does not say.

    Args:
        folder: the adapter's.
        base: not what its user named for this import, but what a fleet file says, say.
        home: whose digests of bases are used.

    Raises:
        PrefixError: it names another one, or one that cannot be compared.
    """
    from pipeline.prefix.peft_format import read_adapter_config

    adapter = read_adapter_config(folder)
    name, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not name:
        return
    same = str(name) == base.id and (None in (revision, base.revision) or revision == base.revision)
    if not same and Path(name).is_dir():
        digests = (home or Home.current()).root / "cache" / "base_digests.json"
        try:
            same = resolve_base(str(name), None, digests).digest == base.digest
        except BaseModelError:
            same = False
    if not same:
        raise PrefixError(
            f"{folder}: its adapter_config.json says that it was made for {_named(name, revision)}, and the base is "
            f"{_named(base.id, base.revision)}. On another base it is worth nothing. If they are the same, name the base explicitly with --base."
        )


def _named(name: str, revision: str | None) -> str:
    return f"{name} (revision {revision})" if revision else str(name)


def import_adapter(
    key: CustomerKey,
    folder: Path,
    base: BaseModelInfo,
    prompt: JobPrompt,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    chat: bool = False,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    champion: bool = False,
    home: Home | None = None,
) -> tuple[Registration, Path]:
    """Import a PEFT adapter for a customer. The same again finds the version that is there.

    Args:
        key: whose it becomes.
        folder: what PEFT's `save_pretrained` wrote.
        base: the model that it was trained on.
        prompt: how an input becomes a prompt; the adapter does not say.
        dtype, quantization: how the base is loaded, now and when the prefix answers.
        chat: whether inputs go through the base's chat template.
        num_beams, max_new_tokens: how it answers; by default greedily, and as long as the prompt's targets.
        champion: whether it takes the alias, without having been evaluated.
        home: where the prefix folder goes.

    Returns:
        the version, and the prefix folder.

    Raises:
        PrefixError: no adapter that can be imported, or for another base.
        BaseModelError: the base takes no prefix.
        RegistryError: the customer was forgotten, or MLflow failed.
    """
    from pipeline.prefix import load_base, save_prefix
    from pipeline.prefix.peft_format import import_peft, read_adapter_config
    from pipeline.prefix.store import weights_digest

    adapter = read_adapter_config(folder)  # before seconds are spent on loading the base
    kind, name = adapter["peft_type"], adapter.get("base_model_name_or_path")
    home = home or Home.current()
    ensure_store(home)
    with translated(f"importing a prefix of customer {key}"):
        refuse_forgotten(connect(), key.customer)  # before anything of the customer's is written here
    loaded = load_base(JobBase(base.id, str(base.path), base.revision, base.digest, dtype, quantization, "auto"))
    prefix = import_peft(folder, loaded)
    settings = dataclasses.asdict(prompt)
    shape = next(iter(prefix.values()))[0].shape
    generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens or prompt.max_target_tokens}
    digest = digest_of(["peft", weights_digest(prefix), base.digest, settings, dtype, quantization, chat, generation])
    config = {
        "customer": key.customer,
        "task": key.task,
        "digest": digest,
        "prefix": {
            "length": shape[1],
            "layers": "all",
            "sites": {name: dataclasses.asdict(loaded.sites[name]) for name in prefix},
            "placement": "prefix",
            "parameters": sum(k.numel() + v.numel() for k, v in prefix.values()),
        },
        "prompt": settings,
        "chat": chat,
        "generation": generation,
        "base": {
            "id": base.id,
            "path": str(base.path),
            "revision": base.revision,
            "digest": base.digest,
            "model_type": loaded.model.config.model_type,
            "is_encoder_decoder": loaded.is_encoder_decoder,
            "tokenizer_digest": base.tokenizer_digest,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "quantization": quantization,
        },
        "training": {"imported_from": f"PEFT {kind}" + (f" for {_named(name, adapter.get('revision'))}" if name else "")},
        "lineage": {
            "data_fingerprint": "",
            "config_digest": digest_of(settings),
            "seed": None,
            "code_version": code_version(),
            "parent": None,
        },
        "run_id": None,
    }
    prefix_dir = home.prefix(key, digest)
    if not (prefix_dir / "prefix.json").exists():
        save_prefix(prefix_dir, prefix, config)
    return register_imported(prefix_dir, f"PEFT {kind}", champion=champion), prefix_dir
