"""Every optimizer of the package, found by itself, as parameters for tests."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest

import keras_gdopt as gdopt


@dataclass(frozen=True)
class Case:
    """An optimizer's class with the arguments to make it with."""

    cls: type
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.cls(*args, **{**dict(self.arguments), **kwargs})

    def __str__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.cls.__name__}({given})"

    @property
    def reference(self) -> Any:
        """The transcription in `tests/reference`; it must exist for each algorithm."""
        return importlib.import_module(f"tests.reference.{self.cls.__module__.split('.')[-1]}")

    def transcribed(self, theta, gradients, learning_rates, optimizer=None):
        """The weights after each update, by the transcription, in float64."""
        optimizer = optimizer or self()
        hyperparameters = {name: getattr(optimizer, name) for name in optimizer.hyperparameters}
        theta = np.asarray(theta, "float64")
        slots = {name: np.full(theta.shape, v) for name, v in self.reference.SLOTS.items()}
        trajectory = []
        for t, (g, eta) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
            g = np.asarray(g, "float64")
            theta, slots = self.reference.update(theta, g, slots, eta, t, **hyperparameters)
            trajectory.append(theta)
        return trajectory


def optimizer_classes() -> list[type]:
    """The public first-order optimizers."""
    public = [getattr(gdopt, name) for name in gdopt.__all__ if name != "callbacks"]
    return [
        candidate
        for candidate in public
        if inspect.isclass(candidate)
        and issubclass(candidate, keras.optimizers.Optimizer)
        and candidate is not gdopt.GradientOptimizer
    ]


def _cases() -> list[Case]:
    """Each class with its defaults, and once more with each of its switches on."""
    cases = []
    for cls in optimizer_classes():
        cases.append(Case(cls))
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.default is False and name != "lazy":
                cases.append(Case(cls, ((name, True),)))
    return cases


CASES = _cases()
VARIANTS = [
    Case(cls, tuple(variant.items()))
    for cls in optimizer_classes()
    for variant in Case(cls).reference.VARIANTS
]

every_optimizer = pytest.mark.parametrize("case", CASES, ids=str)
every_variant = pytest.mark.parametrize("case", VARIANTS, ids=str)
