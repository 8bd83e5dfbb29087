"""Data: read, validate, quarantine, split, tokenise, fingerprint.

In: a customer's files or hub data set, and the base's tokenizer. Out: `prepared/<customer>/<task>/` (see `records` for what is
in it). Light to import: `read_split` and `encode_prompt` also serve GPU nodes, where neither datasets nor pydantic need be
installed.
"""

from pipeline.data.prompt import encode_prompt, load_tokenizer
from pipeline.data.records import Record, read_card, read_split
from pipeline.data.stage import Prepared, is_prepared, prepare, prepare_fresh, prepared_card, same_sources

__all__ = [
    "Prepared",
    "Record",
    "encode_prompt",
    "is_prepared",
    "load_tokenizer",
    "prepare",
    "prepare_fresh",
    "prepared_card",
    "read_card",
    "read_split",
    "same_sources",
]
