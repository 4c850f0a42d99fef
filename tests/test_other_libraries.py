"""The tables of docs/other_libraries.md: optimizers of torch and optax, and ours of equal steps."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt

PAGE = Path(__file__).parents[1] / "docs" / "other_libraries.md"
STEPS = 30


def _rows(header):
    """The pairs of the table with this header."""
    table = PAGE.read_text().split(f"| `{header}` | here |\n", 1)[1].split("\n\n", 1)[0]
    return [tuple(re.findall(r"`([^`]*)`", row)) for row in table.splitlines()[1:]]


def _gradients():
    """Some are tiny, so that the place of an epsilon shows."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(STEPS, 12)) * 10.0 ** -np.arange(12.0)


def _ours(optimizer):
    variable = keras.Variable(np.ones(12))
    made = eval(optimizer, vars(gdopt).copy())
    for gradient in _gradients():
        made.apply([tf.constant(gradient)], [variable])
    return variable.numpy()


@pytest.mark.parametrize(("its", "ours"), _rows("torch.optim"))
def test_steps_of_torch(its, ours, float64):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(12, dtype=torch.float64))
    optimizer = eval(its, {**vars(torch.optim), "params": [weight]})
    for gradient in _gradients():
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(_ours(ours), weight.detach().numpy(), rtol=1e-10)


@pytest.mark.parametrize(("its", "ours"), _rows("optax"))
def test_steps_of_optax(its, ours, float64):
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    with jax.enable_x64(True):
        optimizer = eval(its, vars(optax).copy())
        weight = jax.numpy.ones(12)
        state = optimizer.init(weight)
        for gradient in _gradients():
            changes, state = optimizer.update(jax.numpy.asarray(gradient), state, weight)
            weight = optax.apply_updates(weight, changes)
        assert weight.dtype == "float64"
        expected = np.asarray(weight)
    np.testing.assert_allclose(_ours(ours), expected, rtol=1e-10)
