"""The data mix of the embedded base: windows of documents of the shape ``input, newline, target, end of text``.

In: a `sources.Material`. Out: an endless, seeded stream of `Doc`s for one window. Knows nothing about tokenisation or training.
Everything random comes from the `random.Random` handed in: a window is a function of its seed.

One kind of input leads to many kinds of target: a list of attributes can be put into sentences in any of many voices, copied,
written in another notation, sorted, counted, shortened, asked about. Which of them is wanted is said by what stands before: an
instruction, an example, a piece of an earlier target. Where nothing stands before, no document is put into sentences: such a
base waits for a context to tell it what to do, and a prefix is a context.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from random import Random

from grammar import Doc, Grammar, Names, Style, article, camel, read_values, spaced
from sources import Material, detokenise, sentence_case

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


# ----------------------------------------------------------------------------------------------------------- tasks on rows

RowTask = Callable[[Sequence[tuple[str, ...]], Style, Random], str]


def values_of(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The last column, each value once."""
    return list(dict.fromkeys(row[-1] for row in rows))


def keys_of(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The column of keys or relations."""
    return [row[-2] for row in rows]


def capitals(text: str) -> str:
    """Every word with a capital."""
    return " ".join(w[:1].upper() + w[1:] for w in text.replace("_", " ").split(" "))


def without(rows: Sequence[tuple[str, ...]], at: int) -> list[tuple[str, ...]]:
    """The rows but one."""
    return [row for i, row in enumerate(rows) if i != at % len(rows)] or list(rows)


# name: (instructions, task). A task's free choices are drawn by `bind`, once for a window.
ROW_TASKS: dict[str, tuple[list[str], Callable[[Random, Style], RowTask]]] = {}


def row_task(*instructions: str) -> Callable[[Callable[[Random, Style], RowTask]], Callable[[Random, Style], RowTask]]:
    """Register a task under its function's name."""

    def register(bind: Callable[[Random, Style], RowTask]) -> Callable[[Random, Style], RowTask]:
        ROW_TASKS[bind.__name__] = (list(instructions), bind)
        return bind

    return register


@row_task("Copy:", "Repeat:", "Write this again:", "Say the same:")
def copy(_rng: Random, _style: Style) -> RowTask:
    """The input once more."""
    return lambda rows, style, rng: style.rows(rows)


@row_task("Rewrite in another notation:", "Convert:", "Change the format:")
def notation(rng: Random, style: Style) -> RowTask:
    """The rows in another linearisation."""
    form = rng.choice([f for f in range(7) if f != style.form])
    other = Style(form, rng.randrange(3), rng.random() < 0.5, style.quotes, style.voice)
    return lambda rows, style, rng: other.rows(rows)


@row_task("List the values:", "Values only:", "What is on the right:")
def values(rng: Random, _style: Style) -> RowTask:
    """The values, joined."""
    glue = rng.choice([", ", " | ", "; ", "\n", " / "])
    return lambda rows, style, rng: glue.join(values_of(rows))


@row_task("List the keys:", "Keys only:", "Which fields are given?")
def keys(rng: Random, _style: Style) -> RowTask:
    """The keys, joined."""
    glue = rng.choice([", ", " | ", "; ", "\n", " / "])
    return lambda rows, style, rng: glue.join(keys_of(rows))


@row_task("Reverse the order:", "Backwards:", "Last first:")
def backwards(_rng: Random, _style: Style) -> RowTask:
    """The rows from last to first."""
    return lambda rows, style, rng: style.rows(list(rows)[::-1])


@row_task("Sort:", "In alphabetical order:", "Put in order:")
def in_order(rng: Random, _style: Style) -> RowTask:
    """The rows sorted by key or by value."""
    column = rng.choice([-1, -2])
    return lambda rows, style, rng: style.rows(sorted(rows, key=lambda row: row[column].lower()))


@row_task("Count:", "How many fields?", "How many are there?")
def count(rng: Random, _style: Style) -> RowTask:
    """How many rows."""
    words = rng.choice(["{n}", "{n} fields", "There are {n}.", "count: {n}"])
    return lambda rows, style, rng: words.replace("{n}", str(len(rows)))


@row_task("Drop one:", "Shorten:", "Leave one out:")
def shorter(rng: Random, _style: Style) -> RowTask:
    """The rows without the first, the second or the last."""
    at = rng.choice([0, 1, -1])
    return lambda rows, style, rng: style.rows(without(rows, at))


@row_task("Pick one:", "Only one of them:", "Which one?")
def one_value(rng: Random, _style: Style) -> RowTask:
    """One value by its place."""
    at = rng.choice([0, 1, -1])
    return lambda rows, style, rng: rows[at % len(rows)][-1]


@row_task("Capitals:", "Loud:", "Change the case:")
def case(rng: Random, _style: Style) -> RowTask:
    """The input in capitals, in lower case, or each word with a capital."""
    change = rng.choice([str.upper, str.lower, capitals])
    return lambda rows, style, rng: change(style.rows(rows))


@row_task("Swap:", "Turn round:", "Values first:")
def swapped(_rng: Random, _style: Style) -> RowTask:
    """Keys and values change places."""
    return lambda rows, style, rng: style.rows([(*row[:-2], row[-1], row[-2]) for row in rows])


@row_task("As a numbered list:", "Number them:", "As a list:", "Bullet points:")
def numbered(rng: Random, _style: Style) -> RowTask:
    """One line a row."""
    mark = rng.choice(["{i}. ", "- ", "* ", "{i}) "])
    glue = rng.choice([": ", " - ", " = "])
    return lambda rows, style, rng: "\n".join(mark.replace("{i}", str(i + 1)) + glue.join(row[-2:]) for i, row in enumerate(rows))


@row_task("Initials:", "Shorten the values:", "First letters:")
def initials(_rng: Random, _style: Style) -> RowTask:
    """First letters of the values."""
    return lambda rows, style, rng: " ".join("".join(w[0] for w in re.findall(r"\w+", v)) for v in values_of(rows)).upper()


@row_task("Which is the longest?", "Find the longest value:")
def longest(_rng: Random, _style: Style) -> RowTask:
    """The longest value."""
    return lambda rows, style, rng: max(values_of(rows), key=len)


VERBAL = [
    "Describe:", "Write a sentence:", "Put the facts into words:", "Data to text:", "Say it in English:", "Turn this into a sentence:",
    "Write a description:", "Tell me about it:", "What does it say?", "In words:", "Write it as text:", "Text:", "Summary:", "Advertise it:",
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- dialogues made up

ASKS = [
    "a table for {n}", "a taxi to {place}", "a room with {feature}", "a haircut", "a parking space",
    "{n} tickets for {title}", "an appointment with {person}", "a guide to {place}", "a {word} lesson", "the {word} room",
    "a wake-up call", "a bicycle", "a boat trip to {place}", "a massage", "a double room", "a seat on the train to {place}",
    "a copy of {title}", "a repair of the {word}", "a cake for {n}",
]  # fmt: skip
REQUESTS = [
    "Can I have {x}{when}?", "I would like {x}{when}, please.", "Do you have {x}{when}?", "Please book {x}{when}.", "Could you arrange {x}{when}?",
    "I need {x}{when}.", "Hello, is {x} possible{when}?", "We want {x}{when}.", "Good morning, {x}{when}, please.", "Is there {x} left{when}?",
    "Hi, I am calling about {x}{when}.",
]  # fmt: skip
YES = [
    "Of course.",
    "Certainly.",
    "That is fine.",
    "Done.",
    "All booked.",
    "No problem.",
    "With pleasure.",
    "Yes, we do.",
    "It is yours.",
]
TOLD_YES = [
    "{p} books {x}{when}.", "{a} arranges {x} for {p}{when}.", "{p} asks for {x}{when}, and {a} agrees.", "{p} will have {x}{when}.",
    "{x} is booked for {p}{when}.", "{p} gets {x}{when} from {a}.", "{p} wants {x}{when}.", "{a} confirms {x} for {p}{when}.",
    "{p} calls {a} and reserves {x}{when}.", "{a} books {x}{when} at {p}'s request.",
]  # fmt: skip
TOLD_NO = [
    "{p} asks for {x}{when}, but {a} has none.", "{a} cannot offer {p} {x}{when}.", "There is no {bare} for {p}{when}.",
    "{p} wants {x}{when}, but it is not possible.", "{a} turns down {p}'s request for {x}{when}.",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SLOT_WORDS = {
    "date": "on {v}", "time": "at {v}", "city": "in {v}", "location": "in {v}", "area": "in {v}", "name": "at {v}", "size": "for {v}",
    "destination": "to {v}", "to": "to {v}", "origin": "from {v}", "from": "from {v}", "number": "for {v}", "cuisine": "with {v} food",
    "price": "for {v}", "amount": "of {v}", "type": "({v})", "genre": "({v})", "artist": "by {v}", "to_location": "to {v}",
}  # fmt: skip


class Mix:
    """All sources together. `Mix.window` gives the documents of one window."""

    def __init__(self, material: Material) -> None:
        """Index the material."""
        self.material = material
        self.wiki, self.fewrel, self.acts = material.wiki, material.fewrel, material.acts
        self.relation_names, self.sgd, self.taskmaster = material.relation_names, material.sgd, material.taskmaster
        self.names = Names(material.lists, harvest(self.wiki))
        self.grammar = Grammar(self.names)
        self.sayings = [example for *_, example in material.glosses if 12 < len(example) < 60]
        self.verbal: list[tuple[float, Callable[[Style, Random], Doc | None]]] = [
            (0.27, self.grammar.triples),
            (0.26, self.grammar.attributes_doc),
            (0.11, self.dialogue_act),
            (0.06, self.turn),
            (0.05, self.generic_relation),
            (0.07, self.open_triples),
            (0.03, self.labelled_sentence),
            (0.01, self.agent_answer),
            (0.02, self.keywords),
            (0.05, self.booking),
            (0.04, self.summary),
            (0.02, self.country),
            (0.03, self.gloss),
        ]
        self.textual: list[tuple[list[str], Callable[[Random], Callable[[Random], tuple[str, str] | None]]]] = [
            (["Split:", "In short sentences:"], self.split),
            (["Join:", "In one sentence:"], self.fuse),
            (["Fix the case:", "Write properly:"], self.recase),
            (["Put in order:", "Unscramble:"], self.unscramble),
            (["Keywords:", "Names in it:"], self.find_names),
            (["First sentence:", "Only the beginning:"], self.first_sentence),
            (["Title:", "Give it a title:"], self.title),
            (["Go on:", "What comes next?"], self.next_turn),
            (["Answer:", "Answer the question:"], self.answer),
            (["Which word?", "Word for it:"], self.word_for),
            (["Repeat:", "Copy:"], self.repeat),
        ]

    # ------------------------------------------------------------------------------------------------------------ windows

    def window(self, rng: Random) -> Iterator[Doc]:
        """Endless documents for one window.

        Half of the windows are of one hidden task that puts structured inputs into words, made clear by what they begin with; the
        rest are hidden tasks that do not, tasks on texts, mixtures with an instruction each, and plain text.
        """
        kind = rng.choices(["verbal", "rows", "textual", "instructed", "plain"], [0.52, 0.16, 0.08, 0.13, 0.11])[0]
        if kind == "plain":
            while True:
                yield self.plain(rng)
        if kind == "instructed":
            style = Style.draw(rng, self.sayings)
            while True:
                if rng.random() < 0.5:
                    style = Style.draw(rng, self.sayings)
                yield self.instructed(style, rng)
        if kind == "textual":
            instructions, bind = rng.choice(self.textual)
            task = bind(rng)
            yield from self.shown(lambda: self.text_doc(task, rng), instructions, rng)
        style = Style.draw(rng, self.sayings)
        if kind == "verbal":
            build = self.draw_verbal(rng)
            yield from self.shown(lambda: build(style, rng), VERBAL, rng)
        build = self.draw_verbal(rng, with_rows=True)
        instructions, bind_row = rng.choice(list(ROW_TASKS.values()))
        if rng.random() < 0.25:  # more records of the same kind: what a list suggests when nothing else does
            instructions, row = ["One more like it:", "Another one:"], self.another(build)
        else:
            row = bind_row(rng, style)
        make = lambda: self.row_doc(build, row, style, rng)  # noqa: E731
        if rng.random() < 0.35:
            yield from self.shown(make, instructions, rng)
        while True:
            yield from self.some(make)

    def draw_verbal(self, rng: Random, with_rows: bool = False) -> Callable[[Style, Random], Doc | None]:
        """A builder of the verbal kind."""
        table = self.verbal[:8] if with_rows else self.verbal
        return rng.choices([b for _, b in table], [w for w, _ in table])[0]

    @staticmethod
    def some(make: Callable[[], Doc | None]) -> Iterator[Doc]:
        """One document, or none if the material did not yield one."""
        doc = make()
        if doc is not None and doc.target:
            yield doc

    def shown(self, make: Callable[[], Doc | None], instructions: list[str], rng: Random) -> Iterator[Doc]:
        """Endless documents of one task, after something that tells the task: a piece of a target, an example, an instruction."""

        def one() -> Doc:
            while True:
                for doc in self.some(make):
                    return doc

        way = rng.random()
        if way < 0.42:
            text = " ".join(one().target for _ in range(rng.choice([1, 1, 2, 3])))
            if rng.random() < 0.25:
                doc = one()
                text = f"{doc.input}\n{doc.target}"
            yield Doc("", text, "hint", learn=False, cut=rng.choice([5, 8, 10, 10, 10, 16, 20, 30, 60]))
        elif way < 0.75:
            first = one()
            first.learn = False
            yield first
        else:
            head = rng.choice(instructions)
            every = rng.random() < 0.4
            while True:
                doc = one()
                doc.input = f"{head}\n{doc.input}"
                yield doc
                if not every:
                    break
        while True:
            yield one()

    def instructed(self, style: Style, rng: Random) -> Doc:
        """A document of any task, with its instruction."""
        while True:
            kind = rng.random()
            doc: Doc | None
            if kind < 0.45:
                doc, head = self.draw_verbal(rng)(style, rng), rng.choice(VERBAL)
            elif kind < 0.8:
                instructions, bind = rng.choice(list(ROW_TASKS.values()))
                doc, head = self.row_doc(self.draw_verbal(rng, True), bind(rng, style), style, rng), rng.choice(instructions)
                if doc and rng.random() < 0.25:
                    key, value = (lambda row: row[-2:])(rng.choice(doc.rows))
                    head, doc.target = rng.choice([f"What is the {spaced(key)}?", f"Give the {key}:", f"{key}?"]), value
            else:
                instructions, bind_text = rng.choice(self.textual)
                doc, head = self.text_doc(bind_text(rng), rng), rng.choice(instructions)
            if doc is not None and doc.target and doc.input:
                doc.input = f"{head}\n{doc.input}" if rng.random() < 0.75 else f"{doc.input}\n{head}"
                return doc

    def row_doc(self, build: Callable[[Style, Random], Doc | None], task: RowTask, style: Style, rng: Random) -> Doc | None:
        """The input of a builder, with another task's target."""
        doc = build(style, rng)
        if doc is None or not doc.rows:
            return None
        return Doc(style.rows(doc.rows), task(doc.rows, style, rng), "rows", doc.rows)

    def another(self, build: Callable[[Style, Random], Doc | None]) -> RowTask:
        """One or two more records of the same builder, in the same notation."""

        def task(_rows: Sequence[tuple[str, ...]], style: Style, rng: Random) -> str:
            docs = [build(style, rng) for _ in range(rng.choice([1, 1, 2]))]
            return "\n".join(style.rows(doc.rows) for doc in docs if doc and doc.rows)

        return task

    def text_doc(self, task: Callable[[Random], tuple[str, str] | None], rng: Random) -> Doc | None:
        """A document of a task on texts."""
        pair = task(rng)
        return Doc(pair[0], pair[1], "text") if pair and len(pair[0]) < 1200 else None

    # ---------------------------------------------------------------------------------------------- structured input to words

    def relexicalise(self, value: str, texts: list[str], rng: Random, kinds: str = "VVOPCHB") -> tuple[str, list[str]]:
        """The value and the texts with a fresh name in its place, where the texts hold it word for word."""
        if not value or not all(re.search(rf"\b{re.escape(value)}\b", t, re.I) for t in texts):
            return value, texts
        fresh = self.names.name(rng.choice(kinds), rng)
        return fresh, [re.sub(rf"\b{re.escape(value)}\b", lambda _: fresh, t, flags=re.I) for t in texts]

    def dialogue_act(self, style: Style, rng: Random) -> Doc | None:
        """RNNLG, ViGGO, Alex, Snips: what a hotel, shop, game, timetable or user means to how it is said."""
        act, slots, texts = rng.choice(self.acts)
        text = detokenise(rng.choice(texts).replace(" -s", "s"))
        items = []
        for key, value in slots:
            if key in ("name", "near", "area", "address") and rng.random() < 0.85:
                value, (text,) = self.relexicalise(
                    value, [text], rng, "R" if act.endswith(("laptop", "tv")) else "WW" if act.endswith("game") else "VVHBC"
                )
            items.append((key, value))
        if rng.random() < 0.3:
            items.insert(0, ("act", act))
        subject = next((v for k, v in items if k == "name"), "it")
        return Doc(style.pairs(items), style.voice.say(sentence_case(text), subject, rng), "acts", items)

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
        return Doc(style.pairs(out), style.voice.say(text, "us", rng), "sgd-turn", out)

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
                (rng.choice(self.names.first), "Agent"),
                ("Customer", "Agent"),
            ]
        )
        wants = {s: v for t in turns if t.speaker == "USER" for act, s, v in t.acts if act == "INFORM" and v}
        offers = {s: v for t in turns if t.speaker == "SYSTEM" for act, s, v in t.acts if act in ("OFFER", "INFORM") and v}
        intent = next((v for t in turns for act, _, v in t.acts if act == "INFORM_INTENT"), "")
        if not intent:
            return None
        details = []
        for slot, value in list(wants.items())[:3]:
            words = next((w for end, w in SLOT_WORDS.items() if slot.endswith(end)), f"with {spaced(slot)} {{v}}")
            details.append(words.replace("{v}", value))
        verb, *rest = spaced(intent).replace(" oneway", "").replace("round trip ", "").split()
        thing = " ".join(rest)
        doing = f"{verb} {thing if thing.endswith('s') else article(thing)}" if thing else verb
        text = style.voice.pick([f"{a} wants to {doing}", f"{a} asks {b} to {doing}", f"{a} would like to {doing}"], rng)
        text += "".join(" " + d for d in details) + "."
        if offers:
            text += (
                f" {b} {style.voice.pick(['offers', 'suggests', 'mentions'], rng)} "
                + Grammar.join(list(offers.values())[:3])
                + "."
            )
        glue = rng.choice(["\n", "\n", " "])
        lines = glue.join(f"{a if t.speaker == 'USER' else b}: {t.text}" for t in turns)
        return Doc(lines, style.voice.say(text, a, rng), "sgd-summary") if len(lines) < 900 else None

    def booking(self, style: Style, rng: Random) -> Doc:
        """A made-up talk at a desk, told in one sentence. Which facts come up and in what order varies, as do the wordings."""
        r = rng
        person = r.choice(self.names.first) if r.random() < 0.8 else self.names.person(r)
        agent = r.choice(["Agent", "Reception", "Clerk", "Desk", "Concierge", "Operator", r.choice(self.names.first)])
        thing = r.choice(ASKS)
        for name, draw in (
            ("n", lambda: r.choice(["two", "three", "four", "five", "six", "eight", "twelve"])),
            (
                "place",
                lambda: r.choice(
                    [self.names.place(r), "the " + r.choice(["airport", "station", "museum", "old town", "harbour"])]
                ),
            ),
            (
                "feature",
                lambda: r.choice(["a bath", "a sea view", "two beds", "a kitchen", "a desk", "a fireplace", "a large window"]),
            ),
            ("title", lambda: self.names.title(r)),
            ("person", lambda: self.names.person(r)),
            ("word", lambda: r.choice(self.names.nouns)),
        ):
            thing = thing.replace("{" + name + "}", draw())
        when = {
            "day": r.choice([f" on {r.choice(DAYS)}", " tomorrow", f" on the {r.randint(4, 20)}th", " tonight", " today"]),
            "time": r.choice([f" at {r.randint(1, 12)} o'clock", f" at {r.randint(7, 22)}:{r.choice(['00', '15', '30', '45'])}",
                              f" at half past {r.choice(['six', 'seven', 'eight', 'nine', 'ten'])}", " at noon"]),
        }  # fmt: skip
        facts = [w for w, chance in (("day", 0.8), ("time", 0.6)) if r.random() < chance]
        asked_now = [f for f in facts if r.random() < 0.5]
        says = lambda who, text: f"{who}: {text}"  # noqa: E731
        lines = (
            [says(agent, r.choice(["Good evening.", "How can I help?", f"{agent} speaking.", "Hello."]))]
            if r.random() < 0.3
            else []
        )
        lines.append(
            says(person, r.choice(REQUESTS).replace("{x}", thing).replace("{when}", "".join(when[f] for f in asked_now)))
        )
        for fact in facts:
            if fact not in asked_now:
                lines.append(
                    says(
                        agent, {"day": r.choice(["For which day?", "When?"]), "time": r.choice(["At what time?", "When?"])}[fact]
                    )
                )
                lines.append(
                    says(
                        person,
                        r.choice(["{w}.", "{w}, please.", "{w}, if possible."]).replace("{w}", when[fact].strip().capitalize()),
                    )
                )
        fine = r.random() < 0.8
        lines.append(
            says(
                agent,
                r.choice(YES) if fine else r.choice(["I am sorry, no.", "Sorry, that is not possible.", "We have none left."]),
            )
        )
        if r.random() < 0.3:
            lines.append(says(person, r.choice(["Thank you.", "Great.", "All right.", "Goodbye."])))
        told = style.voice.pick(TOLD_YES if fine else TOLD_NO, r)
        bare = re.sub(r"^(?:an?|the) ", "", thing)
        who = agent if agent[0].isupper() and agent in self.names.first else "the " + agent.lower()
        text = told.replace("{x}", thing).replace("{bare}", bare).replace("{when}", "".join(when[f] for f in facts))
        text = text.replace("{p}", person).replace("{a}", who)
        return Doc(r.choice([" ", " ", "\n"]).join(lines), style.voice.say(text[:1].upper() + text[1:], person, r), "booking")

    def country(self, style: Style, rng: Random) -> Doc:
        """The World Factbook: a country and a field to what is said of it."""
        name, field, text = rng.choice(self.material.countries)
        text = text if len(text) < 300 else re.split(r"(?<=[.;]) ", text)[0]
        return Doc(style.pairs([("country", name), ("topic", field.lower())]), text, "factbook")

    def gloss(self, style: Style, rng: Random) -> Doc:
        """WordNet: a word to its meaning or to a sentence with it."""
        word, part, meaning, example = rng.choice(self.material.glosses)
        if example and style.underscores:
            return Doc(style.pairs([("word", word), ("sentence", part)]), sentence_case(example), "wordnet")
        return Doc(style.pairs([("word", word), ("part of speech", part)]), meaning, "wordnet")

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
        return Doc(style.pairs(slots), sentence_case(text), "taskmaster-3", slots)

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
            noun = "" if re.search(r" (?:by|in|of|to)\b|^(?:has|is|was)\b", rel) else rel
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
            pairs = [("name", subject), *((rel, o) for _, rel, o in rows)]
            return Doc(style.pairs(pairs), style.voice.say(" ".join(parts), subject, r), "generic-relation", pairs)
        return Doc(style.triples(rows), style.voice.say(" ".join(parts), subject, r), "generic-relation", rows)

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
        return Doc(style.triples(rows), text, "wiki-triples", rows)

    def labelled_sentence(self, style: Style, rng: Random) -> Doc:
        """FewRel: head, relation and tail, with the sentence's other names as extra facts."""
        text, head, rel, tail = rng.choice(self.fewrel)
        rest = [m[0] for m in ENTITY.finditer(text) if m[0] not in head and m[0] not in tail and m[0].lower() not in STOP]
        rows = [(head, camel(rel), tail), *((head, rng.choice(["mentions", "with", "and"]), name) for name in rest[:4])]
        return Doc(style.triples(rows), text, "fewrel", rows)

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

    # --------------------------------------------------------------------------------------------------------------- texts

    def sentence(self, rng: Random) -> str:
        """A sentence of Wikipedia or of the prose."""
        if rng.random() < 0.6:
            return rng.choice(rng.choice(self.wiki)[1])
        paragraph = rng.choice(rng.choice(self.material.prose)[1])
        return rng.choice(re.split(r"(?<=[a-z][.!?]) (?=[A-Z])", paragraph))

    def split(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """WikiSplit: one long sentence to two."""

        def task(rng: Random) -> tuple[str, str] | None:
            whole, parts = rng.choice(self.wiki)
            return (whole, " ".join(parts)) if len(parts) > 1 else None

        return task

    def fuse(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """WikiSplit: two sentences to one."""

        def task(rng: Random) -> tuple[str, str] | None:
            whole, parts = rng.choice(self.wiki)
            return (" ".join(parts), whole) if len(parts) > 1 else None

        return task

    def recase(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """Lower case without punctuation to proper writing."""

        def task(rng: Random) -> tuple[str, str] | None:
            text = self.sentence(rng)
            return re.sub(r"[^\w\s'-]", "", text).lower(), text

        return task

    def unscramble(self, rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """Shuffled words, or words with gaps, to the sentence."""
        gaps = rng.random() < 0.5

        def task(rng: Random) -> tuple[str, str] | None:
            text = self.sentence(rng)
            words = text.split()
            if not 4 < len(words) < 26:
                return None
            kept = ["_" if rng.random() < 0.2 else w for w in words] if gaps else rng.sample(words, len(words))
            return " ".join(kept), text

        return task

    def find_names(self, rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """A sentence to the names and numbers in it."""
        glue = rng.choice([", ", " | ", "\n"])

        def task(rng: Random) -> tuple[str, str] | None:
            text = self.sentence(rng)
            return text, glue.join(dict.fromkeys(m[0] for m in ENTITY.finditer(text) if m[0].lower() not in STOP))

        return task

    def first_sentence(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """A paragraph to its first sentence."""

        def task(rng: Random) -> tuple[str, str] | None:
            parts = re.split(r"(?<=[a-z][.!?]) (?=[A-Z])", rng.choice(rng.choice(self.material.prose)[1]))
            return (" ".join(parts[:3]), parts[0]) if len(parts) > 2 else None

        return task

    def title(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """A paragraph to the title of its text."""

        def task(rng: Random) -> tuple[str, str] | None:
            title, paragraphs = rng.choice(self.material.prose)
            return (paragraphs[0], title) if title else None

        return task

    def next_turn(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """A dialogue to its next turn."""

        def task(rng: Random) -> tuple[str, str] | None:
            if rng.random() < 0.25:
                turns = rng.choice(self.material.drive_through)
            else:
                turns = [(t.speaker.capitalize(), t.text) for t in rng.choice(self.sgd)[1]]
            at = rng.randrange(1, len(turns))
            return "\n".join(f"{a}: {b}" for a, b in turns[max(0, at - 4) : at]), ": ".join(turns[at])

        return task

    def answer(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """QED: a Wikipedia paragraph and a question to the answer."""

        def task(rng: Random) -> tuple[str, str] | None:
            question, reply, paragraph = rng.choice(self.material.questions)
            return f"{paragraph}\n{question}", reply

        return task

    def word_for(self, _rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """WordNet: a meaning to its word."""

        def task(rng: Random) -> tuple[str, str] | None:
            word, part, meaning, _ = rng.choice(self.material.glosses)
            return f"{meaning} ({part})", word

        return task

    def repeat(self, rng: Random) -> Callable[[Random], tuple[str, str] | None]:
        """Copying of names in one of several settings, and of sentences."""
        way = rng.randrange(5)

        def task(rng: Random) -> tuple[str, str] | None:
            kinds = ["P", "O", "C", "B", "W", "V", "DATE", "NUM", "CODE"]
            items = [self.names.value(rng.choice(kinds), rng).raw for _ in range(rng.randint(2, 6))]
            if way == 0:
                return " | ".join(items), Grammar.join(items) + "."
            if way == 1:
                return ", ".join(items), ", ".join(reversed(items))
            if way == 2:
                return " | ".join(i.replace(" ", "_") for i in items), ", ".join(items)
            if way == 3:
                return ", ".join(items), ", ".join(sorted(items))
            text = self.sentence(rng)
            return text, text

        return task

    def plain(self, rng: Random) -> Doc:
        """Plain text: prose, Wikipedia sentences, dialogues, the Factbook, WordNet."""
        source = rng.choices(["prose", "wiki", "dialogue", "order", "country", "gloss"], [0.56, 0.16, 0.14, 0.02, 0.04, 0.08])[0]
        if source == "prose":
            title, paragraphs = rng.choice(self.material.prose)
            at = rng.randrange(len(paragraphs))
            head = f"{title}\n" if title and at == 0 else ""
            return Doc("", head + "\n".join(paragraphs[at : at + 4]), "prose")
        if source == "wiki":
            at = rng.randrange(len(self.wiki))
            return Doc("", " ".join(w for w, _ in self.wiki[at : at + 2]), "wiki")
        if source == "country":
            name, field, text = rng.choice(self.material.countries)
            return Doc("", f"{name}, {field.lower()}: {text}", "factbook")
        if source == "gloss":
            word, part, meaning, example = rng.choice(self.material.glosses)
            return Doc("", f"{word} ({part}): {meaning}." + (f" {sentence_case(example)}" if example else ""), "wordnet")
        turns = [(t.speaker.capitalize(), t.text) for t in rng.choice(self.sgd)[1]]
        if source == "order":
            turns = rng.choice(self.material.drive_through)
        at = rng.randrange(len(turns))
        return Doc("", "\n".join(f"{who}: {said}" for who, said in turns[at : at + 8]), "dialogue")
