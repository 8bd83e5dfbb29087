"""The process behind the in-process Prefect API: uvicorn, ended by the end of whoever started it.

Prefect 3.8.8 starts `python -m uvicorn …` and leaves that process (200 MB) behind when its parent is killed. Started as
`python -m flows.api_server …` with the same arguments it watches a pipe that closes then.
"""

import sys

from pipeline.process import exit_with_parent

if __name__ == "__main__":
    exit_with_parent()
    from uvicorn.main import main

    sys.exit(main())
