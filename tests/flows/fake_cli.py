"""The command `prefixfleet` with `fake_stage.py` in the place of `accelerate launch`; everything else is real.

`FAKE_SILENT` is how many seconds a job on a pool may be silent before it is given up.
"""

import os
import sys
from pathlib import Path

from flows import cli, launch

if __name__ == "__main__":
    fake = str(Path(__file__).with_name("fake_stage.py"))
    launch.command = lambda module, job_file, _launch: [sys.executable, fake, module, str(job_file)]  # type: ignore[assignment]
    if silent := os.environ.get("FAKE_SILENT"):
        from flows import dispatch  # imports Prefect, for which the command sets the environment first where no server is given

        dispatch._SILENT_SECONDS = dispatch._PENDING_SECONDS = float(silent)
    sys.exit(cli.main())
