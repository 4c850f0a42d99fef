"""Turns class weights into sample weights, as Keras's `fit` does."""

import numbers
import reprlib
from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.functional import Data


def check_class_weight(class_weight: Any) -> None:
    """Raises a `ValueError` if this is not a dict from integer labels to numbers."""
    if not isinstance(class_weight, dict) or not all(
        isinstance(label, numbers.Real)
        and float(label).is_integer()
        and isinstance(weight, numbers.Real)
        for label, weight in class_weight.items()
    ):
        raise ValueError(
            "`class_weight` must be a dict of a number for each label, and labels are whole "
            "numbers: {0: 1.0, 1: 2.5}. For labels with names, or weights of several outputs, use "
            f"`sample_weight`. Received: class_weight={reprlib.repr(class_weight)}"
        )


def with_class_weight(data: Data, class_weight: dict[int, float] | None) -> Data:
    """Adds the class weights of the labels as sample weights, as Keras does for arrays.

    A label is rounded to an integer; of one-hot labels, it is the index of the largest entry. A
    label without a class weight has the weight 1. (In a `tf.data.Dataset`, Keras accepts no
    labels below 0, or above those with a weight; here datasets are treated like arrays.)

    Raises:
        ValueError: If `y` is not one array of labels, or there are sample weights, too.
    """
    if class_weight is None:
        return data
    y = data.get("y")
    if "sample_weight" in data:
        raise ValueError(
            "Expected `class_weight` or sample weights. Received: both; multiply them into "
            "`sample_weight`"
        )
    if y is None or tf.nest.is_nested(y):
        raise ValueError(
            "`class_weight` needs the targets `y` of a model with one output; with several, use "
            "`sample_weight`, one for each. Received: "
            f"{'no y' if y is None else f'y in a {type(y).__name__}'}"
        )
    if (
        not isinstance(y, tf.Tensor)
        or y.shape.rank is None
        or not (y.dtype.is_integer or y.dtype.is_floating or y.dtype == tf.bool)
    ):
        raise ValueError(
            "`class_weight` needs labels that are whole numbers or one-hot, in dense arrays. "
            f"Received: y of shape {y.shape} and type {y.dtype.name} with class_weight="
            f"{reprlib.repr(class_weight)}"
        )
    if y.shape.rank < 2:
        labels = y
    else:
        labels = tf.squeeze(y, axis=-1) if y.shape[-1] == 1 else tf.argmax(y, axis=-1)
    if labels.dtype.is_floating:
        labels = tf.round(labels)
    labels = tf.cast(labels, tf.int64)
    # Labels without a class weight keep the weight 1.
    known = sorted({int(label): float(weight) for label, weight in class_weight.items()}.items())
    weights = tf.ones_like(labels, keras.config.floatx())
    if known:
        table = tf.constant([label for label, _ in known], tf.int64)
        values = tf.constant([weight for _, weight in known], keras.config.floatx())
        flat = tf.reshape(labels, [-1])
        index = tf.minimum(tf.searchsorted(table, flat), len(known) - 1)
        found = tf.reshape(tf.gather(table, index) == flat, tf.shape(labels))
        weights = tf.where(found, tf.reshape(tf.gather(values, index), tf.shape(labels)), weights)
    return {**data, "sample_weight": weights}
