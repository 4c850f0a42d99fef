r"""Hyper-parameters that differ between the members of a population and are inherited.

Each is drawn and perturbed on a scale $u = \varphi(h)$ on which a step means the same anywhere
in the range: $\varphi = \log h$ if factors matter, as for a learning rate, and
$\varphi = \log(1 - h)$ if the distance from 1 matters, as for a momentum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import keras
import numpy as np

from keras_gdopt.gadam import keys
from keras_gdopt.gadam.keys import Phase

Values = dict[str, np.ndarray]
"""The values of all members, in float64, by the name of the hyper-parameter."""

Range = tuple[float, float]

_SCALES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "positive": (np.log, np.exp),
    "fraction": (lambda h: np.log1p(-h), lambda u: -np.expm1(u)),
}


class Evolution:
    """Draws hyper-parameters for the first population, and perturbs those that children inherit.

    All values lie in their ranges, and floatx, in which members compute, holds them exactly.

    Args:
        ranges: The lowest and the highest value of each hyper-parameter, by name.
        kinds: `"positive"` or `"fraction"`, by the same names.
        perturbation: The standard deviation of a child's step on the scale of the
            hyper-parameter, as a fraction of the width of the range.
        seed: The seed of the run.
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        kinds: Mapping[str, str],
        *,
        perturbation: float,
        seed: int,
    ) -> None:
        self.ranges = dict(sorted(ranges.items()))
        self._kinds = kinds
        self._perturbation = perturbation
        self._seed = seed

    def drawn(self, places: Sequence[int]) -> Values:
        """Draws the initial values of members, uniformly on the scale of each hyper-parameter.

        Args:
            places: The places of the members in the population.
        """
        values = {}
        for number, (name, bounds) in enumerate(self.ranges.items()):
            low, high = self._on_its_scale(name, bounds)
            draws = [
                keys.generator(self._seed, 0, Phase.DRAW_HYPERPARAMETERS, place, number).random()
                for place in places
            ]
            values[name] = self._back(name, low + (high - low) * np.array(draws))
        return values

    def perturbed(self, inherited: Values, generation: int, children: Sequence[int]) -> Values:
        r"""Perturbs what children inherit: $\varphi^{-1}(u + \sigma w z)$ with $z \sim N(0, 1)$.

        σ is the `perturbation` and w the width of the range on the scale. Values beyond the range
        are reflected at its ends.

        Args:
            inherited: The values of each child's fitter parent.
            generation: The number of the generation.
            children: The numbers of the children in the generation.
        """
        values = {}
        for number, (name, bounds) in enumerate(self.ranges.items()):
            to_scale, _ = _SCALES[self._kinds[name]]
            low, high = self._on_its_scale(name, bounds)
            normal = np.array(
                [
                    keys.generator(
                        self._seed, generation, Phase.PERTURB_HYPERPARAMETERS, child, number
                    ).standard_normal()
                    for child in children
                ]
            )
            step = self._perturbation * (high - low) * normal
            moved = to_scale(inherited[name]) + step
            values[name] = self._back(name, _folded(moved, low, high))
        return values

    def of_one(self, values: Values, place: int) -> dict[str, float]:
        """Returns the values of one member, or one child, as plain numbers."""
        return {name: float(of_all[place]) for name, of_all in values.items()}

    def _on_its_scale(self, name: str, bounds: Range) -> Range:
        to_scale, _ = _SCALES[self._kinds[name]]
        low, high = sorted(float(to_scale(value)) for value in bounds)
        return low, high

    def _back(self, name: str, scaled: np.ndarray) -> np.ndarray:
        """Converts values from their scale to the nearest numbers that floatx has in the range."""
        low, high = self.ranges[name]
        _, from_scale = _SCALES[self._kinds[name]]
        exact = np.clip(from_scale(scaled), low, high)
        return _representable(exact, low, high)


def _representable(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Rounds to the nearest numbers that floatx has in a range; returns them in float64."""
    with np.errstate(over="ignore"):
        rounded = values.astype(keras.config.floatx())
    upward, downward = (np.nextafter(rounded, rounded.dtype.type(way)) for way in (np.inf, -np.inf))
    exactly = rounded.astype("float64")  # otherwise `low` and `high` would be rounded, too
    inside = np.where(exactly < low, upward, np.where(exactly > high, downward, rounded))
    return inside.astype("float64")


def checked_ranges(evolve: Any, optimizer: Any) -> dict[str, Range]:
    """Checks the ranges of `Gadam(evolve=...)` and returns them.

    Args:
        evolve: The argument that the user passed.
        optimizer: The pure step of the model's optimizer.

    Raises:
        ValueError: If `evolve` is not a dictionary of ranges, a hyper-parameter cannot evolve, or
            a range is empty or has values that the hyper-parameter must not have.
    """
    kinds = optimizer.evolvable
    if not isinstance(evolve, Mapping) or not evolve:
        raise ValueError(
            "Expected `evolve` to be a dictionary of ranges, such as "
            f"{{'learning_rate': (1e-4, 1e-1)}}. Received: evolve={evolve!r}"
        )
    for name in evolve:
        if name not in kinds:
            raise ValueError(_why_not_evolvable(name, kinds))
        if kinds[name] not in _SCALES:
            raise ValueError(
                f"The optimizer declares {name!r} in `evolvable`. Expected one of {list(_SCALES)} "
                f"for it. Received: {kinds[name]!r}"
            )
    ranges = {name: _checked_range(name, evolve[name], kinds[name]) for name in evolve}
    for end in (0, 1):
        try:
            optimizer.check_hyperparameters({name: of[end] for name, of in ranges.items()})
        except ValueError as error:
            raise ValueError(f"The ranges {ranges} are not allowed. {error}") from None
    return ranges


def _why_not_evolvable(name: str, kinds: Mapping[str, str]) -> str:
    if not kinds:
        why = "a `MultiOptimizer` has several optimizers, and a name is of none of them alone"
    elif name == "learning_rate":
        why = "the optimizer has a schedule of it, and a schedule and a range exclude each other"
    else:
        why = (
            "the optimizer does not have it, or does not declare it (`evolvable`, docs/own_rule.md)"
        )
    expected = f"Expected one of {sorted(kinds)}" if kinds else "Expected no `evolve`"
    return (
        f"The hyper-parameter {name!r} cannot evolve: {why}. {expected}. "
        f"Received: evolve={{{name!r}: ...}}"
    )


def _checked_range(name: str, bounds: Any, kind: str) -> Range:
    """Returns the ends of a range, which must be allowed even when rounded to floatx."""
    of = "above 0" if kind == "positive" else "of at least 0 and below 1"
    low = high = math.nan
    if isinstance(bounds, Sequence) and len(bounds) == 2:
        low, high = (float(b) if isinstance(b, Real) else math.nan for b in bounds)
    ends = np.array([low, high])
    with np.errstate(over="ignore"):
        least, most = ends.astype(keras.config.floatx()).tolist()
    above_the_least = least > 0 if kind == "positive" else low >= 0
    below_the_most = most < (math.inf if kind == "positive" else 1.0)
    if not (above_the_least and below_the_most) or np.diff(_representable(ends, low, high)) <= 0:
        raise ValueError(
            f"Expected the range of {name!r} to be two numbers {of}, the lower one first. "
            f"Received: {bounds!r}"
        )
    return low, high


def _folded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Reflects values at the ends of a range, as often as needed to bring them into it."""
    width = high - low
    beyond = np.mod(values - low, 2 * width)
    return low + np.where(beyond > width, 2 * width - beyond, beyond)
