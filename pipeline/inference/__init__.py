"""Answers for many customers in one batch."""

from pipeline.inference.engine import PrefixEngine, load_engine

__all__ = ["PrefixEngine", "load_engine"]
