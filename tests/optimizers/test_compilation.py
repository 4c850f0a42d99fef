"""How often a model's step is traced, and how often XLA compiles."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.optimizers.compilation import SMALLEST_COMPILED
from tests.optimizer_cases import (
    A_FEW,
    CASES,
    every_optimizer_alike,
    every_optimizer_with,
    every_rule,
)
from tests.parameters import slow

# XLA writes a file for each module it compiles; only a new process heeds the flag.
_COUNT = """
import json, os, sys
import keras, numpy as np
from keras_gdopt.optimizers.compilation import SMALLEST_COMPILED
from tests.optimizer_cases import CASES

def compilations():
    names = os.listdir(dump) if os.path.isdir(dump) else []
    return len({name.split(".")[0] for name in names})

def counts(optimizer, jit_compile):
    # Large enough for a cluster.
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((4,)), dense(SMALLEST_COMPILED // 4), dense(1)])
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    traces, train_step = [], model.train_step
    model.train_step = lambda data: (traces.append(1), train_step(data))[1]
    compiled_before, history = compilations(), []
    def fit(samples, epochs):
        model.fit(x[:samples], y[:samples], batch_size=4, epochs=epochs, verbose=0)
        history.append([len(traces), compilations() - compiled_before])
    fit(8, 1)
    fit(8, 1)
    model.optimizer.learning_rate = 0.5
    fit(8, 2)
    fit(10, 2)  # the last batch has 2 samples
    return history

dump, (plain, with_everything) = sys.argv[1], json.loads(sys.argv[2])
x, y = np.ones((10, 4), "float32"), np.ones((10, 1), "float32")
everything = {"weight_decay": 0.1, "global_clipnorm": 1.0, "use_ema": True}
cases = {str(case): case for case in CASES}
ours = {name: cases[name] for name in plain}
for name in with_everything:
    ours[f"{name} with everything"] = lambda c=cases[name]: c(**everything)
print(json.dumps([
    {
        "keras": counts(keras.optimizers.Adam(), jit_compile),
        "ours": {name: counts(new(), jit_compile) for name, new in ours.items()},
    }
    for jit_compile in ("auto", True)
]))
"""


@pytest.fixture(
    scope="module",
    params=[([], A_FEW[-1:]), slow((CASES, A_FEW))],
    ids=["one with everything", "all optimizers"],
)
def counts(request, tmp_path_factory):
    """Traces of the train step and compilations, so far, after each of four `fit`s.

    First where Keras does not compile, then under `jit_compile=True`.
    """
    dump = tmp_path_factory.mktemp("xla")
    names = [[str(case) for case in cases] for cases in request.param]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_dump_to={dump} --xla_dump_hlo_as_text",
    }
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, str(dump), json.dumps(names)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert len(counts[0]["ours"]) == len(counts[1]["ours"]) == sum(map(len, names))
    return counts


def test_nothing_is_compiled_again_where_keras_does_not_compile(counts):
    """One compilation of the cluster; one more trace of the model for a partial batch.

    TensorFlow traces a step that creates variables (slots) twice.
    """
    counts, _ = counts
    assert [traces for traces, _ in counts["keras"]] == [2, 2, 2, 3]
    for name, history in counts["ours"].items():
        traces = [traces for traces, _ in history]
        assert traces in ([2, 2, 2, 3], [1, 1, 1, 2]), name
        # Lookahead's two clusters stand beside the inner optimizer's.
        clusters = 3 if name.startswith("Lookahead") else 1
        assert [compiled for _, compiled in history] == [clusters] * 4, name


def test_nothing_is_compiled_again_under_jit_compile(counts):
    """XLA's shapes are static: a partial batch is another computation for any model."""
    _, counts = counts
    compiled_by_keras = [compiled for _, compiled in counts["keras"]]
    assert compiled_by_keras[:3] == [1, 1, 1]
    for name, history in counts["ours"].items():
        traces = [traces for traces, _ in history]
        assert traces in ([2, 2, 2, 3], [1, 1, 1, 2]), name
        assert [compiled for _, compiled in history] == compiled_by_keras, name


def _regression(rng):
    x = rng.normal(size=(32, 4)).astype("float32")
    return x, (x @ np.array([[1.0], [-2.0], [0.5], [0.0]], "float32"))


@every_optimizer_with("jit_compile", [True, False], alike=True)
def test_fit_lowers_the_loss(case, jit_compile, rng):
    x, y = _regression(rng)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(case.brisk(0.05), "mse", jit_compile=jit_compile)
    losses = model.fit(x, y, batch_size=8, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


@every_optimizer_alike
def test_compiled_and_eager_steps_agree(case, rng):
    """The cluster, the inlined cluster and plain TensorFlow compute the same."""
    x, y = _regression(rng)
    start = [rng.normal(size=(4, 1)), rng.normal(size=1)]
    weights = []
    for compiled in ({"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.set_weights(start)
        model.compile(case(learning_rate=0.05), "mse", **compiled)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    tf.config.run_functions_eagerly(True)
    try:
        model.set_weights(start)
        model.compile(case(learning_rate=0.05), "mse", run_eagerly=True)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    finally:
        tf.config.run_functions_eagerly(False)
    for other in weights[1:]:
        for received, expected in zip(other, weights[0], strict=True):
            np.testing.assert_allclose(received, expected, rtol=2e-6, atol=2e-7)


@every_rule
def test_update_step_compiles_by_itself(case):
    optimizer, variable = case(learning_rate=0.1), keras.Variable([1.0, -2.0])
    optimizer.build([variable])

    @tf.function(jit_compile=True)
    def step(gradient):
        optimizer.update_step(gradient, variable, optimizer.learning_rate)

    step(tf.constant([1.0, 1.0]))
    twin, other = keras.Variable([1.0, -2.0]), case(learning_rate=0.1)
    other.apply([tf.constant([1.0, 1.0])], [twin])
    np.testing.assert_allclose(variable.numpy(), twin.numpy(), rtol=1e-6)


@every_rule
def test_one_cluster_holds_all_dense_variables(case):
    """Clipping, decay, averages and constraints, too: no other op touches a variable."""
    optimizer = case(weight_decay=0.1, global_clipnorm=1.0, use_ema=True)
    shapes = [(2, SMALLEST_COMPILED // 2), (3, 1), (3, 2)]
    variables = [keras.Variable(np.ones(shape)) for shape in shapes]
    variables[0].constraint = keras.constraints.MaxNorm(1.0)
    optimizer.build(variables)

    @tf.function
    def step(gradients):
        optimizer.apply(gradients, variables)

    graph = step.get_concrete_function([tf.ones(v.shape) for v in variables]).graph
    placeholders = {id(outer): inner for outer, inner in graph.captures}
    touching = set()
    for variable in [*variables, *optimizer.variables[2:]]:  # without count and rate
        touching.update(placeholders[id(variable.value.handle)].consumers())
    (cluster,) = touching
    assert cluster.type == "StatefulPartitionedCall"
    assert cluster.get_attr("_XlaMustCompile")


def test_a_small_model_runs_as_plain_operations():
    """The launch of a cluster would cost more than the update."""
    optimizer, variable = gdopt.Adam(), keras.Variable(np.ones(SMALLEST_COMPILED - 1))
    optimizer.build([variable])
    step = tf.function(lambda: optimizer.apply([tf.ones(variable.shape)]))
    functions = step.get_concrete_function().graph._functions
    assert functions
    assert not any(f.definition.attr["_XlaMustCompile"].b for f in functions.values())


def test_memory_of_clusters_does_not_grow():
    optimizer = gdopt.Adam()
    variable = keras.Variable([1.0])
    for _ in range(5):
        optimizer.apply([tf.constant([1.0])], [variable])
    assert len(optimizer._tensorflow_step.compiled_steps) == 1
    (cluster,) = optimizer._tensorflow_step.compiled_steps.values()
    assert cluster.experimental_get_tracing_count() == 1
