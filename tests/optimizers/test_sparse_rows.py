"""Embeddings: repeated ids, lazy rows, and what becomes of absent rows."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.optimizers.dense_step import _sum_of_squares
from tests.optimizer_cases import (
    A_FEW,
    RULES,
    every_optimizer_alike,
    every_optimizer_with,
    every_rule,
    every_rule_alike,
)
from tests.parameters import slow

ROWS, WIDTH = 12, 3
# Repeated within a batch; rows 8 to 11 never come.
BATCHES = [[1, 1, 3, 1], [0, 2, 2, 7], [5, 5, 5, 5], [1, 3, 6, 4]] * 2


def _gradients(rng):
    """Sparse gradients with repeated rows, and the same gradients dense."""
    sparse, dense = [], []
    for ids in BATCHES:
        values = rng.normal(size=(len(ids), WIDTH)).astype("float32")
        sparse.append(tf.IndexedSlices(values, tf.constant(ids), tf.constant([ROWS, WIDTH])))
        full = np.zeros((ROWS, WIDTH), "float32")
        np.add.at(full, ids, values)
        dense.append(full)
    return sparse, dense


def _trained(optimizer, start, gradients):
    table = keras.Variable(start)
    other = keras.Variable(np.ones(2, "float32"))
    for gradient in gradients:
        optimizer.apply([gradient, tf.constant([0.1, -0.2])], [table, other])
    return table.numpy(), other.numpy()


SETTINGS = {
    "everything": {
        "global_clipnorm": 0.5,
        "weight_decay": 0.1,
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 3,
        "loss_scale_factor": 8.0,
    },
    "plain": {},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.3},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "use_ema": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    "loss_scale": {"loss_scale_factor": 8.0},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@every_optimizer_with("setting", SETTINGS)
def test_exact_mode_equals_the_dense_gradient(case, setting, rng):
    start = rng.normal(size=(ROWS, WIDTH)).astype("float32")
    sparse, dense = _gradients(rng)
    by_rows = _trained(case(learning_rate=0.1, **SETTINGS[setting]), start, sparse)
    by_dense = _trained(
        case(learning_rate=0.1, **SETTINGS[setting]), start, map(tf.constant, dense)
    )
    for received, expected in zip(by_rows, by_dense, strict=True):
        np.testing.assert_allclose(received, expected, rtol=2e-6, atol=2e-7)


@every_rule
def test_update_step_sums_repeated_rows(case, rng):
    start = rng.normal(size=(ROWS, WIDTH)).astype("float32")
    tables = []
    for gradients in _gradients(rng):
        optimizer, table = case(learning_rate=0.1), keras.Variable(start)
        optimizer.build([table])
        for gradient in gradients:
            gradient = tf.constant(gradient) if isinstance(gradient, np.ndarray) else gradient
            optimizer.update_step(gradient, table, 0.1)
        tables.append(table.numpy())
    np.testing.assert_allclose(*tables, rtol=2e-6, atol=2e-7)


def _embedding_model():
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(ROWS, WIDTH, embeddings_initializer="uniform"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )


def _dense_twin(model):
    """The same function of the same weights, with one-hot rows for the embedding."""
    twin = keras.Sequential(
        [
            keras.Input((4, ROWS)),
            keras.layers.Dense(WIDTH, use_bias=False),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    twin.set_weights(model.get_weights())
    return twin


def _fit_both(new_optimizer, rng, jit_compile):
    model = _embedding_model()
    twin = _dense_twin(model)
    ids = np.array(BATCHES, "int32")
    labels = rng.normal(size=(len(ids), 1)).astype("float32")
    for network, x in ((model, ids), (twin, np.eye(ROWS, dtype="float32")[ids])):
        network.compile(new_optimizer(), "mse", jit_compile=jit_compile)
        network.fit(x, labels, batch_size=2, epochs=3, shuffle=False, verbose=0)
    return model.get_weights(), twin.get_weights()


@every_optimizer_with("jit_compile", [True], alike=True, slow_values=[False])
def test_fit_of_an_embedding_equals_its_dense_twin(case, jit_compile, rng):
    received, expected = _fit_both(lambda: case(learning_rate=0.05), rng, jit_compile)
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_keras_adam_fails_where_ours_passes(rng):
    """Why the tests above exist: Keras squares each repetition by itself."""
    received, expected = _fit_both(lambda: keras.optimizers.Adam(0.05), rng, False)
    error = max(np.abs(a - b).max() for a, b in zip(received, expected, strict=True))
    if error < 1e-5:
        pytest.skip("this version of Keras sums repeated rows first")
    assert error > 1e-3


def _custom_step(optimizer, table, sparse):
    def step(batch):
        with tf.GradientTape() as tape:
            weights = table.value
            rows = tf.gather(weights, batch) if sparse else tf.one_hot(batch, ROWS) @ weights
            loss = tf.reduce_sum(tf.square(rows - 1.0))
        gradients = tape.gradient(loss, [table.value])
        assert isinstance(gradients[0], tf.IndexedSlices) == sparse
        optimizer.apply_gradients(zip(gradients, [table], strict=True))

    return step


@every_optimizer_with("compiled", ["xla", "graph", "eager"], alike=True)
def test_custom_loop_over_an_embedding_equals_the_dense_gradient(case, compiled, rng):
    start = rng.normal(size=(ROWS, WIDTH)).astype("float32")
    tables = []
    for sparse in (True, False):
        optimizer, table = case(learning_rate=0.05), keras.Variable(start)
        optimizer.build([table])
        step = _custom_step(optimizer, table, sparse)
        if compiled != "eager":
            step = tf.function(step, jit_compile=compiled == "xla")
        for batch in tf.constant(BATCHES):
            step(batch)
        tables.append(table.numpy())
    np.testing.assert_allclose(*tables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "setting"),
    [
        (case, setting) if setting == "plain" or case in A_FEW else slow(case, setting)
        for case in RULES
        for setting in ("plain", "clipnorm", "global_clipnorm", "weight_decay")
    ],
    ids=str,
)
def test_lazy_mode_leaves_absent_rows_alone(case, setting, rng):
    start = rng.normal(size=(ROWS, WIDTH)).astype("float32")
    sparse, _ = _gradients(rng)
    optimizer = case(learning_rate=0.1, lazy=True, **SETTINGS[setting])
    table = keras.Variable(start)
    optimizer.build([table])
    for ids, gradient in zip(BATCHES, sparse, strict=True):
        before = table.numpy()
        slots_before = [slot[0].numpy() for slot in optimizer._slots.values()]
        optimizer.apply([gradient])
        absent = np.setdiff1d(np.arange(ROWS), ids)
        np.testing.assert_array_equal(table.numpy()[absent], before[absent])
        assert np.all(np.any(table.numpy()[ids] != before[ids], axis=1))
        for slot, old in zip(optimizer._slots.values(), slots_before, strict=True):
            np.testing.assert_array_equal(slot[0].numpy()[absent], old[absent])


@every_rule
def test_lazy_mode_updates_present_rows_by_the_rule(case, rng, float64):
    """Each row follows the rule at the steps it is present in, with the step's t."""
    start = rng.normal(size=(ROWS, WIDTH))
    optimizer, table = case(learning_rate=0.1, lazy=True), keras.Variable(start)
    hyperparameters = case.hyperparameters(optimizer)
    expected = start.copy()
    slots = case.initial_slots(start.shape, optimizer)
    for t, ids in enumerate(BATCHES, start=1):
        values = rng.normal(size=(len(ids), WIDTH))
        full = np.zeros_like(start)
        np.add.at(full, ids, values)
        optimizer.apply([tf.IndexedSlices(values, tf.constant(ids))], [table])
        rows = np.unique(ids)
        expected[rows], new = case.reference.update(
            expected[rows],
            full[rows],
            {n: s[rows] for n, s in slots.items()},
            0.1,
            t,
            **hyperparameters,
        )
        for name, value in new.items():
            slots[name][rows] = value
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=1e-12)


@every_optimizer_alike
def test_lazy_mode_decays_the_present_rows(case, rng, float64):
    start, values = rng.normal(size=(4, 3)), rng.normal(size=(2, 3))
    table = keras.Variable(start)
    optimizer = case(learning_rate=0.1, lazy=True, weight_decay=0.5)
    optimizer.apply([tf.IndexedSlices(values, tf.constant([2, 0]))], [table])
    expected = start.copy()
    moved = case.transcribed(start[[2, 0]] * 0, [values], [0.1])[-1]
    expected[[2, 0]] = start[[2, 0]] * (1 - 0.5 * 0.1) + moved
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=1e-14)


def test_bfloat16_rows_are_summed_in_float32():
    table = keras.Variable(np.zeros((2, 1)), dtype="bfloat16")
    ones = tf.IndexedSlices(tf.ones((512, 1), "bfloat16"), tf.zeros(512, "int32"))
    gdopt.GradientDescent(1.0).apply([ones], [table])
    assert float(table.numpy()[0, 0]) == -512.0


def test_global_norm_of_a_float16_gradient_beside_rows():
    """Both are unscaled in float32, where the factor does not underflow."""
    weights = []
    for sparse in (True, False):
        table, dense = keras.Variable(np.zeros((2, 1))), keras.Variable([0.0])
        rows = tf.constant([[0.0], [0.0]])
        if sparse:
            rows = tf.IndexedSlices(tf.zeros((1, 1)), tf.constant([1]))
        optimizer = gdopt.GradientDescent(
            1.0, lazy=True, global_clipnorm=1e-4, loss_scale_factor=2.0**25
        )
        optimizer.apply([rows, tf.constant([32768.0], "float16")], [table, dense])
        weights.append(dense.numpy()[0])
    assert weights[0] == weights[1] == pytest.approx(-1e-4)


@every_rule
def test_a_declared_zero_gradient_changes_nothing(case, rng, float64):
    """The declaration that lets exact mode update by rows holds for the rule."""
    optimizer = case()
    names = case.initial_slots(5, optimizer)
    slots = {name: tf.constant(np.abs(rng.normal(size=5))) for name in names}
    change, new = optimizer.update_rule(
        tf.zeros(5, tf.float64), slots, tf.constant(0.1, tf.float64), tf.constant(3.0, tf.float64)
    )
    unchanged = not np.any(change) and all(np.array_equal(new[n], slots[n]) for n in slots)
    assert unchanged == optimizer.zero_gradient_changes_nothing


def test_lazy_refuses_accumulation():
    with pytest.raises(ValueError, match="lazy=True` cannot be combined with"):
        gdopt.Adam(lazy=True, gradient_accumulation_steps=2)


@every_rule_alike
def test_only_an_embedding_trains(case, rng):
    """A step without any dense gradient."""
    start = rng.normal(size=(ROWS, WIDTH)).astype("float32")
    sparse, _ = _gradients(rng)
    optimizer, table = (
        case(learning_rate=0.1, lazy=True, global_clipnorm=0.5),
        keras.Variable(start),
    )
    optimizer.record_step_metrics()
    optimizer.apply([sparse[0]], [table])
    change = np.linalg.norm(table.numpy() - start)
    assert optimizer.step_metrics["update_norm"] == pytest.approx(change, rel=1e-4)


def test_eager_steps_with_ever_other_rows_trace_nothing_again(rng):
    optimizer = gdopt.Adam(lazy=True)
    table = keras.Variable(np.ones((50, 2), "float32"))

    def apply(rows):
        values = tf.constant(rng.normal(size=(rows, 2)).astype("float32"))
        optimizer.apply([tf.IndexedSlices(values, tf.range(rows), (50, 2))], [table])

    apply(1)
    before = _sum_of_squares.experimental_get_tracing_count()
    for rows in range(2, 8):
        apply(rows)
    assert _sum_of_squares.experimental_get_tracing_count() == before
