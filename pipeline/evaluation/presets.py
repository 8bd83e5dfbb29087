"""How texts are compared: the conventions of the published tasks, by name.

A preset fixes case, tokenisation, smoothing and the number of references; which metrics it computes is a setting's default
(`pipeline.config.PRESETS`).
"""

import re
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import EvaluationError


@dataclass(frozen=True)
class Preset:
    """Conventions for BLEU, chrF, NIST, TER and METEOR; ROUGE, CIDEr and the others have one way only.

    Attributes:
        lowercase: BLEU and chrF without case.
        tokenize: sacrebleu's tokeniser for BLEU.
        smooth: sacrebleu's smoothing of BLEU.
        prepare: what is done to outputs and references before BLEU, NIST, TER and METEOR.
        max_references: only so many of each record's references, for the same metrics; None: all.
        pad_references: BLEU's treatment of records with fewer references than others: they lack them (False), or have empty texts.
    """

    lowercase: bool = False
    tokenize: Literal["13a", "none"] = "13a"
    smooth: Literal["exp", "none"] = "exp"
    prepare: Literal["webnlg"] | None = None
    max_references: int | None = None
    pad_references: bool = False

    def prepared(self, text: str) -> str:
        """`text` as BLEU, NIST, TER and METEOR get it."""
        return text if self.prepare is None else _webnlg(text)

    @property
    def signature(self) -> str:
        """What `prepared` and `max_references` add to a metric's signature."""
        parts = [] if self.prepare is None else [f"prep:{self.prepare}"]
        if self.max_references is not None:
            parts.append(f"refs:first{self.max_references}")
        return "".join(f"|{part}" for part in parts)


PRESETS = {
    "default": Preset(),
    # The E2E NLG challenge: tuetschek/e2e-metrics.
    "e2e": Preset(lowercase=True),
    # The WebNLG 2017 challenge's scripts.
    "webnlg": Preset(tokenize="none", smooth="none", prepare="webnlg", max_references=3, pad_references=True),
    "summarization": Preset(),
}


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        EvaluationError: there is none.
    """
    try:
        return PRESETS[name]
    except KeyError as error:
        raise EvaluationError(f"unknown preset {name!r}. Known: {', '.join(PRESETS)}.") from error


def _webnlg(text: str) -> str:
    """ASCII, lower case, every sign that is no letter, digit or underscore a token."""
    # The scripts use Unidecode; text-unidecode has the same Perl module's tables under the Artistic licence.
    from text_unidecode import unidecode

    return " ".join(" ".join(re.split(r"(\W)", unidecode(text).lower())).split())
