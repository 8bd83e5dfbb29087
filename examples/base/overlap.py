"""Look for test material in the pretraining data: its 13-grams in the texts, its relations in the grammar.

    python overlap.py --material material.json.xz --against FILE_OR_FOLDER ... [--windows N] [--seed 1]
    python overlap.py --relations --against FILE_OR_FOLDER ... [--max SHARE]

A 13-gram is thirteen successive words (letters and digits, lower case). Two places are searched: every text of the material, and
the documents of N of the windows that `pretrain.py --seed` draws, spread over the run's shards. Prints counts, and each text with an overlap.

A 13-gram does not see a grammar that was written for the same domain. `--relations` does, for records whose input is triples,
`subject : relation : object | ...`: it counts the relation names that relations.tsv has too, and the references of one triple that say
nothing but what relations.tsv says for that relation, the words of both names and articles left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from grammar import read_relations
from mix import Mix
from sources import Material

N = 13


def grams(text: str) -> Iterator[tuple[str, ...]]:
    """The successive 13-grams of a text."""
    words = re.findall(r"[^\W_]+", text.lower())
    return zip(*(words[i:] for i in range(N)), strict=False)


def strings(value: object) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def triples(text: str) -> list[tuple[str, str, str]]:
    """The triples of an input `subject : relation : object | ...`; none if it is not written so."""
    rows = [tuple(part.split(" : ")) for part in text.split(" | ")]
    return [(row[0], row[1], row[2]) for row in rows] if all(len(row) == 3 for row in rows) else []


def relation_names() -> set[str]:
    """The names of relations in triples that relations.tsv has."""
    return {name for relation in read_relations()[0] for name in relation.names}


def frame(text: str, *names: str) -> tuple[str, ...]:
    """The words of a text, lower case, less articles and the words of `names`."""
    words = lambda t: re.findall(r"[^\W_]+", t.lower())  # noqa: E731
    gone = {"a", "an", "the"}.union(*map(words, names))
    return tuple(word for word in words(text) if word not in gone)


def shared_relations(records: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """(shared, all) of relation names, of their occurrences, and of references of one triple, in records with triples as input."""
    wordings: dict[str, set[tuple[str, ...]]] = {}
    for relation in read_relations()[0]:
        said = {frame(re.sub(r"\{[soa]\}", " ", text)) for text in (*relation.vps, *relation.wholes)}
        for name in relation.names:
            wordings.setdefault(name, set()).update(said)
    seen: Counter[str] = Counter()
    equal = references = 0
    for record in records:
        rows = triples(record["input"])
        seen.update(relation for _, relation, _ in rows)
        for text in (record.get("references") or [record["target"]]) if len(rows) == 1 else []:
            subject, relation, value = rows[0]
            references += 1
            equal += frame(text, subject, value) in wordings.get(relation, ())
    return {
        "relation names": (sum(name in wordings for name in seen), len(seen)),
        "their occurrences": (sum(n for name, n in seen.items() if name in wordings), seen.total()),
        "references of one triple": (equal, references),
    }


def drawn(mix: Mix, seed: int, count: int, shards: int) -> Iterator[tuple[str, str]]:
    """(source, text) of the first 2,500 characters of documents of `count` windows, from all over the shards of a run."""
    each = -(-count // shards)  # windows of one shard, each looked at once
    for n in range(count):
        size = 0
        for doc in mix.window(Random(f"{seed}-{n // each * shards // -(-count // each)}-{n % each}")):
            yield f"drawn: {doc.source}", f"{doc.input}\n{doc.target}"
            size += len(doc.input) + len(doc.target)
            if size > 2500:
                break


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--material", type=Path, help="of sources.py: look for 13-grams")
    what.add_argument("--relations", action="store_true", help="look for relations")
    parser.add_argument("--against", required=True, nargs="+", help="JSONL or text files, or folders of them")
    parser.add_argument("--windows", type=int, default=0, help="windows drawn by the run to look at")
    parser.add_argument("--shards", type=int, default=2000, help="shards that the run drew")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--max", type=float, metavar="SHARE", help="with --relations: more than this of names or references fails"
    )
    args = parser.parse_args()
    files = [
        f
        for a in args.against
        for f in ([Path(a)] if Path(a).is_file() else sorted(f for s in ("*.jsonl", "*.txt") for f in Path(a).rglob(s)))
    ]
    if args.relations:
        lines = [line for file in files if file.suffix == ".jsonl" for line in file.read_text(encoding="utf-8").splitlines()]
        shares = shared_relations([json.loads(line) for line in lines])
        if not shares["relation names"][1]:
            parser.error("--against: no record there has triples as input")
        for name, (shared, total) in shares.items():
            print(f"{name}: {shared:,} of {total:,} ({shared / max(total, 1):.1%}) in relations.tsv")
        over = [name for name, (shared, total) in shares.items() if args.max is not None and shared > args.max * total]
        if over:
            raise SystemExit(f"more than {args.max:.0%} of: {', '.join(over)}")
        return
    held = set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            for item in strings(json.loads(line)) if file.suffix == ".jsonl" else [line]:
                held.update(map(hash, grams(item)))
    print(f"{len(files)} files, {len(held):,} 13-grams to look for")
    if not held:
        parser.error("--against: no text of 13 words there. Give JSONL or text files, or folders that hold some.")
    material = Material.read(args.material)
    seen: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for texts in (material.texts(), drawn(Mix(material), args.seed, args.windows, args.shards)):
        for name, text in texts:
            seen[name] += 1
            found = [gram for gram in grams(text) if hash(gram) in held]
            if found:
                hits[name] += 1
                print(f"  {name}: {' '.join(found[0])}")
    for name, count in seen.items():
        print(f"{name}: {count:,} texts, {hits[name]} with an overlap")


if __name__ == "__main__":
    main()
