"""The command `prefixfleet` with `fake_stage.py` in the place of `accelerate launch`; everything else is real."""

import sys
from pathlib import Path

from flows import cli, launch

if __name__ == "__main__":
    fake = str(Path(__file__).with_name("fake_stage.py"))
    launch.command = lambda module, job_file, _launch: [sys.executable, fake, module, str(job_file)]  # type: ignore[assignment]
    sys.exit(cli.main())
