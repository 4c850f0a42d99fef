"""The recorded metrics against norms computed from gradients and weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from tests.optimizer_cases import RULES, every_rule, every_rule_alike
from tests.parameters import slow


def _norm(arrays):
    return np.sqrt(sum(np.sum(np.square(a, dtype="float64")) for a in arrays))


def _step(optimizer, variables, gradients):
    """One step; returns the weights before and after it."""
    before = [v.numpy() for v in variables]
    optimizer.apply([tf.constant(g) for g in gradients], variables)
    return before, [v.numpy() for v in variables]


@pytest.fixture
def variables(rng):
    shapes = [(30, 20), (7,), ()]
    return [keras.Variable(rng.normal(size=s).astype("float32"), name=f"v{len(s)}") for s in shapes]


def _gradients(rng, variables):
    return [rng.normal(size=tuple(v.shape)).astype("float32") for v in variables]


@every_rule
def test_metrics_equal_norms_of_gradients_and_weights(case, variables, rng):
    optimizer = case(learning_rate=0.01)
    optimizer.record_step_metrics()
    assert optimizer.step_metrics == {}
    for t in range(1, 4):
        gradients = _gradients(rng, variables)
        before, after = _step(optimizer, variables, gradients)
        metrics = optimizer.step_metrics
        assert metrics["iterations"] == t
        assert metrics["learning_rate"] == pytest.approx(0.01, rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(_norm(gradients), rel=1e-3)
        change = _norm(a - b for a, b in zip(after, before, strict=True))
        assert metrics["update_norm"] == pytest.approx(change, rel=1e-3)
        assert metrics["weight_norm"] == pytest.approx(_norm(after), rel=1e-3)
        assert all(type(value) in (int, float) for value in metrics.values())


def test_velocity_norm_of_momentum(variables, rng):
    optimizer = gdopt.Momentum(0.01, momentum=0.5)
    optimizer.record_step_metrics()
    gradients = _gradients(rng, variables)
    _step(optimizer, variables, gradients)
    expected = 0.5 * _norm(gradients)
    assert optimizer.step_metrics["velocity_norm"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_gradient_norm_is_taken_before_clipping(kind, variables, rng):
    optimizer = gdopt.GradientDescent(1.0, **{kind: 0.01})
    optimizer.record_step_metrics()
    gradients = _gradients(rng, variables)
    before, after = _step(optimizer, variables, gradients)
    assert optimizer.step_metrics["grad_norm"] == pytest.approx(_norm(gradients), rel=1e-3)
    change = _norm(a - b for a, b in zip(after, before, strict=True))
    assert optimizer.step_metrics["update_norm"] == pytest.approx(change, rel=1e-3)
    assert change < 0.3


def test_gradient_norm_is_taken_after_unscaling(variables, rng):
    optimizer = gdopt.GradientDescent(1.0, loss_scale_factor=16.0)
    optimizer.record_step_metrics()
    gradients = _gradients(rng, variables)
    _step(optimizer, variables, gradients)
    assert optimizer.step_metrics["grad_norm"] == pytest.approx(_norm(gradients) / 16, rel=1e-3)


def test_update_norm_is_without_weight_decay(variables, rng):
    optimizer = gdopt.GradientDescent(0.5, weight_decay=0.5)
    optimizer.record_step_metrics()
    gradients = _gradients(rng, variables)
    _step(optimizer, variables, gradients)
    assert optimizer.step_metrics["update_norm"] == pytest.approx(0.5 * _norm(gradients), rel=1e-3)


@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
def test_only_the_steps_asked_for_are_recorded(compiled, variables, rng):
    optimizer = gdopt.Adam()
    optimizer.build(variables)
    optimizer.record_step_metrics(every=3)
    gradients = [tf.constant(g) for g in _gradients(rng, variables)]

    def step():
        optimizer.apply(gradients)

    if compiled != "eager":
        step = tf.function(step, jit_compile=compiled == "xla")

    def recorded_over(steps):
        seen = []
        for _ in range(steps):
            step()
            seen.append(optimizer.step_metrics.get("iterations", 0))
        return seen

    assert recorded_over(7) == [0, 0, 3, 3, 3, 6, 6]
    optimizer.record_step_metrics(every=5)  # without another trace
    assert recorded_over(4) == [0, 0, 10, 10]
    optimizer.record_step_metrics(every=0)
    assert recorded_over(3) == [10, 10, 10]
    optimizer.record_step_metrics(every=1)
    assert recorded_over(2) == [15, 16]


@every_rule
def test_variables_of_several_dtypes(case, rng):
    variables = [keras.Variable([3.0], dtype="float32"), keras.Variable([4.0], dtype="float64")]
    optimizer = case(learning_rate=0.1)
    optimizer.record_step_metrics()
    optimizer.apply([tf.constant([3.0]), tf.constant([4.0], "float64")], variables)
    assert optimizer.step_metrics["grad_norm"] == pytest.approx(5.0)


def test_tiny_norms_of_float64_models(float64):
    optimizer, variable = gdopt.GradientDescent(1.0), keras.Variable([1e-24])
    optimizer.record_step_metrics()
    optimizer.apply([tf.constant([1e-24], "float64")], [variable])
    assert optimizer.step_metrics["grad_norm"] == pytest.approx(1e-24)


def test_nothing_is_computed_unless_asked_for(variables, rng):
    optimizer = gdopt.Adam()
    for _ in range(3):
        _step(optimizer, variables, _gradients(rng, variables))
    assert optimizer.step_metrics == {}
    assert [plan.record for plan in optimizer._tensorflow_step.compiled_steps] == [-1]


def test_says_whether_the_traced_step_must_be_traced_again(variables, rng):
    optimizer = gdopt.Adam()
    optimizer.build(variables)
    gradients = [tf.constant(g) for g in _gradients(rng, variables)]
    assert not optimizer.record_step_metrics(0)
    tf.function(lambda: optimizer.apply(gradients))()
    assert optimizer.record_step_metrics()
    optimizer.apply(gradients)  # eagerly: that traces nothing
    assert optimizer.record_step_metrics()
    tf.function(lambda: optimizer.apply(gradients))()
    assert not optimizer.record_step_metrics(7)
    assert not optimizer.record_step_metrics(0)


@pytest.mark.parametrize("lazy", [False, True])
@every_rule
def test_metrics_of_sparse_gradients(case, lazy, rng):
    """Norms of the merged rows, where the norm of the slices would be another."""
    table = keras.Variable(rng.normal(size=(9, 4)).astype("float32"))
    optimizer = case(learning_rate=0.01, lazy=lazy)
    optimizer.record_step_metrics()
    for _ in range(3):
        ids = rng.integers(0, 5, size=12)
        values = rng.normal(size=(12, 4)).astype("float32")
        dense = np.zeros((9, 4))
        np.add.at(dense, ids, values)
        before = table.numpy()
        optimizer.apply([tf.IndexedSlices(values, tf.constant(ids))], [table])
        metrics = optimizer.step_metrics
        assert metrics["grad_norm"] == pytest.approx(_norm([dense]), rel=1e-3)
        assert metrics["update_norm"] == pytest.approx(_norm([table.numpy() - before]), rel=1e-3)
        assert metrics["weight_norm"] == pytest.approx(_norm([table.numpy()]), rel=1e-3)


def test_accumulation_records_updates_and_their_mean_gradient(variables, rng):
    optimizer = gdopt.GradientDescent(0.1, gradient_accumulation_steps=3)
    optimizer.record_step_metrics(every=4)  # calls; updates come at calls 3, 6, 9, 12
    seen, gradients = [], []
    for _ in range(12):
        gradients.append(_gradients(rng, variables))
        _step(optimizer, variables, gradients[-1])
        seen.append(optimizer.step_metrics.get("iterations", 0))
    assert seen == [0, 0, 0, 0, 0, 2, 2, 2, 3, 3, 3, 4]
    mean = [np.mean([step[i] for step in gradients[9:]], axis=0) for i in range(3)]
    assert optimizer.step_metrics["grad_norm"] == pytest.approx(_norm(mean), rel=1e-3)


@every_rule_alike
def test_two_devices_record_the_reduced_gradient(case, two_devices, rng):
    x = rng.normal(size=(16, 4)).astype("float32")
    y = rng.normal(size=(16, 1)).astype("float32")

    def recorded():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(case(learning_rate=0.01, clipnorm=0.1), "mse")
        model.optimizer.record_step_metrics()
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model.optimizer.step_metrics

    one = recorded()
    with two_devices.scope():
        two = recorded()
    assert two == pytest.approx(one, rel=1e-4)
    assert two["iterations"] == 4


def test_large_tensors_are_summed_precisely(rng):
    """A running sum in float32 would stop growing at 2**24 ones."""
    size = 2**25
    variable = keras.Variable(np.ones(size, "float32"))
    optimizer = gdopt.GradientDescent(1e-3)
    optimizer.record_step_metrics()
    optimizer.apply([tf.ones(size)], [variable])
    assert optimizer.step_metrics["grad_norm"] == pytest.approx(size**0.5, rel=1e-4)


@pytest.mark.parametrize("kind", ["clipnorm", "clipvalue", "global_clipnorm"])
@pytest.mark.parametrize("lazy", [False, True])
def test_gradient_norm_after_clipping(kind, lazy, rng):
    variables = [keras.Variable(rng.normal(size=(5, 2))), keras.Variable(rng.normal(size=(3,)))]
    rows = rng.normal(size=(3, 2)).astype("float32")
    dense = rng.normal(size=(3,)).astype("float32")
    optimizer = gdopt.GradientDescent(1.0, lazy=lazy, **{kind: 0.5})
    optimizer.record_step_metrics(tier="layers")
    # Row 4 comes twice: what is clipped is the sum.
    optimizer.apply(
        [tf.IndexedSlices(tf.constant(rows), [4, 1, 4], (5, 2)), tf.constant(dense)], variables
    )
    merged = np.zeros((5, 2), "float32")
    np.add.at(merged, [4, 1, 4], rows)
    gradients = [merged, dense]
    total = _norm(gradients)
    clipped = {
        "clipnorm": [g * min(1.0, 0.5 / _norm([g])) for g in gradients],
        "clipvalue": [np.clip(g, -0.5, 0.5) for g in gradients],
        "global_clipnorm": [g * min(1.0, 0.5 / total) for g in gradients],
    }[kind]
    metrics = optimizer.step_metrics
    assert metrics["grad_norm"] == pytest.approx(total, rel=1e-5)
    assert metrics["clipped_grad_norm"] == pytest.approx(_norm(clipped), rel=1e-5)
    of_variables = list(optimizer.variable_metrics.values())
    for values, gradient, short in zip(of_variables, gradients, clipped, strict=True):
        assert values["grad_norm"] == pytest.approx(_norm([gradient]), rel=1e-5)
        assert values["clipped_grad_norm"] == pytest.approx(_norm([short]), rel=1e-5)
        assert values["update_norm"] == pytest.approx(_norm([short]), rel=1e-5)


def _effective_learning_rates(name, slots, eta, t, h):
    """What multiplies an entry's gradient, or its average, from the slots after step t."""

    def root(x):
        return np.sqrt(x + h["epsilon_root"]) + h["epsilon"]

    if name == "Adagrad":
        return eta / root(slots["accumulator"])
    if name == "RMSprop":
        return eta / root(slots["velocity"])
    if name == "Adadelta":
        return eta * root(slots["accumulated_delta_var"]) / root(slots["accumulated_grad"])
    v = slots["velocity_hat" if h.get("amsgrad") else "velocity"] / (1 - h["beta_2"] ** t)
    if name != "RAdam":
        return eta / root(v)
    _, rectification = _rectification(t, h)
    return eta * rectification / root(v) if rectification else np.full_like(v, eta)


def _rectification(t, h):
    """The length of the moving average, and the factor or 0."""
    longest = 2 / (1 - h["beta_2"]) - 1
    power = h["beta_2"] ** t
    length = longest - 2 * t * power / (1 - power)
    if longest <= 4 or length <= h["sma_threshold"]:
        return length, 0.0
    square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return length, np.sqrt(square)


ADAPTIVE = [case for case in RULES if case().effective_learning_rate.__func__ is not
            gdopt.GradientOptimizer.effective_learning_rate]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "size"),
    [
        *((case, 7) for case in ADAPTIVE),
        (ADAPTIVE[0], 9000),  # of which some are taken
        *(slow(case, 9000) for case in ADAPTIVE[1:]),
    ],
    ids=str,
)
def test_quantiles_of_effective_learning_rates(case, size, rng):
    h, name = case.hyperparameters(), case.cls.__name__
    shapes = [(size,), (4, 3)]
    variables = [keras.Variable(rng.normal(size=s).astype("float32")) for s in shapes]
    slots = [case.initial_slots(s) for s in shapes]
    optimizer = case(learning_rate=0.5)
    optimizer.record_step_metrics()
    for t in range(1, 9):
        gradients = [rng.normal(size=s).astype("float32") for s in shapes]
        for i, gradient in enumerate(gradients):
            theta = np.zeros(shapes[i])
            _, slots[i] = case.reference.update(
                theta, gradient.astype("float64"), slots[i], 0.5, t, **h
            )
        _step(optimizer, variables, gradients)
        rates = np.concatenate(
            [_effective_learning_rates(name, own, 0.5, t, h).ravel() for own in slots]
        )
        places = np.linspace(0, len(rates) - 1, min(512, len(rates))).astype(int)
        ascending = np.sort(rates[places])
        for quantile in (10, 50, 90):
            expected = ascending[round(quantile / 100 * (len(ascending) - 1))]
            measured = optimizer.step_metrics[f"effective_learning_rate_p{quantile}"]
            assert measured == pytest.approx(expected, rel=1e-4), (t, quantile)


@pytest.mark.parametrize("beta_2", [0.999, 0.9, 0.5])
def test_radams_rectification(beta_2, variables, rng):
    optimizer = gdopt.RAdam(beta_2=beta_2)
    optimizer.record_step_metrics()
    for t in range(1, 8):
        _step(optimizer, variables, _gradients(rng, variables))
        length, factor = _rectification(t, {"beta_2": beta_2, "sma_threshold": 4.0})
        metrics = optimizer.step_metrics
        assert metrics["rho_t"] == pytest.approx(length, rel=1e-5, abs=1e-5)
        assert metrics["rectification"] == pytest.approx(factor, rel=1e-5)
    assert (metrics["rectification"] > 0) == (beta_2 > 0.5)


def test_listeners_with_frequencies_of_their_own(variables, rng):
    class Listener:
        pass

    optimizer = gdopt.Adam()
    often, seldom = Listener(), Listener()
    optimizer.record_step_metrics(3, listener=often)
    optimizer.record_step_metrics(5, tier="layers", listener=seldom)

    def recorded_over(steps):
        seen = set()
        for _ in range(steps):
            _step(optimizer, variables, _gradients(rng, variables))
            seen.add(optimizer.step_metrics.get("iterations", 0))
        return sorted(seen - {0})

    assert recorded_over(10) == [3, 5, 6, 9, 10]
    assert len(optimizer.variable_metrics) == 3
    optimizer.record_step_metrics(0, listener=often)
    assert recorded_over(9) == [10, 15]
    del seldom  # one that is gone asks no more, as soon as another one asks
    optimizer.record_step_metrics(7, listener=often)
    assert recorded_over(11) == [21, 28]
    crowd = [Listener() for _ in range(8)]
    with pytest.raises(ValueError, match=r"At most 8 listeners.*Received: 9"):
        for listener in crowd:
            optimizer.record_step_metrics(1, listener=listener)


def test_an_unknown_tier():
    with pytest.raises(ValueError, match=r"`tier` must be one of .*Received: tier='all'"):
        gdopt.Adam().record_step_metrics(tier="all")
