"""Small models that tests train populations of, and data for them."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers


def dense():
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(3)]
    )


def linear():
    return keras.Sequential([keras.Input((6,)), layers.Dense(3)])


def wide():
    """Its weights take 320 KB."""
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8192, activation="tanh"), layers.Dense(3)]
    )


def convolution():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Reshape((3, 2, 1)),
            layers.Conv2D(4, 2, activation="tanh"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def normalization():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, use_bias=False),  # whose gradient would be 0, but for rounding
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )


def recurrent(unroll=False):
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Reshape((3, 2)),
            layers.LSTM(4, unroll=unroll),
            layers.Dense(3),
        ]
    )


def remembering():
    """Takes batches of 8 sequences, each of which goes on in the next batch."""
    return keras.Sequential(
        [
            keras.Input(batch_shape=(8, 6)),
            layers.Reshape((3, 2)),
            layers.LSTM(4, stateful=True),
            layers.Dense(3),
        ]
    )


def words(texts):
    """Takes strings."""
    vectorization = layers.TextVectorization(8, output_sequence_length=4)
    vectorization.adapt(texts)
    inputs = keras.Input((), dtype="string")
    ids = vectorization(inputs)
    averages = layers.GlobalAveragePooling1D()(layers.Embedding(8, 3, mask_zero=True)(ids))
    return keras.Model(inputs, layers.Dense(1)(averages))


def unrolled_recurrent():
    return recurrent(unroll=True)


def embedding():
    """The inputs, from -3 to 3, become ids from 0 to 6, some of them repeated."""
    inputs = keras.Input((6,))
    ids = layers.Lambda(_as_ids, output_shape=(6,))(inputs)
    x = layers.Flatten()(layers.Embedding(8, 3)(ids))
    return keras.Model(inputs, layers.Dense(3)(x))


@keras.saving.register_keras_serializable("tests")
def _as_ids(x):
    return keras.ops.cast(keras.ops.clip(keras.ops.round(x) + 3, 0, 6), "int32")


def dropout():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, activation="tanh"),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )


def two_inputs():
    """Two inputs and two outputs, with a loss of the layers' own."""
    first, second = keras.Input((4,), name="first"), keras.Input((2,), name="second")
    hidden = layers.Dense(5, activation="tanh", kernel_regularizer="l2")(first)
    joined = layers.Concatenate()([hidden, second])
    outputs = {
        "one": layers.Dense(2, name="one")(joined),
        "other": layers.Dense(1, name="other")(joined),
    }
    return keras.Model({"first": first, "second": second}, outputs)


@keras.saving.register_keras_serializable("tests")
class MeanOfWords(layers.Layer):
    """Of texts that may be ragged."""

    def call(self, x):
        return tf.reduce_mean(x, axis=1)

    def compute_output_shape(self, shape):
        return (shape[0], shape[2])


def texts():
    """Takes batches of texts, each of any length."""
    inputs = keras.Input((None,), dtype="int64", ragged=True)
    words = layers.Embedding(8, 3)(inputs)
    return keras.Model(inputs, layers.Dense(1)(MeanOfWords()(words)))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = layers.Dense(units, activation="tanh")
        self.out = layers.Dense(3)

    def call(self, inputs):
        return self.out(self.hidden(inputs))

    def get_config(self):
        return {"units": self.units}


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6)))
    return model


def samples(rng, count=22):
    x = rng.normal(size=(count, 6))
    return x, np.stack([np.sin(x.sum(1)), x[:, 0] * x[:, 1], x[:, 2]], axis=1)


def samples_of_two(rng, count=22):
    x = rng.normal(size=(count, 6))
    return (
        {"first": x[:, :4], "second": x[:, 4:]},
        {"one": x[:, :2] ** 2, "other": x[:, 3:4]},
    )
