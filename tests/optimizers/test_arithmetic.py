"""Numbers that the rules and the metrics share."""

import math

import numpy as np
import pytest
import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import one_minus_power, sum_of_squares

PART = 2**15


@pytest.mark.parametrize("shape", [(), (7,), (PART,), (2 * PART + 3,), (3, PART + 1), (33, PART)])
def test_sum_of_squares_counts_each_entry_once(shape, rng):
    entries = rng.integers(-9, 10, size=shape).astype("float64")
    entries.flat[-1] = 1000.0  # beside the parts of equal length, where there is a rest
    expected = math.fsum(entry * entry for entry in entries.flat)
    compiled = tf.function(sum_of_squares, jit_compile=True)
    assert float(sum_of_squares(tf.constant(entries))) == expected
    assert float(compiled(tf.constant(entries))) == expected


@pytest.mark.parametrize("step", [1.0, 2.0, 1e6])
def test_one_minus_power_loses_no_digits(step):
    """In float32, 1 - 0.999 is 57 units in the last place off."""
    expected = -math.expm1(step * math.log(0.999))
    received = float(one_minus_power(0.999, tf.constant(step, "float32")))
    np.testing.assert_allclose(received, expected, rtol=3e-7)
