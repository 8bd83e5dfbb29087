"""Draw docs/flow-*.svg, the stages of each flow: `python docs/make_flow_pictures.py`."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# What runs in the flow's own process, in a child process, and what is kept.
TASK, CHILD, KEPT, INK = "#c9d6e6", "#e8833a", "#dfe7d8", "#27313f"


@dataclass(frozen=True)
class Box:
    """One thing in a picture: where its middle is, what it says (the first line is its name), what kind it is."""

    x: float
    y: float
    text: str
    colour: str = TASK
    width: float = 2.2

    @property
    def height(self) -> float:
        """By its lines."""
        return 0.42 + 0.27 * self.text.count("\n")


Arrow = tuple[str, str, str]


def draw(name: str, size: tuple[float, float], boxes: dict[str, Box], arrows: list[Arrow]) -> None:
    """Write `docs/flow-<name>.svg`. An arrow goes from one box to another and says something, perhaps nothing."""
    figure, axes = pyplot.subplots(figsize=size, facecolor="white")
    axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
    axes.axis("off")
    for box in boxes.values():
        corner = (box.x - box.width / 2, box.y - box.height / 2)
        shape = FancyBboxPatch(
            corner, box.width, box.height, boxstyle="round,pad=0.06", facecolor=box.colour, edgecolor=INK, lw=0.8
        )
        axes.add_patch(shape)
        title, _, rest = box.text.partition("\n")
        lines = rest.count("\n") + bool(rest)
        axes.text(box.x, box.y + 0.135 * lines, title, ha="center", va="center", fontsize=9.5, weight="bold", color=INK)
        if rest:
            axes.text(box.x, box.y - 0.135, rest, ha="center", va="center", fontsize=8, color=INK, linespacing=1.35)
    for first, second, told in arrows:
        _arrow(axes, boxes[first], boxes[second], told)
    for x, colour, text in ((0.3, TASK, "in the flow's process"), (2.6, CHILD, "in a child process"), (4.7, KEPT, "kept")):
        axes.text(x, 0.2, "■", color=colour, fontsize=12, va="center")
        axes.text(x + 0.25, 0.2, text, color=INK, fontsize=8, va="center")
    path = Path(__file__).with_name(f"flow-{name}.svg")
    with pyplot.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
    pyplot.close(figure)


def _arrow(axes: pyplot.Axes, first: Box, second: Box, told: str) -> None:
    across = abs(second.x - first.x) - (first.width + second.width) / 2 > 0.1
    if across:
        sign = 1 if second.x > first.x else -1
        start, end = (first.x + sign * (first.width / 2 + 0.08), first.y), (second.x - sign * (second.width / 2 + 0.1), second.y)
    else:
        sign = 1 if second.y > first.y else -1
        start, end = (
            (first.x, first.y + sign * (first.height / 2 + 0.08)),
            (second.x, second.y - sign * (second.height / 2 + 0.1)),
        )
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, lw=0.9))
    if told:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        side = {"ha": "center", "va": "bottom"} if across else {"ha": "left", "va": "center"}
        axes.text(x + (0 if across else 0.1), y + (0.07 if across else 0), told, fontsize=7.5, color=INK, style="italic", **side)


def pictures() -> None:
    """All of them."""
    draw(
        "fleet",
        (11.4, 3.9),
        {
            "due": Box(1.3, 3.2, "who is due\nschedule, data, settings,\nbase, drift: by digests"),
            "prepare": Box(4.2, 3.2, "prepare\na task for each customer"),
            "jobs": Box(7.1, 3.2, "jobs\nby launch, memory and\ncustomers_per_job"),
            "train": Box(9.95, 3.2, "train\nmixed batches, one base;\na job that crashes is halved", CHILD, 2.4),
            "evaluate": Box(9.95, 1.5, "evaluate\nbase, champion and prefix\nin mixed batches", CHILD, 2.4),
            "register": Box(7.1, 1.5, "register\na task for each customer:\nversion, then alias"),
            "mlflow": Box(4.2, 1.5, "MLflow\nversions, champions", KEPT),
            "report": Box(1.3, 1.5, "report\ntable with links, page", KEPT),
        },
        [
            ("due", "prepare", ""),
            ("prepare", "jobs", ""),
            ("jobs", "train", "job"),
            ("train", "evaluate", ""),
            ("evaluate", "register", ""),
            ("register", "mlflow", ""),
            ("mlflow", "report", ""),
        ],
    )
    draw(
        "customer",
        (11.4, 2.2),
        {
            "asked": Box(1.3, 1.5, "asked for\nparameters checked\nby the fleet file's models"),
            "prepare": Box(3.9, 1.5, "prepare", width=1.6),
            "train": Box(6.0, 1.5, "train", CHILD, 1.4),
            "evaluate": Box(8.0, 1.5, "evaluate", CHILD, 1.4),
            "register": Box(10.2, 1.5, "register\nversion, then alias", width=1.9),
        },
        [("asked", "prepare", ""), ("prepare", "train", ""), ("train", "evaluate", ""), ("evaluate", "register", "")],
    )
    draw(
        "sweep",
        (11.4, 2.2),
        {
            "grid": Box(1.3, 1.5, "grid\nlengths, rates, batch sizes,\nsteps, starts, seeds", width=2.4),
            "train": Box(4.3, 1.5, "train\nevery setting a slot\nof one job", CHILD),
            "score": Box(7.2, 1.5, "score\nchosen on dev, reported\non test", CHILD),
            "page": Box(10.1, 1.5, "page\ncurve over lengths, table,\nlines for the fleet file", KEPT),
        },
        [("grid", "train", ""), ("train", "score", ""), ("score", "page", "")],
    )
    draw(
        "maintain",
        (11.4, 3.9),
        {
            "behind": Box(1.4, 3.2, "register\nwhat was left behind while\nMLflow was away", width=2.4),
            "rows": Box(4.5, 3.2, "new rows\nof every champion's\ncustomer, if enough"),
            "score": Box(7.4, 3.2, "score\nthe champion\non them", CHILD, 1.5),
            "queue": Box(10.1, 3.2, "queued\nif the interval of the drop\nlies above max_drop", KEPT, 2.2),
            "plan": Box(4.5, 1.5, "plan\nruns, versions, files beyond\nthe retention rule", width=2.5),
            "remove": Box(7.4, 1.5, "remove\nunder the locks of those\nwhom it concerns"),
            "left": Box(10.1, 1.5, "table\nremoved, and left with\nthe reason", KEPT, 2.2),
        },
        [
            ("behind", "rows", ""),
            ("rows", "score", ""),
            ("score", "queue", "fallen"),
            ("rows", "plan", ""),
            ("plan", "remove", ""),
            ("remove", "left", ""),
        ],
    )
    draw(
        "job",
        (11.4, 2.2),
        {
            "asked": Box(1.4, 1.5, "fleet\nrun_deployment job/POOL,\nonce for each job and stage", width=2.5),
            "slot": Box(4.5, 1.5, "work pool\nits concurrency limit is\nthe number of GPU slots"),
            "child": Box(7.4, 1.5, "accelerate launch\nevery rank's lines\nin this run's log", CHILD),
            "files": Box(10.2, 1.5, "files\nprefixes, evaluations,\ncheckpoints", KEPT),
        },
        [("asked", "slot", ""), ("slot", "child", "worker"), ("child", "files", "")],
    )


if __name__ == "__main__":
    pictures()
