"""`accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.evaluation JOB.yaml`."""

import argparse
import os
import sys
from pathlib import Path

from pipeline.errors import PrefixFleetError
from pipeline.process import begin_stage
from pipeline.training.job import read_job


def main() -> int:
    """Exit status: 0 the process did its work (failed customers say so in their results), 2 job or base unusable, 143 SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation", description="Evaluate the prefixes of a job.")
    parser.add_argument("job", type=Path, help="job file, as `prefixfleet train FLEET.yaml` writes it")
    arguments = parser.parse_args()
    begin_stage()
    if os.environ.get("RANK", "0") != "0":
        return 0  # the launcher's config may name several processes for training; generation needs one
    try:
        job = read_job(arguments.job)
        # Only now, with the parent watched and a job in hand: importing torch takes seconds.
        from pipeline.evaluation.run import evaluate_job
        from pipeline.inference import load_engine

        evaluate_job(job, load_engine)
    except PrefixFleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
