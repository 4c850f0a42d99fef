"""Strategies, mixed precision, accumulation, clipping, averages, decay, constraints."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from tests.optimizer_cases import (
    A_FEW,
    every_optimizer_alike,
    every_optimizer_with,
    every_rule_alike,
)


def _data(rng, samples=48):
    x = rng.normal(size=(samples, 4)).astype("float32")
    return x, (np.sin(x) @ rng.normal(size=(4, 2))).astype("float32")


def _mlp():
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(2)]
    )


def _fitted(optimizer, start, rng_data, **compile_arguments):
    model = _mlp()
    model.set_weights(start)
    model.compile(optimizer, "mse", **compile_arguments)
    model.fit(*rng_data, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


def _assert_close(received, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def _transcribed_run(case, optimizer, start, gradients, *, before=None, after=None):
    """The transcription over several variables, with hooks of NumPy around it.

    `before(gradients)` gives the gradients of an update and `after(t, weights)` the
    weights after it; both work on lists of arrays.
    """
    hyperparameters = case.hyperparameters(optimizer)
    weights = [w.copy() for w in start]
    slots = [case.initial_slots(w.shape, optimizer) for w in weights]
    for t, step in enumerate(gradients, start=1):
        step = before(step) if before else step
        for i, g in enumerate(step):
            weights[i], slots[i] = case.reference.update(
                weights[i], g, slots[i], 0.1, t, **hyperparameters
            )
        if after:
            weights = after(t, weights)
    return weights


def _applied(optimizer, start, gradients, variable_class=keras.Variable):
    variables = [variable_class(w, name=f"v{i}") for i, w in enumerate(start)]
    for step in gradients:
        optimizer.apply([tf.constant(g) for g in step], variables)
    return variables


@pytest.fixture
def start(rng):
    return [rng.normal(size=(3, 2)), rng.normal(size=4)]


@pytest.fixture
def gradients(rng):
    return [[rng.normal(size=(3, 2)), rng.normal(size=4)] for _ in range(12)]


# --- clipping, decay, averages, constraints: against NumPy -------------------------


def _clip_each(limit):
    return lambda step: [g * min(1.0, limit / np.linalg.norm(g)) for g in step]


def _clip_all(limit):
    def clip(step):
        norm = np.sqrt(sum(np.sum(g**2) for g in step))
        return [g * min(1.0, limit / norm) for g in step]

    return clip


CLIPPING = {
    "clipnorm": _clip_each(0.7),
    "clipvalue": lambda step: [np.clip(g, -0.7, 0.7) for g in step],
    "global_clipnorm": _clip_all(0.7),
}


@every_optimizer_with("kind", CLIPPING, alike=True)
def test_clipping_equals_numpy(case, kind, start, gradients, float64):
    optimizer = case(learning_rate=0.1, **{kind: 0.7})
    received = _applied(optimizer, start, gradients)
    expected = _transcribed_run(case, optimizer, start, gradients, before=CLIPPING[kind])
    _assert_close([v.numpy() for v in received], expected, rtol=0, atol=1e-12)


# In a loop of one's own, variables are TensorFlow's.
either_variable = pytest.mark.parametrize("variable_class", [keras.Variable, tf.Variable])


@either_variable
@every_rule_alike
def test_weight_decay_equals_numpy(case, variable_class, start, gradients, float64):
    """Decoupled, before the update, and not on what is excluded."""
    optimizer = case(learning_rate=0.1, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(var_names=["v1"])
    received = _applied(optimizer, start, gradients, variable_class)

    hyperparameters = case.hyperparameters(optimizer)
    for i, decay in enumerate((0.3, 0.0)):
        weight = start[i]
        slots = case.initial_slots(weight.shape, optimizer)
        for t, step in enumerate(gradients, start=1):
            weight = weight - decay * 0.1 * weight
            weight, slots = case.reference.update(weight, step[i], slots, 0.1, t, **hyperparameters)
        np.testing.assert_allclose(received[i].numpy(), weight, rtol=0, atol=1e-12)


def test_a_name_excludes_from_weight_decay_wherever_it_stands_in_a_path():
    optimizer = gdopt.GradientDescent(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="first")])
    assert model.trainable_variables[1].path.endswith("/first/bias")
    for variable in model.trainable_variables:
        variable.assign(tf.ones_like(variable))
    zeros = [tf.zeros(v.shape) for v in model.trainable_variables]
    optimizer.apply(zeros, model.trainable_variables)
    kernel, bias = model.get_weights()
    np.testing.assert_array_equal(kernel, np.full((4, 2), 0.75))
    np.testing.assert_array_equal(bias, np.ones(2))


@pytest.mark.parametrize("frequency", [None, 3])
@every_rule_alike
def test_moving_average_equals_numpy(case, frequency, start, gradients, float64):
    optimizer = case(
        learning_rate=0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=frequency
    )
    received = _applied(optimizer, start, gradients)
    averages = []

    def average(t, weights):
        averages[:] = [
            w if t == 1 else 0.8 * a + 0.2 * w
            for w, a in zip(weights, averages or weights, strict=True)
        ]
        return list(averages) if frequency and t % frequency == 0 else weights

    expected = _transcribed_run(case, optimizer, start, gradients, after=average)
    _assert_close([v.numpy() for v in received], expected, rtol=0, atol=1e-12)
    optimizer.finalize_variable_values(received)
    _assert_close([v.numpy() for v in received], averages, rtol=0, atol=1e-12)


class _Halved(keras.constraints.Constraint):
    """A user's own constraint, which the cluster must not assume to compile."""

    def __call__(self, w):
        halved = tf.numpy_function(lambda array: array * 0.5, [tf.convert_to_tensor(w)], w.dtype)
        return tf.ensure_shape(halved, w.shape)


@pytest.mark.parametrize(
    ("constraint", "projection"),
    [(keras.constraints.NonNeg(), lambda w: np.maximum(w, 0.0)), (_Halved(), lambda w: w * 0.5)],
    ids=["of Keras", "of one's own"],
)
@every_rule_alike
def test_constraints_equal_numpy(case, constraint, projection, start, gradients, float64):
    optimizer = case(learning_rate=0.1)
    variables = [keras.Variable(w) for w in start]
    variables[0].constraint = constraint

    @tf.function
    def step(gradients):
        optimizer.apply(gradients, variables)

    optimizer.build(variables)
    for gradient in gradients:
        step([tf.constant(g) for g in gradient])
    expected = _transcribed_run(
        case, optimizer, start, gradients, after=lambda t, w: [projection(w[0]), w[1]]
    )
    _assert_close([v.numpy() for v in variables], expected, rtol=0, atol=1e-12)


@every_optimizer_alike
def test_accumulation_equals_the_mean_gradient(case, start, gradients, float64):
    """An update every 4 calls; bias corrections count updates."""
    optimizer = case(learning_rate=0.1, gradient_accumulation_steps=4, clipnorm=0.7)
    received = _applied(optimizer, start, gradients)
    means = [
        [np.mean([step[i] for step in gradients[k : k + 4]], axis=0) for i in range(2)]
        for k in range(0, 12, 4)
    ]
    expected = _transcribed_run(case, optimizer, start, means, before=_clip_each(0.7))
    _assert_close([v.numpy() for v in received], expected, rtol=0, atol=1e-12)
    assert int(optimizer.iterations) == 3


@either_variable
def test_everything_together_equals_keras(variable_class, start, gradients, float64):
    """Classical momentum is Keras's SGD, so its whole `apply` must be Keras's too."""
    setting = {
        "momentum": 0.5,
        "weight_decay": 0.25,
        "global_clipnorm": 0.5,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 2,
        "gradient_accumulation_steps": 3,
        "loss_scale_factor": 4.0,
    }
    ours = _applied(
        gdopt.Momentum(0.125, classical=True, **setting), start, gradients, variable_class
    )
    keras_s = _applied(keras.optimizers.SGD(0.125, **setting), start, gradients)
    _assert_close([v.numpy() for v in ours], [v.numpy() for v in keras_s], rtol=0, atol=1e-12)


@every_optimizer_alike
def test_bfloat16_variables_are_updated_in_float32(case, rng):
    """Their slots would lose what a decay of 0.999 adds."""
    start = rng.normal(size=(4, 3)).astype("float32")
    variable = keras.Variable(start, dtype="bfloat16")
    rounded = variable.numpy().astype("float32")
    gradients = [rng.normal(size=(4, 3)).astype("float32") for _ in range(5)]
    optimizer = case(learning_rate=0.1)
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    slots = [v for v in optimizer.variables if v.shape == variable.shape]
    assert all(slot.dtype == "float32" for slot in slots)
    expected = case.transcribed(rounded, gradients, [0.1] * 5)[-1]
    # Five roundings of the weights to 8 bits.
    np.testing.assert_allclose(variable.numpy().astype("float32"), expected, atol=0.05)


def test_bfloat16_averages_and_accumulators_are_in_float32():
    """In bfloat16 an average of momentum 0.999 and a long sum would both stand still."""
    variable = keras.Variable([2.0], dtype="bfloat16")
    optimizer = gdopt.GradientDescent(0.0, use_ema=True, ema_momentum=0.999)
    optimizer.build([variable])
    optimizer._model_variables_moving_average[0].assign([1.0])
    optimizer.iterations.assign(1)
    step = tf.function(optimizer.apply)
    for _ in range(1000):
        step([tf.constant([0.0])])
    expected = 2.0 - 0.999**1000
    average = optimizer._model_variables_moving_average[0].numpy()[0]
    assert average == pytest.approx(expected, abs=1e-3)
    optimizer.finalize_variable_values([variable])
    assert float(variable.numpy()[0]) == pytest.approx(expected, abs=1e-2)

    variable = keras.Variable([0.0], dtype="bfloat16")
    optimizer = gdopt.GradientDescent(1.0, gradient_accumulation_steps=1024)
    optimizer.build([variable])
    step = tf.function(optimizer.apply)
    for _ in range(1024):
        step([tf.constant([1.0])])
    assert float(variable.numpy()[0]) == -1.0


@every_optimizer_alike
def test_constraints_of_embeddings(case, rng, float64):
    start = np.abs(rng.normal(size=(5, 2)))
    table = keras.Variable(start)
    table.constraint = keras.constraints.NonNeg()
    optimizer = case(learning_rate=1e4, lazy=True)
    optimizer.apply([tf.IndexedSlices(tf.constant([[100.0, -1.0]], "float64"), [1])], [table])
    expected = case.transcribed(start[1], [[100.0, -1.0]], [1e4])[-1]
    np.testing.assert_allclose(table.numpy()[1], np.maximum(expected, 0.0), rtol=1e-12)
    assert table.numpy()[1, 0] == 0.0


def test_a_constraint_of_ones_own_holds_for_raw_variables():
    variable = keras.Variable([4.0])
    variable.constraint = _Halved()
    optimizer = gdopt.GradientDescent(0.0)
    optimizer.build([variable])
    optimizer.apply([tf.constant([1.0])], [variable.value])
    assert variable.numpy() == [2.0]


def test_accumulation_with_a_missing_gradient_equals_keras():
    """The sums of a round end with it, as in Keras, also of a variable left out."""
    results = []
    for optimizer in (
        gdopt.Momentum(1.0, momentum=0.0, classical=True, gradient_accumulation_steps=2),
        keras.optimizers.SGD(1.0, gradient_accumulation_steps=2),
    ):
        variables = [keras.Variable([0.0]), keras.Variable([0.0])]
        for gradient in (1.0, None, None, 1.0):
            other = tf.constant([1.0])
            mine = None if gradient is None else tf.constant([gradient])
            optimizer.apply([other, mine], variables)
        results.append([v.numpy()[0] for v in variables])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["momentum", "clipvalue", "weight_decay", "loss_scale_factor"])
def test_a_changed_setting_holds_from_the_next_eager_step(name):
    """As with Keras's own optimizers; also in a model that is compiled again."""
    weights = []
    for cls, extra in ((gdopt.Momentum, {"classical": True}), (keras.optimizers.SGD, {})):
        optimizer = cls(1.0, momentum=0.5, clipvalue=4.0, weight_decay=0.25, **extra)
        variable = keras.Variable([8.0])
        for value in (None, 0.125):
            if value is not None:
                setattr(optimizer, name, value)
            optimizer.apply([tf.constant([2.0])], [variable])
        weights.append(variable.numpy()[0])
    assert weights[0] == weights[1]


@every_optimizer_with(
    "setting", [{"weight_decay": 0.25}, {"use_ema": True, "ema_overwrite_frequency": 2}]
)
def test_an_integer_among_the_weights_stays_as_it_is(case, setting):
    """A counter for which somebody forgot `trainable=False`: Keras trains the rest."""
    optimizer = case.brisk(0.1, **setting)
    weight, counter = keras.Variable([1.0]), keras.Variable([7], dtype="int32")
    for _ in range(2):
        optimizer.apply([tf.constant([0.5]), None], [weight, counter])
    optimizer.finalize_variable_values([weight, counter])
    assert weight.numpy() != 1.0
    assert counter.numpy() == 7


@every_rule_alike
def test_lazy_rows_of_a_raw_variable_decay(case, float64):
    """Of the rows in the batch alone; the step is that of the dense rule on them."""
    start = np.array([[1.0, 2.0], [3.0, 4.0]])
    table = tf.Variable(start)
    optimizer = case(learning_rate=0.1, weight_decay=0.5, lazy=True)
    gradient = np.array([[0.5, -1.0]])
    optimizer.apply([tf.IndexedSlices(tf.constant(gradient), [1], (2, 2))], [table])
    # The decay is of the weight before the step.
    expected = case.transcribed(start[1:], [gradient], [0.1])[-1] - 0.05 * start[1:]
    np.testing.assert_allclose(table.numpy(), [start[0], expected[0]], rtol=1e-12)


def test_a_changed_learning_rate_compiles_nothing_again():
    optimizer, variable = gdopt.Adam(), keras.Variable([1.0])
    optimizer.apply([tf.constant([1.0])], [variable])
    (cluster,) = optimizer._tensorflow_step.compiled_steps.values()
    optimizer.learning_rate = 0.5
    optimizer.apply([tf.constant([1.0])], [variable])
    assert list(optimizer._tensorflow_step.compiled_steps.values()) == [cluster]
    assert cluster.experimental_get_tracing_count() == 1


# --- mixed precision -----------------------------------------------------------------


@every_optimizer_with("policy", ["mixed_float16", "mixed_bfloat16"], alike=True)
def test_mixed_precision_equals_the_rule_on_the_same_gradients(case, policy, rng):
    """Weights stay in float32; the wrapper of Keras unscales before ours begins."""
    keras.mixed_precision.set_global_policy(policy)
    data = _data(rng)
    model = _mlp()
    start = model.get_weights()
    optimizer = case(learning_rate=0.1)
    model.compile(optimizer, "mse")
    # NAG and Lookahead change the weights at the end of `fit`.
    object.__setattr__(optimizer, "finalize_variable_values", lambda variables: None)
    seen = []
    apply = optimizer.apply

    def noted(grads, trainable_variables=None):
        seen.append([tf.identity(g) for g in grads])
        apply(grads, trainable_variables)

    object.__setattr__(optimizer, "apply", noted)
    model.run_eagerly = True
    model.fit(*data, batch_size=8, epochs=1, shuffle=False, verbose=0)
    wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapped == (policy == "mixed_float16")
    assert len(seen) == 6
    for i, weight in enumerate(model.trainable_variables):
        assert weight.dtype == "float32"
        gradients = [step[i].numpy() for step in seen]
        expected = case.transcribed(start[i], gradients, [0.1] * 6)[-1]
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-4, atol=1e-6)


@every_optimizer_with("jit_compile", [True, False], alike=True)
def test_mixed_float16_skips_steps_that_overflow(case, jit_compile, rng):
    keras.mixed_precision.set_global_policy("mixed_float16")
    x, y = _data(rng)
    model = _mlp()
    model.compile(case.brisk(0.01), "mse", jit_compile=jit_compile)
    before = model.get_weights()
    model.fit(x[:8] * 1e5, y[:8], batch_size=8, verbose=0)
    _assert_close(model.get_weights(), before, rtol=0, atol=0)
    losses = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# --- strategies ----------------------------------------------------------------------

STRATEGY_SETTINGS = {
    "everything": {
        "learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 20),
        "global_clipnorm": 0.5,
        "weight_decay": 0.1,
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 3,
    },
    "plain": {},
    "schedule": {"learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 20)},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1, "weight_decay": 0.1},
    "averages": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 4},
}


@every_optimizer_with(
    "setting",
    ["everything"],
    alike=True,
    slow_values=["plain", "schedule", "clipnorm", "global_clipnorm", "averages", "accumulation"],
)
def test_two_devices_equal_one(case, setting, two_devices, rng):
    data = _data(rng)
    start = _mlp().get_weights()
    arguments = {"learning_rate": 0.05, **STRATEGY_SETTINGS[setting]}
    one = _fitted(case(**arguments), start, data)
    with two_devices.scope():
        two = _fitted(case(**arguments), start, data)
    _assert_close(two.get_weights(), one.get_weights())
    for ours, single in zip(two.optimizer.variables, one.optimizer.variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), single.numpy(), rtol=1e-4, atol=1e-6)
    # Without the count and the rate, which only the first device need hold.
    unshared = {"iteration", "learning_rate"}
    slots = [v for v in two.optimizer.variables if v.name not in unshared]
    assert len(slots) >= 4 * len(case.initial_slots(()))
    for variable in [*two.trainable_variables, *slots]:
        first, second = two_devices.experimental_local_results(variable.value)
        np.testing.assert_array_equal(first, second)


@every_optimizer_with("lazy", [True], alike=True, slow_values=[False])
def test_two_devices_sum_repeated_rows(case, lazy, two_devices, rng):
    """The same row may come from both devices."""
    ids = rng.integers(0, 5, size=(32, 3))
    labels = rng.normal(size=(32, 1)).astype("float32")

    def fitted():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Embedding(9, 2),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(case(learning_rate=0.05, lazy=lazy, weight_decay=0.1), "mse")
        model.fit(ids, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    one = fitted()
    with two_devices.scope():
        two = fitted()
    _assert_close(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", A_FEW, ids=str)
def test_two_devices_in_mixed_float16(case, two_devices, rng):
    keras.mixed_precision.set_global_policy("mixed_float16")
    data = _data(rng)
    start = _mlp().get_weights()
    one = _fitted(case(learning_rate=0.05), start, data)
    with two_devices.scope():
        two = _fitted(case(learning_rate=0.05), start, data)
    # float16 gradients are summed in another order.
    _assert_close(two.get_weights(), one.get_weights(), rtol=0, atol=2e-2)


@every_optimizer_with("compiled", [True, False], alike=True)
def test_apply_outside_of_the_scope_updates_both_devices(case, compiled, two_devices, rng):
    with two_devices.scope():
        optimizer, variable = case(learning_rate=0.1), keras.Variable([1.0, 2.0])
        optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient], [variable])

    step = tf.function(step) if compiled else step
    for _ in range(2):
        step(tf.constant([0.5, -1.0]))
    expected = case.transcribed([1.0, 2.0], [[0.5, -1.0]] * 2, [0.1] * 2)[-1]
    for value in two_devices.experimental_local_results(variable.value):
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


@every_rule_alike
def test_update_step_as_a_strategy_calls_it(case, two_devices, rng, float64):
    """Variable by variable, on each device."""
    gradients, start = rng.normal(size=(5, 3)), rng.normal(size=3)
    with two_devices.scope():
        optimizer, variable = case(learning_rate=0.1), keras.Variable(start)
        optimizer.build([variable])
        for gradient in gradients:
            two_devices.extended.update(
                variable.value,
                lambda v, g: optimizer.update_step(g, v, optimizer.learning_rate),
                args=(tf.constant(gradient),),
                group=False,
            )
            optimizer.iterations.assign_add(1)
    expected = case.transcribed(start, gradients, [0.1] * 5)[-1]
    for value in two_devices.experimental_local_results(variable.value):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)


@every_optimizer_alike
def test_custom_loop_under_a_strategy(case, two_devices, rng, float64):
    gradients = rng.normal(size=(5, 3))
    start = rng.normal(size=3)
    with two_devices.scope():
        optimizer, variable = case(learning_rate=0.1), keras.Variable(start)
        optimizer.build([variable])

    @tf.function
    def step(gradient):
        # Each of the two devices holds half of the gradient.
        two_devices.run(lambda: optimizer.apply([gradient / 2], [variable]))

    for gradient in gradients:
        step(tf.constant(gradient))
    expected = case.transcribed(start, gradients, [0.1] * 5)[-1]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=0, atol=1e-12)


# --- the rest of Keras ---------------------------------------------------------------


@every_optimizer_alike
def test_variables_without_a_gradient_stay(case, rng):
    used, unused = keras.Variable([1.0, 2.0]), keras.Variable([3.0], name="unused")
    optimizer = case(learning_rate=0.1, use_ema=True)
    with pytest.warns(UserWarning, match="unused"):
        optimizer.apply([tf.constant([1.0, -1.0]), None], [used, unused])
    assert unused.numpy() == [3.0]
    assert np.all(used.numpy() != [1.0, 2.0])


@every_optimizer_alike
def test_frozen_layers_stay(case, rng):
    model = _mlp()
    model.layers[0].trainable = False
    frozen = model.layers[0].get_weights()
    model.compile(case(learning_rate=0.1), "mse")
    model.fit(*_data(rng), verbose=0)
    _assert_close(model.layers[0].get_weights(), frozen, rtol=0, atol=0)


@every_optimizer_alike
def test_steps_per_execution(case, rng):
    data, start = _data(rng), _mlp().get_weights()
    one = _fitted(case(learning_rate=0.05), start, data)
    several = _fitted(case(learning_rate=0.05), start, data, steps_per_execution=4)
    _assert_close(several.get_weights(), one.get_weights())
    assert int(several.optimizer.iterations) == 12
