"""Models, data and settings that users bring, by name: what `fit` takes.

Each model has its own samples; each kind of data puts them into another container; each setting
changes how a step is made.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

SAMPLES, BATCH = 12, 4


@dataclass(frozen=True)
class OrdinaryModel:
    """A model, the samples it is trained on, and how it is compiled."""

    build: Callable[[], keras.Model]
    x: Any
    y: Any = None
    loss: Any = "mse"
    metrics: Any = None
    full_batches_only: bool = False
    """Whether each batch must have `BATCH` samples."""
    compiles: bool = True
    """Whether XLA compiles it."""


def _draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


FEATURES = _draw(SAMPLES, 4)
TARGETS = (FEATURES[:, :1] > 0).astype("float32")  # labels of two classes, and numbers
SEQUENCES = _draw(SAMPLES, 5, 2)
IDS = np.random.default_rng(0).integers(1, 6, (SAMPLES, 5)).astype("int32")
IDS[::2, -1] = 0  # padding
# Keras takes no strings of NumPy.
WORDS = tf.constant([["the cat"], ["a dog and the cat"], ["mice"]] * (SAMPLES // 3))


def _sequential(*parts: Any) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), *parts])


def _dense(**arguments: Any) -> keras.Model:
    return _sequential(layers.Dense(3, "tanh", **arguments), layers.Dense(1))


def _several() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((1,), name="b")
    hidden = layers.Concatenate()([layers.Dense(3, "tanh")(a), b])
    outputs = {name: layers.Dense(1, name=name)(hidden) for name in ("p", "q")}
    return keras.Model({"a": a, "b": b}, outputs)


def _nested() -> keras.Model:
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, "tanh")])
    inputs = keras.Input((4,))
    middle = keras.Model(inputs, inner(layers.Dense(3)(inputs)))
    return _sequential(middle, layers.Dense(1))


def _shared() -> keras.Model:
    inputs, layer = keras.Input((4,)), layers.Dense(4, "tanh")
    return keras.Model(inputs, layers.Dense(1)(layer(layer(inputs))))


@keras.saving.register_keras_serializable("tests")
class Distance(keras.layers.Layer):
    """Whose loss is all there is."""

    def call(self, pair):
        self.add_loss(
            keras.ops.mean((pair[0] - keras.ops.sum(pair[1], axis=1, keepdims=True)) ** 2)
        )
        return pair[0]


def _only_add_loss() -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, Distance()([layers.Dense(1)(inputs), inputs]))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.out = layers.Dense(3, "tanh"), layers.Dense(1)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


@keras.saving.register_keras_serializable("tests")
class OwnLoss(Subclassed):
    """With a metric that its loss moves."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.largest = keras.metrics.Mean(name="largest")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        error = keras.ops.abs(y_pred - keras.ops.cast(y, y_pred.dtype))
        self.largest.update_state(keras.ops.max(error))
        return keras.ops.mean(error**2)


@keras.saving.register_keras_serializable("tests")
class OwnStep(Subclassed):
    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            error = tf.cast(self(x, training=True), tf.float32) - tf.cast(y, tf.float32)
            loss = tf.reduce_mean(error**2)
        self.optimizer.apply(
            tape.gradient(loss, self.trainable_variables), self.trainable_variables
        )
        return {"loss": loss}


def _built(model: keras.Model) -> keras.Model:
    model(FEATURES[:1])
    return model


def _frozen_part() -> keras.Model:
    model = _dense()
    model.layers[0].trainable = False
    return model


def _frozen() -> keras.Model:
    model = _dense()
    model.trainable = False
    return model


def _embedding() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(6, 3, mask_zero=True),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )


def _lstm() -> keras.Model:
    return keras.Sequential([keras.Input((None, 2)), layers.LSTM(3), layers.Dense(1)])


def _stateful_lstm() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(batch_shape=(BATCH, 5, 2)),
            layers.LSTM(3, stateful=True),
            layers.Dense(1),
        ]
    )


def _words() -> keras.Model:
    vectorization = layers.TextVectorization(8, output_sequence_length=4)
    vectorization.adapt(WORDS[:, 0])
    return keras.Sequential(
        [
            keras.Input((1,), dtype="string"),
            vectorization,
            layers.Embedding(8, 3, mask_zero=True),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )


def _convolution() -> keras.Model:
    return _sequential(
        layers.Reshape((2, 2, 1)), layers.Conv2D(2, 2, activation="tanh"), layers.Flatten(),
        layers.Dense(1),
    )  # fmt: skip


MODELS: dict[str, OrdinaryModel] = {
    "Sequential": OrdinaryModel(_dense, FEATURES, TARGETS, metrics=["mae"]),
    "functional with several inputs and outputs": OrdinaryModel(
        _several,
        {"a": FEATURES, "b": FEATURES[:, :1]},
        {"p": TARGETS, "q": 2 * TARGETS},
        {"p": "mse", "q": "mae"},
        {"p": ["mae"], "q": ["mse"]},
    ),
    "subclassed": OrdinaryModel(lambda: _built(Subclassed()), FEATURES, TARGETS),
    "nested": OrdinaryModel(_nested, FEATURES, TARGETS),
    "shared layers": OrdinaryModel(_shared, FEATURES, TARGETS),
    "only `add_loss`": OrdinaryModel(_only_add_loss, FEATURES, loss=None),
    "a `compute_loss` of its own": OrdinaryModel(lambda: _built(OwnLoss()), FEATURES, TARGETS),
    "a `train_step` of its own": OrdinaryModel(lambda: _built(OwnStep()), FEATURES, TARGETS),
    "convolution": OrdinaryModel(_convolution, FEATURES, TARGETS),
    "BatchNormalization": OrdinaryModel(
        lambda: _sequential(layers.Dense(3), layers.BatchNormalization(), layers.Dense(1)),
        FEATURES,
        TARGETS,
    ),
    "Dropout": OrdinaryModel(
        lambda: _sequential(layers.Dense(8), layers.Dropout(0.5, seed=1), layers.Dense(1)),
        FEATURES,
        TARGETS,
    ),
    "Embedding with `mask_zero`": OrdinaryModel(_embedding, IDS, TARGETS),
    "LSTM": OrdinaryModel(_lstm, SEQUENCES, TARGETS),
    "stateful LSTM": OrdinaryModel(_stateful_lstm, SEQUENCES, TARGETS, full_batches_only=True),
    "Lambda": OrdinaryModel(
        lambda: _sequential(
            layers.Dense(3), layers.Lambda(lambda x: keras.ops.tanh(x)), layers.Dense(1)
        ),
        FEATURES,
        TARGETS,
    ),
    "TextVectorization": OrdinaryModel(_words, WORDS, TARGETS, compiles=False),
    "constraints": OrdinaryModel(
        lambda: _dense(kernel_constraint="non_neg", name="bounded"), FEATURES, TARGETS
    ),
    "regularizers": OrdinaryModel(lambda: _dense(kernel_regularizer="l2"), FEATURES, TARGETS),
    "frozen parts": OrdinaryModel(_frozen_part, FEATURES, TARGETS),
    "no trainable weights": OrdinaryModel(_frozen, FEATURES, TARGETS),
    "mixed dtypes": OrdinaryModel(lambda: _dense(dtype="float64"), FEATURES, TARGETS),
}


# --- data ---------------------------------------------------------------------------------


def _first(model: OrdinaryModel, count: int) -> tuple[Any, Any]:
    def cut(part: Any) -> Any:
        return None if part is None else keras.tree.map_structure(lambda a: a[:count], part)

    return cut(model.x), cut(model.y)


def _arrays(model: OrdinaryModel, **more: Any) -> dict[str, Any]:
    return {"x": model.x, "y": model.y, "batch_size": BATCH, **more}


def _lists(model: OrdinaryModel) -> dict[str, Any]:
    if isinstance(model.x, dict):
        x, y = list(model.x.values()), model.y
    else:
        x, y = [model.x], None if model.y is None else [model.y]
    return {"x": x, "y": y, "batch_size": BATCH}


def _tensors(model: OrdinaryModel) -> dict[str, Any]:
    convert = tf.convert_to_tensor
    x = keras.tree.map_structure(convert, model.x)
    y = None if model.y is None else keras.tree.map_structure(convert, model.y)
    return {"x": x, "y": y, "batch_size": BATCH}


def _slices(model: OrdinaryModel) -> tf.data.Dataset:
    parts = (model.x,) if model.y is None else (model.x, model.y)
    return tf.data.Dataset.from_tensor_slices(parts)


def _dataset(model: OrdinaryModel) -> dict[str, Any]:
    return {"x": _slices(model).batch(BATCH)}


def _endless(model: OrdinaryModel) -> dict[str, Any]:
    return {"x": _slices(model).repeat().batch(BATCH), "steps_per_epoch": 3}


def _unknown_length(model: OrdinaryModel) -> dict[str, Any]:
    return {"x": _slices(model).filter(lambda *parts: True).batch(BATCH)}


def _padded(model: OrdinaryModel) -> dict[str, Any]:
    lengths = np.arange(SAMPLES) % 3 + 1
    parts = tf.data.Dataset.zip((_slices(model), tf.data.Dataset.from_tensor_slices(lengths)))
    cut = parts.map(lambda pair, length: (pair[0][:length], pair[1]))
    return {"x": cut.padded_batch(BATCH)}


class _Sequence(keras.utils.PyDataset):
    def __init__(self, model: OrdinaryModel) -> None:
        super().__init__()
        self.model = model

    def __len__(self) -> int:
        return SAMPLES // BATCH

    def __getitem__(self, index: int) -> Any:
        def cut(part: Any) -> Any:
            return keras.tree.map_structure(
                lambda array: array[index * BATCH : (index + 1) * BATCH], part
            )

        if self.model.y is None:
            return (cut(self.model.x),)
        return cut(self.model.x), cut(self.model.y)


def _one_sample(model: OrdinaryModel) -> dict[str, Any]:
    x, y = _first(model, 1)
    return {"x": x, "y": y, "batch_size": BATCH}


def _fewer_than_a_batch(model: OrdinaryModel) -> dict[str, Any]:
    x, y = _first(model, 3)
    return {"x": x, "y": y}


def _last_batch_of_one(model: OrdinaryModel) -> dict[str, Any]:
    x, y = _first(model, 9)
    return {"x": x, "y": y, "batch_size": BATCH}


def _sample_weight(model: OrdinaryModel) -> dict[str, Any]:
    weights = np.linspace(0.5, 2.0, SAMPLES, dtype="float32")
    if isinstance(model.y, dict):
        return _arrays(model, sample_weight={name: weights for name in model.y})
    return _arrays(model, sample_weight=weights)


def _class_weight(model: OrdinaryModel) -> dict[str, Any]:
    return _arrays(model, class_weight={0: 0.5, 1: 2.0})


@dataclass(frozen=True)
class OrdinaryData:
    """What `fit` is given of a model's samples, as its arguments."""

    arguments: Callable[[OrdinaryModel], dict[str, Any]]
    suits: Callable[[OrdinaryModel], bool] = field(default=lambda model: True)
    """Whether Keras trains such a model on it."""


def _is_of_full_batches(model: OrdinaryModel) -> bool:
    return not model.full_batches_only


DATA: dict[str, OrdinaryData] = {
    "arrays": OrdinaryData(_arrays),
    "lists": OrdinaryData(_lists),
    "tensors": OrdinaryData(_tensors),
    "a `tf.data.Dataset`": OrdinaryData(_dataset),
    "an endless one with `steps_per_epoch`": OrdinaryData(_endless),
    "one of unknown length": OrdinaryData(_unknown_length),
    "batches of different lengths": OrdinaryData(
        _padded, lambda model: model in (MODELS["Embedding with `mask_zero`"], MODELS["LSTM"])
    ),
    "a `PyDataset`": OrdinaryData(lambda model: {"x": _Sequence(model)}),
    "one sample": OrdinaryData(_one_sample, _is_of_full_batches),
    "fewer than a batch": OrdinaryData(_fewer_than_a_batch, _is_of_full_batches),
    "a last batch of one": OrdinaryData(_last_batch_of_one, _is_of_full_batches),
    "sample weights": OrdinaryData(_sample_weight, lambda model: model.y is not None),
    "class weights": OrdinaryData(_class_weight, lambda model: isinstance(model.y, np.ndarray)),
}


# --- settings -----------------------------------------------------------------------------


@dataclass(frozen=True)
class OrdinarySetting:
    """How a step is made: arguments of `compile` and of the optimizer, and a dtype policy."""

    compile: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    policy: str = "float32"


SETTINGS: dict[str, OrdinarySetting] = {
    "as it comes": OrdinarySetting(),
    "eager": OrdinarySetting({"run_eagerly": True}),
    "jit": OrdinarySetting({"jit_compile": True}),
    "several steps an execution": OrdinarySetting({"steps_per_execution": 2}),
    "accumulation": OrdinarySetting(optimizer={"gradient_accumulation_steps": 2}),
    "an average of the weights": OrdinarySetting(optimizer={"use_ema": True}),
    "weight decay": OrdinarySetting(optimizer={"weight_decay": 0.01}),
    "mixed_float16": OrdinarySetting(policy="mixed_float16"),
    "mixed_bfloat16": OrdinarySetting(policy="mixed_bfloat16"),
}
