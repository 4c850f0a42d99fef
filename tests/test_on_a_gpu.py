"""What holds on the CPU holds on a GPU: the same steps, compiled, without a transfer."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from tests.optimizer_cases import closure_classes, every_optimizer

GPU = "GPU"
DEVICES = tf.config.list_physical_devices(GPU)

# What a compiled program says where it waits for the host.
HOST = re.compile(r'\b(?:outfeed|infeed|send|recv)\(|custom_call_target="[^"]*callback')

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICES, reason="no GPU"),
]


def _data(rng, count=64):
    x = rng.normal(size=(count, 6)).astype("float32")
    return x, x @ rng.normal(size=(6, 2)).astype("float32")


def _model(optimizer, **compiled):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(optimizer, "mse", **compiled)
    return model


def _on_both(train):
    """What `train` returns on the CPU and on the GPU."""
    results = []
    for device in ("CPU:0", f"{GPU}:0"):
        keras.backend.clear_session()
        with tf.device(device):
            results.append(train())
    return results


def _assert_close(one, other, rtol=1e-4, atol=1e-5):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@every_optimizer
@pytest.mark.parametrize("jit_compile", [True, False])
def test_steps_are_those_of_the_cpu(case, jit_compile):
    def train():
        model = _model(case.brisk(0.01), jit_compile=jit_compile)
        model.fit(*_data(np.random.default_rng(0)), batch_size=16, shuffle=False, verbose=0)
        return model

    on_cpu, on_gpu = _on_both(train)
    _assert_close(on_cpu.get_weights(), on_gpu.get_weights())
    slots = [variable for variable in on_gpu.optimizer.variables if variable.shape]
    assert all(GPU in variable.value.device for variable in [*on_gpu.weights, *slots])


@every_optimizer
def test_a_compiled_step_calls_nothing_on_the_host(case, rng):
    variables = [keras.Variable(rng.normal(size=(6, 2)).astype("float32"))]
    optimizer = case()
    optimizer.build(variables)

    @tf.function(jit_compile=True)
    def step(gradient):
        optimizer.apply([gradient])

    gradient = tf.ones((6, 2))
    step(gradient)
    program = step.experimental_get_compiler_ir(gradient)(stage="optimized_hlo")
    assert "ENTRY" in program
    assert not HOST.findall(program)


def test_what_a_call_of_the_host_looks_like():
    call = '%a = f32[] custom-call(%b), custom_call_target="xla_python_gpu_callback"'
    assert all(map(HOST.search, (call, "%t = token[] outfeed(%a, %b)", "%s = send(%a, %t)")))


@every_optimizer
def test_a_step_moves_nothing_between_host_and_gpu(case, rng):
    variables = [keras.Variable(rng.normal(size=(6, 2)).astype("float32"))]
    optimizer = case()
    optimizer.build(variables)
    step = tf.function(lambda gradient: optimizer.apply([gradient]))
    gradient = tf.ones((6, 2))
    step(gradient)
    before = tf.config.experimental.get_device_policy()
    tf.config.experimental.set_device_policy("explicit")  # an implicit copy is an error
    try:
        step(gradient)
    finally:
        tf.config.experimental.set_device_policy(before)


@pytest.mark.parametrize("lazy", [False, True])
def test_repeated_rows(lazy):
    def train():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
        model.compile(gdopt.Adam(0.01, lazy=lazy), "mse")
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 8, size=(64, 5))
        model.fit(ids, ids.sum(axis=1), batch_size=16, shuffle=False, verbose=0)
        return model.get_weights()

    _assert_close(*_on_both(train))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, rng):
    keras.mixed_precision.set_global_policy(policy)
    model = _model(gdopt.Adam(0.02))
    losses = model.fit(*_data(rng), batch_size=16, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("cls", closure_classes())
def test_closures(cls, float64):
    def train():
        optimizer = cls(iterations_per_step=5)
        model = _model(optimizer)
        optimizer.attach(model)
        model.fit(*_data(np.random.default_rng(0)), batch_size=64, epochs=2, verbose=0)
        return model.get_weights()

    _assert_close(*_on_both(train), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_a_population(engine, float64):
    def train():
        gadam = gdopt.Gadam(_model(gdopt.Adam(0.01)), 4, engine=engine, seed=0)
        gadam.fit(*_data(np.random.default_rng(0)), generations=2, batch_size=16, verbose=0)
        return [gadam.fitness, *gadam.model.get_weights()]

    _assert_close(*_on_both(train), rtol=1e-6, atol=1e-8)


def test_what_a_step_records():
    def train():
        metrics = gdopt.callbacks.OptimizerMetrics(update_freq=1)
        model = _model(gdopt.Adam(0.01))
        data = _data(np.random.default_rng(0))
        model.fit(*data, batch_size=16, shuffle=False, verbose=0, callbacks=[metrics])
        return [np.array(model.history.history[name]) for name in sorted(model.history.history)]

    _assert_close(*_on_both(train), rtol=1e-3)
