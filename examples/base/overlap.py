"""Look for 13-grams of test material in the pretraining data.

    python overlap.py --material material.json.xz --against FILE_OR_FOLDER ... [--windows N] [--seed 1]

A 13-gram is thirteen successive words (letters and digits, lower case). Two places are searched: every text of the material, and
the documents of N of the windows that `pretrain.py --seed` draws, spread over the run's shards. Prints counts, and each text with an overlap.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

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
    parser.add_argument("--material", required=True, type=Path)
    parser.add_argument("--against", required=True, nargs="+", help="JSONL or text files, or folders of them")
    parser.add_argument("--windows", type=int, default=0, help="windows drawn by the run to look at")
    parser.add_argument("--shards", type=int, default=2000, help="shards that the run drew")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    files = [
        f
        for a in args.against
        for f in ([Path(a)] if Path(a).is_file() else sorted(f for s in ("*.jsonl", "*.txt") for f in Path(a).rglob(s)))
    ]
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
