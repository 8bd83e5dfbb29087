"""Stage 1, `prepare`: a customer's data becomes tokenised splits, a quarantine file and a card.

In: one customer of the fleet, and the base. Out: the folder described in `records`, written whole or not at all. Every row that
was read is either used or in quarantine, once. Knows nothing of prefixes, but for the room that one takes in the context.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import check, split
from pipeline.data.check import Example, UnusableError
from pipeline.data.prompt import encode_prompts, encode_targets, load_tokenizer
from pipeline.data.read import Row, check_source, read_rows, source_note
from pipeline.data.records import CARD, FORMAT, QUARANTINE, SPLITS, Record, read_card, read_split, write_split
from pipeline.errors import ConfigError, DataError, PrefixFleetError, StorageError
from pipeline.files import digest_of, is_whole, whole_folder, write_json

if TYPE_CHECKING:  # pydantic is not at hand on a bare GPU node, which reads what this room wrote
    from pipeline.base import BaseModelInfo
    from pipeline.config import Customer

# Raise it when a change of this room changes what it makes of the same data: everything is then prepared again.
ROOM_VERSION = 1
_BATCH = 1000


@dataclass(frozen=True)
class Prepared:
    """Outcome of `prepare`: `fresh` is False if nothing had changed, so nothing was done."""

    card: dict[str, Any]
    folder: Path
    fresh: bool


@dataclass(frozen=True)
class _Tokenised:
    """An example with its token ids; `targets` in the order of its references."""

    example: Example
    prompt_ids: list[int]
    targets: list[list[int]]


def prepare(customer: "Customer", base: "BaseModelInfo", folder: Path, progress: Callable[[int], None] | None = None) -> Prepared:
    """Prepare one customer's data.

    Args:
        customer: data, columns and prompt settings.
        base: its tokenizer is used, and its longest sequence is the limit.
        folder: where the files go; replaced if anything changed.
        progress: called with the number of rows read since the last call.

    Raises:
        ConfigError: the prefix leaves no room in the base's context, or the settings ask for a token that the tokenizer has not.
        DataError: a source cannot be read, a column is missing, or too little is usable. In the latter case `folder` then holds
            the quarantine file and nothing else, so that no later stage goes on with old data.
        StorageError: the folder cannot be written.
    """
    try:
        return _prepare(customer, base, folder, progress)
    except (DataError, ConfigError) as error:
        raise type(error)(f"customer {customer.key}: {error}") from error


def _prepare(customer: "Customer", base: "BaseModelInfo", folder: Path, progress: Callable[[int], None] | None) -> Prepared:
    notes = _notes(customer, base, {})
    digest = _source_digest(customer, base, notes)
    card = _unchanged(folder, _card(folder), digest)
    if card is not None:
        return Prepared(card, folder, fresh=False)

    read = _read(customer, base, progress)
    rows, quarantine, by_split = read.rows, read.quarantine, read.by_split
    cut = [name for name in ("test", "dev") if not by_split[name]]
    splits = _split(read.tokenised, cut)
    records = {name: _merge(name, splits[name], quarantine) for name in SPLITS}

    quarantine_text = read.quarantine_text()
    problem = _too_little(rows, records, cut, quarantine, folder / QUARANTINE)
    if problem is not None:
        with whole_folder(folder) as temporary:
            (temporary / QUARANTINE).write_text(quarantine_text, encoding="utf-8")
        raise DataError(problem)

    card = _write(folder, customer, base, read, records, digest, notes)
    return Prepared(card, folder, fresh=True)


def prepare_fresh(customer: "Customer", base: "BaseModelInfo", known: Path, folder: Path, least: int) -> Prepared | None:
    """Prepare the rows that have arrived since `known` was prepared, all of them as test split: what a prefix of before has never seen.

    Args:
        customer: with the prompt and the prefix length of the prefix that will be judged.
        base: see `prepare`.
        known: the prepared data of before. A row is new if its input stands in no split of it.
        folder: where the files go; replaced if anything changed.
        least: how many usable inputs must be new.

    Returns:
        None if fewer are; nothing is written then.

    Raises:
        ConfigError, DataError: as `prepare`.
        StorageError: `known` cannot be read, or `folder` cannot be written.
    """
    try:
        before = {split.normalised(record.input) for name in SPLITS for record in read_split(known, name)}
        earlier = _card(folder)
        notes = _notes(customer, base, (earlier or {}).get("source_notes", {}))
        digest = digest_of([_source_digest(customer, base, notes), read_card(known)["fingerprint"]])
        card = _unchanged(folder, earlier, digest)
        if card is not None:
            return Prepared(card, folder, fresh=False) if card["counts"]["test"] >= least else None
        read = _read(customer, base, None)
        new = [item for item in read.tokenised if split.normalised(item.example.input) not in before]
        records = {"train": [], "dev": [], "test": _merge("test", new, read.quarantine)}
        if len(records["test"]) < least:
            return None
        return Prepared(_write(folder, customer, base, read, records, digest, notes), folder, fresh=True)
    except (DataError, ConfigError) as error:
        raise type(error)(f"customer {customer.key}: {error}") from error


@dataclass(frozen=True)
class _Read:
    """A customer's rows, those that can be used tokenised, and why the others cannot."""

    rows: list[Row]
    by_split: dict[str, list[Row]]
    chat: bool
    tokenised: list[_Tokenised]
    quarantine: list[tuple[Row, UnusableError]]
    pad_token_added: bool

    def quarantine_text(self) -> str:
        """Put what cannot be used into the order of the rows; returns the quarantine file."""
        place = {id(row): number for number, row in enumerate(self.rows)}
        self.quarantine.sort(key=lambda item: place[id(item[0])])
        return "".join(check.quarantine_line(row, unusable) for row, unusable in self.quarantine)


def _read(customer: "Customer", base: "BaseModelInfo", progress: Callable[[int], None] | None) -> _Read:
    tokenizer, pad_token_added = _tokenizer(base.path, base.tokenizer_digest)
    sources = customer.data.sources
    rows = list(_counted((row for name, source in sources.items() for row in read_rows(name, source, customer.data)), progress))
    by_split = {name: [row for row in rows if row.split == name] for name in ("all", *SPLITS)}
    for name, source in sources.items():
        if not any(row.source == source and row.split in (name, *SPLITS) for row in rows):
            raise DataError(f"{source}: holds no rows, only blank lines or a header. Put at least one row into it.")
    chats = {name: check.is_chat(some[0].source, some, customer.data.columns) for name, some in by_split.items() if some}
    chat = next(iter(chats.values()))
    if len({chats[name] for name in chats if any(row.values is not None for row in by_split[name])}) > 1:
        raise DataError("some splits hold chat messages and others do not. Give all splits in one form.")

    quarantine: list[tuple[Row, UnusableError]] = []
    special_tokens = [str(token) for token in tokenizer.all_special_tokens]
    examples: list[Example] = []
    for row in rows:
        try:
            examples.append(check.check_row(row, customer.data.columns, chat, special_tokens))
        except UnusableError as unusable:
            quarantine.append((row, unusable))
    tokenised = list(_tokenise(examples, customer, base, tokenizer, chat, quarantine))
    return _Read(rows, by_split, chat, tokenised, quarantine, pad_token_added)


def _write(
    folder: Path,
    customer: "Customer",
    base: "BaseModelInfo",
    read: _Read,
    records: dict[str, list[Record]],
    digest: str,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the folder; returns its card."""
    inputs = {name: {split.normalised(record.input) for record in records[name]} for name in SPLITS}
    every = [record for name in SPLITS for record in records[name]]
    card = {
        "format": FORMAT,
        "customer": customer.id,
        "task": customer.task,
        "source_digest": digest,
        "fingerprint": _fingerprint(records),
        # A corrected test reference is no reason to train again.
        "train_fingerprint": _fingerprint(records, ("train", "dev")),
        "counts": {
            "read": len(read.rows),
            "used": len(read.rows) - len(read.quarantine),
            **{name: len(records[name]) for name in SPLITS},
            "quarantined": len(read.quarantine),
            "reasons": dict(sorted(Counter(unusable.reason for _, unusable in read.quarantine).items())),
        },
        "overlap": {f"{a}/{b}": len(inputs[a] & inputs[b]) for a, b in (("train", "dev"), ("train", "test"), ("dev", "test"))},
        "sources": customer.data.sources,
        "source_notes": notes,
        "prompt": {**customer.prompt.model_dump(), "chat": read.chat},
        "tokenizer_digest": base.tokenizer_digest,
        "pad_token_added": read.pad_token_added,
        "max_prompt_tokens": max(len(record.prompt_ids) for record in every),
        "max_target_tokens_seen": max(len(record.target_ids) for record in every),
    }
    with whole_folder(folder) as temporary:
        for name in SPLITS:
            write_split(temporary, name, records[name])
        (temporary / QUARANTINE).write_text(read.quarantine_text(), encoding="utf-8")
        write_json(temporary / CARD, card)
    return card


def is_prepared(customer: "Customer", base: "BaseModelInfo", folder: Path) -> bool:
    """Whether `prepare` would do nothing, see `prepared_card`."""
    return prepared_card(customer, base, folder) is not None


def prepared_card(customer: "Customer", base: "BaseModelInfo", folder: Path) -> dict[str, Any] | None:
    """The card in `folder` if `prepare` would do nothing, its data, settings and tokenizer being those that `folder` was made of.

    Files that have not been touched since are not read.

    Raises:
        ConfigError, DataError: as `prepare`, where it would fail before reading a row.
    """
    card = _card(folder)
    before = {} if card is None else card.get("source_notes", {})
    return _unchanged(folder, card, _source_digest(customer, base, _notes(customer, base, before)))


def same_sources(customer: "Customer", card: Mapping[str, Any]) -> bool:
    """Whether a customer's data is in the same files with the same content as when `card` was made. What cannot be read has changed."""
    before = card.get("source_notes", {})
    try:
        now = {name: source_note(source, customer.data, before.get(name)) for name, source in customer.data.sources.items()}
    except PrefixFleetError:
        return False
    return {name: note["digest"] for name, note in now.items()} == {name: note["digest"] for name, note in before.items()}


def _notes(customer: "Customer", base: "BaseModelInfo", before: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the content of each source, by split."""
    length = customer.prefix.length
    if base.max_positions is not None and length >= base.max_positions:
        raise ConfigError(
            f"prefix.length is {length}, but the base {base.id} takes {base.max_positions} positions in all "
            "(max_position_embeddings). Set a shorter prefix.length."
        )
    sources = customer.data.sources
    for source in sources.values():
        check_source(source)
    return {name: source_note(source, customer.data, before.get(name)) for name, source in sources.items()}


def _source_digest(customer: "Customer", base: "BaseModelInfo", notes: Mapping[str, Any]) -> str:
    """Digest of everything that the prepared data depends on."""
    identity = {
        "room": ROOM_VERSION,
        "sources": {name: note["digest"] for name, note in notes.items()},
        "columns": customer.data.columns.model_dump(),
        "columns_named": sorted(customer.data.columns.model_fields_set),
        "prompt": customer.prompt.model_dump(),
        "tokenizer": base.tokenizer_digest,
        "is_encoder_decoder": base.is_encoder_decoder,
        "positions": None if base.max_positions is None else base.max_positions - customer.prefix.length,
    }
    return digest_of(identity)


def _card(folder: Path) -> dict[str, Any] | None:
    try:
        return read_card(folder)
    except StorageError:  # none yet, damaged, or of another format: prepare anew
        return None


def _unchanged(folder: Path, card: dict[str, Any] | None, digest: str) -> dict[str, Any] | None:
    """The card of `folder` if it is of the same data and settings and all files are there."""
    if card is None or card.get("source_digest") != digest:
        return None
    return card if is_whole(folder, (QUARANTINE, *(f"{name}.parquet" for name in SPLITS))) else None


@functools.lru_cache(maxsize=2)
def _tokenizer(path: Path, digest: str) -> tuple[Any, bool]:
    """Loaded once for a whole fleet; `digest` is only the cache's key."""
    return load_tokenizer(path)


def _counted(rows: Iterator[Row], progress: Callable[[int], None] | None) -> Iterator[Row]:
    new = 0
    for row in rows:
        yield row
        new += 1
        if new == _BATCH and progress is not None:
            progress(new)
            new = 0
    if new and progress is not None:
        progress(new)


def _tokenise(
    examples: list[Example],
    customer: "Customer",
    base: "BaseModelInfo",
    tokenizer: Any,
    chat: bool,
    quarantine: list[tuple[Row, UnusableError]],
) -> Iterator[_Tokenised]:
    """Token ids of all examples; those that do not fit go to `quarantine`."""
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        prompts = _prompts(batch, customer, base, tokenizer, chat, quarantine)
        targets = iter(
            encode_targets(
                tokenizer, customer.prompt, [text for example in batch for text in example.references], base.is_encoder_decoder
            )
        )
        for example, prompt_ids in zip(batch, prompts, strict=True):
            target_ids = [next(targets) for _ in example.references]
            if prompt_ids is None:
                continue
            try:
                _check_lengths(prompt_ids, target_ids, customer, base)
            except UnusableError as unusable:
                quarantine.append((example.row, unusable))
            else:
                yield _Tokenised(example, prompt_ids, target_ids)


def _prompts(
    batch: list[Example],
    customer: "Customer",
    base: "BaseModelInfo",
    tokenizer: Any,
    chat: bool,
    quarantine: list[tuple[Row, UnusableError]],
) -> list[list[int] | None]:
    """Prompt ids of a batch; None for a conversation that the chat template refuses, which goes to `quarantine`."""
    import jinja2

    try:
        return [*encode_prompts(tokenizer, customer.prompt, chat, [example.source for example in batch], base.is_encoder_decoder)]
    except jinja2.TemplateError as error:
        if len(batch) == 1:
            quarantine.append(
                (batch[0].row, UnusableError("wrong_type", f"the base's chat template refuses the messages: {error}"))
            )
            return [None]
    return [ids for example in batch for ids in _prompts([example], customer, base, tokenizer, chat, quarantine)]


def _check_lengths(prompt_ids: list[int], targets: list[list[int]], customer: "Customer", base: "BaseModelInfo") -> None:
    """Raise `UnusableError` if a prompt or target has no tokens, or more than the settings or the base allow."""
    prompt, prefix = customer.prompt, customer.prefix.length
    longest = max(len(ids) for ids in targets)
    if not prompt_ids or not all(targets):
        raise UnusableError("empty", "the tokenizer makes no tokens of the input or of a target")
    if len(prompt_ids) > prompt.max_input_tokens:
        raise UnusableError(
            "too_long",
            f"the input has {len(prompt_ids)} tokens with its prompt, prompt.max_input_tokens is {prompt.max_input_tokens}",
        )
    if longest > prompt.max_target_tokens:
        raise UnusableError("too_long", f"a target has {longest} tokens, prompt.max_target_tokens is {prompt.max_target_tokens}")
    # An encoder's input and a decoder's target are sequences of their own, the prefix standing before the target.
    together = max(len(prompt_ids), prefix + longest) if base.is_encoder_decoder else prefix + len(prompt_ids) + longest
    if base.max_positions is not None and together > base.max_positions:
        raise UnusableError(
            "too_long",
            f"prefix ({prefix}), input ({len(prompt_ids)}) and target ({longest}) need {together} positions, "
            f"the base takes {base.max_positions}",
        )


def _split(tokenised: list[_Tokenised], cut: list[str]) -> dict[str, list[_Tokenised]]:
    """Examples by split: those that came ready as they are, even if they overlap, those to `cut` taken from train (see
    `assign_splits`)."""
    splits: dict[str, list[_Tokenised]] = {name: [] for name in ("all", *SPLITS)}
    for item in tokenised:
        splits[item.example.row.split].append(item)
    uncut = splits.pop("all") + splits["train"]
    inputs = [split.normalised(item.example.input) for item in uncut]
    assigned = split.assign_splits(inputs, cut)
    splits["train"] = []
    for item, text in zip(uncut, inputs, strict=True):
        splits[assigned[text]].append(item)
    return splits


def _merge(name: str, items: list[_Tokenised], quarantine: list[tuple[Row, UnusableError]]) -> list[Record]:
    """The records of one split: in train one per (input, reference), in dev and test one per input with all its references.

    A row that adds no new pair of input and reference is a duplicate and goes to `quarantine`.
    """
    first: dict[tuple[str, str], int] = {}
    merged: dict[str, Record] = {}
    records: list[Record] = []
    for item in items:
        example, row = item.example, item.example.row
        new = [
            (text, ids) for text, ids in zip(example.references, item.targets, strict=True) if (example.input, text) not in first
        ]
        if not new:
            line = first[example.input, example.references[0]]
            quarantine.append((row, UnusableError("duplicate", f"the same input and target as line {line}")))
            continue
        first.update({(example.input, text): row.line for text, _ in new})
        if name == "train":
            records += [Record(item.prompt_ids, ids, example.input, [text]) for text, ids in new]
        elif example.input in merged:
            merged[example.input].references.extend(text for text, _ in new)
        else:
            merged[example.input] = Record(item.prompt_ids, new[0][1], example.input, [text for text, _ in new], example.fields)
    return records if name == "train" else list(merged.values())


def _too_little(
    rows: list[Row], records: dict[str, list[Record]], cut: list[str], quarantine: list[tuple[Row, UnusableError]], file: Path
) -> str | None:
    """What is wrong if some split has no record, and what to do; None if each has one."""
    if all(records.values()):
        return None
    bad = {id(row) for row, _ in quarantine}
    read = Counter((row.split, row.source) for row in rows)
    usable = Counter(row.split for row in rows if id(row) not in bad)
    for (name, source), count in read.items():
        if usable[name]:
            continue
        reasons = Counter(unusable.reason for row, unusable in quarantine if row.split == name)
        first = {
            unusable.reason: f"line {row.line} {unusable.reason} ({unusable.detail})"
            for row, unusable in quarantine[::-1]
            if row.split == name
        }
        counted = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        named = "; ".join(first[reason] for reason, _ in reasons.most_common(3))
        return (
            f"{source}: none of its {count} rows can be used: {counted}. First: {named}. All are in {file}. "
            "Correct the data or `data.columns`."
        )
    inputs = len({split.normalised(record.input) for name in ("train", *cut) for record in records[name]})
    place = next(source for name, source in read if name in ("all", "train"))
    hint = f"{len(bad)} of {len(rows)} rows are in quarantine, see {file}. " if bad else ""
    return (
        f"{place}: {inputs} distinct inputs can be used, at least {len(cut) + 1} are needed, "
        f"one each for {', '.join(('train', *reversed(cut)))}. {hint}Add rows."
    )


def _fingerprint(records: dict[str, list[Record]], splits: Sequence[str] = SPLITS) -> str:
    """SHA-256 in hex of everything that later stages see of these splits, in order."""
    digest = hashlib.sha256()
    for name in splits:
        for record in records[name]:
            content = [
                name,
                record.prompt_ids,
                record.target_ids,
                record.input,
                record.references,
                {} if name == "train" else record.fields,
            ]
            digest.update(json.dumps(content, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
