"""What contains no TensorFlow: with JAX and torch it runs through Keras's own path."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.parameters import slow

_SCRIPT = """
import copy, os, tempfile
import keras, numpy as np
import keras_gdopt as gdopt
from tests.optimizer_cases import A_FEW, CASES

rng = np.random.default_rng(0)
for case in CASES:
    # The rule, by `apply`.
    start, gradients = rng.normal(size=(3, 2)), rng.normal(size=(20, 3, 2)).astype("float32")
    optimizer, variable = case(learning_rate=0.1), keras.Variable(start, dtype="float32")
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    expected = case.transcribed(start, gradients, [0.1] * 20)[-1]
    received = keras.ops.convert_to_numpy(variable)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)

    # What needs TensorFlow says so.
    rule = case.rule(optimizer)
    assert rule.step_metrics == {}
    recording = (rule.record_step_metrics, RuntimeError)
    for call, error in (recording, (lambda: case(lazy=True), ValueError)):
        try:
            call()
        except error as message:
            assert "TensorFlow backend" in str(message)
        else:
            raise AssertionError(f"{case}: no {error}")

for case in CASES if os.environ["FIT"] == "all" else A_FEW[:1]:
    # In `fit`, with Keras's base arguments, saved and loaded.
    keras.utils.set_random_seed(0)  # other weights may need more epochs
    x = rng.normal(size=(32, 4)).astype("float32")
    y = x @ np.array([[1.0], [-2.0], [0.5], [0.0]], "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    settings = {"weight_decay": 1e-4, "global_clipnorm": 10.0, "use_ema": True, "ema_momentum": 0.5}
    model.compile(case.brisk(0.05, **settings), "mse")
    losses = model.fit(x, y, batch_size=8, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0], (case, losses)
    path = os.path.join(tempfile.mkdtemp(), "model.keras")
    model.save(path)
    loaded = keras.models.load_model(path)
    copied = copy.deepcopy(model.optimizer)
    copied.build(model.trainable_variables)
    for other in (loaded.optimizer, copied):
        for a, b in zip(other.variables, model.optimizer.variables, strict=True):
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
            )

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(gdopt.Adam(), "mse")
for make in (
    lambda: gdopt.Gadam(model),
    gdopt.LBFGS,
    lambda: gdopt.callbacks.OptimizerTensorBoard(tempfile.mkdtemp()),
    lambda: gdopt.callbacks.PopulationTensorBoard(tempfile.mkdtemp()),
):
    try:
        make()
    except RuntimeError as message:
        assert "needs the TensorFlow backend" in str(message)
    else:
        raise AssertionError("no RuntimeError")

# The paper's example of the hinge loss, and the initializers.
loss = gdopt.losses.MulticlassHinge(reduction="none")
losses = loss([0, 1], [[0.49, 0.43, 0.08], [0.45, 0.53, 0.02]])
np.testing.assert_allclose(keras.ops.convert_to_numpy(losses), [1.53, 1.41], rtol=1e-6)
kernel = keras.ops.convert_to_numpy(gdopt.initializers.SparseNormal(2, seed=1)((5, 3)))
assert np.count_nonzero(kernel, axis=0).tolist() == [2, 2, 2]
bias = keras.ops.convert_to_numpy(gdopt.initializers.ClassPriorBias([1, 3])((2,)))
np.testing.assert_allclose(np.exp(bias), [0.25, 0.75], rtol=1e-6)

import sys
assert "keras_gdopt.optimizers.tensorflow_step" not in sys.modules
print("all", len(CASES))
"""


@pytest.mark.parametrize("fit", ["one", slow("all")])
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_rules_work_with_another_backend(backend, fit):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "KERAS_BACKEND": backend,
        "JAX_PLATFORMS": "cpu",
        "FIT": fit,
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all")
