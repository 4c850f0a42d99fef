"""Counts and statistics of sparse weights; first predictions with a class prior."""

import keras
import numpy as np
import pytest
from scipy import stats

from keras_gdopt.initializers import ClassPriorBias, SparseNormal

COUNTS = np.array([900, 90, 9, 1])


def _drawn(*args, shape, dtype=None, **kwargs):
    return keras.ops.convert_to_numpy(SparseNormal(*args, **kwargs)(shape, dtype))


# --- sparse weights --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("non_zero", "shape"),
    [
        (1, (1, 1)),
        (15, (200, 300)),
        (200, (200, 4)),
        (7, (3, 3, 5, 16)),
        (4, (6, 2, 3)),
    ],
)
def test_each_unit_has_exactly_so_many_weights(non_zero, shape):
    weights = _drawn(non_zero, shape=shape, seed=3)
    assert weights.shape == shape
    counts = np.count_nonzero(weights.reshape(-1, shape[-1]), axis=0)
    assert counts.tolist() == [non_zero] * shape[-1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_counts_hold_in_every_dtype(dtype):
    weights = _drawn(3, shape=(5000, 8), dtype=dtype, seed=1)
    assert keras.backend.standardize_dtype(weights.dtype) == dtype
    assert np.count_nonzero(weights, axis=0).tolist() == [3] * 8
    # In half precision ties would favor the first inputs: these are the same ones.
    if dtype != "float64":
        assert np.array_equal(weights != 0, _drawn(3, shape=(5000, 8), seed=1) != 0)


def test_floatx_is_the_default_dtype(float64):
    assert _drawn(3, shape=(5, 8)).dtype == "float64"


def test_the_weights_are_normal():
    """60,000 draws find a deviation of σ by 2 %, or of the mean by 0.03 σ, nearly always.

    Of a right implementation each test rejects one seed in 10,000; this is one seed.
    """
    weights = _drawn(20, 2.5, shape=(50, 3000), seed=5)
    drawn = weights[weights != 0] / 2.5
    n = len(drawn)
    assert n == 60_000
    assert abs(drawn.mean()) < 3.9 / np.sqrt(n)
    assert abs(drawn.var() - 1) < 3.9 * np.sqrt(2 / n)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4


def test_each_input_is_equally_likely():
    """Chi-squared over 50 inputs, each expected 1,200 times.

    Finds an input that is 25 % more likely than the others in all but 1 of 1,000 cases.
    """
    weights = _drawn(20, shape=(50, 3000), seed=6)
    times = np.count_nonzero(weights, axis=1)
    # Without replacement the counts vary less, by 1 - k / n.
    statistic = np.sum((times - 1200) ** 2 / 1200) / (1 - 20 / 50)
    assert stats.chi2.sf(statistic, 49) > 1e-4
    assert stats.chi2.cdf(statistic, 49) > 1e-4


def test_choice_and_value_are_independent():
    """An input that is chosen by its own value would have the smallest ones only."""
    weights = _drawn(1, shape=(2, 20_000), seed=7)
    first = weights[0][weights[0] != 0]
    assert abs(first.mean()) < 3.9 / np.sqrt(len(first))
    for other in (1, 2):  # units next to each other
        shifted = np.roll(weights[0] != 0, other)
        correlation = np.corrcoef(weights[0] != 0, shifted)[0, 1]
        assert abs(correlation) < 3.9 / np.sqrt(20_000)


def test_seeds_are_those_of_keras():
    one, same, other = (_drawn(2, shape=(6, 5), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    unseeded = [_drawn(2, shape=(6, 5)) for _ in range(2)]
    assert not np.array_equal(*unseeded)
    initializer = SparseNormal(2, seed=keras.random.SeedGenerator(1))
    assert not np.array_equal(initializer((6, 5)), initializer((6, 5)))


def test_layers_take_it_and_save_it(tmp_path):
    layers = [
        keras.Input((8, 8, 3)),
        keras.layers.Conv2D(4, 3, kernel_initializer=SparseNormal(5, 0.5, seed=1)),
        keras.layers.Flatten(),
        keras.layers.Dense(2, kernel_initializer=SparseNormal(9)),
    ]
    model = keras.Sequential(layers)
    kernels = [keras.ops.convert_to_numpy(v) for v in (model.weights[0], model.weights[2])]
    assert [np.count_nonzero(k.reshape(-1, k.shape[-1]), axis=0).tolist() for k in kernels] == [
        [5] * 4,
        [9] * 2,
    ]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    initializer = loaded.layers[0].kernel_initializer
    assert isinstance(initializer, SparseNormal)
    config = {"non_zero": 5, "stddev": 0.5, "seed": 1}
    assert initializer.get_config() == config
    assert np.array_equal(initializer((3, 3, 3, 4)), kernels[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"non_zero": 0}, "Received: non_zero=0 "),
        ({"non_zero": 2.5}, "Received: non_zero=2.5 "),
        ({"non_zero": 2, "stddev": 0}, "Received: stddev=0 "),
        ({"non_zero": 2, "seed": "one"}, "Received: seed=one"),
    ],
)
def test_bad_arguments_of_sparse_normal(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseNormal(**arguments)


@pytest.mark.parametrize("shape", [(3, 9), (1, 3, 9), (9,), ()])
def test_shapes_with_too_few_inputs(shape):
    with pytest.raises(ValueError, match="at least 4"):
        SparseNormal(4)(shape)


# --- class priors ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 1 / 1000])
def test_first_predictions_are_the_class_marginals(scale, rng):
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(
                4,
                "softmax",
                kernel_initializer="zeros",
                bias_initializer=ClassPriorBias(COUNTS * scale),
            ),
        ]
    )
    predicted = model.predict(rng.normal(size=(6, 5)), verbose=0)
    np.testing.assert_allclose(predicted, np.tile(COUNTS / 1000, (6, 1)), rtol=1e-5)


def test_first_predictions_of_sigmoid_units(rng):
    c = [0.001, 0.3, 0.5, 0.999]
    layer = keras.layers.Dense(
        4, "sigmoid", kernel_initializer="zeros", bias_initializer=ClassPriorBias(c, "sigmoid")
    )
    predicted = layer(rng.normal(size=(6, 5)))
    np.testing.assert_allclose(predicted, np.tile(c, (6, 1)), rtol=1e-5)


def test_biases_by_hand(float64):
    np.testing.assert_allclose(
        ClassPriorBias([1, 2, 1])((3,)), [-np.log(4), -np.log(2), -np.log(4)], rtol=1e-15
    )
    np.testing.assert_allclose(ClassPriorBias(0.25, "sigmoid")((1,)), [-np.log(3)], rtol=1e-15)


def test_the_first_loss_is_the_entropy(rng):
    """No constant prediction has a lower one: -Σ c ln c = 0.35759 for 0.9, 0.09 and 0.01."""
    y = np.repeat([0, 1, 2], [900, 90, 10])
    prior = ClassPriorBias.from_labels(y)
    dense = keras.layers.Dense(3, kernel_initializer="zeros", bias_initializer=prior)
    model = keras.Sequential([keras.Input((2,)), dense])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loss = model.evaluate(rng.normal(size=(1000, 2)), y, verbose=0)
    assert loss == pytest.approx(0.35759, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "arguments", "expected"),
    [
        ([0, 2, 2, 1], {}, [1, 1, 2]),
        ([[0], [2], [2], [1]], {}, [1, 1, 2]),
        ([0.0, 1.0, 1.0], {"num_classes": 2}, [1, 2]),
        ([[0, 1], [1, 0], [0, 1], [0, 1]], {}, [0.25, 0.75]),
        ([[0, 1], [1, 0]], {"num_classes": 2}, [0.5, 0.5]),
        ([0, 1, 1, 1], {"activation": "sigmoid"}, [0.75]),
        ([[0], [1], [1], [1]], {"activation": "sigmoid"}, [0.75]),
        ([[1, 1], [0, 1], [0, 1], [0, 0]], {"activation": "sigmoid"}, [0.25, 0.75]),
        ([True, False], {"activation": "sigmoid"}, [0.5]),
    ],
)
def test_frequencies_from_labels(labels, arguments, expected):
    assert ClassPriorBias.from_labels(labels, **arguments).frequencies == expected


def test_a_model_saves_and_loads_the_prior(tmp_path):
    layer = keras.layers.Dense(4, bias_initializer=ClassPriorBias(COUNTS))
    keras.Sequential([keras.Input((3,)), layer]).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").layers[0].bias_initializer
    assert isinstance(loaded, ClassPriorBias)
    assert loaded.get_config() == {"frequencies": [900, 90, 9, 1], "activation": "softmax"}
    assert np.array_equal(loaded((4,)), layer.bias)


@pytest.mark.parametrize(
    ("frequencies", "activation", "message"),
    [
        ([3, 0, 1], "softmax", r"count it once.* Received: frequencies=\[3, 0, 1\]"),
        ([3, -1], "softmax", "above 0 for softmax"),
        ([3, np.inf], "softmax", "finite"),
        ([3, np.nan], "softmax", "finite"),
        ([1], "softmax", "at least 2"),
        ([[1, 2]], "softmax", r"Received: frequencies=\[\[1, 2\]\]"),
        ([0.5, 1.0], "sigmoid", "below 1 for sigmoid"),
        ([0.0], "sigmoid", "above 0 and below 1"),
        ([], "sigmoid", "at least 1"),
        ([1, 2], "relu", "Received: activation='relu'"),
    ],
)
def test_bad_frequencies(frequencies, activation, message):
    with pytest.raises(ValueError, match=message):
        ClassPriorBias(frequencies, activation)


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([0, 2], {}, "count it once"),
        ([0, 1], {"num_classes": 3}, "count it once"),
        ([0, 3], {"num_classes": 3}, "below num_classes=3. Received: 3"),
        ([0, -1], {}, r"at least 0. Received: labels of \[-1, 0\]"),
        ([0, 0.5], {}, "integers"),
        ([[0, 2], [1, 0]], {}, r"Received: labels of \[0, 1, 2\]"),
        ([[0, 1], [1, 0]], {"num_classes": 3}, "2 columns. Received: num_classes=3"),
        ([0, 2], {"activation": "sigmoid"}, "0 and 1"),
        ([], {}, r"Received: labels.shape=\(0,\)"),
        (1, {}, r"Received: labels.shape=\(\)"),
        ([0, 1], {"num_classes": 1}, "Received: num_classes=1"),
    ],
)
def test_bad_labels(labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassPriorBias.from_labels(labels, **arguments)


@pytest.mark.parametrize("shape", [(3,), (4, 1), ()])
def test_a_bias_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"Expected a bias of shape \(4,\)"):
        ClassPriorBias(COUNTS)(shape)
