"""The data mix of the embedded base: documents of the shape ``input, newline, target, end of text``.

In: a folder of git clones of the public repositories named in README.md (work trees or bare), read with git itself, and
`relations.tsv`, the project's own grammar of relations. Out: an endless, seeded stream of `Doc`. Knows nothing about
tokenisation, windows or training. Everything random comes from the `random.Random` handed in: a shard is a function of its seed.

Names and values are drawn anew for every document, from lists, from Wikipedia sentences and from a letter-trigram
generator: a model can only get them right by copying them from the input, which is what the mix is meant to teach.
"""

from __future__ import annotations

import calendar
import csv
import io
import itertools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

MAX_BLOB = 4 * 1024 * 1024  # larger files of the sources are left out, so that every copy of a source gives the same mix


@dataclass
class Doc:
    """One document. `target` ends the document; an empty `input` means plain text."""

    input: str
    target: str
    source: str


# ---------------------------------------------------------------------------------------------------------------- sources


def blobs(repo: Path, prefix: str, suffix: str) -> Iterator[tuple[str, str]]:
    """(path, text) of the files of a clone's HEAD below `prefix` that end in `suffix`, in the order of their paths."""
    listing = subprocess.run(
        ["git", "-C", str(repo), "ls-tree", "-r", "-l", "HEAD"], check=True, capture_output=True, text=True
    ).stdout
    for line in sorted(listing.splitlines(), key=lambda row: row.split("\t", 1)[1]):
        head, path = line.split("\t", 1)
        size = head.split()[3]
        if path.startswith(prefix) and path.endswith(suffix) and size.isdigit() and int(size) < MAX_BLOB:
            out = subprocess.run(["git", "-C", str(repo), "show", f"HEAD:{path}"], capture_output=True)
            if out.returncode == 0:
                yield path, out.stdout.decode("utf-8", "replace")


def blob(repo: Path, path: str) -> str:
    """The text of one file of a clone's HEAD."""
    return subprocess.run(["git", "-C", str(repo), "show", f"HEAD:{path}"], check=True, capture_output=True).stdout.decode()


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


# ------------------------------------------------------------------------------------------------------------------ names


class Trigrams:
    """Invents words that look like those it was given."""

    def __init__(self, words: list[str]) -> None:
        """Count what follows each pair of letters."""
        self.next: dict[str, list[str]] = {}
        for word in words:
            padded = "^^" + word.lower() + "$"
            for i in range(len(padded) - 2):
                self.next.setdefault(padded[i : i + 2], []).append(padded[i + 2])

    def word(self, rng: Random) -> str:
        """A capitalised word of 4 to 11 letters."""
        while True:
            out = "^^"
            while not out.endswith("$") and len(out) < 14:
                out += rng.choice(self.next[out[-2:]])
            word = out[2:].rstrip("$")
            if 3 < len(word) < 12 and word.isalpha():
                return word.capitalize()


MONTHS = list(calendar.month_name)[1:]


@dataclass
class Value:
    """An entity or a value: how the input writes it, how the text may write it, and fillers for the grammar's slots."""

    raw: str
    text: str
    fill: dict[str, str]


def read_values() -> dict[str, list[str]]:
    """The fixed lists of values at the end of relations.tsv, by type code."""
    lines = (Path(__file__).parent / "relations.tsv").read_text(encoding="utf-8").splitlines()
    return {line[2:].split("\t")[0]: line.split("\t")[1].split("|") for line in lines if line.startswith("= ")}


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


class Names:
    """Draws entities and values by the type codes of relations.tsv."""

    def __init__(self, sources: Path, harvested: list[str]) -> None:
        """Read the lists of the `corpora` repository."""
        repo = sources / "corpora"

        def words(path: str, key: str) -> list[str]:
            items = json.loads(blob(repo, f"data/{path}.json"))[key]
            return [i if isinstance(i, str) else next(iter(i.values())) for i in items]

        self.first = words("humans/firstNames", "firstNames")
        self.last = words("humans/lastNames", "lastNames") + words("humans/norwayLastNames", "lastnames_norwegian")
        self.last += words("humans/spanishLastNames", "lastNames") + words("humans/authors", "authors")
        self.cities = words("geography/us_cities", "cities") + words("geography/english_towns_cities", "towns")
        pairs = json.loads(blob(repo, "data/geography/countries_with_capitals.json"))["countries"]
        self.countries = [p["name"] for p in pairs]
        self.cities += [p["capital"] for p in pairs]
        self.states = sorted({c["state"] for c in json.loads(blob(repo, "data/geography/us_cities.json"))["cities"]})
        self.nationalities = words("geography/nationalities", "nationalities")
        self.jobs = [j for j in words("humans/occupations", "occupations") if len(j) < 28]
        self.dishes = [d for d in words("foods/menuItems", "menuItems") if len(d) < 30]
        self.foods = words("foods/fruits", "fruits") + words("foods/pizzaToppings", "pizzaToppings")
        self.adjectives = [w for w in words("words/adjs", "adjs") if w.islower()]
        self.nouns = [w for w in words("words/nouns", "nouns") if w.islower()]
        self.genres = words("music/genres", "genres")
        self.rivers = words("geography/rivers", "rivers")
        self.harvested = harvested
        self.fixed = read_values()
        self.fixed["LANG"] = [n for n in self.nationalities if n.endswith(("ish", "ese", "ian"))]
        self.fixed["NATS"] = [n + "s" if n.endswith("an") else n for n in self.nationalities]
        self.fixed["OCC"] = self.jobs + self.fixed["OCC"]
        self.fixed["GENRE"] = self.genres + self.fixed["GENRE"]
        self.person_words = Trigrams(self.last + self.first)
        self.place_words = Trigrams([c for c in self.cities if " " not in c])

    def person(self, rng: Random) -> str:
        """A person's name."""
        first = rng.choice(self.first) if rng.random() < 0.7 else self.person_words.word(rng)
        last = rng.choice(self.last) if rng.random() < 0.5 else self.person_words.word(rng)
        middle = rng.choice(
            ["", "", "", "", " " + rng.choice("ABCDEFGHJKLMRSTW") + ".", " " + rng.choice(self.last), " de", " van"]
        )
        return f"{first}{middle} {last}"

    def place(self, rng: Random) -> str:
        """A town."""
        name = rng.choice(self.cities) if rng.random() < 0.5 else self.place_words.word(rng)
        return name + (", " + rng.choice(self.states + self.countries) if rng.random() < 0.2 else "")

    def title(self, rng: Random) -> str:
        """A name made of common words, as pubs, books and albums have."""
        adjective, noun, other = (
            rng.choice(self.adjectives).title(),
            rng.choice(self.nouns).title(),
            rng.choice(self.nouns).title(),
        )
        word = self.person_words.word(rng)
        return rng.choice(
            [
                f"The {adjective} {noun}",
                f"The {noun}",
                f"{adjective} {noun}",
                f"{noun} and {other}",
                f"The {noun} of {word}",
                word,
                f"The {word}",
                f"{word}'s {noun}",
                f"{noun} {other}",
                f"{adjective} {noun} {rng.randint(2, 9)}",
            ]
        )

    def name(self, kind: str, rng: Random) -> str:
        """An entity's name by its kind."""
        r = rng
        if r.random() < 0.15 and kind in "OBWVSREC":
            return r.choice(self.harvested)
        word = self.place_words.word(r) if r.random() < 0.6 else self.person_words.word(r)
        if kind in ("P",):
            return self.person(r)
        if kind == "C":
            return self.place(r)
        if kind == "REG":
            return r.choice(
                [r.choice(self.states), word + " County", word + " Province", "Province of " + word, word, word + " Region"]
            )
        if kind == "K":
            return r.choice(self.countries) if r.random() < 0.85 else word + "ia"
        if kind == "O":
            n = r.choice(self.nouns).title()
            return r.choice(
                [
                    word + " Group",
                    f"{word} & {self.person_words.word(r)}",
                    word,
                    f"{word} {n}s",
                    f"{n} Corporation",
                    f"{self.place(r)} {n} Agency",
                    f"{word} Press",
                    f"{word} Records",
                    f"{r.choice(self.last)} Media",
                    f"{word} Airlines",
                    f"{r.choice(self.countries)} {n} Association",
                    f"Ministry of {n} ({r.choice(self.countries)})",
                    f"{word} Inc.",
                ]
            )
        if kind == "U":
            return r.choice(
                [
                    f"University of {self.place(r)}",
                    f"{word} University",
                    f"{word} Institute of {r.choice(self.nouns).title()}",
                    f"{word} College",
                    f"School of {r.choice(self.nouns).title()}, {word}",
                    f"{word} State University",
                ]
            )
        if kind == "A":
            return r.choice(
                [
                    f"{word} International Airport",
                    f"{word} Regional Airport",
                    f"{word} Airport",
                    f"{self.place(r)} Airfield",
                    f"{word} Air Base",
                    f"{self.person(r)} Airport",
                ]
            )
        if kind == "B":
            return r.choice(
                [
                    f"{word} Tower",
                    f"{word} Hall",
                    f"{word} House",
                    f"{word} Museum of Art",
                    f"{r.randint(2, 900)} {word} Street",
                    f"Monument to {word}",
                    f"{word} Stadium",
                    f"{word} Library",
                    f"{word} Memorial",
                    f"{word} Bridge",
                    f"{self.place(r)} Town Hall",
                    f"{word} Building",
                    f"{word} Plaza",
                    f"{word} Castle",
                    f"{self.last and r.choice(self.last)} Arena",
                ]
            )
        if kind == "T":
            return r.choice(
                [
                    f"{self.place(r)} United F.C.",
                    f"FC {word}",
                    f"{word} City",
                    f"{word} {r.choice(self.nouns).title()}s",
                    f"A.C. {word}",
                    f"{word} Rovers",
                    f"S.S. {word} Calcio",
                    f"{word} S.C.",
                    f"Real {word}",
                    f"{word} F.C.",
                ]
            )
        if kind == "F":
            return r.choice(
                [
                    r.choice(self.dishes).title(),
                    word,
                    word + " " + r.choice(self.foods),
                    word.lower() + " " + r.choice(["soup", "pie", "rice", "stew"]),
                    f"{r.choice(self.foods).title()} {r.choice(['pudding', 'curry', 'salad', 'roll', 'sandwich', 'cake'])}",
                    f"{word} goreng"[: len(word)],
                ]
            )
        if kind == "V":
            return r.choice(
                [
                    self.title(r),
                    self.title(r),
                    word,
                    f"{self.person_words.word(r)}'s",
                    f"Café {word}",
                    f"The {word} {r.choice(['Arms', 'Inn', 'Room', 'Kitchen', 'Tavern'])}",
                    f"{word} {r.choice(['Coffee', 'Grill', 'Bistro', 'Bar', 'Palace', 'Garden', 'House', 'Lounge'])}",
                ]
            )
        if kind == "H":
            return r.choice(
                [
                    f"Hotel {word}",
                    f"{word} Inn",
                    f"The {word} Hotel",
                    f"{word} Lodge",
                    f"Grand {word}",
                    f"{self.title(r)} Guest House",
                ]
            )
        if kind == "R":
            return r.choice(
                [
                    f"{word} {r.randint(2, 99)}",
                    f"{word} {r.choice(self.nouns).title()} {r.randint(1, 9)}00",
                    f"{word} Pro",
                    word,
                    f"{word} {r.choice('ABCDEFGXZ')}{r.randint(1, 99)}",
                ]
            )
        if kind == "S":
            return r.choice(
                [
                    f"{word} {r.choice('ABCDEFGXZ')}-{r.randint(1, 99)}",
                    f"USS {word}",
                    f"{word} {r.randint(100, 900)}",
                    f"{word} {r.choice('ABCDFGX')}{r.randint(1, 99)} {r.choice(self.nouns).title()}",
                ]
            )
        if kind in ("W", "WT"):
            return (
                self.title(r)
                if r.random() < 0.75
                else r.choice(
                    [f"Journal of {r.choice(self.nouns).title()}", word, f"{word} (novel)", f"{self.title(r)}: {self.title(r)}"]
                )
            )
        if kind == "N":
            return r.choice([word + "us", word + " " + r.choice(["orchid", "oak", "lily", "beetle", "frog", "moss"]), word])
        if kind == "M":
            return r.choice([self.person(r), self.title(r), word, f"The {r.choice(self.nouns).title()}s"])
        if kind == "E":
            return r.choice([f"{word} Festival", f"{r.randint(1950, 2024)} {word} Cup", f"{word} Conference", f"{word} Marathon"])
        if kind == "CH":
            return r.choice(
                [
                    word,
                    self.person(r),
                    f"Captain {word}",
                    f"{word} the {r.choice(self.adjectives).title()}",
                    f"{word} (comicsCharacter)",
                ]
            )
        if kind == "LEAGUE":
            return r.choice(
                [
                    f"{word} League",
                    f"Serie {r.choice('ABCD')}",
                    f"{r.choice(self.countries)} Premier Division",
                    f"{word} Championship",
                    f"{r.randint(1950, 2024)} {word} season",
                ]
            )
        if kind == "BATTLE":
            return r.choice([f"Battle of {word}", f"{word} War", f"Siege of {word}"])
        if kind == "MISS":
            return r.choice([f"{word} {r.randint(1, 20)}", f"STS-{r.randint(1, 140)}", f"{word} program"])
        return word

    def value(self, kind: str, rng: Random) -> Value:
        """A value of the given kind, with the ways the text may write it."""
        r = rng
        fill: dict[str, str] = {}
        if kind == "DATE":
            y, m, d = r.randint(1700, 2024), r.randint(1, 12), r.randint(1, 28)
            raw = r.choice(
                [f"{y}-{m:02}-{d:02}", f"{y}-{m:02}-{d:02}", f"{d} {MONTHS[m - 1]} {y}", str(y), f"{MONTHS[m - 1]} {y}"]
            )
            text = raw
            if raw[4:5] == "-":
                nth = f"{d}{'th' if 10 < d < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(d % 10, 'th')}"
                text = r.choice(
                    [
                        f"{MONTHS[m - 1]} {d}, {y}",
                        f"{d} {MONTHS[m - 1]} {y}",
                        f"{MONTHS[m - 1]} {nth}, {y}",
                        f"the {nth} of {MONTHS[m - 1]} {y}",
                    ]
                )
            return Value(raw, text, fill)
        if kind in ("NUM", "NUM5", "BIG"):
            n = int(10 ** r.uniform(1.5, 7 if kind != "NUM5" else 5))
            raw = str(n)
            text = f"{n:,}" if r.random() < 0.6 and kind == "NUM" else raw
            if kind == "BIG":
                raw = r.choice([f"{n}", f"{n}.0", f"{round(r.uniform(1, 90), 1)} million dollars"])
                text = r.choice([f"{n:,} dollars", f"{n:,}"]) if raw[0] in "0123456789" and "million" not in raw else raw
            return Value(raw, text, fill)
        if kind == "DEC":
            if r.random() < 0.5:
                n = r.randint(1, 9000)
                raw, text = (f"{n}.0", r.choice([f"{n}.0", str(n), f"{n:,}"])) if r.random() < 0.6 else (str(n), str(n))
            else:
                raw = text = f"{r.uniform(0.5, 4000):.{r.choice([1, 2, 3])}f}"
            return Value(raw, text, fill)
        if kind == "YEAR":
            raw = str(r.randint(1400, 2024))
            return Value(raw, raw, fill)
        if kind in ("SMALL", "SMALL3"):
            raw = str(r.randint(2, 90) if kind == "SMALL" else r.randint(40, 1200))
            return Value(raw, raw, fill)
        if kind == "FOODS":
            items = r.sample(self.foods, r.choice([1, 1, 1, 2, 3, 4]))
            listed = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
            return Value(", ".join(items), listed, fill)
        if kind in ("FAM", "DOG", "FEAT"):
            yes = r.random() < 0.55
            raw = r.choice(["yes", "true", "Yes"] if yes else ["no", "false", "No"])
            topic = {
                "FAM": r.choice(["family friendly", "child friendly", "kid friendly", "family-friendly", "child-friendly"]),
                "DOG": r.choice(["dog friendly", "pet friendly"]),
                "FEAT": "",
            }[kind]
            who = r.choice(["children", "families", "kids"]) if kind == "FAM" else "dogs"
            if kind == "FEAT":
                fill["vp"], fill["post"], fill["full"] = (
                    ("has {r}", "with {r}", "There is {r} at {s}.")
                    if yes
                    else ("has no {r}", "without {r}", "There is no {r} at {s}.")
                )
            elif yes:
                fill["vp"] = r.choice(
                    [f"is {topic}", f"welcomes {who}", f"is good for {who}", f"allows {who}", f"is a {topic} place"]
                )
                fill["post"] = r.choice([f"that is {topic}", f"which welcomes {who}", f"suitable for {who}"])
                fill["full"] = r.choice(
                    [
                        f"{{s}} is {topic}.",
                        f"Bring the {who} to {{s}}.".replace("the families", "the family"),
                        f"At {{s}}, {who} are welcome.",
                    ]
                )
                fill["adj"] = topic
            else:
                fill["vp"] = r.choice(
                    [f"is not {topic}", f"does not allow {who}", f"is not for {who}", f"isn't {topic}"]
                    + (["is for adults only"] if kind == "FAM" else [])
                )
                fill["post"] = r.choice([f"that is not {topic}", f"where no {who} are allowed"])
                fill["full"] = r.choice([f"{{s}} is not {topic}.", f"{who.capitalize()} are not welcome at {{s}}."])
                fill["adj"] = f"non {topic}"
            return Value(raw, raw, fill)
        if kind == "PRICE":
            level = r.choice(["cheap", "moderate", "high", "low", "expensive", "average", "mid-range"])
            n = r.randint(5, 60)
            if r.random() < 0.5:
                raw, np = (
                    level,
                    r.choice([f"{level} prices", f"a {level} price range"])
                    .replace("a average", "an average")
                    .replace("a expensive", "an expensive"),
                )
                fill["adj"] = {
                    "high": "expensive",
                    "low": "cheap",
                    "moderate": "moderately priced",
                    "average": "average in price",
                }.get(level, level)
            else:
                cur = r.choice("£$€")
                raw = r.choice(
                    [f"less than {cur}{n}", f"more than {cur}{n}", f"{cur}{n}-{n + 10}", f"{cur}{n}", f"under {cur}{n}"]
                )
                np = r.choice([f"prices of {raw}", f"a price range of {raw}", f"meals for {raw}", f"food that costs {raw}"])
                fill["adj"] = f"priced {raw}"
            fill["np"] = np
            return Value(raw, raw, fill)
        if kind == "RATE":
            top = r.choice([5, 5, 10])
            raw = r.choice(
                [
                    f"{r.randint(1, top)} out of {top}",
                    r.choice(["low", "average", "high", "good", "poor", "excellent"]),
                    f"{r.randint(1, 5)} stars",
                    f"{r.uniform(1, 5):.1f}",
                ]
            )
            fill["np"] = f"a customer rating of {raw}" if raw[0].isdigit() else f"{article(raw)} customer rating"
            return Value(raw, raw, fill)
        if kind in self.fixed:
            raw = r.choice(self.fixed[kind])
            fill["a"] = article(raw)
            return Value(raw, raw, fill)
        word = self.place_words.word(r)
        noun = r.choice(self.nouns)
        made: dict[str, Callable[[], str]] = {
            "UTC": lambda: r.choice("+-−") + str(r.randint(1, 12)) + ":00",
            "RIV": lambda: r.choice([r.choice(self.rivers), word + " River", "River " + word]),
            "NICK": lambda: r.choice([self.title(r), word, f"{word} {self.person_words.word(r)}", self.person(r)]),
            "AWARD": lambda: r.choice(
                [f"{word} Prize", f"{word} Medal", f"{noun.title()} Award", f"{r.choice(self.countries)} Service Medal"]
            ),
            "PARTY": lambda: r.choice(
                [
                    f"{word} Party",
                    f"{noun.title()} Party ({r.choice(self.countries)})",
                    f"{r.choice(self.adjectives).title()} Party",
                ]
            ),
            "ORGYEAR": lambda: r.choice([f"the {word} Agency in {r.randint(1950, 2024)}", f"NASA in {r.randint(1959, 2010)}"]),
            "MINS": lambda: f"{r.randint(10, 90000)}.0 minutes",
            "SEASON": lambda: r.choice(
                [
                    f"{r.randint(1960, 2024)}",
                    f"{(y := r.randint(1960, 2020))}-{(y + 1) % 100:02} {word} League",
                    f"{r.randint(1960, 2024)} {word} season",
                ]
            ),
            "RWY": lambda: f"{r.randint(1, 18):02}{r.choice(['', 'L', 'R'])}/{r.randint(19, 36)}{r.choice(['', 'L', 'R'])}",
            "CODE": lambda: "".join(r.choice("ABCDEFGHIJKLMNOPRSTUVWXYZ") for _ in range(r.choice([3, 4, 4, 5]))),
            "REFNO": lambda: r.choice(
                [
                    f"{r.randint(10**6, 10**9)}",
                    f"{r.randint(1000, 9999)}-{r.randint(1000, 9999)}",
                    f"{r.randint(0, 9)}-{r.randint(100, 999)}-{r.randint(10000, 99999)}-{r.randint(0, 9)}",
                ]
            ),
            "ADDR": lambda: f"{r.randint(1, 900)} {word} {r.choice(['Street', 'Avenue', 'Road', 'Lane', 'Boulevard'])}",
            "GROUP": lambda: (
                r.choice(["soldiers", "sailors", "the victims", "the founders", "the people"])
                + r.choice([" of " + word, " of the " + word + " War", ""])
            ),
            "GRAM": lambda: f"{r.randint(1, 900)}{r.choice(['.0', '', '.5'])} {r.choice(['g', 'kcal', 'grams'])}",
            "TAXON": lambda: word + r.choice(["aceae", "ales", "idae", "opsida", "us"]),
            "PHONE": lambda: r.choice(
                [
                    f"{r.randint(100, 999)}-{r.randint(100, 999)}-{r.randint(1000, 9999)}",
                    f"0{r.randint(100, 9999)} {r.randint(100000, 999999)}",
                ]
            ),
        }
        raw = made[kind]() if kind in made else self.name(kind, r)
        fill["a"] = article(raw)
        return Value(raw, re.sub(r" \((.*?)\)$", "", raw) if r.random() < 0.5 else raw, fill)


# ---------------------------------------------------------------------------------------------------------- linearisations


def camel(words: str) -> str:
    """`home ground` -> `homeGround`."""
    first, *rest = re.split(r"[ _-]+", words.strip()) or [words]
    return first[:1].lower() + first[1:] + "".join(w[:1].upper() + w[1:] for w in rest)


def spaced(name: str) -> str:
    """`homeGround` or `home_ground` -> `home ground`."""
    return re.sub(r"([a-z])([A-Z])", r"\1 \2", name.replace("_", " ")).lower()


INSTRUCTIONS = ["Describe:", "Write a sentence:", "Put the facts into words:", "Data to text:", "Say it in English:"]


@dataclass
class Style:
    """How one group of documents writes its inputs; drawn once for a window, so that a window can be of one style."""

    form: int
    key_case: int
    underscores: bool
    instruction: str
    voice: int

    @classmethod
    def draw(cls, rng: Random, late: bool = False) -> Style:
        """A random style; the product's own shapes are the likeliest, above all late in a run."""
        instruction = ""
        if rng.random() < (0.04 if late else 0.12):
            instruction = rng.choice(INSTRUCTIONS)
        form = 0 if late and rng.random() < 0.5 else rng.choice([0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
        voice = rng.randrange(12)
        if late and rng.random() < 0.7:
            voice = 0
        return cls(form, rng.choice([0, 0, 0, 1, 2]), rng.random() < 0.7, instruction, voice)

    def key(self, name: str) -> str:
        """A key in this style's case."""
        if self.key_case == 0 or ("_" in name and self.key_case == 1):
            return name
        return spaced(name) if self.key_case == 1 else spaced(name).replace(" ", "_")

    def head(self, text: str) -> str:
        """The input with the style's instruction, if it has one, before it."""
        return f"{self.instruction}\n{text}" if self.instruction else text

    def pairs(self, items: list[tuple[str, str]]) -> str:
        """Key-value pairs, linearised."""
        items = [(self.key(k), v) for k, v in items]
        form = self.form
        if form == 0:
            body = " | ".join(f"{k} : {v}" for k, v in items)
        elif form == 1:
            body = ", ".join(f"{k}[{v}]" for k, v in items)
        elif form == 2:
            body = json.dumps(dict(items), ensure_ascii=False)
        elif form == 3:
            body = "\n".join(f"{k}: {v}" for k, v in items)
        elif form == 4:
            body = "; ".join(f"{k}={v}" for k, v in items)
        elif form == 5:
            body = "(" + ", ".join(f"{k} = '{v}'" for k, v in items) + ")"
        else:
            body = " | ".join(f"{k}: {v}" for k, v in items)
        return self.head(body)

    def triples(self, items: list[tuple[str, str, str]]) -> str:
        """Subject-relation-object triples, linearised."""
        rows = []
        for s, rel, o in items:
            if self.underscores:
                s, o = s.replace(" ", "_"), o if o[:1].isdigit() and "_" not in o and " " in o else o.replace(" ", "_")
                if "," in o and len(o) > 25:
                    o = '"' + o.replace("_", " ") + '"'
            rows.append((s, self.key(rel), o))
        form = self.form
        if form in (0, 1, 6):
            body = " | ".join(f"{s} : {r} : {o}" for s, r, o in rows)
        elif form == 2:
            body = json.dumps([list(row) for row in rows], ensure_ascii=False)
        elif form == 3:
            body = "\n".join(f"{s} | {r} | {o}" for s, r, o in rows)
        elif form == 4:
            body = "; ".join(f"({s}, {r}, {o})" for s, r, o in rows)
        else:
            body = " && ".join(f"<S> {s} <P> {r} <O> {o}" for s, r, o in rows)
        return self.head(body)


# ---------------------------------------------------------------------------------------------------------------- grammar


@dataclass
class Relation:
    """One line of relations.tsv."""

    names: list[str]
    subjects: list[str]
    object: str
    vps: list[str]
    posts: list[str]
    wholes: list[str]


def read_relations() -> tuple[list[Relation], list[Relation]]:
    """(relations for triples, relations for attribute lists) from relations.tsv beside this file."""
    facts: list[Relation] = []
    attributes: list[Relation] = []
    into = facts
    for line in (Path(__file__).parent / "relations.tsv").read_text(encoding="utf-8").splitlines():
        if line.startswith("="):
            continue
        if line.startswith("#"):
            into = attributes if "attributes" in line else into
            continue
        names, subjects, obj, vps, posts, wholes = line.split("\t")
        into.append(Relation(names.split("/"), subjects.split(","), obj, vps.split("|"), posts.split("|"), wholes.split("|")))
    return facts, attributes


ENTITY_KINDS = {
    "C",
    "REG",
    "K",
    "P",
    "O",
    "U",
    "A",
    "B",
    "T",
    "F",
    "V",
    "H",
    "R",
    "S",
    "W",
    "N",
    "M",
    "E",
    "CH",
    "LEAGUE",
    "BATTLE",
}
PRONOUN = {
    "P": ["He", "She"],
    "M": ["He", "She", "They"],
    "CH": ["He", "She", "The character"],
    "T": ["They", "The club", "The team", "It"],
}


class Grammar:
    """Realises facts as text: whole sentences, verb phrases joined by `and`, relative clauses, pronouns, modifiers."""

    def __init__(self, names: Names) -> None:
        """Read relations.tsv."""
        self.names = names
        self.facts, self.attributes = read_relations()
        self.by_subject: dict[str, list[Relation]] = {}
        for relation in self.facts:
            for kind in relation.subjects:
                self.by_subject.setdefault(kind, []).append(relation)
        self.attributes_of: dict[str, list[Relation]] = {}
        for relation in self.attributes:
            for kind in relation.subjects:
                self.attributes_of.setdefault(kind, []).append(relation)

    @staticmethod
    def phrase(template: str, value: Value, rel: str) -> str:
        """A template with the object in it; `{s}` is left for the caller."""
        key = re.match(r"\{(?:fam|dog|feat)(vp|post|full)\}", template)
        if key:
            template = value.fill[key[1]]
        template = template.replace("{r}", re.sub(r"^has ", "", spaced(rel))).replace("{o}", value.text)
        for name, text in value.fill.items():
            template = template.replace("{" + name + "}", text)
        if "{a}" in template:
            template = template.replace("{a}", article(value.text))
        return template

    def clause(self, kind: str, facts: list[tuple[str, Value, Relation]], subject: str, rng: Random, again: bool) -> str:
        """One sentence that says the given one to three facts of a subject."""
        r = rng
        who = subject if not again else r.choice([*PRONOUN.get(kind, ["It"]), subject])
        vps = [self.phrase(r.choice(rel.vps), value, name) for name, value, rel in facts]
        if len(facts) == 1:
            if not again and r.random() < 0.4:
                name, value, rel = facts[0]
                text = self.phrase(r.choice(rel.wholes), value, name).replace("{s}", subject)
                return text[:1].upper() + text[1:]
            return self.agree(who, vps[0]) + "."
        posts = [self.phrase(r.choice(rel.posts), value, name) for name, value, rel in facts]
        which = "who" if kind in ("P", "M", "CH") else "which"
        shape = r.randrange(6)
        if shape == 0 and who == subject:
            return f"{subject}, {posts[0]}, " + self.join(vps[1:]) + "."
        if shape == 1 and who == subject:
            return f"{subject}, {which} {vps[0]}, " + self.join(vps[1:]) + "."
        if shape == 2:
            return self.agree(who, vps[0]) + ", " + " and ".join(posts[1:]) + "."
        if shape == 3 and not again:
            lead = posts[0][:1].upper() + posts[0][1:]
            if not lead.startswith(("(", "With the code", "Which", "Who", "That", "Where", "Whose")):
                return f"{lead}, {self.agree(who, self.join(vps[1:]))}."
        if shape == 4 and len(facts) == 2:
            return self.agree(who, vps[0]) + ". " + self.agree(r.choice(PRONOUN.get(kind, ["It"])), vps[1]) + "."
        return self.agree(who, self.join(vps)) + "."

    @staticmethod
    def agree(who: str, vp: str) -> str:
        """Subject and verb phrase, the verb plural after They."""
        if who == "They":
            for one, many in (
                ("is ", "are "),
                ("was ", "were "),
                ("has ", "have "),
                ("plays ", "play "),
                ("competes ", "compete "),
            ):
                if vp.startswith(one):
                    vp = many + vp[len(one) :]
                    break
        return f"{who} {vp}"

    @staticmethod
    def join(parts: list[str]) -> str:
        """`a`, `a and b`, `a, b and c`."""
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

    def draw(self, kind: str, count: int, table: dict[str, list[Relation]], rng: Random) -> list[tuple[str, Value, Relation]]:
        """Up to `count` facts of a subject of the given kind."""
        relations = rng.sample(table[kind], min(count, len(table[kind])))
        return [(rng.choice(rel.names), self.names.value(rel.object, rng), rel) for rel in relations]

    def tell(self, kind: str, subject: str, facts: list[tuple[str, Value, Relation]], rng: Random) -> str:
        """All facts of a subject in sentences of one to three facts."""
        out, at = [], 0
        while at < len(facts):
            take = min(rng.choice([1, 1, 2, 2, 2, 3]), len(facts) - at)
            out.append(self.clause(kind, facts[at : at + take], subject, rng, again=at > 0))
            at += take
        return " ".join(out)

    def triples(self, style: Style, rng: Random) -> Doc:
        """One to seven triples about one subject, its object, or several subjects."""
        r = rng
        kind = r.choice([k for k in self.by_subject if k not in ("LEAGUE", "BATTLE")])
        subject = self.names.name(kind, r)
        count = r.choice([1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6])
        facts = self.draw(kind, r.randint(1, count), self.by_subject, r)
        rows = [(subject, name, value.raw) for name, value, _ in facts]
        told = re.sub(r" \(.*?\)$", "", subject)
        text = self.tell(kind, told, facts, r)
        while len(rows) < count:
            ends = [(v, rel) for _, v, rel in facts if rel.object in self.by_subject and rel.object in ENTITY_KINDS]
            if not ends:
                break
            value, rel = r.choice(ends)
            more = self.draw(rel.object, min(r.choice([1, 1, 2]), count - len(rows)), self.by_subject, r)
            rows += [(value.raw, name, v.raw) for name, v, _ in more]
            if len(more) == 1 and text.endswith(value.text + ".") and r.random() < 0.6:
                name, v, mrel = more[0]
                vp = self.phrase(r.choice(mrel.vps), v, name)
                text = text[:-1] + (
                    f", {r.choice(['who'] if rel.object == 'P' else ['which'])} {vp}."
                    if r.random() < 0.6
                    else ", " + self.phrase(r.choice(mrel.posts), v, name) + "."
                )
            else:
                text += " " + self.tell(rel.object, value.text, more, r)
            if r.random() < 0.5:
                break
        if r.random() < 0.25:
            r.shuffle(rows)
        return Doc(style.triples(rows), text, "grammar-triples")

    def attributes_doc(self, style: Style, rng: Random) -> Doc:
        """A venue, hotel, product or any other subject with attributes, as key : value pairs, in one of several voices."""
        r = rng
        if r.random() < 0.7:
            kind, table = r.choice(["V", "V", "V", "H", "R"]), self.attributes_of
        else:
            kind, table = r.choice([k for k in self.by_subject if k not in ("LEAGUE", "BATTLE")]), self.by_subject
        subject = self.names.name(kind, r)
        facts = self.draw(kind, r.choice([1, 2, 2, 3, 3, 4, 5, 6, 7]), table, r)
        rows = [
            (r.choice(["name", "name", "name", "title", "called"]), subject),
            *((name, value.raw) for name, value, _ in facts),
        ]
        order = facts[:]
        if r.random() < 0.4:
            r.shuffle(order)
        text = self.venue(subject, order, r) if kind == "V" and r.random() < 0.7 else self.tell(kind, subject, order, r)
        if r.random() < 0.2:
            rows = [rows[0], *r.sample(rows[1:], len(rows) - 1)]
        return Doc(style.pairs(rows), self.voiced(text, subject, style.voice, r), "grammar-attributes")

    def venue(self, subject: str, facts: list[tuple[str, Value, Relation]], rng: Random) -> str:
        """A venue in one or two sentences around a noun phrase: `X is a cheap Thai bar in the old town near Y.`"""
        r = rng
        by = {rel.object: (name, value, rel) for name, value, rel in facts}
        noun = by["VTYPE"][1].text if "VTYPE" in by else r.choice(["place", "restaurant", "venue", "establishment"])
        used = {"VTYPE"}
        before = []
        if "FAM" in by and "adj" in by["FAM"][1].fill and r.random() < 0.4:
            before.append(by["FAM"][1].fill["adj"])
            used.add("FAM")
        if "PRICE" in by and r.random() < 0.4:
            before.append(by["PRICE"][1].fill["adj"] if " " not in by["PRICE"][1].fill["adj"] else "")
            if before[-1]:
                used.add("PRICE")
        if "CUIS" in by and r.random() < 0.6:
            before.append(by["CUIS"][1].text + (" food" if by["CUIS"][1].text in ("fast",) else ""))
            used.add("CUIS")
        phrase = article(" ".join([b for b in before if b] + [noun]))
        rest = [f for f in facts if f[2].object not in used]
        split = r.randint(0, min(3, len(rest)))
        posts = [self.phrase(r.choice(rel.posts), value, name) for name, value, rel in rest[:split]]
        tail = (" " + " ".join(posts)) if posts else ""
        opening = r.choice(
            [
                f"{subject} is {phrase}{tail}.",
                f"{subject} is {phrase}{tail}.",
                f"There is {phrase} called {subject}{tail}.",
                f"{subject}, {phrase}{tail}.",
                f"There is {phrase}{tail}, {subject}.",
                f"{phrase[:1].upper() + phrase[1:]}{tail} is {subject}.",
                f"{phrase[:1].upper() + phrase[1:]}{tail} is called {subject}.",
            ]
        )
        rest = rest[split:]
        if opening.startswith(f"{subject}, ") and rest:
            name, value, rel = rest[0]
            opening = opening[:-1] + ", " + self.phrase(r.choice(rel.vps), value, name) + "."
            rest = rest[1:]
        elif opening.startswith(f"{subject}, "):
            opening = f"{subject} is {phrase}{tail}."
        out = [opening]
        while rest:
            take = min(r.choice([1, 1, 2, 2]), len(rest))
            out.append(self.clause("V", rest[:take], subject, r, again=True))
            rest = rest[take:]
        return " ".join(out)

    @staticmethod
    def voiced(text: str, subject: str, voice: int, rng: Random) -> str:
        """The text in one of several voices; most are plain."""
        extras = {
            6: ("Looking for something special? ", ""),
            7: ("", f" Come and see {subject} for yourself!"),
            8: ("Dear customer, ", " Kind regards."),
            9: ("Did you know? ", ""),
            10: ("", " Enjoy!"),
            11: ("Good news: ", ""),
        }
        before, after = extras.get(voice, ("", ""))
        return before + text + after


# -------------------------------------------------------------------------------------------------------- the builders

ENTITY = re.compile(
    r"(?:[A-Z][\w'’-]+|[A-Z]\.)(?:(?: (?:of|the|de|von|and|&|van|la) (?=[A-Z])| )(?:[A-Z][\w'’-]+|[A-Z]\.))*"
    r"|\b\d[\d,.]*\d\b|\b\d\b"
)
STOP = set(read_values()["STOP"])


def harvest(wiki: list[tuple[str, list[str]]]) -> list[str]:
    """Names of one to five capitalised words found inside (not at the start of) Wikipedia sentences."""
    found: dict[str, None] = {}
    for whole, _ in wiki:
        for match in ENTITY.finditer(whole):
            name = match[0]
            if match.start() > 0 and name[0].isalpha() and 3 < len(name) < 40 and name.count(" ") < 5:
                found[name] = None
    return list(found)


class Mix:
    """All sources together. `Mix.window_docs` gives the documents of one window."""

    def __init__(self, sources: Path) -> None:
        """Read every source (some 20 s)."""
        self.wiki = read_wiki(sources)
        self.fewrel, self.relation_names = read_fewrel(sources)
        self.rnnlg = read_rnnlg(sources)
        self.sgd = read_sgd(sources)
        self.taskmaster = read_taskmaster(sources)
        self.harvested = harvest(self.wiki)
        self.names = Names(sources, self.harvested)
        self.grammar = Grammar(self.names)
        # weight in the first part of a run, weight in the last part, builder
        self.builders: list[tuple[float, float, Callable[[Style, Random], Doc | None]]] = [
            (0.27, 0.33, self.grammar.triples),
            (0.20, 0.30, self.grammar.attributes_doc),
            (0.07, 0.04, self.generic_relation),
            (0.10, 0.14, self.dialogue_act),
            (0.10, 0.06, self.turn),
            (0.03, 0.02, self.summary),
            (0.02, 0.01, self.agent_answer),
            (0.07, 0.04, self.open_triples),
            (0.04, 0.02, self.keywords),
            (0.03, 0.01, self.split_or_fuse),
            (0.03, 0.02, self.copying),
            (0.02, 0.01, self.labelled_sentence),
            (0.02, 0.00, self.plain),
        ]

    def counts(self) -> dict[str, int]:
        """Sizes of the sources, for the card."""
        return {
            "wiki sentences": len(self.wiki), "fewrel sentences": len(self.fewrel), "relation names": len(self.relation_names),
            "rnnlg acts": len(self.rnnlg), "sgd dialogues": len(self.sgd), "sgd turns": sum(len(t) for _, t in self.sgd),
            "taskmaster answers": len(self.taskmaster), "harvested names": len(self.harvested),
        }  # fmt: skip

    def docs(self, rng: Random, late: bool = False) -> Iterator[Doc]:
        """Endless documents for one window: of one builder and style half of the time, freely mixed otherwise.

        `late` draws for the last part of a run: more of the grammar, fewer voices and odd linearisations.
        """
        weights = [row[late] for row in self.builders]
        fixed = rng.random() < 0.5
        style = Style.draw(rng, late)
        build = rng.choices(self.builders, weights)[0][2]
        while True:
            if not fixed:
                style = Style.draw(rng, late)
                build = rng.choices(self.builders, weights)[0][2]
            doc = build(style, rng)
            if doc is not None and doc.target:
                yield doc

    def relexicalise(self, value: str, texts: list[str], rng: Random, kinds: str = "VVOPCHB") -> tuple[str, list[str]]:
        """The value and the texts with a fresh name in its place, where the texts hold it word for word."""
        if not value or not all(re.search(rf"\b{re.escape(value)}\b", t, re.I) for t in texts):
            return value, texts
        fresh = self.names.name(rng.choice(kinds), rng)
        return fresh, [re.sub(rf"\b{re.escape(value)}\b", lambda _: fresh, t, flags=re.I) for t in texts]

    def dialogue_act(self, style: Style, rng: Random) -> Doc | None:
        """RNNLG: a dialogue act of a hotel, restaurant, laptop or television domain to a sentence."""
        act, slots, texts = rng.choice(self.rnnlg)
        text = detokenise(rng.choice(texts).replace(" -s", "s"))
        items = []
        for key, value in slots:
            if key in ("name", "near", "area", "address") and rng.random() < 0.85:
                value, (text,) = self.relexicalise(value, [text], rng, "R" if act.endswith(("laptop", "tv")) else "VVHBC")
            items.append((key, value))
        if rng.random() < 0.3:
            items.insert(0, ("act", act))
        return Doc(style.pairs(items), sentence_case(text), "rnnlg")

    def turn(self, style: Style, rng: Random) -> Doc | None:
        """SGD: the acts of one turn to its utterance, names replaced."""
        for _ in range(20):
            service, turns = rng.choice(self.sgd)
            turn = rng.choice(turns)
            items = [(slot, value) for _, slot, value in turn.acts if slot and value]
            if items and (turn.speaker == "SYSTEM" or rng.random() < 0.3):
                break
        else:
            return None
        text = turn.text
        out = []
        for slot, value in items:
            if value in turn.spans and ("name" in slot or "location" in slot or "city" in slot or "address" in slot):
                value, (text,) = self.relexicalise(value, [text], rng)
            out.append((slot, value))
        if rng.random() < 0.5:
            out.insert(0, ("act", turn.acts[0][0].lower()))
        if rng.random() < 0.2:
            out.insert(0, ("service", service))
        return Doc(style.pairs(out), text, "sgd-turn")

    def summary(self, style: Style, rng: Random) -> Doc | None:
        """SGD: a dialogue to a short account of who wanted what, made from its acts."""
        _service, turns = rng.choice(self.sgd)
        turns = turns[: rng.choice([4, 6, 8])]
        a, b = rng.choice(
            [
                ("User", "Assistant"),
                ("#Person1#", "#Person2#"),
                ("A", "B"),
                (rng.choice(self.names.first), rng.choice(self.names.first)),
                ("Customer", "Agent"),
            ]
        )
        wants = {s: v for t in turns if t.speaker == "USER" for act, s, v in t.acts if act == "INFORM" and v}
        offers = {s: v for t in turns if t.speaker == "SYSTEM" for act, s, v in t.acts if act in ("OFFER", "INFORM") and v}
        intent = next((v for t in turns for act, _, v in t.acts if act == "INFORM_INTENT"), "")
        if not intent:
            return None
        doing = spaced(intent)
        text = f"{a} wants to {doing}"
        if wants:
            text += rng.choice([" with ", ", giving "]) + Grammar.join([f"{spaced(s)} {v}" for s, v in list(wants.items())[:3]])
        text += "."
        if offers:
            text += (
                f" {b} {rng.choice(['offers', 'suggests', 'mentions'])} "
                + Grammar.join([v for v in list(offers.values())[:3]])
                + "."
            )
        lines = "\n".join(f"{a if t.speaker == 'USER' else b}: {t.text}" for t in turns)
        return Doc(lines, text, "sgd-summary") if len(lines) < 600 else None

    def agent_answer(self, style: Style, rng: Random) -> Doc | None:
        """Taskmaster-3: values of an API's answer to what the agent said."""
        if not self.taskmaster:
            return None
        slots, text = rng.choice(self.taskmaster)
        if rng.random() < 0.6:
            slots = [(k, v) if k not in ("name", "location") else (k, *self.relexicalise(v, [text], rng)) for k, v in slots]  # type: ignore[misc]
            fixed = []
            for item in slots:
                if len(item) == 3:
                    fixed.append((item[0], item[1]))
                    text = item[2][0]
                else:
                    fixed.append(item)
            slots = fixed
            if not all(v.lower() in text.lower() for _, v in slots):
                return None
        return Doc(style.pairs(slots), sentence_case(text), "taskmaster")

    def generic_relation(self, style: Style, rng: Random) -> Doc:
        """Any of Wikidata's relation names between invented entities, said in ways that fit every noun."""
        r = rng
        count = r.choice([1, 1, 1, 2, 2, 3])
        kind = r.choice(["P", "O", "C", "B", "W", "T", "R", "V"])
        subject = self.names.name(kind, r)
        rows, said = [], []
        for i in range(count):
            rel = r.choice(self.relation_names)
            value = self.names.value(
                r.choice(["P", "O", "C", "B", "W", "K", "DATE", "NUM", "DEC", "CODE", "OCC", "NICK", "U"]), r
            )
            rows.append((subject, camel(rel) if r.random() < 0.8 else rel, value.raw))
            said.append((rel, value.text))
            if r.random() < 0.3 and i + 1 < count:
                break
        parts = []
        for i, (rel, text) in enumerate(said):
            noun = rel if " by" not in rel and " in" not in rel and " of" not in rel and " to" not in rel else ""
            whole = subject if i == 0 or r.random() < 0.4 else r.choice(["It", "It"] if kind != "P" else ["He", "She"])
            poss = subject + "'s" if whole == subject else {"It": "Its", "He": "His", "She": "Her"}[whole]
            if noun:
                parts.append(
                    r.choice(
                        [
                            f"The {noun} of {subject} is {text}.",
                            f"{poss} {noun} is {text}.",
                            f"{text} is the {noun} of {subject}.",
                            f"{whole} has {text} as its {noun}.",
                            f"{whole} has the {noun} {text}.",
                        ]
                    )
                )
            else:
                verb = (
                    rel
                    if rel.split()[0] in ("has", "is", "was")
                    else (
                        "is " + rel
                        if rel.split()[0].endswith(("ed", "en")) or rel.split()[-1] in ("by", "in", "to")
                        else "is " + article(rel)
                    )
                )
                parts.append(f"{whole} {verb} {text}.")
        if len(parts) == 2 and r.random() < 0.4:
            parts = [
                parts[0][:-1]
                + " and "
                + (
                    parts[1][:1].lower() + parts[1][1:]
                    if parts[1].split()[0] in ("The", "Its", "It", "His", "Her", "He", "She")
                    else parts[1]
                )
            ]
        if r.random() < 0.25:
            return Doc(style.pairs([("name", subject), *((rel, o) for _, rel, o in rows)]), " ".join(parts), "generic-relation")
        return Doc(style.triples(rows), " ".join(parts), "generic-relation")

    def open_triples(self, style: Style, rng: Random) -> Doc | None:
        """A Wikipedia sentence from the names in it and the words between them, written as triples or pairs."""
        whole, parts = rng.choice(self.wiki)
        text = rng.choice([whole, *parts, *parts])
        hits = [m for m in ENTITY.finditer(text) if m[0].lower() not in STOP]
        if not 2 <= len(hits) <= 8 or len(text) > 260:
            return None
        rows = []
        for left, right in itertools.pairwise(hits):
            between = [w for w in re.findall(r"[a-z]+", text[left.end() : right.start()]) if w not in STOP][:4]
            rows.append((left[0], camel(" ".join(between)) if between else rng.choice(["and", "in", "of"]), right[0]))
        swaps = {m[0] for m in hits if m[0][0].isupper() and " " in m[0]} if rng.random() < 0.3 else set()
        for name in sorted(swaps):
            if any(name != m[0] and name in m[0] for m in hits):
                continue
            fresh = self.names.name("P", rng)
            text = text.replace(name, fresh)
            rows = [(fresh if s == name else s, rel, fresh if o == name else o) for s, rel, o in rows]
        return Doc(style.triples(rows), text, "wiki-triples")

    def labelled_sentence(self, style: Style, rng: Random) -> Doc:
        """FewRel: head, relation and tail, with the sentence's other names as extra facts."""
        text, head, rel, tail = rng.choice(self.fewrel)
        rest = [m[0] for m in ENTITY.finditer(text) if m[0] not in head and m[0] not in tail and m[0].lower() not in STOP]
        rows = [(head, camel(rel), tail), *((head, rng.choice(["mentions", "with", "and"]), name) for name in rest[:4])]
        return Doc(style.triples(rows), text, "fewrel")

    def keywords(self, style: Style, rng: Random) -> Doc | None:
        """Names, numbers and content words of a sentence, shuffled, to the sentence."""
        if rng.random() < 0.5:
            _whole, parts = rng.choice(self.wiki)
            text = rng.choice(parts)
        else:
            text = rng.choice(rng.choice(self.sgd)[1]).text
        names = [m[0] for m in ENTITY.finditer(text) if m[0].lower() not in STOP]
        held = " ".join(names)
        content = [w for w in re.findall(r"\b[a-z]{4,}\b", text) if w not in STOP and w not in held]
        words = names + rng.sample(content, min(len(content), rng.randint(1, 5)))
        if not 2 <= len(words) <= 14 or len(text) > 220:
            return None
        if rng.random() < 0.6:
            rng.shuffle(words)
        return Doc(rng.choice([" | ", ", ", " "]).join(words), text, "keywords")

    def split_or_fuse(self, style: Style, rng: Random) -> Doc | None:
        """WikiSplit both ways: one long sentence to two, or two to one."""
        whole, parts = rng.choice(self.wiki)
        if len(parts) < 2 or len(whole) > 260:
            return None
        if rng.random() < 0.5:
            return Doc(rng.choice(["Split: ", "In short sentences: "]) + whole, " ".join(parts), "split")
        return Doc(rng.choice(["Join: ", "In one sentence: "]) + " ".join(parts), whole, "fuse")

    def copying(self, style: Style, rng: Random) -> Doc:
        """Copying, listing, picking and reordering of names."""
        r = rng
        items = [
            self.names.value(r.choice(["P", "O", "C", "B", "W", "V", "DATE", "NUM", "CODE"]), r).raw
            for _ in range(r.randint(2, 5))
        ]
        keys = r.sample(self.relation_names, len(items))
        task = r.randrange(6)
        if task == 0:
            return Doc("Repeat: " + " | ".join(items), Grammar.join(items) + ".", "copying")
        if task == 1:
            return Doc(
                style.pairs(list(zip(keys, items, strict=True))),
                " ".join(f"The {k} is {v}." for k, v in zip(keys, items, strict=True)),
                "copying",
            )
        if task == 2:
            i = r.randrange(len(items))
            return Doc(style.pairs(list(zip(keys, items, strict=True))) + f"\nWhat is the {keys[i]}?", f"{items[i]}.", "copying")
        if task == 3:
            return Doc("Reverse: " + ", ".join(items), ", ".join(reversed(items)), "copying")
        if task == 4:
            return Doc("Without underscores: " + " | ".join(i.replace(" ", "_") for i in items), ", ".join(items), "copying")
        return Doc("Sort: " + ", ".join(items), ", ".join(sorted(items)), "copying")

    def plain(self, style: Style, rng: Random) -> Doc:
        """Plain text: Wikipedia sentences or a dialogue."""
        if rng.random() < 0.6:
            at = rng.randrange(len(self.wiki))
            return Doc("", " ".join(w for w, _ in self.wiki[at : at + 2]), "plain")
        turns = rng.choice(self.sgd)[1]
        at = rng.randrange(len(turns))
        return Doc("", "\n".join(t.text for t in turns[at : at + 4]), "plain")
