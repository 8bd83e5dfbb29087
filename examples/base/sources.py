"""What the embedded base's text comes from: openly licensed public repositories, read into one compact file.

    python sources.py SOURCES --out material.json.xz

In: a folder of git clones named as in `COMMITS` (work trees or bare), of which the commits named there are read with git itself,
whatever is checked out, and WordNet's data files with the digests in `WORDNET`. What is missing or another version is refused, with
the commands that bring it. Out: a `Material`: sentences, dialogues, acts, records and lists of names, without markup. `Material.read`
takes the folder or the compact file, so a machine without the clones can train too. Knows nothing about tasks, tokenisation or training.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import lzma
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_BLOB = 4 * 1024 * 1024  # larger files of the sources are left out, so that every copy of a source gives the same mix


# The repository and the commit that the released weights were made from, by the clone's folder.
COMMITS = {
    "RNNLG": ("shawnwun/RNNLG", "61ac6fd1304c9dcf29ea894452e685652718f6f8"),
    "slug2slug": ("jjuraska/slug2slug", "3a1629a05ad6204aac07c24c6250b06311bc28b2"),
    "alex_context_nlg_dataset": ("UFAL-DSG/alex_context_nlg_dataset", "1151088dc00d9e2e07ae5f8388882fc0691b63a0"),
    "nlu-benchmark": ("sonos/nlu-benchmark", "b86ac7f1577868c42158d0dec77db50956046696"),
    "dstc8-schema-guided-dialogue": (
        "google-research-datasets/dstc8-schema-guided-dialogue",
        "e852981ae34990f4358979625854259302feaa78",
    ),
    "Taskmaster": ("google-research-datasets/Taskmaster", "d92cb6af3005f1dc09c39e75e7daf4a04905e00b"),
    "wiki-split": ("google-research-datasets/wiki-split", "80f5bddf42d1a68201b7b107ee4b8d86d82e9fde"),
    "gap-coreference": ("google-research-datasets/gap-coreference", "83135f26025cdd705c04f77e940d0c9201116b80"),
    "FewRel": ("thunlp/FewRel", "278a2315d2138810a379cd8d5718914dc56e2582"),
    "QED": ("google-research-datasets/QED", "2492920337122918bbfc7d12c1268b9af796c6cf"),
    "osbooks-life-liberty-and-pursuit-happiness": (
        "openstax/osbooks-life-liberty-and-pursuit-happiness",
        "acb6fbe2744dd112187b6aff5946cfe969410fca",
    ),
    "osbooks-introduction-anthropology": (
        "openstax/osbooks-introduction-anthropology",
        "418eedd9bef21ec1a6fa1b472c0d82c084e35c70",
    ),
    "digitalgov.gov": ("GSA/digitalgov.gov", "4979583206d90ff1707b097454a9b169ca9e95e4"),
    "18f.gsa.gov": ("18F/18f.gsa.gov", "0a55c75e6d9bc71c80136a3867dac52356177443"),
    "arthur-conan-doyle_the-adventures-of-sherlock-holmes": (
        "standardebooks/arthur-conan-doyle_the-adventures-of-sherlock-holmes",
        "23b2b6e0aa1350aaccaac91e1d0fe3bb6ed4c81f",
    ),
    "p-g-wodehouse_love-among-the-chickens": (
        "standardebooks/p-g-wodehouse_love-among-the-chickens",
        "225f938a7eea9b3fa721065cf04917f253733285",
    ),
    "factbook.json": ("factbook/factbook.json", "8662a8b17a784841ab4528631b04090eb2f183eb"),
    "corpora": ("dariusk/corpora", "cf30ca27ab176b63623af1ddcfa2447ac07305ba"),
}
# sha256 of the files of WordNet 3.0, as in Debian's package wordnet-base 1:3.0-37.
WORDNET = {
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
}


def missing(sources: Path) -> list[str]:
    """What of `COMMITS` and `WORDNET` is not in the folder: for each a line that says so and a line of shell that brings it."""
    out = []
    for name, (repository, commit) in COMMITS.items():
        found = subprocess.run(["git", "-C", str(sources / name), "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
        if found.returncode == 0:
            continue
        folder = shlex.quote(str(sources / name))
        out.append(
            f"# {name}: {'another version, without' if (sources / name).exists() else 'no repository with'} commit {commit}"
        )
        out.append(f"git init -q {folder} && git -C {folder} fetch --depth 1 https://github.com/{repository} {commit}")
    for name, digest in WORDNET.items():
        file = sources / "wordnet" / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            where = shlex.quote(str(sources / "wordnet"))
            out.append(f"# {file}: {'another version' if file.is_file() else 'not there'}; data.* of WordNet 3.0 belong there")
            out.append(f"apt-get download wordnet-base && dpkg-deb -x wordnet-base_*3.0-37_all.deb {where} && "
                       f"mv {where}/usr/share/wordnet/data.* {where}")  # fmt: skip
            break
    return out


def blobs(repo: Path, prefix: str, suffix: str) -> Iterator[tuple[str, str]]:
    """(path, text) of the files of a clone's commit below `prefix` that end in `suffix`, in the order of their paths."""
    commit = COMMITS[repo.name][1]
    listing = subprocess.run(
        ["git", "-C", str(repo), "ls-tree", "-r", "-l", commit], check=True, capture_output=True, text=True
    ).stdout
    for line in sorted(listing.splitlines(), key=lambda row: row.split("\t", 1)[1]):
        head, path = line.split("\t", 1)
        size = head.split()[3]
        if path.startswith(prefix) and path.endswith(suffix) and size.isdigit() and int(size) < MAX_BLOB:
            out = subprocess.run(["git", "-C", str(repo), "show", f"{commit}:{path}"], capture_output=True)
            if out.returncode == 0:
                yield path, out.stdout.decode("utf-8", "replace")


def blob(repo: Path, path: str) -> str:
    """The text of one file of a clone's commit."""
    commit = COMMITS[repo.name][1]
    return subprocess.run(["git", "-C", str(repo), "show", f"{commit}:{path}"], check=True, capture_output=True).stdout.decode()


def detokenise(text: str) -> str:
    """Undo the spaces that tokenised corpora put around punctuation."""
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r"(\w) - (\w)", r"\1-\2", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return re.sub(r"\s+", " ", text).strip()


def sentence_case(text: str) -> str:
    """Capital at the start and a full stop at the end."""
    text = text.strip()
    text = re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)
    text = re.sub(r"\bi\b", "I", text)
    return text if text.endswith((".", "!", "?")) else text + "."


def read_wiki(sources: Path) -> list[tuple[str, list[str]]]:
    """WikiSplit's small files and GAP: (sentence, [its simpler sentences]); GAP's have themselves only."""
    out: list[tuple[str, list[str]]] = []
    for _, text in blobs(sources / "wiki-split", "", ".tsv"):
        for line in text.splitlines():
            if "\t" in line and "<::::>" in line:
                whole, parts = line.split("\t")[:2]
                out.append((detokenise(whole), [detokenise(p) for p in parts.split("<::::>")]))
    for _, text in blobs(sources / "gap-coreference", "gap-", ".tsv"):
        for row in csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
            for sent in re.split(r"(?<=[a-z)][.!?]) (?=[A-Z])", detokenise(row["Text"])):
                if 40 < len(sent) < 300:
                    out.append((sent, [sent]))
    return out


def read_fewrel(sources: Path) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """FewRel's Wikipedia sentences as (sentence, head, relation, tail), and the names of some 740 relations."""
    repo = sources / "FewRel"
    names = {pid: name for pid, (name, _) in json.loads(blob(repo, "data/pid2name.json")).items()}
    out = []
    for pid, rows in json.loads(blob(repo, "data/val_wiki.json")).items():
        for row in rows:
            tokens = row["tokens"]
            head, tail = (detokenise(" ".join(tokens[i] for i in row[end][2][0])) for end in "ht")
            out.append((detokenise(" ".join(tokens)), head, names.get(pid, pid), tail))
    return out, sorted(n for n in names.values() if len(n) < 40)


def read_rnnlg(sources: Path) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """RNNLG's dialogue acts: (act, [(slot, value)], [texts])."""
    out = []
    for path, text in blobs(sources / "RNNLG", "data/original/", ".json"):
        domain = path.split("/")[2]
        body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        for da, *texts in json.loads(body):
            match = re.match(r"(\??\w+)\((.*)\)$", da)
            if not match:
                continue
            slots = []
            for item in match[2].split(";"):
                if "=" in item:
                    key, value = item.split("=", 1)
                    slots.append((key, value.strip("'\"")))
            if slots:
                out.append((f"{match[1].strip('?')} {domain}", slots, texts))
    return out


@dataclass
class Turn:
    """One turn of a schema-guided dialogue."""

    speaker: str
    text: str
    acts: list[tuple[str, str, str]]  # act, slot, value
    spans: list[str]


def read_sgd(sources: Path) -> list[tuple[str, list[Turn]]]:
    """Schema-guided dialogues as (service, turns)."""
    out = []
    repo = sources / "dstc8-schema-guided-dialogue"
    for part in ("train/", "dev/", "test/"):
        for _, text in blobs(repo, part + "dialogues", ".json"):
            for dialogue in json.loads(text):
                turns = []
                for turn in dialogue["turns"]:
                    acts, spans = [], []
                    for frame in turn["frames"]:
                        for action in frame["actions"]:
                            acts.append((action["act"], action["slot"], ", ".join(action["values"])))
                        spans += [turn["utterance"][s["start"] : s["exclusive_end"]] for s in frame["slots"] if "start" in s]
                    turns.append(Turn(turn["speaker"], turn["utterance"], acts, spans))
                out.append((dialogue["services"][0].split("_")[0], turns))
    return out


def read_taskmaster(sources: Path) -> list[tuple[list[tuple[str, str]], str]]:
    """Taskmaster-3: (values of the API's answers, what the agent then said)."""
    out = []
    for _, text in blobs(sources / "Taskmaster", "TM-3-2020/splits/train/", ".tsv"):
        for line in text.splitlines():
            cells = line.split("\t")
            if len(cells) < 2 or not cells[1].startswith("[A]"):
                continue
            said = cells[1][3:].strip()
            slots = [
                (name, value.strip())
                for name, value in re.findall(r"<P?R?AN>([\w.]+)<P?R?AV>([^<]+)", cells[0])
                if value.strip().lower() in said.lower()
            ]
            slots = list(dict.fromkeys((n.split(".")[0], v) for n, v in slots))
            if slots:
                out.append((slots, said))
    return out


def read_drive_through(sources: Path) -> list[list[tuple[str, str]]]:
    """Taskmaster-4: orders at a counter as [(speaker, text)]."""
    out = []
    for _, text in blobs(sources / "Taskmaster", "TM-4-2024/data/", ".json"):
        for dialogue in json.loads(text):
            turns = [(u["speaker"].capitalize(), u["text"].strip()) for u in dialogue["utterances"] if u["text"].strip()]
            if len(turns) > 1:
                out.append(turns)
    return out


def read_games(sources: Path) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """ViGGO: (act, [(slot, value)], [text]) about video games. No other data set of that repository is read."""
    out = []
    for part in ("train", "valid", "test"):
        path = f"data/video_game/{part}.csv"
        for row in csv.DictReader(io.StringIO(blob(sources / "slug2slug", path))):
            match = re.match(r"(\w+)\((.*)\)$", row["mr"].strip())
            if match:
                slots = [(k, v) for k, v in re.findall(r"(\w+)(?:\[([^\]]*)\])?", match[2]) if v]
                if slots:
                    out.append((match[1].replace("_", " ") + " game", slots, [row["ref"]]))
    return out


def read_transport(sources: Path) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """Alex: what a timetable service answers, (act, [(slot, value)], [texts])."""
    out = []
    for row in csv.DictReader(io.StringIO(blob(sources / "alex_context_nlg_dataset", "dataset.csv"))):
        slots = re.findall(r'(\w+)="([^"]*)"', row["response_da_l"])
        texts = [row[f"response_nl{i}_l"] for i in (1, 2, 3)]
        if slots and all(texts):
            out.append((row["response_da_l"].split("(")[0].replace("_", " ") + " transport", slots, texts))
    return out


def read_commands(sources: Path) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """Snips: what people ask of an assistant, (intent, [(slot, value)], [text])."""
    out = []
    for path, text in blobs(sources / "nlu-benchmark", "2017-06-custom-intent-engines/", "_full.json"):
        if "/train_" not in path:
            continue
        for intent, rows in json.loads(text).items():
            for row in rows:
                said = re.sub(r"\s+", " ", "".join(p["text"] for p in row["data"])).strip()
                slots = [(p["entity"], p["text"].strip()) for p in row["data"] if "entity" in p]
                if slots and len(said) < 160:
                    out.append((re.sub(r"(?<=[a-z])(?=[A-Z])", " ", intent).lower(), slots, [said]))
    return out


def plain_text(markup: str) -> str:
    """The words of a piece of XML, HTML or Markdown."""
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|!\[[^\]]*\]\([^)]*\)|\{:.*?\}", " ", markup, flags=re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|\[([^\]]*)\]\[[^\]]*\]", r"\1\2", text)
    text = re.sub(r"<[^>]*>", "", text)
    text = re.sub(r"[*`#]+|\b_+|_+\b", "", html.unescape(text))
    text = text.replace("\u2060", "").replace("\u2019", "'").replace("\u2018", "'").replace("\u201c", '"').replace("\u201d", '"')
    text = text.replace("\u2013", "-").replace("\u2014", " - ").replace("\xa0", " ")
    return re.sub(r"\s+", " ", text).strip()


def is_prose(text: str) -> bool:
    """Whether a paragraph looks like English sentences."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return 60 < len(text) < 2400 and letters > 0.88 * len(text) and text[-1] in ".!?\"'" and "http" not in text


def read_prose(sources: Path) -> list[tuple[str, list[str]]]:
    """Texts as (title, paragraphs): two textbooks, two public bodies' articles, two novels."""
    out = []
    for repo in ("osbooks-life-liberty-and-pursuit-happiness", "osbooks-introduction-anthropology"):
        for _, text in blobs(sources / repo, "modules/", ".cnxml"):
            title = plain_text((re.search(r"<title>(.*?)</title>", text, re.S) or ["", ""])[1])
            out.append((title, [plain_text(p) for p in re.findall(r"<para[^>]*>(.*?)</para>", text, re.S)]))
    for repo, under in (("18f.gsa.gov", "content/posts/"), ("digitalgov.gov", "content/")):
        for _, text in blobs(sources / repo, under, ".md"):
            title = (re.search(r"^title: *['\"]?(.*?)['\"]?$", text, re.M) or ["", ""])[1]
            body = re.sub(r"\A---.*?\n---\n|^```.*?^```", "", text, flags=re.S | re.M)
            out.append((plain_text(title), [plain_text(p) for p in re.split(r"\n\s*\n|\n\s*[*-] ", body)]))
    for repo in ("arthur-conan-doyle_the-adventures-of-sherlock-holmes", "p-g-wodehouse_love-among-the-chickens"):
        for _, text in blobs(sources / repo, "src/epub/text/", ".xhtml"):
            paragraphs = [plain_text(p) for p in re.findall(r"<p>(.*?)</p>", text, re.S)]
            runs = [" ".join(paragraphs[i : i + 3]) for i in range(0, len(paragraphs), 3)]
            out.append(("", runs))
    kept = [(title, [p for p in paragraphs if is_prose(p)]) for title, paragraphs in out]
    return [(title, paragraphs) for title, paragraphs in kept if paragraphs]


def read_countries(sources: Path) -> list[tuple[str, str, str]]:
    """The World Factbook: (country, field, text)."""
    out = []
    for path, text in blobs(sources / "factbook.json", "", ".json"):
        fields = json.loads(text)
        if path.startswith("meta") or "Government" not in fields:
            continue
        names = fields["Government"].get("Country name", {})
        name = plain_text(names.get("conventional short form", {}).get("text", ""))
        for part in fields.values():
            for field, value in part.items():
                said = plain_text(re.sub(r"<br\s*/?>", " ", value.get("text", ""))) if isinstance(value, dict) else ""
                if name and name != "none" and 30 < len(said) < 1200:
                    out.append((name, field, said))
    return out


def read_glosses(sources: Path) -> list[tuple[str, str, str, str]]:
    """WordNet: (word, part of speech, definition, example or nothing)."""
    out = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (sources / "wordnet" / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" ") or "|" not in line:
                continue
            left, gloss = line.split("|", 1)
            pieces = [p.strip() for p in gloss.split(";")]
            examples = [p.strip('"') for p in pieces if p.startswith('"') and p.endswith('"') and len(p) > 12]
            meaning = "; ".join(p for p in pieces if not p.startswith('"'))
            word = re.sub(r"\(.*?\)", "", left.split()[4]).replace("_", " ")
            if meaning and len(meaning) < 200:
                out.append(
                    (word, {"adj": "adjective", "adv": "adverb"}.get(part, part), meaning, examples[0] if examples else "")
                )
    return out


def read_questions(sources: Path) -> list[tuple[str, str, str]]:
    """QED: (question, answer, Wikipedia paragraph)."""
    out = []
    for line in blob(sources / "QED", "qed-dev.jsonlines").splitlines():
        row = json.loads(line)
        answers = [a["string"] for group in row["original_nq_answers"] for a in group]
        if answers and len(row["paragraph_text"]) < 900:
            out.append((row["question_text"].strip() + "?", detokenise(answers[0]), detokenise(row["paragraph_text"])))
    return out


LISTS = {
    "first": ["humans/firstNames:firstNames"],
    "last": [
        "humans/lastNames:lastNames", "humans/norwayLastNames:lastnames_norwegian", "humans/spanishLastNames:lastNames",
        "humans/authors:authors",
    ],
    "cities": ["geography/us_cities:cities", "geography/english_towns_cities:towns"],
    "nationalities": ["geography/nationalities:nationalities"],
    "jobs": ["humans/occupations:occupations"],
    "dishes": ["foods/menuItems:menuItems"],
    "foods": ["foods/fruits:fruits", "foods/pizzaToppings:pizzaToppings"],
    "adjectives": ["words/adjs:adjs"],
    "nouns": ["words/nouns:nouns"],
    "genres": ["music/genres:genres"],
    "rivers": ["geography/rivers:rivers"],
}  # fmt: skip


def read_lists(sources: Path) -> dict[str, list[str]]:
    """The lists of names and words of the `corpora` repository that the grammar draws from."""
    repo = sources / "corpora"
    out: dict[str, list[str]] = {}
    for name, places in LISTS.items():
        out[name] = []
        for place in places:
            path, key = place.split(":")
            for item in json.loads(blob(repo, f"data/{path}.json"))[key]:
                out[name].append(item if isinstance(item, str) else next(iter(item.values())))
    pairs = json.loads(blob(repo, "data/geography/countries_with_capitals.json"))["countries"]
    out["countries"] = [p["name"] for p in pairs]
    out["cities"] += [p["capital"] for p in pairs]
    out["states"] = sorted({c["state"] for c in json.loads(blob(repo, "data/geography/us_cities.json"))["cities"]})
    return out


# ---------------------------------------------------------------------------------------------------------------- material


@dataclass
class Material:
    """Everything that is read, by source. Tuples become lists when it is written and read again."""

    wiki: list[tuple[str, list[str]]]
    fewrel: list[tuple[str, str, str, str]]
    relation_names: list[str]
    acts: list[tuple[str, list[tuple[str, str]], list[str]]]
    sgd: list[tuple[str, list[Turn]]]
    taskmaster: list[tuple[list[tuple[str, str]], str]]
    drive_through: list[list[tuple[str, str]]]
    prose: list[tuple[str, list[str]]]
    countries: list[tuple[str, str, str]]
    glosses: list[tuple[str, str, str, str]]
    questions: list[tuple[str, str, str]]
    lists: dict[str, list[str]]

    @classmethod
    def read(cls, place: Path) -> Material:
        """From a folder of clones, or from the compact file that `write` made. Raises ValueError where a source is not as it was."""
        if place.is_file():
            with lzma.open(place, "rt", encoding="utf-8") as file:
                fields: dict[str, Any] = json.load(file)
            fields["sgd"] = [(service, [Turn(*turn) for turn in turns]) for service, turns in fields["sgd"]]
            return cls(**fields)
        if lines := missing(place):
            raise ValueError(
                "sources are missing, or are other versions than the base was made from. What brings them:\n" + "\n".join(lines)
            )
        fewrel, relation_names = read_fewrel(place)
        acts: list[Callable[[Path], list[tuple[str, list[tuple[str, str]], list[str]]]]] = [
            read_rnnlg, read_games, read_transport, read_commands,
        ]  # fmt: skip
        return cls(
            wiki=read_wiki(place),
            fewrel=fewrel,
            relation_names=relation_names,
            acts=[act for read in acts for act in read(place)],
            sgd=read_sgd(place),
            taskmaster=read_taskmaster(place),
            drive_through=read_drive_through(place),
            prose=read_prose(place),
            countries=read_countries(place),
            glosses=read_glosses(place),
            questions=read_questions(place),
            lists=read_lists(place),
        )

    def write(self, file: Path) -> None:
        """As compressed JSON."""
        fields = asdict(self)
        fields["sgd"] = [(service, [(t.speaker, t.text, t.acts, t.spans) for t in turns]) for service, turns in self.sgd]
        with lzma.open(file, "wt", encoding="utf-8", preset=6) as out:
            json.dump(fields, out, ensure_ascii=False, separators=(",", ":"))

    def texts(self) -> Iterator[tuple[str, str]]:
        """(source, text) of everything that reads as text, for the card and the search for overlaps."""
        for whole, parts in self.wiki:
            yield from (("wiki", s) for s in (whole, *parts))
        yield from (("fewrel", row[0]) for row in self.fewrel)
        for act, slots, texts in self.acts:
            yield from (("acts: " + act.split()[-1], s) for s in (*texts, " ".join(f"{k} {v}" for k, v in slots)))
        for _, turns in self.sgd:
            yield "sgd", " ".join(t.text for t in turns)
        yield from (("taskmaster-3", said) for _, said in self.taskmaster)
        yield from (("taskmaster-4", " ".join(text for _, text in turns)) for turns in self.drive_through)
        for title, paragraphs in self.prose:
            yield from (("prose", text) for text in (title, *paragraphs))
        yield from (("factbook", f"{field} {text}") for _, field, text in self.countries)
        yield from (("wordnet", f"{meaning} {example}") for _, _, meaning, example in self.glosses)
        yield from (("qed", f"{question} {paragraph}") for question, _, paragraph in self.questions)

    def sizes(self) -> dict[str, dict[str, int]]:
        """Texts and characters of every source, for the card."""
        out: dict[str, dict[str, int]] = {}
        for name, text in self.texts():
            row = out.setdefault(name, {"texts": 0, "characters": 0})
            row["texts"] += 1
            row["characters"] += len(text)
        return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="compact file to write, material.json.xz")
    args = parser.parse_args()
    try:
        material = Material.read(args.sources)
    except ValueError as error:
        raise SystemExit(f"sources.py: {error}") from None
    material.write(args.out)
    for name, row in material.sizes().items():
        print(f"{name}: {row['texts']:,} texts, {row['characters']:,} characters")


if __name__ == "__main__":
    main()
