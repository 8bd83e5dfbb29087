"""Baselines: what fine-tuning, adapters and other light methods reach with the same data and the same budget as a prefix.

In: one customer of a job. Out: for each method its outputs for the test split, what it cost, and one table of them all. Nothing of it is
served or registered: it is there to choose a method by. Light to import.
"""
