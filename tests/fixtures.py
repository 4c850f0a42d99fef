"""Fast compilation, two logical CPU devices for strategies, Keras's global settings put back."""

import gc
import importlib.util
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.util import tf_stack

# XLA reads them at its first compilation, here and in the processes that tests start. `.ci/slow`
# sets `XLA_FLAGS` to nothing, so that its tests compile as users do.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
)
# Optimizing a graph takes longer than running it a few times.
tf.config.optimizer.set_experimental_options(
    {"disable_meta_optimizer": bool(os.environ["XLA_FLAGS"])}
)

# TensorFlow notes the Python stack of each operation that it makes. Under all the frames of pytest
# that takes long, so here all operations have the same one.
if os.environ["XLA_FLAGS"]:
    _anywhere = tf_stack.extract_stack()
    str(_anywhere)  # keeps its lines, before the code that they belong to is freed
    tf_stack.extract_stack = lambda *_args, **_kwargs: _anywhere

# Before anything initializes TensorFlow's runtime.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


# Filtering the tracebacks of all calls takes a tenth of the time that tracing does.
keras.config.disable_traceback_filtering()
tf.debugging.disable_traceback_filtering()


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)  # tracing makes many objects and little garbage


@pytest.fixture(autouse=True)
def _keras_settings_put_back():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.set_floatx("float32")
    keras.mixed_precision.set_global_policy("float32")
    keras.backend.clear_session(free_memory=False)  # a collection takes longer than most tests


@pytest.fixture(autouse=True, scope="module")
def _garbage_collected():
    """After each file, so that no later collection has to go through what all files traced."""
    yield
    gc.collect()
    gc.freeze()  # what is left


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def float64():
    keras.backend.set_floatx("float64")


@pytest.fixture(scope="session")
def cluster():
    """Ray on this machine, started once in this process."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    import ray

    from keras_gdopt.gadam.cluster.pool import connect

    connect(None, cpus=12)  # as populations of other tests may still have theirs
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def two_devices():
    """One strategy for all tests: a second one in a process reuses the first's keys."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
