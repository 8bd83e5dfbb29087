"""Answers for many customers in one batch: the decoding loop, prefixes in memory, ensembles, the HTTP service (`pipeline.inference.service`)."""

from pipeline.inference.decoder import Decoder
from pipeline.inference.engine import PrefixEngine, load_engine
from pipeline.inference.prefixes import PrefixMemory
from pipeline.inference.request import BASE_ALONE, Decoding, Members, Request

__all__ = ["BASE_ALONE", "Decoder", "Decoding", "Members", "PrefixEngine", "PrefixMemory", "Request", "load_engine"]
