"""Two logical CPU devices for strategies, and Keras's global settings put back."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

# Before anything initializes TensorFlow's runtime.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


def pytest_collection_finish():
    """What is imported by now stays: `clear_session`, after each test, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _keras_settings_put_back():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.set_floatx("float32")
    keras.mixed_precision.set_global_policy("float32")
    keras.backend.clear_session()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def float64():
    keras.backend.set_floatx("float64")


@pytest.fixture(scope="session")
def two_devices():
    """One strategy for all tests: a second one in a process reuses the first's keys."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
