"""Draws the diagrams: boxes and arrows, as SVG."""

import io
import itertools
from typing import Any

import matplotlib.figure
from matplotlib.backends.backend_agg import FigureCanvasAgg

_FILLS = {"question": "#e8eaf6", "answer": "#ffffff", "work": "#e8eaf6", "choice": "#fff3e0"}


class Diagram:
    """Boxes, placed in units of lines of text, and arrows between them."""

    def __init__(self, width: float, height: float) -> None:
        # 72 dots an inch, as in an SVG, so that the arrows still end at the edges of the boxes.
        self._figure = matplotlib.figure.Figure(figsize=(width / 8, height / 6), dpi=72)
        self._renderer = FigureCanvasAgg(self._figure).get_renderer()
        self._axes: Any = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(0, width), ylim=(height, 0))
        self._axes.axis("off")
        self._boxes: dict[str, Any] = {}

    def box(self, name: str, x: float, y: float, text: str, kind: str) -> None:
        """Draws a box around a text, with its center at (x, y)."""
        style = {"boxstyle": "round,pad=0.5", "facecolor": _FILLS[kind], "edgecolor": "#7986cb"}
        self._boxes[name] = self._axes.text(
            x, y, text, ha="center", va="center", fontsize=9, bbox=style, zorder=2
        )

    def arrow(self, start: str, end: str, text: str = "") -> None:
        """Draws an arrow from one box to another, with a text beside its middle."""
        ends = [self._boxes[name] for name in (start, end)]
        for box in ends:
            box.update_bbox_position_size(self._renderer)
        self._axes.annotate(
            "",
            xy=ends[1].get_position(),
            xytext=ends[0].get_position(),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#5c6bc0",
                "patchA": ends[0].get_bbox_patch(),
                "patchB": ends[1].get_bbox_patch(),
                "shrinkA": 2,
                "shrinkB": 2,
            },
            zorder=1,
        )
        if text:
            (x0, y0), (x1, y1) = (box.get_position() for box in ends)
            self._axes.text(
                (x0 + x1) / 2,
                (y0 + y1) / 2,
                text,
                ha="center",
                va="center",
                fontsize=8.5,
                color="#3949ab",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
                zorder=3,
            )

    def svg(self) -> bytes:
        """Returns the contents of the SVG file."""
        file = io.BytesIO()
        self._figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def choosing() -> bytes:
    """Draws the questions about a task that lead to the optimizer to begin with."""
    d = Diagram(64, 30)
    questions = [
        (
            "batch",
            "Does the whole data set fit in one batch,\nand does every digit of the loss count?",
        ),
        ("rows", "Do most batches miss most rows\nof a large embedding?"),
        ("tuned", "Do you have the time to tune\na learning rate and its schedule?"),
        ("start", "Does training go wrong\nin its first steps?"),
    ]
    answers = {
        "batch": "LevenbergMarquardt up to a thousand\nweights, BFGS to some thousands, then LBFGS",
        "rows": "Adagrad, or Adam(lazy=True)",
        "tuned": "Momentum or NAG",
        "start": "RAdam, or Adam with a warm-up schedule",
    }
    for place, (name, text) in enumerate(questions):
        y = 3 + 6 * place
        d.box(name, 16, y, text, "question")
        d.box(f"{name}: yes", 48, y, answers[name], "answer")
        d.arrow(name, f"{name}: yes", "yes")
    d.box("else", 16, 27, "Adam", "answer")
    names = [name for name, _ in questions] + ["else"]
    for one, next_one in itertools.pairwise(names):
        d.arrow(one, next_one, "no")
    return d.svg()


def gadam_loop() -> bytes:
    """Draws a generation of Gadam."""
    d = Diagram(78, 18)
    d.box("train", 9, 4, "g members train,\neach with its own batches\nand optimizer state", "work")
    d.box("fitness", 29, 4, "fitness loss of each\non a sampled batch", "work")
    d.box("select", 48, 4, "g pairs of parents:\nthe fitter, the likelier", "choice")
    d.box("cross", 68, 4, "crossover: each weight\nfrom one of the parents", "choice")
    d.box("mutate", 68, 14, "mutation: a few weights\nare drawn anew", "choice")
    d.box("children", 48, 14, "g children train,\nas the members did", "work")
    d.box("survive", 29, 14, "2g losses on\none new batch", "work")
    d.box("best", 9, 14, "the g fittest are\nthe next generation", "choice")
    ring = ["train", "fitness", "select", "cross", "mutate", "children", "survive", "best", "train"]
    for one, next_one in itertools.pairwise(ring):
        d.arrow(one, next_one)
    return d.svg()
