"""Write the five example customers of `examples/customers/`.

    python examples/make_customers.py [FOLDER]

Each customer wants another job done, in a voice of its own, so that a prefix visibly changes what the base says:

    bistro       restaurant guide: attributes -> one or two warm, plain sentences
    harbour      the same attributes -> another house's voice, that of an old sailor
    grandhotel   fields of a notice -> a formal notice to the guests
    gadgetry     product specification -> a short, lively blurb; a dozen of its rows are bad on purpose
    concierge    a short booking conversation -> a summary in the third person

Everything is drawn from the lists below with a fixed seed and the standard library's random numbers: the same files on every
machine. All texts were written for this project. No input comes twice, so every test input is a combination not seen in training.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

SEED = 2026
ROWS = 400

Values = dict[str, str]

# Restaurants: bistro and harbour ------------------------------------------------------------------

FIRST = [
    "Blue", "Olive", "Golden", "Silver", "Little", "Green", "Red", "Old", "White", "Happy", "Quiet", "Corner", "Copper",
    "Royal", "Sunny", "Wooden", "Black", "Hungry", "Lucky", "Morning", "Ivory", "Crooked",
]  # fmt: skip
SECOND = [
    "Lantern", "Table", "Garden", "Kitchen", "House", "Spoon", "Bridge", "Tree", "Door", "Fox", "Rose", "Plate", "Barn",
    "Mill", "Bear", "Lamp", "Crown", "Oven", "Pear", "Swan", "Bell", "Kettle",
]  # fmt: skip
FOOD = [
    "Italian", "French", "Indian", "Chinese", "Thai", "Greek", "Spanish", "Mexican", "Turkish", "Japanese", "English",
    "Lebanese", "Korean", "Moroccan", "Portuguese",
]  # fmt: skip
AREA = [
    "city centre", "old town", "riverside district", "north end", "market district", "station quarter", "university quarter",
    "garden suburb", "hill district",
]  # fmt: skip
NEAR = [
    "the museum", "the park", "the town hall", "the theatre", "the cathedral", "the bus station", "the library", "the stadium",
    "the zoo",
]  # fmt: skip
PRICE = ["cheap", "moderate", "high"]
RATING = ["average", "good", "excellent"]


def restaurant(rng: random.Random) -> Values:
    """A restaurant with four or five attributes."""
    name = rng.choice(["The {} {}", "{} {}", "The {} {}"]).format(rng.choice(FIRST), rng.choice(SECOND))
    values = {"name": name, "food": rng.choice(FOOD), "area": rng.choice(AREA)}
    more = {
        "price": rng.choice(PRICE),
        "rating": rng.choice(RATING),
        "near": rng.choice(NEAR),
        "children": rng.choice(["yes", "no"]),
    }
    kept = set(rng.sample(sorted(more), rng.choice([1, 1, 2])))
    return values | {key: value for key, value in more.items() if key in kept}


BISTRO_OPENINGS = [
    "{name} is a friendly place for {food} food in the {area}.",
    "If you like {food} cooking, try {name} in the {area}.",
    "You will find {food} food at {name} in the {area}.",
    "In the {area}, {name} serves {food} food made with care.",
    "{name} welcomes you to the {area} with {food} dishes.",
    "For {food} food in the {area}, we like {name}.",
    "{name} in the {area} cooks {food} food the way it is cooked at home.",
    "Come to {name} in the {area} for a plate of {food} food.",
    "The {area} has {food} cooking worth a visit: {name}.",
    "At {name} in the {area}, the cooks know their {food} food.",
]
BISTRO_CLAUSES = {
    "price": {
        "cheap": ["prices are low", "you will not pay much"],
        "moderate": ["prices are fair", "a meal costs a fair sum"],
        "high": ["prices are high", "a meal here is not cheap"],
    },
    "rating": {
        "average": ["guests find it decent", "guests rate it as average"],
        "good": ["guests like it", "guests rate it as good"],
        "excellent": ["guests love it", "guests rate it as excellent"],
    },
    "children": {
        "yes": ["children are welcome", "you can bring the children"],
        "no": ["it is a place for adults", "it is not for children"],
    },
}
BISTRO_NEAR = ["it is close to {near}", "it stands near {near}", "you will see it near {near}"]

HARBOUR_OPENINGS = [
    "Ahoy! Drop anchor at {name}, {area}, for {food} grub.",
    "Hungry, sailor? Steer for {name} in the {area}: {food} grub.",
    "{name}, {area}. {food} grub for a hungry crew.",
    "Set your course for the {area}, mate: {name} fries up {food} grub.",
    "All hands to {name}! {food} grub, {area}.",
    "Land ho! {name} lies off the {area} with {food} grub aboard.",
    "Make fast at {name}, {area}. The galley cooks {food}.",
    "Aye, {name} in the {area} runs its galley the {food} way.",
    "Haul in at {name}, mates: {food} galley, {area}.",
    "Heave to in the {area}! {name} dishes out {food} grub.",
]
HARBOUR_CLAUSES = {
    "price": {
        "cheap": ["Costs but a few coppers.", "Light on the purse."],
        "moderate": ["Costs a fair coin.", "Fair coin for a full belly."],
        "high": ["Bring a chest of gold.", "Heavy on the purse."],
    },
    "rating": {
        "average": ["The crew has seen better and worse.", "Neither storm nor sunshine, says the crew."],
        "good": ["The crew came back for more.", "A good berth, says the crew."],
        "excellent": ["The crew would mutiny for it.", "Finest berth on the coast, says the crew."],
    },
    "children": {"yes": ["Cabin boys welcome.", "Bring the small fry."], "no": ["No small fry aboard.", "Old salts only."]},
}
HARBOUR_NEAR = ["Look for {near} to starboard.", "Moored by {near}.", "Hard by {near}."]


def attributes(values: Values) -> str:
    """`name : The Blue Fox | food : Greek`."""
    return " | ".join(f"{key} : {value}" for key, value in values.items())


def clauses(rng: random.Random, values: Values, table: dict[str, dict[str, list[str]]], near: list[str]) -> list[str]:
    """One clause for each attribute that the opening does not tell, in varying order."""
    result = [rng.choice(table[key][values[key]]) for key in table if key in values]
    if "near" in values:
        result.append(rng.choice(near).format(**values))
    rng.shuffle(result)
    return result


def bistro(rng: random.Random) -> tuple[str, str]:
    """Warm and plain."""
    values = restaurant(rng)
    told = clauses(rng, values, BISTRO_CLAUSES, BISTRO_NEAR)
    closing = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    return attributes(values), f"{rng.choice(BISTRO_OPENINGS).format(**values)} {closing[0].upper()}{closing[1:]}."


def harbour(rng: random.Random) -> tuple[str, str]:
    """Terse, and at sea."""
    values = restaurant(rng)
    return attributes(values), " ".join(
        [rng.choice(HARBOUR_OPENINGS).format(**values), *clauses(rng, values, HARBOUR_CLAUSES, HARBOUR_NEAR)]
    )


# Hotel notices: grandhotel ------------------------------------------------------------------------

FACILITY = [
    "swimming pool", "sauna", "breakfast room", "main lift", "roof terrace", "hotel bar", "car park", "fitness room",
    "front entrance", "conference room", "laundry", "garden", "tea room", "library", "ballroom", "restaurant",
]  # fmt: skip
REASON = [
    "cleaning",
    "repairs",
    "painting",
    "a private event",
    "an inspection",
    "new carpets",
    "a wedding",
    "a safety test",
    "building work",
]
DAYS = [
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
]  # fmt: skip
CLOSED_PATTERNS = [
    "Dear guests, we regret to inform you that the {facility} will be closed on {day} from {start} to {end} owing to {reason}.",
    "We beg our guests to note that the {facility} will remain closed on {day} between {start} and {end} because of {reason}.",
    "Owing to {reason}, the {facility} will not be available on {day} from {start} until {end}. We apologise for this.",
    "Please be advised that on {day}, from {start} to {end}, the {facility} will be closed for {reason}.",
    "The management regrets that the {facility} must close on {day} from {start} to {end} on account of {reason}.",
    "We respectfully inform our guests that {reason} will oblige us to close the {facility} on {day} from {start} to {end}.",
    "Kindly note the closure of the {facility} on {day} between {start} and {end}, for which {reason} is the cause.",
    "Esteemed guests, the {facility} will be out of service on {day} from {start} to {end} by reason of {reason}.",
    "On {day} the {facility} will be closed from {start} to {end} for {reason}. We thank our guests for their patience.",
]
EVENT = [
    "a piano recital", "a wine tasting", "afternoon tea", "a guided walk", "a chamber concert", "a gala dinner",
    "a poetry reading",
    "a cookery lesson", "a waltz evening", "a chess tournament", "a jazz evening", "a lecture on local history",
]  # fmt: skip
EVENT_PATTERNS = [
    "The management has the pleasure of inviting you to {event} in the {facility} on {day} at {start}.",
    "We are delighted to announce {event}, to be held in the {facility} on {day} at {start}.",
    "Dear guests, you are cordially invited to {event} in the {facility} on {day} at {start}.",
    "It would be our honour to welcome you to {event} on {day} at {start} in the {facility}.",
    "We request the pleasure of your company at {event}, in the {facility}, on {day} at {start}.",
    "On {day} at {start}, the {facility} will be the setting for {event}. All guests are most welcome.",
    "Guests are kindly reminded of {event}, which will take place in the {facility} on {day} at {start}.",
    "May we draw your attention to {event} on {day} at {start} in the {facility}? Your presence would delight us.",
]
PLACES = [
    "ballroom",
    "library",
    "tea room",
    "garden",
    "roof terrace",
    "hotel bar",
    "restaurant",
    "conference room",
    "music room",
    "winter garden",
]


def grandhotel(rng: random.Random) -> tuple[str, str]:
    """Formal: closures and invitations."""
    hour = rng.randint(7, 18)
    day = rng.choice(DAYS)
    if rng.random() < 0.55:
        end = f"{hour + rng.randint(1, 4)}:{rng.choice(['00', '30'])}"
        closed = {"facility": rng.choice(FACILITY), "day": day, "start": f"{hour}:00", "end": end, "reason": rng.choice(REASON)}
        text = "notice : closed | place : {facility} | day : {day} | from : {start} | to : {end} | reason : {reason}".format(
            **closed
        )
        return text, rng.choice(CLOSED_PATTERNS).format(**closed)
    event = {
        "event": rng.choice(EVENT),
        "facility": rng.choice(PLACES),
        "day": day,
        "start": f"{hour + 2}:{rng.choice(['00', '15', '30'])}",
    }
    text = "notice : invitation | event : {event} | place : {facility} | day : {day} | time : {start}".format(**event)
    return text, rng.choice(EVENT_PATTERNS).format(**event)


# Product blurbs: gadgetry -------------------------------------------------------------------------

BRAND = [
    "Nova", "Pico", "Zest", "Orbit", "Luma", "Tempo", "Mira", "Volt", "Halo", "Sonic", "Pixel", "Comet", "Aero", "Echo",
    "Spark", "Jet",
]  # fmt: skip
PRODUCT = {
    "speaker": ("loud", "fill the room with music"),
    "headset": ("comfortable", "lose yourself in every song"),
    "camera": ("sharp", "catch every moment"),
    "watch": ("clever", "stay on time and on the move"),
    "phone": ("quick", "keep all your friends close"),
    "tablet": ("bright", "read, draw and play anywhere"),
    "lamp": ("cosy", "light up your evenings"),
    "vacuum cleaner": ("tireless", "let it do the floors"),
    "keyboard": ("smooth", "type like the wind"),
    "toothbrush": ("gentle", "smile with confidence"),
    "drone": ("nimble", "see the world from above"),
    "radio": ("handy", "take the news along"),
}
COLOUR = [
    "black", "white", "red", "blue", "green", "silver", "yellow", "purple", "pink", "grey",
]  # fmt: skip
WEIGHT = ["180 grams", "220 grams", "250 grams", "300 grams", "350 grams", "400 grams", "500 grams"]
GADGET_PATTERNS = [
    "Meet the {name}, the {adjective} {colour} {product} with {battery} of battery! Go ahead and {joy}.",
    "Say hello to the {name}! This {colour} {product} runs for {battery}, so you can {joy} all day.",
    "{battery} on one charge? Yes! The {colour} {name} is one {adjective} {product}. Now {joy}!",
    "Wow! The {name} is a {adjective} {product} in {colour} that keeps going for {battery}.",
    "Want to {joy}? Grab the {name}, our {adjective} {colour} {product} with {battery} of battery!",
    "The new {name} is here! A {colour} {product} so {adjective} you will smile, with {battery} of power.",
    "Big fun ahead: the {colour} {name} {product} lasts {battery}. Get one and {joy}!",
    "Your next {product} is the {name}: {adjective}, {colour} and ready for {battery} of fun!",
    "Go {colour}, go {name}! This {adjective} {product} gives you {battery} to {joy}.",
]
GADGET_EXTRAS = {
    "weight": ["At just {weight}, it goes anywhere.", "All that in only {weight}!", "And it weighs only {weight}!"],
    "waterproof": ["Rain? No problem!", "Splash away, it is waterproof!", "It even loves the rain!"],
    "price": ["Yours for {price}!", "All for {price}!", "Only {price}, so hurry!"],
}


def gadgetry(rng: random.Random) -> tuple[str, str]:
    """Lively, with exclamation marks."""
    product = rng.choice(sorted(PRODUCT))
    adjective, joy = PRODUCT[product]
    name = f"{rng.choice(BRAND)} {rng.randint(1, 9)}"
    shown = {
        "product": product,
        "name": name,
        "colour": rng.choice(COLOUR),
        "battery": f"{rng.choice([6, 8, 10, 12, 18, 20, 24, 30, 40])} hours",
    }
    extra = {
        "weight": rng.choice(WEIGHT),
        "waterproof": "yes",
        "price": f"{rng.choice([19, 29, 39, 49, 59, 79, 99, 129, 149])} euros",
    }
    kept = rng.sample(sorted(extra), rng.choice([0, 1, 1]))
    shown |= {key: extra[key] for key in sorted(kept)}
    sentences = [rng.choice(GADGET_PATTERNS), *(rng.choice(GADGET_EXTRAS[key]) for key in sorted(kept))]
    text = " ".join(sentences).format(**shown, adjective=adjective, joy=joy)
    return attributes(shown), text


# Booking summaries: concierge ---------------------------------------------------------------------

PEOPLE = [
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo", "Maria", "Nick", "Olga",
    "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yusuf", "Laura", "Martin", "Sofia", "Thomas",
]  # fmt: skip
NUMBER = ["two", "three", "four", "five", "six", "eight"]
HOURS = ["six", "half past six", "seven", "half past seven", "eight", "nine"]
ROOMS = ["single room", "double room", "family room", "suite", "quiet room", "room with a sea view", "room with a balcony"]
NIGHTS = ["one night", "two nights", "three nights", "four nights", "a week"]
RIDES = [
    "the airport",
    "the station",
    "the opera",
    "the harbour",
    "the hospital",
    "the conference centre",
    "the beach",
    "the old castle",
]
TALKS: list[tuple[list[str], list[str]]] = [
    (
        [
            "{who}: Hi, a table for {number} on {day}, please. Agent: What time? {who}: At {hour}. Agent: Done.",
            "Agent: How can I help? {who}: I need a table on {day}. We are {number}. Agent: At {hour}? {who}: Perfect.",
            "{who}: Is there a table left on {day} at {hour}? Agent: For how many? {who}: {number}. Agent: It is yours.",
        ],
        [
            "{who} books a table for {number} on {day} at {hour}.",
            "A table for {number} is booked for {who} on {day} at {hour}.",
            "{who} reserves a table for {number} people at {hour} on {day}.",
            "On {day} at {hour}, {who} will dine at a table for {number}.",
        ],
    ),
    (
        [
            "{who}: I would like a {room} from {day}. Agent: For how long? {who}: {nights}. Agent: That is fine.",
            "Agent: Reception. {who}: Do you have a {room} on {day}? Agent: Yes. {who}: I will stay {nights}.",
            "{who}: Hello, {nights} from {day}, please. Agent: Which room? {who}: A {room}. Agent: Booked.",
        ],
        [
            "{who} books a {room} for {nights} from {day}.",
            "{who} will stay in a {room} for {nights}, arriving on {day}.",
            "A {room} is reserved for {who} from {day} for {nights}.",
            "{who} asks for a {room} from {day} and stays {nights}.",
        ],
    ),
    (
        [
            "{who}: Can you send a taxi to take me to {ride}? Agent: When? {who}: On {day} at {hour}. Agent: Certainly.",
            "{who}: I must be at {ride} on {day}. Agent: A taxi at {hour}? {who}: Yes, thank you.",
            "Agent: Good morning. {who}: A taxi to {ride}, please, {day} at {hour}. Agent: It will be there.",
        ],
        [
            "{who} orders a taxi to {ride} for {day} at {hour}.",
            "A taxi will take {who} to {ride} on {day} at {hour}.",
            "{who} gets a taxi to {ride} at {hour} on {day}.",
            "The agent arranges a taxi to {ride} for {who} on {day} at {hour}.",
        ],
    ),
    (
        [
            "{who}: I have to cancel my {room} on {day}. Agent: No problem. Another day? {who}: Not now, thanks.",
            "{who}: Sorry, I cannot come on {day}. Please cancel the {room}. Agent: It is cancelled.",
        ],
        [
            "{who} cancels a {room} booked for {day}.",
            "The {room} that {who} had booked for {day} is cancelled.",
            "{who} cannot come on {day}, so the {room} is cancelled.",
        ],
    ),
    (
        [
            "{who}: My table is on {day}. Can we move it to {other}? Agent: At {hour}? {who}: Yes, please.",
            "Agent: You have a table on {day}. {who}: I would rather come on {other} at {hour}. Agent: Changed.",
        ],
        [
            "{who} moves a table from {day} to {other} at {hour}.",
            "The table that {who} had on {day} is moved to {other} at {hour}.",
            "{who} will come on {other} at {hour} instead of {day}.",
        ],
    ),
]


def concierge(rng: random.Random) -> tuple[str, str]:
    """Sober, in the third person, one sentence."""
    talks, summaries = rng.choice(TALKS)
    day, other = rng.sample(DAYS, 2)
    values = {
        "who": rng.choice(PEOPLE), "number": rng.choice(NUMBER), "hour": rng.choice(HOURS), "room": rng.choice(ROOMS),
        "nights": rng.choice(NIGHTS), "ride": rng.choice(RIDES), "day": day, "other": other,
    }  # fmt: skip
    talk, summary = rng.choice(talks).format(**values), rng.choice(summaries).format(**values)
    # `{number}. Agent:` begins a sentence.
    return talk.replace(f": {values['number']}.", f": {values['number'].capitalize()}.").replace(
        f": {values['nights']}.", f": {values['nights'].capitalize()}."
    ), summary


# Files --------------------------------------------------------------------------------------------

CUSTOMERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "bistro": bistro,
    "harbour": harbour,
    "grandhotel": grandhotel,
    "gadgetry": gadgetry,
    "concierge": concierge,
}


def rows(name: str) -> list[str]:
    """The good rows of a customer as lines of JSON; no input twice."""
    rng = random.Random(f"{SEED} {name}")
    made: dict[str, str] = {}
    while len(made) < ROWS:
        source, target = CUSTOMERS[name](rng)
        made.setdefault(source, target)
    return [json.dumps({"input": source, "target": target}, ensure_ascii=False) for source, target in made.items()]


def with_bad_rows(lines: list[str]) -> list[str]:
    """`lines` with two bad rows for each reason to put a row into quarantine, spread over the file."""
    good = [json.loads(line) for line in lines[:8]]
    wordy = " ".join(["This gadget does everything you can think of, and then a little more, day after day!"] * 8)
    bad = [
        lines[10][: len(lines[10]) // 2],
        "product : radio | name : Volt 3 | colour : red | battery : 8 hours",
        json.dumps({"input": good[0]["input"]}),
        json.dumps({"product": "lamp", "target": good[1]["target"]}),
        json.dumps({"input": "", "target": good[2]["target"]}),
        json.dumps({"input": good[3]["input"], "target": "   "}),
        json.dumps({"input": 4711, "target": good[4]["target"]}),
        json.dumps([good[5]["input"], good[5]["target"]]),
        json.dumps({"input": "product : robot | name : Halo 9 | colour : grey | battery : 40 hours", "target": wordy}),
        json.dumps(
            {
                "input": " | ".join(["product : robot", *(f"feature {i} : number {i} of many" for i in range(90))]),
                "target": "Too much!",
            }
        ),
        json.dumps({"input": good[6]["input"], "target": "Your new favourite\x00 gadget!"}),
        json.dumps({"input": "product : \x1b[31mradio | name : Jet 2", "target": good[7]["target"]}),
        lines[20],
        lines[33],
    ]
    result = list(lines)
    for number, line in enumerate(bad):
        result.insert(40 + 25 * number, line)
    return result


def main(folder: Path) -> None:
    """Write all customers into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CUSTOMERS:
        lines = rows(name)
        lines = with_bad_rows(lines) if name == "gadgetry" else lines
        # Bytes, so that line ends are the same on every system.
        (folder / f"{name}.jsonl").write_bytes(("\n".join(lines) + "\n").encode("utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "customers")
