"""When what runs: Prefect flows and tasks over the stages of `pipeline`, and the command `prefixfleet`. Imports no torch."""
