"""BLEU of inputs whose relations the base was pretrained on, and of those with a relation that it never saw.

    python by_relation.py OUTPUTS.jsonl [...]

In: files that `measure.py --outputs` wrote, of data whose inputs are triples. Their names
say what was measured: files of one method and rate (the part behind the first dash) are scored together. Out: a table with
sacrebleu of the inputs all of whose relation names stand in relations.tsv, of the others, and of all, with their mean number of triples.
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
    table = ["| outputs | all relations in relations.tsv | at least one is not | all |", "|---|---|---|---|"]
    for method, files in methods.items():
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        facts = [triples(row["input"]) for row in rows]
        if not all(facts):
            parser.error(f"{method}: an input there is not a list of triples")
        inside = [all(relation in known for _, relation, _ in fact) for fact in facts]
        cells = []
        for part in (True,), (False,), (True, False):
            chosen = [i for i, is_inside in enumerate(inside) if is_inside in part]
            if not chosen:
                cells.append("–")
                continue
            score = bleu([rows[i]["output"] for i in chosen], [rows[i] for i in chosen])
            size = sum(len(facts[i]) for i in chosen) / len(chosen)
            cells.append(f"{score:.1f} ({len(chosen)} inputs, {size:.1f} triples each)")
        table.append(f"| {method}, {len(files)} files | {' | '.join(cells)} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
