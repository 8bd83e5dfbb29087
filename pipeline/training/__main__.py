"""`accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.training JOB.yaml`."""

import argparse
import sys
from pathlib import Path

from pipeline.errors import PrefixFleetError
from pipeline.process import exit_with_parent, share_cores


def main() -> int:
    """Exit status: 0 the process did its work (failed customers say so in their results), 2 the job or its base is unusable."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.training", description="Train the prefixes of a job.")
    parser.add_argument("job", type=Path, help="job file, as `prefixfleet train FLEET.yaml` writes it")
    arguments = parser.parse_args()
    exit_with_parent()
    share_cores()
    # After the parent is watched, for importing torch takes seconds.
    from pipeline.training.job import read_job
    from pipeline.training.run import run_job

    try:
        run_job(read_job(arguments.job))
    except PrefixFleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
