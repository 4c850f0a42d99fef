"""A population's last generations as a family tree: a picture and a table."""

import importlib.util
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_gdopt.gadam import Lineage

GENERATIONS = 6
"""How many generations a picture shows, besides the one before them."""

_NAMED = 0.2
"""The least share in the winner's weights at which an ancestor's birth is labelled."""

# Inches: the picture's width, which TensorBoard shows as about 350 pixels, and its margin.
_WIDTH, _LEFT = 6.4, 1.05
_ALONG = np.linspace(0.0, 1.0, 16)
# Rises from 0 to 1 in both directions and is level at the ends.
_CURVE = np.stack([_ALONG, _ALONG**2 * (3 - 2 * _ALONG)], axis=1)
_WINNER, _CHILD, _SURVIVOR, _LINE, _TEXT = "#e8590c", "#1c7ed6", "#adb5bd", "#dee2e6", "#343a40"


class Generation(NamedTuple):
    """The members alive at the end of a generation."""

    number: int
    """Counted from 0; -1 for the population that a run starts from."""
    identities: list[int]
    """Their ids in the lineage, the fittest first."""
    losses: list[float]
    """Their fitness losses; NaN before the first generation."""


def ranked(number: int, identities: Iterable[int], losses: Iterable[float]) -> Generation:
    """A generation sorted by fitness; losses that are not finite come last."""
    pairs = sorted(
        zip(identities, losses, strict=True),
        key=lambda pair: pair[1] if np.isfinite(pair[1]) else np.inf,
    )
    return Generation(number, [int(one) for one, _ in pairs], [float(loss) for _, loss in pairs])


def last_generations(lineage: Lineage) -> list[Generation]:
    """The generations that a picture of a lineage shows, the latest one last.

    Takes time proportional to the length of the whole lineage.
    """
    survivors: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for individual in lineage:
        if not individual["parents"]:
            survivors[-1].append((individual["id"], np.nan))
        for number, loss, survives in individual["selections"]:
            if survives:
                survivors[number].append((individual["id"], loss))
    shown = sorted(survivors)[-GENERATIONS - 1 :]
    return [ranked(number, *zip(*survivors[number], strict=True)) for number in shown]


def shares(lineage: Lineage, generations: Sequence[Generation]) -> list[dict[int, float]]:
    r"""How much each individual of each generation contributed to the winner's weights.

    The winner is the fittest of the last generation, with a share of 1. A child that is
    born in a generation passes a part $p$ of its share on to its first parent and $1 - p$ to
    the second, where $p$ is the probability that an entry came from the first (Eq. 47).
    Mutations are ignored.

    Returns:
        For each generation, the shares above 0 by identity.
    """
    of_generation: list[dict[int, float]] = [{generations[-1].identities[0]: 1.0}]
    for before in reversed(generations[:-1]):
        given: dict[int, float] = defaultdict(float)
        alive = set(before.identities)
        for identity, share in of_generation[0].items():
            if identity in alive:
                given[identity] += share
                continue
            individual = lineage[identity]
            first, second = individual["parents"]
            given[first] += share * individual["crossover_probability"]
            given[second] += share * (1 - individual["crossover_probability"])
        of_generation.insert(0, {one: share for one, share in given.items() if share > 0})
    return of_generation


def table(lineage: Lineage, generation: Generation, rows: int = 10) -> str:
    """A Markdown table of the fittest individuals and their origin."""
    lines = [
        "| rank | individual | fitness loss | born in | parents | from the first "
        "| mutated entries |",
        "| ---: | ---: | ---: | ---: | :---: | ---: | ---: |",
    ]
    fittest = zip(generation.identities[:rows], generation.losses, strict=False)
    for rank, (identity, loss) in enumerate(fittest, start=1):
        individual = lineage[identity]
        if individual["parents"]:
            born = str(individual["generation"] - 1)
            parents = " × ".join(f"#{parent}" for parent in individual["parents"])
            first = f"{individual['crossover_probability']:.0%}"
            mutated = str(individual["mutated_entries"])
        else:
            born, parents, first, mutated = "the start", "–", "–", "–"
        lines.append(
            f"| {rank} | #{identity} | {loss:.4g} | {born} | {parents} | {first} | {mutated} |"
        )
    return "\n".join(lines)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def drawn(lineage: Lineage, generations: Sequence[Generation]) -> bytes:
    """A picture of generations, as PNG.

    Each column holds the members at the end of a generation, the fittest on top. Lines connect
    a member with its origin: itself, if it lived on, or its two parents. The winner's ancestry
    is highlighted: the more of its weights came along a line, the wider the line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # installed with matplotlib

    size = max(len(generation.identities) for generation in generations)
    height = float(np.clip(0.24 * size + 1.5, 2.6, 7.2))
    # Drawn in inches on the figure itself, because axes would take as long as all the rest.
    figure = Figure(figsize=(_WIDTH, height), dpi=100)
    x = _LEFT + (_WIDTH - _LEFT) * (np.arange(len(generations)) + 0.5) / len(generations)
    y = height - 0.7 - (height - 1.6) * np.arange(size) / (size - 1)
    given = shares(lineage, generations)
    _draw_lines(figure, x, y, lineage, generations, given)
    _draw_members(figure, x, y, lineage, generations, given)
    _write_around(figure, x, height, generations)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette takes a third of the time and a quarter of the bytes.
    few_colors = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(
        64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    )
    picture = io.BytesIO()
    few_colors.save(picture, format="png")
    return picture.getvalue()


def _draw_lines(
    figure: Any,
    x: np.ndarray,
    y: np.ndarray,
    lineage: Lineage,
    generations: Sequence[Generation],
    given: Sequence[dict[int, float]],
) -> None:
    from matplotlib.collections import LineCollection

    lines, highlighted, widths = [], [], []
    for column in range(1, len(generations)):
        before = {one: rank for rank, one in enumerate(generations[column - 1].identities)}
        for rank, identity in enumerate(generations[column].identities):
            share = given[column].get(identity, 0.0)
            for origin, part in _origins(lineage[identity], before):
                start = np.array([x[column - 1], y[before[origin]]])
                line = start + (np.array([x[column], y[rank]]) - start) * _CURVE
                lines.append(line)
                if share * part > 0:
                    highlighted.append(line)
                    widths.append(0.6 + 3.4 * np.sqrt(share * part))
    inches = {"transform": figure.dpi_scale_trans, "capstyle": "round"}
    figure.add_artist(LineCollection(lines, colors=_LINE, linewidths=1.0, zorder=1, **inches))
    figure.add_artist(
        LineCollection(highlighted, colors=_WINNER, linewidths=widths, zorder=2, **inches)
    )


def _origins(individual: dict[str, Any], before: dict[int, int]) -> list[tuple[int, float]]:
    """The individuals that a member comes from, and which part of it from each."""
    if individual["id"] in before:
        return [(individual["id"], 1.0)]
    first, second = individual["parents"]
    part = individual["crossover_probability"]
    return [(first, 1.0)] if first == second else [(first, part), (second, 1 - part)]


def _draw_members(
    figure: Any,
    x: np.ndarray,
    y: np.ndarray,
    lineage: Lineage,
    generations: Sequence[Generation],
    given: Sequence[dict[int, float]],
) -> None:
    points = defaultdict(list)
    for column, generation in enumerate(generations):
        for rank, identity in enumerate(generation.identities):
            born = lineage[identity]["generation"] - 1 == generation.number
            share = given[column].get(identity, 0.0)
            points[born, share > 0].append((x[column], y[rank]))
            if share >= _NAMED and (born or column == 0):
                name = f"#{identity}"
                _text(figure, x[column], y[rank] + 0.16, name, size=11, weight="bold", zorder=5)
    diameter = float(np.clip(40 / np.sqrt(len(y)), 3, 10))
    for (born, is_ancestor), centers in points.items():
        color = _CHILD if born else _SURVIVOR
        _marks(figure, centers, "o", diameter, color, _WINNER if is_ancestor else "white")
    _marks(figure, [(x[-1], y[0])], "*", 2 * diameter, _WINNER, "white")


def _write_around(
    figure: Any, x: np.ndarray, height: float, generations: Sequence[Generation]
) -> None:
    """Writes the legend above the columns and the numbers below them."""
    top, below, bottom = height - 0.25, 0.6, 0.25
    legend = (
        (0.25, "*", _WINNER, f"winner #{generations[-1].identities[0]}, its ancestry"),
        (3.75, "o", _CHILD, "newborn"),
        (5.2, "o", _SURVIVOR, "lived on"),
    )
    for place, marker, color, words in legend:
        _marks(figure, [(place, top)], marker, 16 if marker == "*" else 10, color, "white")
        _text(figure, place + 0.17, top, words, ha="left")
    _text(figure, 0.2, height / 2, "fitter →", rotation=90)
    _text(figure, 0.1, below, "generation", ha="left")
    _text(figure, 0.1, bottom, "best loss", ha="left")
    for place, generation in zip(x, generations, strict=True):
        if generation.number < 0:
            _text(figure, place, below, "start", weight="bold")
        else:
            _text(figure, place, below, str(generation.number), weight="bold")
            _text(figure, place, bottom, f"{generation.losses[0]:.3g}", size=11)


def _marks(
    figure: Any, centers: Sequence[Any], marker: str, diameter: float, color: str, edge: str
) -> None:
    from matplotlib.lines import Line2D

    figure.add_artist(
        Line2D(
            *np.transpose(centers),
            linestyle="none",
            marker=marker,
            markersize=diameter,
            markerfacecolor=color,
            markeredgecolor=edge,
            markeredgewidth=min(1.6, diameter / 3),
            transform=figure.dpi_scale_trans,
            zorder=3,
        )
    )


def _text(figure: Any, x: float, y: float, words: str, **style: Any) -> None:
    style = {"size": 13, "color": _TEXT, "ha": "center", "va": "center", **style}
    figure.text(x, y, words, transform=figure.dpi_scale_trans, **style)
