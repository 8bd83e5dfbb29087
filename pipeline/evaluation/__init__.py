"""Evaluation: generate for the test split, score, compare with the base, decide, report.

In: prepared data and prefix folders, named by a job. Out: `evaluations/<customer>/<task>/<digest>/` (see `run` for what is in
it). Run it as `python -m pipeline.evaluation JOB.yaml`. Light to import: the metric packages are imported by the modules that
need them.
"""
