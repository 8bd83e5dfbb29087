"""METEOR 1.5 by its own Java program, as pycocoevalcap 1.2 brings it along (the extra `meteor`). Needs `java` on the path.

In: outputs and references as text. Out: sufficient statistics, one row a record, and the corpus score of sums of such rows: the
program's `EVAL` of a whole test set is that of the sums, but that an output equal to its reference counts as no chunk.
"""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.errors import EvaluationError
from pipeline.evaluation.ptb import ptb_tokens

# Places in the program's statistics: words of output and reference, chunks, matched words of output and reference.
_OUTPUT, _REFERENCE, _CHUNKS, _OUTPUT_MATCHED, _REFERENCE_MATCHED = 0, 1, 20, 21, 22


def check_meteor() -> Path:
    """The program's jar.

    Raises:
        EvaluationError: the extra or Java is missing.
    """
    found = find_spec("pycocoevalcap")
    places = list(found.submodule_search_locations or []) if found else []
    jar = Path(places[0]) / "meteor" / "meteor-1.5.jar" if places else None
    if jar is None or not jar.is_file():
        raise EvaluationError(
            "meteor needs its Java program: `pip install 'prefixfleet[meteor]'`, or remove it from evaluation.metrics."
        )
    if shutil.which("java") is None:
        raise EvaluationError(
            "meteor needs `java` on the path (Debian: default-jre-headless), or remove it from evaluation.metrics."
        )
    return jar


class Meteor:
    """The running program. Close it, or use it in a `with` block."""

    def __init__(self) -> None:
        """Start it.

        Raises:
            EvaluationError: see `check_meteor`.
        """
        jar = check_meteor()
        self._process = subprocess.Popen(
            ["java", "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def statistics(self, references: Sequence[Sequence[str]]) -> Callable[[Sequence[str]], np.ndarray]:
        """A function from outputs to [N, 23]."""
        tokenised = [[_line(text) for text in own] for own in references]

        def of(outputs: Sequence[str]) -> np.ndarray:
            rows = []
            for text, own in zip(outputs, tokenised, strict=True):
                self._say(" ||| ".join(("SCORE", *own, _line(text))))
                rows.append([float(number) for number in self._hear().split()])
            found = np.array(rows)
            whole = (found[:, _CHUNKS] == 1) & (found[:, _OUTPUT] == found[:, _OUTPUT_MATCHED])
            found[whole & (found[:, _REFERENCE] == found[:, _REFERENCE_MATCHED]), _CHUNKS] = 0
            return found

        return of

    def scores(self, sums: np.ndarray) -> np.ndarray:
        """The scores, 0 to 1, of sums of statistics [R, 23] -> [R]."""
        self._say(" ||| ".join(("EVAL", *(" ".join(repr(float(number)) for number in row) for row in sums))))
        found = [float(self._hear()) for _ in sums]
        self._hear()  # the score of all of them together
        return np.array(found)

    def close(self) -> None:
        """End the program."""
        self._stream(self._process.stdin).close()
        self._process.kill()
        self._process.wait()
        self._stream(self._process.stdout).close()

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, line: str) -> None:
        stream = self._stream(self._process.stdin)
        stream.write(f"{line}\n".encode())
        stream.flush()

    def _hear(self) -> str:
        line = self._stream(self._process.stdout).readline().decode()
        if not line:
            raise EvaluationError("meteor's Java program ended before its answer. Does `java -Xmx2G` work on this machine?")
        return line.strip()

    @staticmethod
    def _stream(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None
        return stream


def _line(text: str) -> str:
    return " ".join(ptb_tokens(" ".join(text.replace("|||", " ").split())))
