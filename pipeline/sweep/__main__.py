"""`accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.sweep TASK.json`: judge the trained settings of a sweep."""

import argparse
import os
import sys
from pathlib import Path

from pipeline.errors import PrefixFleetError
from pipeline.files import read_json
from pipeline.process import begin_stage
from pipeline.training.job import read_job


def main() -> int:
    """Exit status: 0 the sweep's files are written, 2 task, job or base unusable or nothing to choose from, 143 SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.sweep", description="Judge the settings of a sweep.")
    parser.add_argument("task", type=Path, help="what it is about, as `prefixfleet sweep` writes it; the result goes beside it")
    arguments = parser.parse_args()
    begin_stage()
    if os.environ.get("RANK", "0") != "0":
        return 0  # the launcher's config may name several processes for training; generation needs one
    try:
        task = read_json(arguments.task, 1)
        job = read_job(Path(task["job"]))
        # Only now, with the parent watched and a job in hand: importing torch takes seconds.
        from pipeline.inference import load_engine
        from pipeline.sweep.report import write_sweep
        from pipeline.sweep.score import score_sweep

        write_sweep(score_sweep(job, task, load_engine), arguments.task.parent)
    except PrefixFleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
