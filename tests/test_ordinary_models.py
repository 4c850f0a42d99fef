"""Every optimizer, and Gadam, on ordinary models and data: as Keras trains, or refused in words."""

import functools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_gdopt as gdopt
from keras_gdopt.closures import LineSearchOptimizer
from tests.optimizer_cases import CASES, Case, WrapperCase, closure_classes
from tests.ordinary_models import DATA, MODELS, SETTINGS

FIRST_ORDER = [case for case in CASES if not case.arguments or isinstance(case, WrapperCase)]
SEARCHING = [Case(cls) for cls in closure_classes() if issubclass(cls, LineSearchOptimizer)]
KINDS: dict[str, list[Any]] = {
    "first-order": FIRST_ORDER,
    "closure": SEARCHING,
    "of outputs": [Case(cls) for cls in closure_classes() if Case(cls) not in SEARCHING],
    "Gadam": [None],
}

# What a kind of optimizer does not take, by a word of the model, the data or the setting, and what
# the error must say. docs/not_supported.md has a line for each.
REFUSED: dict[str, dict[str, str]] = {
    "first-order": {},
    "closure": {
        "a `train_step` of its own": "'own_step.*' has a `train_step` of its own",
        "no trainable weights": "needs trainable weights",
        "constraints": "'.*bounded/kernel' with the constraint",
        "accumulation": "gradient_accumulation_steps",
        "an average of the weights": "use_ema",
        "weight decay": "weight_decay",
        "mixed_float16": "does not train in mixed float16",
        "mixed_bfloat16": "half precision in the layers",
    },
    "Gadam": {
        "a `train_step` of its own": "'own_step.*' has a `train_step` of its own",
        "no trainable weights": "no trainable weights",
        "mixed_float16": "does not train in mixed float16",
    },
}

REFUSED["of outputs"] = {
    **REFUSED["closure"],
    "only `add_loss`": "layers add by `add_loss`",
    "a `compute_loss` of its own": "a `compute_loss` of its own",
    "BatchNormalization": "batch normalization mixes",
}

# Steps of Keras's own optimizers that are ours; its sums over repeated ids are right where the
# rule is linear in the gradient.
SAME_RULE = {
    "GradientDescent": lambda **kw: keras.optimizers.SGD(0.05, **kw),
    "Momentum": lambda **kw: keras.optimizers.SGD(0.05, momentum=0.9, **kw),
    "NAG": lambda **kw: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, **kw),
    "RMSprop": lambda **kw: keras.optimizers.RMSprop(0.05, epsilon=1e-6, **kw),
    "Adagrad": lambda **kw: keras.optimizers.Adagrad(
        0.05, initial_accumulator_value=0.0, epsilon=1e-8, **kw
    ),
    "Adadelta": lambda **kw: keras.optimizers.Adadelta(0.05, epsilon=1e-6, **kw),
}
CLASSICAL = ("Momentum", "NAG")
LINEAR = ("GradientDescent", "Momentum", "NAG")
WITH_REPEATED_IDS = ("Embedding with `mask_zero`", "TextVectorization")

# Closures are given their batches by Keras; the other kinds of data become batches like these.
OTHER_BATCHES = {
    "arrays",
    "lists",
    "one of unknown length",
    "batches of different lengths",
    "a last batch of one",
    "sample weights",
    "class weights",
}


def _cells(kind: str) -> Iterator[tuple[str, Any, str, str, str, bool]]:
    """Kind, optimizer, model, data, setting, and whether only `.ci/slow` tests it.

    Each model with each kind of data, the settings and the optimizers in turn. In the default run
    each model at least once, and with each kind of optimizer each setting and each kind of data
    (with closures those whose batches differ).
    """
    optimizers, searches = KINDS[kind], kind in ("closure", "of outputs")
    new_data, new_settings = OTHER_BATCHES & set(DATA) if searches else set(DATA), set(SETTINGS)
    if searches:
        new_settings.discard("as it comes")  # which compiles by XLA, as "jit" does
    if kind == "of outputs":
        new_settings.discard("jit")  # its own tests compile
    turn = 0
    refused = REFUSED[kind]
    for i, model in enumerate(MODELS):
        suitable = [data for data in DATA if DATA[data].suits(MODELS[model])]
        settings = [name for name in SETTINGS if name != "jit" or MODELS[model].compiles]
        default = next((data for data in suitable if data in new_data), suitable[i % len(suitable)])
        for data in suitable:
            setting = settings[turn % len(settings)]
            by_every_change = data == default and (
                kind == "first-order" or i == 0 or model in refused
            )
            if data == default and model not in refused:
                trained = [name for name in settings if name not in {*refused, "eager", "jit"}]
                if searches:
                    trained.remove("as it comes")
                todo = [name for name in settings if name in new_settings]
                setting = next(iter(todo), trained[i % len(trained)])
                if kind != "of outputs":
                    by_every_change |= data in new_data or setting in new_settings
                if setting not in refused:
                    new_data.discard(data)
                new_settings.discard(setting)
            optimizer = optimizers[turn // len(SETTINGS) % len(optimizers)]
            if data == default and kind == "closure" and "LSTM" in model:
                optimizer = Case(gdopt.LBFGS)  # XLA compiles the Hessian of a loop for a minute
            yield kind, optimizer, model, data, setting, not by_every_change
            turn += 1


def _parameters() -> list[Any]:
    return [
        pytest.param(
            *cell,
            marks=[pytest.mark.slow] if is_slow else [],
            id="-".join(map(str, [cell[1] or cell[0], *cell[2:]])),
        )
        for kind in KINDS
        for *cell, is_slow in _cells(kind)
    ]


def _compiled(model: str, setting: str, optimizer: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    built, ordinary = MODELS[model].build(), MODELS[model]
    optimizer = optimizer(**SETTINGS[setting].optimizer)
    built.compile(optimizer, ordinary.loss, metrics=ordinary.metrics, **SETTINGS[setting].compile)
    return built


def _fitted(model: str, data: str, built: keras.Model) -> dict[str, list[float]]:
    keras.utils.set_random_seed(1)
    arguments = DATA[data].arguments(MODELS[model])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's, of no trainable weights and of `shuffle`
        return built.fit(**arguments, epochs=4, shuffle=False, verbose=0).history


@functools.cache
def _history_of_keras(model: str, data: str, setting: str, name: str) -> dict[str, list[float]]:
    return _fitted(model, data, _compiled(model, setting, SAME_RULE[name]))


@pytest.mark.parametrize(("kind", "case", "model", "data", "setting"), _parameters())
def test_an_ordinary_model_is_trained_as_keras_does_or_refused(kind, case, model, data, setting):
    keras.mixed_precision.set_global_policy(SETTINGS[setting].policy)
    refused = dict(REFUSED[kind])
    if isinstance(case, Case) and getattr(case.cls, "takes_bounds", False):
        del refused["constraints"]  # which are bounds
    reasons = [refused[name] for name in (model, data, setting) if name in refused]
    train = {
        "first-order": _train_first_order,
        "closure": _train_with_closures,
        "of outputs": _train_with_closures,
        "Gadam": _train_a_population,
    }[kind]
    if not reasons:
        train(case, model, data, setting)
        return
    with pytest.raises(ValueError, match="|".join(reasons)) as error:
        train(case, model, data, setting)
    text = str(error.value)
    assert text.count("\n") < 4 and len(text) < 800 and "{{node" not in text, text


def _train_first_order(case: Any, model: str, data: str, setting: str) -> None:
    name = type(case()).__name__

    def optimizer(**arguments: Any) -> Any:
        classical = {"classical": True} if name in CLASSICAL else {}
        return case(learning_rate=0.05, **classical, **arguments)

    built = _compiled(model, setting, optimizer)
    before = built.get_weights()
    history = _fitted(model, data, built)
    assert all(map(math.isfinite, history["loss"]))
    _check_moved(model, before, built)
    if name in SAME_RULE and (name in LINEAR or model not in WITH_REPEATED_IDS):
        alike = setting
        if (model, setting) == ("no trainable weights", "an average of the weights"):
            alike = "as it comes"  # Keras's `fit` fails with an average of nothing
        same_data = data
        if (data, setting) == ("one of unknown length", "accumulation"):
            same_data = "a `tf.data.Dataset`"  # Keras's optimizers count the end as a step
        expected = _history_of_keras(model, same_data, alike, name)
        assert history.keys() == expected.keys()
        tolerance = 1e-4 if SETTINGS[setting].policy == "float32" else 0.05
        for key in expected:
            np.testing.assert_allclose(history[key], expected[key], tolerance, 1e-6, err_msg=key)


def _train_with_closures(case: Any, model: str, data: str, setting: str) -> None:
    compiled = {} if setting in ("as it comes", "jit") else {"jit_compile": False}
    optimizer = case(**compiled, **SETTINGS[setting].optimizer)
    built = _compiled(model, setting, lambda **arguments: optimizer)
    optimizer.attach(built)
    before = built.get_weights()
    history = _fitted(model, data, built)
    expected = _history_of_keras(model, data, "as it comes", "GradientDescent")
    assert history.keys() == expected.keys()
    assert all(math.isfinite(value[-1]) for value in history.values()), history
    if data != "one sample":  # which may be fitted to the last digit
        assert all(max(value) > 0 for value in history.values()), history
    _check_moved(model, before, built)


def _train_a_population(case: Any, model: str, data: str, setting: str) -> None:
    built = _compiled(model, setting, lambda **kw: gdopt.Adam(0.05, **kw))
    before = built.get_weights()
    gadam = gdopt.Gadam(built, 2, seed=1)
    arguments = DATA[data].arguments(MODELS[model])
    history = gadam.fit(**arguments, generations=1, epochs=2, verbose=0).history
    assert all(math.isfinite(value[-1]) for value in history.values()), history
    expected = _history_of_keras(model, data, "as it comes", "GradientDescent")
    assert set(expected) <= set(history)
    assert all(history[key][-1] > 0 for key in expected), history
    _check_moved(model, before, built)


def _check_moved(model: str, before: list[np.ndarray], built: keras.Model) -> None:
    """What is frozen stands still, and of the rest something moves."""
    if model == "no trainable weights":
        for old, new in zip(before, built.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        return
    if model == "frozen parts":
        np.testing.assert_array_equal(before[0], built.get_weights()[0])
    assert any(np.any(a != b) for a, b in zip(before, built.get_weights(), strict=True))


# --- the page -----------------------------------------------------------------------------


def test_the_page_says_what_is_refused():
    page = Path(__file__).parents[1] / "docs" / "not_supported.md"
    rows = {
        cells[0]: dict(zip(KINDS, (cell == "refused" for cell in cells[1:-1]), strict=True))
        for line in page.read_text().split("Beyond that matrix")[0].splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
        and len(cells) == len(KINDS) + 2
    }
    names = {name for refused in REFUSED.values() for name in refused}
    assert names <= {*MODELS, *DATA, *SETTINGS}
    expected = {name: {kind: name in REFUSED[kind] for kind in KINDS} for name in names}
    assert {name: row for name, row in rows.items() if any(row.values())} == expected
