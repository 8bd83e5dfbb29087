"""The grammar of the embedded base's mix: names, values, relations, linearisations, voices, and sentences made of them.

In: lists of names (`sources.Material.lists`) and `relations.tsv`, the project's own relations with their wordings. Out: `Doc`s
whose text is known to say the rows of the input. Knows nothing about tasks, windows, tokenisation or training. Everything random comes from the
`random.Random` handed in.

Names and values are drawn anew for every document, from lists, from Wikipedia sentences and from a letter-trigram
generator: a model can only get them right by copying them from the input, which is what the mix is meant to teach.
"""

from __future__ import annotations

import calendar
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random


@dataclass
class Doc:
    """One document. `target` ends the document; an empty `input` means plain text.

    `rows` are the pairs or triples that the input says, where it says such; `learn` is false for what a window only shows;
    `cut` says that this is a piece of `target`, so many tokens long, without an end.
    """

    input: str
    target: str
    source: str
    rows: Sequence[tuple[str, ...]] = ()
    learn: bool = True
    cut: int = 0


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
    others: tuple[str, ...] = ()  # further values of the same relation, already in `text`

    @property
    def raws(self) -> list[str]:
        """One for each row of the input."""
        return [self.raw, *self.others]


def read_values() -> dict[str, list[str]]:
    """The fixed lists of values at the end of relations.tsv, by type code."""
    lines = (Path(__file__).parent / "relations.tsv").read_text(encoding="utf-8").splitlines()
    return {line[2:].split("\t")[0]: line.split("\t")[1].split("|") for line in lines if line.startswith("= ")}


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


class Names:
    """Draws entities and values by the type codes of relations.tsv."""

    def __init__(self, lists: dict[str, list[str]], harvested: list[str]) -> None:
        """From the lists of `sources.LISTS` and names found in texts."""
        self.first, self.last, self.cities, self.countries = lists["first"], lists["last"], lists["cities"], lists["countries"]
        self.states, self.nationalities, self.genres, self.rivers = (
            lists[name] for name in ("states", "nationalities", "genres", "rivers")
        )
        self.jobs = [j for j in lists["jobs"] if len(j) < 28]
        self.dishes = [d for d in lists["dishes"] if len(d) < 30]
        self.foods = lists["foods"]
        self.adjectives = [w for w in lists["adjectives"] if w.islower()]
        self.nouns = [w for w in lists["nouns"] if w.islower()]
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


OPENINGS = [
    "Ahoy! ", "Dear guests, ", "Looking for {s}? ", "Did you know? ", "Good news: ", "Hello! ", "Attention please: ", "Well, ",
    "Ladies and gentlemen, ", "Please note: ", "Here is what we know. ", "Today's tip: ", "Listen up! ", "Meet {s}. ", "In short: ",
    "Introducing {s}. ", "Friends! ", "News from the desk: ", "Dear customer, ", "Looking for something special? ", "Wow! ", "Hey, ",
    "Welcome to {s}! ", "For the record: ", "As you may know, ", "Why not try {s}? ", "Let me tell you about {s}. ", "FYI: ", "Psst! ",
]  # fmt: skip
CLOSINGS = [
    " Come and see {s} for yourself!", " Kind regards.", " Enjoy!", " We thank you for your patience.", " Book now.", " See you there!",
    " That is all we know.", " What a find!", " Over and out.", " Yours, the team.", " Do not miss it.", " More soon.", " Fair winds!",
    " Ask us for details.", " We apologise for any trouble.", " Everyone is talking about {s}.", " You will love it!", " Good luck!",
    " And that is {s}.", " Call us today.", " What more could you want?", " Highly recommended.", " Thank you.", " Cheers!",
]  # fmt: skip
SWAPS = [
    ("restaurant", "eatery"), ("restaurant", "place to eat"), ("located", "situated"), ("is located in", "sits in"), ("cheap", "low-cost"),
    ("expensive", "pricey"), (" and ", " & "), ("near", "close to"), ("food", "dishes"), ("food", "grub"), ("family friendly", "good for kids"),
    ("was born in", "came into the world in"), ("city", "town"), ("the United States", "the US"), ("called", "named"), ("It is", "It's"),
    ("is not", "isn't"), ("serves", "offers"), ("children", "kids"), ("large", "big"), ("has a", "boasts a"), ("built", "constructed"),
    ("started", "begun"), ("customer rating", "rating"), ("written by", "penned by"), ("price range", "prices"), ("died", "passed away"),
]  # fmt: skip


@dataclass
class Voice:
    """How one customer's texts sound: what opens and closes them, which wordings they prefer, how they are set. Drawn for a window."""

    openings: list[str]
    closings: list[str]
    swaps: list[tuple[str, str]]
    setting: str
    narrow: int  # 0: any wording; otherwise a seed that leaves one or two wordings of each relation
    order: str

    @classmethod
    def draw(cls, rng: Random, sayings: list[str]) -> Voice:
        """A random voice; half are plain. `sayings` are short sentences that may open or close a text."""
        r = rng
        if r.random() < 0.5:
            return cls([], [], [], "", r.randrange(1, 1 << 30) if r.random() < 0.4 else 0, r.choice(["input", "input", "any"]))
        own = [s[:1].upper() + s[1:] + ("" if s.endswith((".", "!", "?")) else r.choice(".!")) for s in r.sample(sayings, 3)]
        openings = r.sample(OPENINGS, r.randint(1, 3)) if r.random() < 0.7 else [s + " " for s in own[: r.randint(1, 2)]]
        closings = r.sample(CLOSINGS, r.randint(1, 3)) if r.random() < 0.7 else [" " + s for s in own[2:]]
        setting = r.choice(["", "", "", "", "", "", "exclaim", "lower", "upper", "lines", "semicolons", "telegraph"])
        return cls(
            openings if r.random() < 0.6 else [],
            closings if r.random() < 0.5 else [],
            r.sample(SWAPS, r.randint(1, 6)) if r.random() < 0.5 else [],
            setting,
            r.randrange(1, 1 << 30) if r.random() < 0.6 else 0,
            r.choice(["input", "any"]),
        )

    def pick(self, options: list[str], rng: Random) -> str:
        """One of several wordings, the voice's own where it has preferences."""
        if self.narrow and len(options) > 1:
            key = len(options[0]) if "{" in options[0] else 0  # the same wordings again for the same relation
            first = (self.narrow * (1 + key + 7 * len(options)) >> 5) % len(options)
            return options[first if rng.random() < 0.75 else (first + 1) % len(options)]
        return rng.choice(options)

    def say(self, text: str, subject: str, rng: Random) -> str:
        """The text in this voice."""
        for old, new in self.swaps:
            text = text.replace(old, new)
        if self.setting == "exclaim":
            text = re.sub(r"(?<=[a-z0-9)])\.(?= [A-Z]|$)", "!", text)
        elif self.setting == "semicolons":
            text = re.sub(r"\. (?=[A-Z])", "; ", text)
        elif self.setting == "telegraph":
            text = re.sub(r"\b(?:[Aa]n?|[Tt]he|is|are) (?=[a-z])", "", text)
        if self.openings:
            text = rng.choice(self.openings).replace("{s}", subject) + text
        if self.closings:
            text += rng.choice(self.closings).replace("{s}", subject)
        if self.setting == "lower":
            text = text.lower()
        elif self.setting == "upper":
            text = text.upper()
        elif self.setting == "lines":
            text = "\n".join("- " + s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text))
        return text


@dataclass
class Style:
    """How one group of documents is written: its inputs and its voice. Drawn for a window, so that a window can be of one style."""

    form: int
    key_case: int
    underscores: bool
    quotes: bool
    voice: Voice

    @classmethod
    def draw(cls, rng: Random, sayings: list[str]) -> Style:
        """A random style; the product's own shapes are the likeliest."""
        form = 0 if rng.random() < 0.35 else rng.choice([0, 0, 0, 1, 2, 3, 4, 5, 6])
        return cls(form, rng.choice([0, 0, 0, 1, 2]), rng.random() < 0.7, rng.random() < 0.5, Voice.draw(rng, sayings))

    def key(self, name: str) -> str:
        """A key in this style's case."""
        if self.key_case == 0 or ("_" in name and self.key_case == 1):
            return name
        return spaced(name) if self.key_case == 1 else spaced(name).replace(" ", "_")

    def rows(self, items: Sequence[tuple[str, ...]]) -> str:
        """Pairs or triples, linearised."""
        if items and len(items[0]) == 3:
            return self.triples([(s, rel, o) for s, rel, o in items])
        return self.pairs([(k, v) for k, v in items])

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
        return body

    def triples(self, items: list[tuple[str, str, str]]) -> str:
        """Subject-relation-object triples, linearised."""
        rows = []
        for s, rel, o in items:
            if self.underscores:
                s, o = s.replace(" ", "_"), o if o[:1].isdigit() and "_" not in o and " " in o else o.replace(" ", "_")
                if "," in o and len(o) > 25:
                    o = '"' + o.replace("_", " ") + '"'
            if self.quotes and o[:1].isdigit():
                o = f'"{o}"'
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
        return body


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
SEVERAL = {
    "P",
    "C",
    "O",
    "U",
    "W",
    "M",
    "NATS",
    "LANG",
    "OCC",
    "AWARD",
    "BATTLE",
    "INSTR",
    "GENRE",
    "MAT",
    "F",
    "T",
}  # kinds that may come twice
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

    def clause(
        self, kind: str, facts: list[tuple[str, Value, Relation]], subject: str, rng: Random, again: bool, voice: Voice
    ) -> str:
        """One sentence that says the given one to three facts of a subject."""
        r = rng
        who = subject if not again else r.choice([*PRONOUN.get(kind, ["It"]), subject])
        vps = [self.phrase(voice.pick(rel.vps, r), value, name) for name, value, rel in facts]
        if len(facts) == 1:
            if not again and r.random() < 0.4:
                name, value, rel = facts[0]
                text = self.phrase(voice.pick(rel.wholes, r), value, name).replace("{s}", subject)
                return text[:1].upper() + text[1:]
            return self.agree(who, vps[0]) + "."
        posts = [self.phrase(voice.pick(rel.posts, r), value, name) for name, value, rel in facts]
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
        out = []
        for rel in rng.sample(table[kind], min(count, len(table[kind]))):
            value = self.names.value(rel.object, rng)
            if rel.object in SEVERAL and rng.random() < 0.12:
                more = [self.names.value(rel.object, rng) for _ in range(rng.choice([1, 1, 2]))]
                text = self.join([v.text for v in (value, *more)])
                value = Value(
                    value.raw, text, {"a": self.join([article(v.text) for v in (value, *more)])}, tuple(v.raw for v in more)
                )
            out.append((rng.choice(rel.names), value, rel))
        return out

    def tell(self, kind: str, subject: str, facts: list[tuple[str, Value, Relation]], rng: Random, voice: Voice) -> str:
        """All facts of a subject in sentences of one to three facts."""
        out, at = [], 0
        while at < len(facts):
            take = min(rng.choice([1, 1, 2, 2, 2, 3]), len(facts) - at)
            out.append(self.clause(kind, facts[at : at + take], subject, rng, at > 0, voice))
            at += take
        return " ".join(out)

    def triples(self, style: Style, rng: Random) -> Doc:
        """One to seven triples about one subject, its object, or several subjects."""
        r = rng
        kind = r.choice([k for k in self.by_subject if k not in ("LEAGUE", "BATTLE")])
        subject = self.names.name(kind, r)
        count = r.choice([1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6])
        facts = self.draw(kind, r.randint(1, count), self.by_subject, r)
        rows = [(subject, name, raw) for name, value, _ in facts for raw in value.raws]
        told = re.sub(r" \(.*?\)$", "", subject)
        text = self.tell(kind, told, facts, r, style.voice)
        while len(rows) < count:
            ends = [(v, rel) for _, v, rel in facts if rel.object in ENTITY_KINDS & set(self.by_subject) and not v.others]
            if not ends:
                break
            value, rel = r.choice(ends)
            more = self.draw(rel.object, min(r.choice([1, 1, 2]), count - len(rows)), self.by_subject, r)
            rows += [(value.raw, name, raw) for name, v, _ in more for raw in v.raws]
            if len(more) == 1 and text.endswith(value.text + ".") and r.random() < 0.6:
                name, v, mrel = more[0]
                vp = self.phrase(style.voice.pick(mrel.vps, r), v, name)
                text = text[:-1] + (
                    f", {r.choice(['who'] if rel.object == 'P' else ['which'])} {vp}."
                    if r.random() < 0.6
                    else ", " + self.phrase(style.voice.pick(mrel.posts, r), v, name) + "."
                )
            else:
                text += " " + self.tell(rel.object, value.text, more, r, style.voice)
            if r.random() < 0.5:
                break
        if r.random() < 0.25:
            r.shuffle(rows)
        return Doc(style.triples(rows), style.voice.say(text, told, r), "grammar-triples", rows)

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
            *((name, ", ".join(value.raws)) for name, value, _ in facts),
        ]
        order = facts[:]
        if style.voice.order == "any" and r.random() < 0.7:
            r.shuffle(order)
        in_a_phrase = kind == "V" and r.random() < 0.7
        text = self.venue(subject, order, r, style.voice) if in_a_phrase else self.tell(kind, subject, order, r, style.voice)
        if r.random() < 0.2:
            rows = [rows[0], *r.sample(rows[1:], len(rows) - 1)]
        return Doc(style.pairs(rows), style.voice.say(text, subject, r), "grammar-attributes", rows)

    def venue(self, subject: str, facts: list[tuple[str, Value, Relation]], rng: Random, voice: Voice) -> str:
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
        posts = [self.phrase(voice.pick(rel.posts, r), value, name) for name, value, rel in rest[:split]]
        tail = (" " + " ".join(posts)) if posts else ""
        opening = voice.pick(
            [
                f"{subject} is {phrase}{tail}.",
                f"{subject} is {phrase}{tail}.",
                f"There is {phrase} called {subject}{tail}.",
                f"{subject}, {phrase}{tail}.",
                f"There is {phrase}{tail}, {subject}.",
                f"{phrase[:1].upper() + phrase[1:]}{tail} is {subject}.",
                f"{phrase[:1].upper() + phrase[1:]}{tail} is called {subject}.",
            ],
            r,
        )
        rest = rest[split:]
        if opening.startswith(f"{subject}, ") and rest:
            name, value, rel = rest[0]
            opening = opening[:-1] + ", " + self.phrase(voice.pick(rel.vps, r), value, name) + "."
            rest = rest[1:]
        elif opening.startswith(f"{subject}, "):
            opening = f"{subject} is {phrase}{tail}."
        out = [opening]
        while rest:
            take = min(r.choice([1, 1, 2, 2]), len(rest))
            out.append(self.clause("V", rest[:take], subject, r, True, voice))
            rest = rest[take:]
        return " ".join(out)
