"""BLEU of inputs whose relations the base was pretrained on, and of those with a relation that it never saw.

    python by_relation.py OUTPUTS.jsonl [...]

In: files that `measure.py --outputs` wrote, of data whose inputs are triples. Their names
say what was measured: files of one method and rate (the part behind the first dash) are scored together. Out: a table with
sacrebleu of the inputs all of whose relation names stand in relations.tsv and of the others, for each number of triples, since the
others have more of them, and for all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measure import bleu
from overlap import relation_names, triples

SIZES = [("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4", 4, 4), ("5 or more", 5, 99), ("all", 1, 99)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    known = relation_names()
    methods: dict[str, list[Path]] = {}
    for file in args.files:
        methods.setdefault(file.stem.partition("-")[2] or file.stem, []).append(file)
    table = ["| outputs | triples | all relations in relations.tsv | at least one is not |", "|---|---|---|---|"]
    for method, files in methods.items():
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        facts = [triples(row["input"]) for row in rows]
        if not all(facts):
            parser.error(f"{method}: an input there is not a list of triples")
        for label, least, most in SIZES:
            cells = []
            for inside in (True, False):
                chosen = [
                    row
                    for row, fact in zip(rows, facts, strict=True)
                    if least <= len(fact) <= most and all(relation in known for _, relation, _ in fact) == inside
                ]
                score = f"{bleu([row['output'] for row in chosen], chosen):.1f} ({len(chosen)} inputs)" if chosen else "–"
                cells.append(score)
            table.append(f"| {method}, {len(files)} files | {label} | {' | '.join(cells)} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
