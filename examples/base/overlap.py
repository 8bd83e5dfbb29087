"""Look for 13-grams of test material in the pretraining data.

    python overlap.py --sources DIR --against FILE_OR_FOLDER ... [--shards N] [--seed 1]

A 13-gram is thirteen successive words (letters and digits, lower case). Two places are searched: every text of the sources as
it is read, and every document that `pretrain.py` drew for its first N shards. Prints counts, and each document with an overlap.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mix import Mix
from pretrain import EOS, PAD, SHARD, windows
from transformers import AutoTokenizer

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True)
    parser.add_argument("--against", required=True, nargs="+", help="JSONL or text files, or folders of them")
    parser.add_argument("--shards", type=int, default=0, help="shards of 480 windows drawn by the run")
    parser.add_argument("--tokenizer", default=str(Path(__file__).parent), help="folder of the run's tokenizer")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    files = [f for a in args.against for f in ([Path(a)] if Path(a).is_file() else sorted(Path(a).rglob("*.jsonl")))]
    held = set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            for item in strings(json.loads(line)) if file.suffix == ".jsonl" else [line]:
                held.update(map(hash, grams(item)))
    print(f"{len(files)} files, {len(held)} 13-grams to look for")
    mix = Mix(Path(args.sources))
    groups = {
        "wiki": (s for whole, parts in mix.wiki for s in (whole, *parts)),
        "fewrel": (row[0] for row in mix.fewrel),
        "rnnlg": (t for _, slots, texts in mix.rnnlg for t in (*texts, " ".join(f"{k} {v}" for k, v in slots))),
        "sgd": (" ".join(t.text for t in turns) for _, turns in mix.sgd),
        "taskmaster": (said for _, said in mix.taskmaster),
        "documents": (d for s in range(args.shards) for d in drawn(mix, tokenizer, f"{args.seed}-{s}", args.seq)),
    }
    for name, texts in groups.items():
        seen = hits = 0
        for item in texts:
            seen += 1
            found = [g for g in grams(item) if hash(g) in held]
            if found:
                hits += 1
                print(f"  {name}: {' '.join(found[0])}")
        print(f"{name}: {seen} texts, {hits} with an overlap")


def drawn(mix: Mix, tokenizer: Any, seed: str, seq: int) -> Iterator[str]:
    """The documents of one shard, read back from its windows, as drawn in the first and in the last part of a run."""
    for late in (False, True):
        ids, _ = windows(mix, tokenizer, seed, SHARD, seq, late)
        for row in tokenizer.batch_decode(ids):
            yield from (doc for doc in row.replace(PAD, "").split(EOS) if doc)


if __name__ == "__main__":
    main()
