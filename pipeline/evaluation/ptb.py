"""Words as the Penn Treebank counts them, in lower case and without punctuation: what the COCO and E2E scorers count.

In: a text. Out: its words. Equal to Stanford's PTBTokenizer (CoreNLP 3.4.1, `-lowerCase`) followed by COCO's list of punctuation
to drop, on the texts that these metrics are used for: English sentences with names, numbers, prices, dates and addresses. What
of it is not here: foreign currencies, emoticons, and the longer tail of its abbreviations.
"""

import functools
import re

# COCO drops these tokens. Brackets stay, as -lrb- and so on: its list has them in capitals, and tokens come in lower case.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "–", "—", "…"])

# A full stop belongs to these wherever they stand.
_ABBREVIATIONS = (
    "adj|adm|adv|asst|ave|bancorp|bldg|blvd|bros|capt|cmdr|co|col|comdr|corp|ct|dept|det|dr|drs|ens|esq|ft|gen|"
    "gov|hon|hosp|hwy|inc|insp|jr|lt|ltd|maj|messrs|mlle|mme|mr|mrs|ms|msgr|mt|op|ord|pfc|ph|prof|pvt|rep|reps|"
    "res|rev|rt|sen|sens|sfc|sgt|sr|st|ste|supt|surg|univ|vs|etc|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|"
    "dec|mon|tue|tues|wed|thu|thurs|fri|fig|figs|pp|vol|ed|eds|al|calif|fla|ga|ill|ind|mass|mich|minn|mo|pa|"
    "tenn|tex|va|wash|wis|ariz|ark|colo|conn|del"
)

_WORD = r"[^\W_](?:\w|\u0307|[&'](?=\w))*"
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)[^\s<>"]*[^\s<>".,;:!?')]     # an address
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | \#[^\W\d_]+                                    # #person 1
    | \.{{3,}} | …
    | (?:[^\W\d_]\.){{2,}}(?=\W|$)                     # initials: u.s. and j.r.r.
    | [^\W\d_]\.(?=\s+\w)
    | (?:{_ABBREVIATIONS})\.(?!\w)
    | no\.(?=\s*\d)
    | [^\W\d_]{{2,}}\.(?=,)                           # whatever stands before "., " is an abbreviation
    | [+-]?\d+(?:[.,:/]\d+)+(?:-{_WORD})*              # 2702.0, 1,095, 10:30, 1/2; a unit behind is a word of its own
    | [+-]?\d\w*(?:[-/]{_WORD})*                     # 20-25, 3rd, 18l/36r
    | {_WORD}(?:[-./]{_WORD})*                       # family-friendly
    | '(?:s|m|d|re|ve|ll|em|n|t)(?!\w)
    | -{{2,}}
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?:n't|'(?:s|m|d|re|ve|ll|em))$")
_SPELT = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#"}
# Two words in one, as the Treebank has them.
_PAIRS = {"cannot": 3, "gonna": 3, "gotta": 3, "gimme": 3, "lemme": 3, "wanna": 3, "d'ye": 2, "more'n": 4, "'tis": 2, "'twas": 2}


@functools.lru_cache(maxsize=50_000)
def ptb_tokens(text: str) -> tuple[str, ...]:
    """The words of `text`."""
    found: list[str] = []
    for token in _TOKEN.findall(text.lower().replace("’", "'").replace("‘", "'")):
        if token in _PAIRS:
            found += [token[: _PAIRS[token]], token[_PAIRS[token] :]]
        elif (clitic := _CLITIC.search(token)) and clitic.start():
            found += [token[: clitic.start()], clitic.group()]
        else:
            found.append(_SPELT.get(token, token))
    return tuple(token for token in found if token not in _DROPPED)
