"""Draw docs/method.png, where the prefix enters a block: `python docs/make_method_picture.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

TRAINED, FROZEN, INK = "#e8833a", "#c9d6e6", "#27313f"
PREFIX, PROMPT, TARGET = 3, 4, 3


def draw(path: Path) -> None:
    """Three panels: the block with its attention, who sees whom, and the same for an infix."""
    figure, (block, front, between) = pyplot.subplots(1, 3, figsize=(13, 4.6), width_ratios=[1.35, 1, 1], facecolor="white")
    _block(block)
    _mask(front, infix=False)
    _mask(between, infix=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _block(axes: pyplot.Axes) -> None:
    axes.set(xlim=(0, 10), ylim=(0, 10.4))
    axes.axis("off")
    axes.set_title("A block of the frozen base", color=INK, fontsize=11)

    def box(x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.08", facecolor=colour, edgecolor=INK, lw=0.8))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=INK)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, lw=0.9))

    box(2.2, 0.3, 5.6, 0.8, "hidden states  [B, T, d]", "white")
    for x, name in ((1.3, "W_q"), (4.3, "W_k"), (7.3, "W_v")):
        box(x, 2.0, 1.5, 0.7, name, FROZEN)
        arrow((5, 1.2), (x + 0.75, 1.9))
    box(3.2, 3.8, 1.2, 0.8, "$P_K$\n[P, h]", TRAINED)
    box(4.6, 3.8, 1.6, 0.8, "keys\n[T, h]", FROZEN)
    box(6.8, 3.8, 1.2, 0.8, "$P_V$\n[P, h]", TRAINED)
    box(8.2, 3.8, 1.6, 0.8, "values\n[T, h]", FROZEN)
    arrow((5.05, 2.8), (5.4, 3.7))
    arrow((8.05, 2.8), (9.0, 3.7))
    arrow((2.05, 2.8), (2.6, 5.6))
    arrow((4.7, 4.7), (4.7, 5.6))
    arrow((8.2, 4.7), (7.6, 5.6))
    box(1.3, 5.7, 7.4, 0.9, "softmax( Q [P_K ; K]ᵀ / √h + mask ) [P_V ; V]", FROZEN)
    arrow((5, 6.7), (5, 7.3))
    box(3.6, 7.4, 2.8, 0.7, "W_o, residual, norm", FROZEN)
    arrow((5, 8.2), (5, 8.7))
    box(3.6, 8.8, 2.8, 0.7, "MLP, residual, norm", FROZEN)
    axes.text(0.1, 9.9, "■", color=TRAINED, fontsize=13, va="center")
    axes.text(0.7, 9.9, "trained, one per customer", color=INK, fontsize=8.5, va="center")
    axes.text(5.5, 9.9, "■", color=FROZEN, fontsize=13, va="center")
    axes.text(6.1, 9.9, "frozen, shared by all", color=INK, fontsize=8.5, va="center")


def _mask(axes: pyplot.Axes, infix: bool) -> None:
    """Rows are queries, columns are keys: the prefix's columns come first in the tensors, wherever they stand in the positions."""
    tokens = PROMPT + TARGET
    axes.set_title("placement: infix" if infix else "placement: prefix", color=INK, fontsize=11)
    for query in range(tokens):
        for key in range(PREFIX + tokens):
            of_prefix = key < PREFIX
            seen = (not infix or query >= PROMPT - 1) if of_prefix else key - PREFIX <= query
            colour = (TRAINED if of_prefix else FROZEN) if seen else "white"
            axes.add_patch(Rectangle((key, tokens - 1 - query), 1, 1, facecolor=colour, edgecolor="#8a94a3", lw=0.6))
    axes.set(xlim=(-0.1, PREFIX + tokens + 0.1), ylim=(-0.1, tokens + 0.1), aspect="equal")
    columns = [f"P{i}" for i in range(PREFIX)] + [f"x{i}" for i in range(PROMPT)] + [f"y{i}" for i in range(TARGET)]
    shift = [PREFIX] * tokens if not infix else [0] * PROMPT + [PREFIX] * TARGET
    rows = [f"{name}  @{i + shift[i]}" for i, name in enumerate(columns[PREFIX:])]
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, fontsize=8, color=INK)
    axes.set_yticks([tokens - 0.5 - i for i in range(tokens)], rows, fontsize=8, color=INK)
    axes.set_xlabel("key", fontsize=8.5, color=INK)
    axes.set_ylabel("query @ position", fontsize=8.5, color=INK)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    draw(Path(__file__).with_name("method.png"))
