"""The multi-class hinge against the paper's example and a NumPy transcription."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.losses import MulticlassHinge
from tests.parameters import slow
from tests.reference.losses import multiclass_hinge

# Fig. 1: dog, cat and bird; a picture of each in this order.
PROBABILITIES = [[0.49, 0.43, 0.08], [0.45, 0.53, 0.02], [0.21, 0.15, 0.64]]
LABELS = [0, 1, 2]
HINGE_LOSSES = [1.53, 1.41, 1.08]
CROSS_ENTROPIES = [0.713, 0.6349, 0.446]


@pytest.fixture
def samples(rng):
    """Scores of 50 samples in 7 classes, their labels and losses."""
    scores, labels = 3 * rng.normal(size=(50, 7)), rng.integers(7, size=50)
    losses = [multiclass_hinge(s, label, 0.7) for s, label in zip(scores, labels, strict=True)]
    return scores, labels, np.array(losses)


def _one_hot(labels, classes=7):
    return np.eye(classes)[labels]


@pytest.mark.parametrize("labels", [LABELS, [[0], [1], [2]], np.eye(3)])
def test_the_papers_example(labels):
    losses = MulticlassHinge(reduction="none")(np.array(labels), np.array(PROBABILITIES))
    np.testing.assert_allclose(losses, HINGE_LOSSES, rtol=1e-6)
    total = MulticlassHinge(reduction="sum")(np.array(labels), np.array(PROBABILITIES))
    assert float(total) == pytest.approx(1.53 + 1.41 + 1.08, rel=1e-6)  # Eq. 11


def test_the_papers_cross_entropies_are_those_of_keras():
    losses = keras.losses.CategoricalCrossentropy(reduction="none")(
        np.eye(3), np.array(PROBABILITIES)
    )
    np.testing.assert_allclose(losses, CROSS_ENTROPIES, atol=5e-4)
    loss = keras.losses.SparseCategoricalCrossentropy(reduction="none")
    losses = loss(np.array(LABELS), np.array(PROBABILITIES))
    np.testing.assert_allclose(losses, CROSS_ENTROPIES, atol=5e-4)


def test_keras_takes_only_the_largest_term():
    """By hand: max(0, 0.43 - 0.49 + 1) = 0.94."""
    keras_loss = keras.losses.CategoricalHinge()([[1, 0, 0]], [PROBABILITIES[0]])
    assert float(keras_loss) == pytest.approx(0.94)


@pytest.mark.parametrize("form", [lambda y: y, lambda y: y[:, None], _one_hot])
def test_equals_its_transcription(form, samples, float64):
    scores, labels, expected = samples
    losses = MulticlassHinge(0.7, reduction="none")(form(labels), scores)
    np.testing.assert_allclose(losses, expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("reduction", "divisor", "weighted_divisor"),
    [
        ("sum", 1, 1),
        ("sum_over_batch_size", 50, 50),
        ("mean", 50, 50),
        ("mean_with_sample_weight", 50, "weights"),
    ],
)
def test_reductions_and_sample_weights(reduction, divisor, weighted_divisor, samples, rng, float64):
    scores, labels, losses = samples
    weights = rng.uniform(size=50)
    loss = MulticlassHinge(0.7, reduction)
    assert float(loss(labels, scores)) == pytest.approx(losses.sum() / divisor, rel=1e-12)
    if weighted_divisor == "weights":
        weighted_divisor = weights.sum()
    expected = (weights * losses).sum() / weighted_divisor
    assert float(loss(labels, scores, weights)) == pytest.approx(expected, rel=1e-12)


def test_without_reduction_sample_weights_multiply(samples, rng, float64):
    scores, labels, losses = samples
    weights = rng.uniform(size=50)
    received = MulticlassHinge(0.7, reduction=None)(_one_hot(labels), scores, weights)
    np.testing.assert_allclose(received, weights * losses, rtol=1e-12)


@pytest.mark.parametrize("form", [lambda y: y, lambda y: y[..., None], _one_hot])
def test_masked_steps_of_a_sequence_do_not_count(form, samples, float64):
    scores, labels, losses = samples
    mask = np.arange(50).reshape(10, 5) % 3 > 0
    y_pred = tf.constant(scores.reshape(10, 5, 7))
    y_pred._keras_mask = tf.constant(mask)
    received = MulticlassHinge(0.7)(form(labels.reshape(10, 5)), y_pred)
    # Keras 3.12 adds 1e-7 to the count of steps that it divides by.
    assert float(received) == pytest.approx(losses[mask.ravel()].mean(), rel=1e-8)


@pytest.mark.parametrize("form", [lambda y: y, _one_hot])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_are_finite_differences(form, jit_compile, samples, float64):
    scores, labels, _ = samples
    loss = MulticlassHinge(0.7, reduction="sum")

    @tf.function(jit_compile=jit_compile)
    def gradient(y_pred):
        with tf.GradientTape() as tape:
            tape.watch(y_pred)
            value = loss(tf.constant(form(labels)), y_pred)
        return tape.gradient(value, y_pred)

    expected, step = np.zeros_like(scores), 1e-6
    for i, j in np.ndindex(*scores.shape):
        for sign in (1, -1):
            moved = scores[i].copy()
            moved[j] += sign * step
            expected[i, j] += sign * multiclass_hinge(moved, labels[i], 0.7) / (2 * step)
    np.testing.assert_allclose(gradient(tf.constant(scores)), expected, atol=1e-8)


def test_scores_of_minus_infinity_rule_classes_out():
    """By hand: max(0, 2 - 3 + 1.5) = 0.5; the ruled out class adds nothing."""
    y_pred = tf.constant([[3.0, 2.0, -np.inf]])
    with tf.GradientTape() as tape:
        tape.watch(y_pred)
        value = MulticlassHinge(1.5)([0], y_pred)
    assert float(value) == 0.5
    assert tape.gradient(value, y_pred).numpy().tolist() == [[-1.0, 1.0, 0.0]]


@pytest.mark.parametrize("label", [-1, 3, 0.5])
def test_labels_of_no_class_give_nan(label):
    losses = MulticlassHinge(reduction="none")([label, 0], PROBABILITIES[:2])
    assert np.isnan(losses[0]) and np.isfinite(losses[1])


def test_label_256_is_none_of_its_neighbors_in_mixed_bfloat16():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    scores = np.zeros((1, 300))
    scores[0, 257] = 2
    y_pred = tf.constant(scores, tf.bfloat16)
    assert float(MulticlassHinge()([257], y_pred)) == 0
    assert float(MulticlassHinge()([256], y_pred)) == 298 + 3


@pytest.mark.parametrize(
    ("policy", "labels"),
    [slow("mixed_bfloat16", "one-hot"), ("mixed_float16", "integers")],
)
def test_trains_and_is_saved(policy, labels, rng, tmp_path):
    keras.mixed_precision.set_global_policy(policy)
    x = rng.normal(size=(64, 5)).astype("float32")
    y = np.argmax(x @ rng.normal(size=(5, 4)), axis=1)
    if labels == "one-hot":
        y = _one_hot(y, 4)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, dtype=policy)])
    model.compile(gdopt.Adam(0.1), MulticlassHinge(0.5), metrics=["accuracy"], jit_compile=True)
    first = model.fit(x, y, epochs=20, verbose=0).history
    assert first["loss"][-1] < 0.2 * first["loss"][0]
    assert first["accuracy"][-1] > 0.85
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.loss, MulticlassHinge) and loaded.loss.margin == 0.5
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)


def test_config_is_all_there_is():
    loss = MulticlassHinge(0.3, "sum", "mine", "float64")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()
    assert loss.get_config() == {
        "margin": 0.3,
        "reduction": "sum",
        "name": "mine",
        "dtype": "float64",
    }
    assert MulticlassHinge().get_config()["dtype"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": 0}, "above 0. Received: margin=0 "),
        ({"margin": "1"}, "Received: margin='1'"),
        ({"margin": float("nan")}, "Received: margin=nan"),
        ({"reduction": "max"}, "Received: reduction=max"),
        ({"dtype": "bfloat16"}, "Received: dtype='bfloat16'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MulticlassHinge(**arguments)


@pytest.mark.parametrize(
    ("label_shape", "prediction_shape", "message"),
    [
        ((5, 4), (5, 3), r"Received: y_true.shape=\(5, 4\)"),
        ((5, 2, 3), (5, 3), r"Received: y_true.shape=\(5, 2, 3\)"),
        ((5,), (5, 2, 3), r"Received: y_true.shape=\(5,\)"),
        ((5, 1), (5, 1), r"at least two classes.* Received: y_pred.shape=\(5, 1\)"),
        ((), (), r"Received: y_pred.shape=\(\)"),
    ],
)
def test_bad_shapes(label_shape, prediction_shape, message):
    with pytest.raises(ValueError, match=message):
        MulticlassHinge()(np.zeros(label_shape), np.zeros(prediction_shape))


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["integers", "column", "one-hot"])
def test_two_devices_equal_one(labels, two_devices, rng):
    x, y = rng.normal(size=(24, 3)), np.arange(24) % 4
    y = {"integers": y, "column": y[:, None], "one-hot": np.eye(4)[y]}[labels]

    def fitted():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        model.compile(gdopt.Adam(0.1), MulticlassHinge())
        model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        return model.get_weights()

    one = fitted()
    with two_devices.scope():
        two = fitted()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
