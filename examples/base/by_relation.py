"""BLEU of inputs whose relations the base was pretrained on, and of those with a relation that it never saw.

    python by_relation.py OUTPUTS.jsonl [...]

In: files that `measure.py --outputs` wrote, of data whose inputs are triples. Their names
say what was measured: files of one method and rate (the part behind the first dash) are scored together. Out: a table with
sacrebleu of the inputs all of whose relation names stand in relations.tsv, of the others, and of all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measure import bleu
from overlap import relation_names, triples


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    known = relation_names()
    methods: dict[str, list[Path]] = {}
    for file in args.files:
        methods.setdefault(file.stem.partition("-")[2] or file.stem, []).append(file)
    print("| outputs | all relations in relations.tsv | at least one is not | all |\n|---|---|---|---|")
    for method, files in methods.items():
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        if not all(triples(row["input"]) for row in rows):
            parser.error(f"{method}: an input there is not a list of triples")
        inside = [all(relation in known for _, relation, _ in triples(row["input"])) for row in rows]
        cells = []
        for part in (True, False), (True,), (False,):
            chosen = [row for row, is_inside in zip(rows, inside, strict=True) if is_inside in part]
            score = f"{bleu([row['output'] for row in chosen], chosen):.1f}" if chosen else "–"
            cells.append(f"{score} ({len(chosen)} inputs)")
        print(f"| {method}, {len(files)} files | {cells[1]} | {cells[2]} | {cells[0]} |")


if __name__ == "__main__":
    main()
