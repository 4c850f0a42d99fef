"""Bounds of weights: what they do by themselves, in layers and in saved models."""

import keras
import numpy as np
import pytest

import keras_gdopt as gdopt
from keras_gdopt.constraints import Bounds
from tests.optimizer_cases import every_optimizer_alike
from tests.parameters import slow


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"lower": -1}, [-1.0, 0.5, 3.0]),
        ({"upper": 1.0}, [-2.0, 0.5, 1.0]),
        ({"lower": -1, "upper": np.float32(1)}, [-1.0, 0.5, 1.0]),
        ({"lower": [-3.0, 1.0, -np.inf], "upper": [np.inf, 2.0, 0.0]}, [-2.0, 1.0, 0.0]),
        ({"lower": 0.25, "upper": 0.25}, [0.25, 0.25, 0.25]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weights_are_clipped(arguments, expected, dtype):
    constraint = Bounds(**arguments)
    for one in (constraint, keras.constraints.deserialize(keras.constraints.serialize(constraint))):
        found = one(keras.ops.array([-2.0, 0.5, 3.0], dtype))
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(found).astype("float64"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs `lower`, `upper` or both"),
        ({"lower": 1.0, "upper": 0.0}, "`lower` must not be above `upper`"),
        ({"lower": [0.0, 1.0], "upper": 0.5}, "`lower` must not be above `upper`"),
        ({"lower": np.nan}, "`lower` must be a number or an array of numbers"),
        ({"upper": "much"}, "`upper` must be a number or an array of numbers"),
        ({"lower": [0.0, 0.0], "upper": [1.0, 1.0, 1.0]}, "broadcast to one shape"),
    ],
)
def test_bounds_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Bounds(**arguments)


@pytest.mark.parametrize("limit", [[0.0, 0.0], [[0.0], [0.0]]])
def test_bounds_that_do_not_fit_the_weights(limit):
    with pytest.raises(ValueError, match="must broadcast to the shape of the weights"):
        Bounds(limit)(keras.ops.ones((3,)))


def _are_within(kernel):
    return np.all(kernel >= np.float32(-0.05)) and np.all(kernel <= np.float32([0.1, 0.2]))


def _have_unit_norm(kernel):
    return np.linalg.norm(kernel, axis=0) == pytest.approx(1.0, rel=1e-5)


@every_optimizer_alike
@pytest.mark.parametrize(
    ("constraint", "is_obeyed"),
    [
        (Bounds(-0.05, [0.1, 0.2]), _are_within),
        (keras.constraints.UnitNorm(), _have_unit_norm),
    ],
    ids=["bounds", "unit norm"],
)
@pytest.mark.parametrize("jit_compile", ["auto", slow(True)])
@pytest.mark.parametrize("use_ema", [False, slow(True)])
def test_every_first_order_optimizer_obeys(
    case, constraint, is_obeyed, jit_compile, use_ema, tmp_path
):
    """From weights that break the constraint; and a saved model has it, too."""
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(2, kernel_constraint=constraint)
    model = keras.Sequential([keras.Input((3,)), layer])
    optimizer = case(learning_rate=0.05, use_ema=use_ema)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    y = x @ [[1.0, -1.0], [0.0, 0.1], [-1.0, 1.0]]
    model.save(tmp_path / "model.keras")
    for one in (model, keras.models.load_model(tmp_path / "model.keras")):
        assert not is_obeyed(one.get_weights()[0])
        one.fit(x, y, batch_size=4, epochs=3, verbose=0)
        assert is_obeyed(one.get_weights()[0])


@pytest.mark.parametrize("use_ema", [False, slow(True)])
def test_members_of_a_population_obey(use_ema, rng):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, kernel_constraint=Bounds(-0.1, 0.1))]
    )
    model.compile(gdopt.Adam(0.1, use_ema=use_ema), "mse")
    x = rng.normal(size=(16, 3)).astype("float32")
    gadam = gdopt.Gadam(model, 2, seed=1)
    gadam.fit(x, 10 * x[:, :2], generations=1, epochs=2, verbose=0)
    for member in range(2):
        kernel = np.abs(gadam.member(member).get_weights()[0])
        assert np.max(kernel) <= np.float32(0.1)
