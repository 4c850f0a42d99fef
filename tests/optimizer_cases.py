"""Every optimizer of the package, found by itself, as parameters for tests."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest

import keras_gdopt as gdopt
from keras_gdopt.closures import ClosureOptimizer

BRISK = {"Adadelta": 100}


@dataclass(frozen=True)
class Case:
    """An optimizer's class with the arguments to make it with."""

    cls: type
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, **kwargs: Any) -> Any:
        return self.cls(**{**dict(self.arguments), **kwargs})

    def __str__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.cls.__name__}({given})"

    def brisk(self, learning_rate: float, **kwargs: Any) -> Any:
        """With a rate that shows in a few steps: Adadelta's multiplies small steps."""
        return self(learning_rate=learning_rate * BRISK.get(self.cls.__name__, 1), **kwargs)

    @property
    def reference(self) -> Any:
        """The transcription in `tests/reference`; it must exist for each algorithm."""
        return importlib.import_module(f"tests.reference.{self.cls.__module__.split('.')[-1]}")

    def rule(self, optimizer=None) -> Any:
        """The optimizer that has the update rule, slots and settings."""
        return optimizer or self()

    def hyperparameters(self, optimizer=None) -> dict[str, Any]:
        rule = self.rule(optimizer)
        return {name: getattr(rule, name) for name in rule.hyperparameters}

    def initial_slots(self, shape, optimizer=None) -> dict[str, np.ndarray]:
        initial = self.reference.slots(**self.hyperparameters(optimizer))
        return {name: np.full(shape, value) for name, value in initial.items()}

    def transcribed(self, theta, gradients, learning_rates, optimizer=None):
        """The weights after each update, by the transcription, in float64."""
        hyperparameters = self.hyperparameters(optimizer)
        theta = np.asarray(theta, "float64")
        slots = self.initial_slots(theta.shape, optimizer)
        trajectory = []
        for t, (g, eta) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
            g = np.asarray(g, "float64")
            theta, slots = self.reference.update(theta, g, slots, eta, t, **hyperparameters)
            trajectory.append(theta)
        return trajectory


class WrapperCase(Case):
    """An optimizer around another one, which takes the arguments that are not its own.

    The inner one is Momentum, as in the transcription.
    """

    def __call__(self, **kwargs: Any) -> Any:
        own = set(inspect.signature(self.cls).parameters)
        outside = {name: kwargs.pop(name) for name in own & set(kwargs)}
        return self.cls(gdopt.Momentum(**kwargs), **{**dict(self.arguments), **outside})

    def __str__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.cls.__name__}(gdopt.Momentum(),{given})"

    def rule(self, optimizer=None) -> Any:
        return (optimizer or self()).inner_optimizer

    def hyperparameters(self, optimizer=None) -> dict[str, Any]:
        wrapper = optimizer or self()
        own = set(inspect.signature(self.cls).parameters) - {"optimizer", "name"}
        return {
            **super().hyperparameters(wrapper),
            **{name: getattr(wrapper, name) for name in own},
        }


def optimizer_classes() -> list[type]:
    """The public first-order optimizers."""
    public = [getattr(gdopt, name) for name in gdopt.__all__ if name != "callbacks"]
    return [
        candidate
        for candidate in public
        if inspect.isclass(candidate)
        and issubclass(candidate, keras.optimizers.Optimizer)
        and not issubclass(candidate, ClosureOptimizer)
        and candidate is not gdopt.GradientOptimizer
    ]


def closure_classes() -> list[type]:
    """The public optimizers that evaluate the loss themselves."""
    public = [getattr(gdopt, name) for name in gdopt.__all__ if name != "callbacks"]
    return [c for c in public if inspect.isclass(c) and issubclass(c, ClosureOptimizer)]


def rule_classes() -> list[type]:
    """Those that have an update rule; the others wrap one of them."""
    return [cls for cls in optimizer_classes() if issubclass(cls, gdopt.GradientOptimizer)]


def wrapper_classes() -> list[type]:
    """Those that wrap another one."""
    return [cls for cls in optimizer_classes() if cls not in rule_classes()]


def _variants(cls) -> list[Case]:
    """The algorithm with each set of arguments that its transcription names."""
    kind = Case if cls in rule_classes() else WrapperCase
    cases = [kind(cls)]
    return [kind(cls, tuple(variant.items())) for variant in cases[0].reference.VARIANTS]


def _cases(cls) -> list[Case]:
    """A variant for each set of slots and each position of the switches."""
    cases = {}
    for case in _variants(cls):
        if isinstance(case, WrapperCase):
            return [case]
        hyperparameters = case.hyperparameters()
        slots = frozenset(case.reference.slots(**hyperparameters))
        switches = frozenset(n for n, value in hyperparameters.items() if value is True)
        cases.setdefault((slots, switches), case)
    return list(cases.values())


VARIANTS = [case for cls in optimizer_classes() for case in _variants(cls)]
CASES = [case for cls in optimizer_classes() for case in _cases(cls)]
RULES = [case for case in CASES if not isinstance(case, WrapperCase)]

# Those that differ in more than their rule: scalars of their own and changes at the end of
# `fit` (NAG), another optimizer inside (Lookahead), and for the rest Adam.
A_FEW = [
    case for case in CASES if str(case) in ("Adam()", "NAG()") or isinstance(case, WrapperCase)
]


def _is_slow(case, *, alike: bool) -> bool:
    """Whether only `.ci/slow` runs it: a rule with options, or any rule where all are alike."""
    return not isinstance(case, WrapperCase) and (alike or bool(case.arguments))


def every_optimizer_with(
    name: str, values, *, alike: bool = False, slow_values=()
) -> pytest.MarkDecorator:
    """Each optimizer with the first of the values, and a few with the others.

    What a setting does is up to the base class, and not to the rule: `.ci/run` tests each of
    the other values with one of the few in turn, `.ci/slow` with all of them. The slow values are
    left to `.ci/slow`. For `alike`, see `every_optimizer_alike`.
    """
    first, *others = values
    parameters = [_param(case, first, is_slow=_is_slow(case, alike=alike)) for case in CASES]
    for turn, value in enumerate(others):
        parameters += [
            _param(case, value, is_slow=index != turn % len(A_FEW))
            for index, case in enumerate(A_FEW)
        ]
    parameters += [_param(case, value, is_slow=True) for case in A_FEW for value in slow_values]
    return pytest.mark.parametrize(("case", name), parameters)


def _param(case, *values, is_slow: bool) -> Any:
    marks = [pytest.mark.slow] if is_slow else []
    return pytest.param(case, *values, marks=marks, id="-".join(map(str, [case, *values])))


def _each(cases, *, alike: bool = False) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [_param(case, is_slow=_is_slow(case, alike=alike)) for case in cases]
    )


every_optimizer = _each(CASES)
every_rule = _each(RULES)

# For what the base class does alike for all: `.ci/run` tests it with Lookahead, which does all that
# the others do and more (slots, a scalar of its own, changes at the end of `fit`), `.ci/slow` with
# each. NAG stands for the rules by themselves.
every_optimizer_alike = _each(CASES, alike=True)
every_rule_alike = pytest.mark.parametrize(
    "case", [_param(case, is_slow=str(case) != "NAG()") for case in RULES]
)
