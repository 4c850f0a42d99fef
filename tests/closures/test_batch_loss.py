"""A batch's loss, gradient and Hessian against Keras and TensorFlow without this package.

The loss is Keras's own of the model called in training, the gradient a tape's by the model's
variables. The Hessian is central differences of that gradient: not a tape's derivative of it,
which for batch normalization is wrong (`tf.nn.moments` holds the mean fixed).
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.functional import Batch, ModelFunction
from tests.gadam import models
from tests.parameters import slow

COUNT = 7


def _sequential(*stack):
    return lambda: keras.Sequential([keras.Input((4,)), *(layer() for layer in stack)])


def _dense(units=2, **kwargs):
    return lambda: layers.Dense(units, **kwargs)


def _steps(features=2):
    return lambda: layers.Reshape((4 // features, features))


class _Attention(layers.Layer):
    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 2)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, inputs):
        return self.attention(inputs, inputs)


def _activations(x):
    kinds = ("silu", "gelu", "selu", "softplus", "softmax", "mish")
    return sum(getattr(keras.activations, kind)(x) for kind in kinds)


MODELS = {
    "dense": _sequential(_dense(3, activation="tanh"), _dense()),
    "regularized": _sequential(
        _dense(3, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.25)),
        _dense(bias_regularizer=keras.regularizers.L2(0.125)),
    ),
    "convolution": _sequential(
        lambda: layers.Reshape((2, 2, 1)),
        lambda: layers.Conv2D(3, 2, padding="same", activation="tanh"),
        layers.Flatten,
        _dense(),
    ),
    "batch_normalization": _sequential(
        _dense(3, use_bias=False), layers.BatchNormalization, _dense(activation="tanh")
    ),
    "lstm": _sequential(_steps(1), lambda: layers.LSTM(2), _dense()),
    "unrolled_lstm": _sequential(_steps(1), lambda: layers.LSTM(2, unroll=True), _dense()),
    "two_inputs": models.two_inputs,
}
# With these only the products are checked.
MORE_MODELS = {
    "activations": _sequential(_dense(3), lambda: layers.Activation(_activations), _dense()),
    "other_normalizations": _sequential(
        _dense(6, activation="tanh"),
        layers.LayerNormalization,
        lambda: layers.GroupNormalization(2),
        layers.RMSNormalization,
        _dense(),
    ),
    "attention": _sequential(_steps(), _Attention, layers.Flatten, _dense()),
    "embedding": _sequential(
        lambda: layers.Lambda(lambda x: tf.cast(x > 0.0, tf.int32)),
        lambda: layers.Embedding(2, 2),
        layers.Flatten,
        _dense(activation="tanh"),
    ),
}


def _model_and_batch(name, rng, count=COUNT):
    """With weights that are none of the initializers' zeros and ones."""
    model = {**MODELS, **MORE_MODELS}[name]()
    model.compile("sgd", "mse")
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * rng.normal(size=variable.shape))
    if name == "two_inputs":
        x, y = models.samples_of_two(rng, count)
    else:
        x, y = rng.normal(size=(count, 4)), rng.normal(size=(count, 2))
    weights = rng.uniform(0.2, 2.0, size=count)
    return model, tf.nest.map_structure(tf.constant, Batch(x, y, weights))


def _vector(arrays):
    return np.concatenate([np.ravel(np.asarray(array)) for array in arrays])


class _Plain:
    """The loss and its gradient, with Keras and TensorFlow alone."""

    def __init__(self, model, batch):
        self.model = model
        self.batch = batch
        self._traced = tf.function(self._value_and_gradient, autograph=False)

    def _value_and_gradient(self):
        x, y, sample_weight = self.batch
        variables = [variable.value for variable in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            loss = self.model.compute_loss(
                x=x, y=y, y_pred=self.model(x, training=True), sample_weight=sample_weight,
                training=True,
            )  # fmt: skip
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        return loss, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def __call__(self, point):
        """At a vector, which it puts into the model's variables."""
        ends = np.cumsum([int(np.prod(v.shape)) for v in self.model.trainable_variables])
        parts = np.split(point, ends[:-1])
        for variable, part in zip(self.model.trainable_variables, parts, strict=True):
            variable.assign(np.reshape(part, variable.shape))
        loss, gradients = self._traced()
        return float(loss), _vector(gradients)


def _difference(function, distance=1e-4):
    """The derivative at 0, to the fourth order of the distance."""
    values = [function(number * distance) for number in (-2, -1, 1, 2)]
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * distance)


def _evaluated(model, batch, point, direction, *, chunks=1, hessian=False, jit_compile=False,
               any_count=False):  # fmt: skip
    """Loss, gradient, the Hessian's product with a direction and, if asked for, the Hessian."""

    def evaluations(data, point, direction):
        loss = BatchLoss(ModelFunction(model), Batch(**data), chunks, is_compiled=jit_compile)
        product = loss.hessian_product(point, direction)
        of_all = [loss.hessian(point)] if hessian else []
        return *loss.value_and_gradient(point), product, *of_all

    def spec(part):
        shape = (None, *part.shape[1:]) if any_count else part.shape
        return tf.TensorSpec(shape, part.dtype)

    data = {name: part for name, part in batch._asdict().items() if part is not None}
    vector = tf.TensorSpec(point.shape, tf.float64)
    function = tf.function(
        evaluations,
        input_signature=[tf.nest.map_structure(spec, data), vector, vector],
        jit_compile=jit_compile,
        autograph=False,
    )
    return [np.asarray(part) for part in function(data, tf.constant(point), direction)]


# --- against Keras and differences -------------------------------------------------------


# Each kind of loop and layer by itself; compiled, those of which XLA makes something else.
@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [
        *((name, False) if name != "lstm" else slow(name, False) for name in MODELS),
        *((name, True) if name == "dense" else slow(name, True) for name in MODELS),
    ],
)
def test_the_loss_its_gradient_and_its_hessian(name, jit_compile, rng, float64):
    model, batch = _model_and_batch(name, rng)
    point = _vector(model.trainable_variables)
    direction = rng.normal(size=point.shape)
    plain = _Plain(model, batch)
    expected_value, expected_gradient = plain(point)
    product, *columns = (
        _difference(lambda distance, way=way: plain(point + distance * way)[1])
        for way in (direction, *np.eye(len(point)))
    )
    results = _evaluated(model, batch, point, direction, hessian=True, jit_compile=jit_compile)
    np.testing.assert_allclose(results[0], expected_value, rtol=1e-13)
    np.testing.assert_allclose(results[1], expected_gradient, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(results[2], product, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(results[3], columns, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(results[3] @ direction, results[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MORE_MODELS)
def test_products_with_the_hessian_of_other_layers(name, rng, float64):
    model, batch = _model_and_batch(name, rng)
    point = _vector(model.trainable_variables)
    direction = rng.normal(size=point.shape)
    plain = _Plain(model, batch)
    expected = _difference(lambda distance: plain(point + distance * direction)[1])
    _, gradient, product = _evaluated(model, batch, point, direction)
    np.testing.assert_allclose(gradient, plain(point)[1], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(product, expected, rtol=1e-8, atol=1e-9)


def test_a_product_leaves_tensorflow_as_it_was(rng, float64):
    """Batch normalization's second derivative needs moments of its own while it is traced."""
    moments = tf.nn.moments
    model, batch = _model_and_batch("batch_normalization", rng)
    point = _vector(model.trainable_variables)
    _evaluated(model, batch, point, point)
    assert tf.nn.moments is moments
    model.add(layers.Lambda(lambda x: x @ tf.ones((7, 7), tf.float64)))  # of no such shape
    with pytest.raises(ValueError, match=r"[Dd]imensions must be equal"):
        _evaluated(model, batch, point, point)
    assert tf.nn.moments is moments


# --- in parts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chunks", "jit_compile"),
    [
        ("regularized", 2, True),
        ("regularized", 3, False),
        slow("regularized", 5, True),
        slow("regularized", 11, True),
        slow("two_inputs", 2, False),
        slow("two_inputs", 3, True),
        slow("two_inputs", 5, False),
        slow("two_inputs", 11, False),
    ],
)
def test_a_batch_in_parts_is_the_batch_as_a_whole(name, chunks, jit_compile, rng, float64):
    """Of 7 samples, whose number is not known when the function is traced."""
    model, batch = _model_and_batch(name, rng)
    point = _vector(model.trainable_variables)
    direction = rng.normal(size=point.shape)
    expected = _evaluated(model, batch, point, direction)
    np.testing.assert_allclose(expected[0], _Plain(model, batch)(point)[0], rtol=1e-13)
    results = _evaluated(
        model, batch, point, direction, chunks=chunks, jit_compile=jit_compile, any_count=True
    )
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunks", [1, 7])
def test_parts_without_targets_and_sample_weights(chunks, rng, float64):
    """The loss is the layers' own; the number of samples is known."""
    _, batch = _model_and_batch("regularized", rng)
    model = MODELS["regularized"]()
    model.compile("sgd")
    point = _vector(model.trainable_variables)
    squares = [np.sum(np.square(model.layers[i].get_weights()[i])) for i in range(2)]
    value, *_ = _evaluated(model, Batch(batch.x), point, point, chunks=chunks, hessian=True)
    np.testing.assert_allclose(value, 0.25 * squares[0] + 0.125 * squares[1], rtol=1e-13)


@pytest.mark.parametrize(
    ("chunks", "sizes"),
    [(1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (5, [2, 2, 2, 1]), (7, [1] * 7), (11, [1] * 7)],
)
def test_there_are_no_more_parts_than_asked_for(chunks, sizes, rng, float64):
    seen = []
    model, batch = _model_and_batch("dense", rng)

    def noting(y_true, y_pred):
        with tf.control_dependencies([tf.py_function(seen.append, [tf.shape(y_true)[0]], [])]):
            return keras.losses.mean_squared_error(y_true, y_pred)

    model.compile("sgd", noting)
    weights = tf.constant(_vector(model.trainable_variables))
    BatchLoss(ModelFunction(model), batch, chunks).value_and_gradient(weights)
    assert [int(size) for size in seen] == sizes


# --- random layers -----------------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [False, True])
def test_dropout_keeps_one_mask_until_the_state_moves(jit_compile, rng, float64):
    model = models.dropout()
    model.compile("sgd", "mse")
    batch = Batch(*(tf.constant(part) for part in models.samples(rng, COUNT)))
    function = ModelFunction(model)
    point = _vector(model.trainable_variables)
    direction = rng.normal(size=point.shape)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def evaluated(point, distance):
        loss = BatchLoss(function, batch, is_compiled=jit_compile)
        there = loss.value_and_gradient(point + distance * direction)
        here = loss.value_and_gradient(point)
        return there, here, loss.hessian_product(point, direction)

    seeds = [variable.numpy() for variable in model.non_trainable_variables]
    (_, _), here, product = evaluated(point, tf.constant(0.0, tf.float64))
    # Were the masks others, the differences would be some tenths divided by 1e-4.
    slope = _difference(lambda d: evaluated(point, tf.constant(d, tf.float64))[0][0].numpy())
    np.testing.assert_allclose(np.dot(here[1], direction), slope, rtol=1e-8)
    change = _difference(lambda d: evaluated(point, tf.constant(d, tf.float64))[0][1].numpy())
    np.testing.assert_allclose(product, change, rtol=1e-8, atol=1e-9)
    for variable, seed in zip(model.non_trainable_variables, seeds, strict=True):
        np.testing.assert_array_equal(variable, seed)

    if not jit_compile:  # XLA draws other masks from the same seeds
        plain = _Plain(model, Batch(batch.x, batch.y))
        np.testing.assert_allclose(here[0], plain(point)[0], rtol=1e-13)
    else:
        model(batch.x, training=True)
    assert any(
        np.any(variable.numpy() != seed)
        for variable, seed in zip(model.non_trainable_variables, seeds, strict=True)
    )
    _, after, _ = evaluated(point, tf.constant(0.0, tf.float64))
    assert abs(float(after[0]) - float(here[0])) > 1e-3
