"""How the pictures of curves look: quiet axes, and a file that is the same in each build."""

import io

import matplotlib.axes
import matplotlib.figure


def make_plain(axes: matplotlib.axes.Axes) -> None:
    """Small gray labels, no frame, and a legend."""
    axes.tick_params(labelsize=8, colors="0.4")
    axes.legend(fontsize=7.5, frameon=False)
    for side, line in axes.spines.items():
        line.set_color("0.8")
        line.set_visible(side in ("left", "bottom"))


def as_svg(figure: matplotlib.figure.Figure) -> bytes:
    """The figure as an SVG without a date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
