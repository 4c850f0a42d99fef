"""Each rule against its transcription, and against other packages."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.optimizers.tensorflow_step import SMALLEST_CLUSTER
from tests.optimizer_cases import every_optimizer, every_rule, every_variant

SHAPES = [(), (3,), (2, 3), (2, 3, 2), (2, 2, 3, 2)]
STEPS = 50


def _run(optimizer, weights, gradients):
    """The weights after each `apply`, as lists of arrays."""
    variables = [keras.Variable(w, dtype=str(w.dtype)) for w in weights]
    trajectory = []
    for step in gradients:
        optimizer.apply([tf.constant(g) for g in step], variables)
        trajectory.append([v.numpy() for v in variables])
    return trajectory


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@every_variant
def test_equals_its_equation_in_float64(case, scheduled, rng, float64):
    weights = [rng.normal(size=shape) for shape in SHAPES]
    gradients = [[rng.normal(size=shape) for shape in SHAPES] for _ in range(STEPS)]
    if scheduled:
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
        optimizer = case(learning_rate=schedule)
        # Keras computes its schedules in float32, whatever floatx is.
        rates = [float(schedule(step)) for step in range(STEPS)]
        np.testing.assert_allclose(rates, 0.1 * 0.9 ** (np.arange(STEPS) / 10), rtol=1e-6)
    else:
        optimizer = case(learning_rate=0.1)
        rates = np.full(STEPS, 0.1)
    received = _run(optimizer, weights, gradients)
    for i, start in enumerate(weights):
        expected = case.transcribed(start, [g[i] for g in gradients], rates, optimizer)
        for t in range(STEPS):
            np.testing.assert_allclose(received[t][i], expected[t], rtol=0, atol=1e-12)


@every_rule
def test_update_step_by_itself_equals_apply(case, rng, float64):
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(10, 4, 3))
    by_apply = _run(case(learning_rate=0.1), [start], [[g] for g in gradients])
    optimizer = case(learning_rate=0.1)
    variable = keras.Variable(start)
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.update_step(tf.constant(gradient), variable, optimizer.learning_rate)
        optimizer.iterations.assign_add(1)
    np.testing.assert_allclose(variable.numpy(), by_apply[-1][0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [10_000, SMALLEST_CLUSTER], ids=["plain", "cluster"])
@every_rule
def test_a_float32_step_is_right_to_four_units_in_the_last_place(case, size, rng):
    """Of its largest term, from any state: the rule starts from the same float32 state."""
    optimizer = case(learning_rate=0.01)
    hyperparameters = case.hyperparameters(optimizer)
    eta = float(np.float32(0.01))
    variable = keras.Variable(np.zeros(size, "float32"))
    optimizer.build([variable])
    for t in range(1, 16):
        # Weights start from 0, so that the change itself is what is measured.
        variable.assign(np.zeros(size, "float32"))
        before = {
            name: slot[0].numpy().astype("float64") for name, slot in optimizer._slots.items()
        }
        g = (rng.normal(size=size) * 10.0 ** rng.uniform(-4, 4, size)).astype("float32")
        optimizer.apply([tf.constant(g)], [variable])
        expected, _ = case.reference.update(
            np.zeros(size), g.astype("float64"), before, eta, t, **hyperparameters
        )
        terms = case.reference.terms(g.astype("float64"), before, eta, t, **hyperparameters)
        np.testing.assert_allclose(sum(terms), expected, rtol=1e-9, atol=1e-9 * np.abs(terms).max())
        largest = np.max(np.abs([*terms, expected]), axis=0)
        error = np.abs(variable.numpy() - expected)
        assert np.all(error <= 4 * np.spacing(largest.astype("float32"))), f"step {t}"


def test_gradient_descent_equals_keras_sgd(rng, float64):
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(20, 4, 3))
    ours = _run(gdopt.GradientDescent(0.1), [start], [[g] for g in gradients])
    keras_s = _run(keras.optimizers.SGD(0.1), [start], [[g] for g in gradients])
    np.testing.assert_allclose(ours, keras_s, rtol=0, atol=1e-14)


# Powers of two: Keras rounds its hyper-parameters to float32, in float64 too.
@pytest.mark.parametrize("momentum", [0.5, 0.875])
def test_classical_momentum_equals_keras_sgd(momentum, rng, float64):
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(50, 4, 3))
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 40)
    ours = _run(
        gdopt.Momentum(schedule, momentum=momentum, classical=True),
        [start],
        [[g] for g in gradients],
    )
    keras_s = _run(
        keras.optimizers.SGD(schedule, momentum=momentum), [start], [[g] for g in gradients]
    )
    np.testing.assert_allclose(ours, keras_s, rtol=0, atol=1e-13)


def test_momentum_after_two_hand_worked_steps(float64):
    # v1 = 0.1 * 2 = 0.2, theta1 = 1 - 0.5 * 0.2 = 0.9
    # v2 = 0.9 * 0.2 + 0.1 * (-1) = 0.08, theta2 = 0.9 - 0.5 * 0.08 = 0.86
    trajectory = _run(
        gdopt.Momentum(0.5), [np.array([1.0])], [[np.array([2.0])], [np.array([-1.0])]]
    )
    np.testing.assert_allclose([step[0][0] for step in trajectory], [0.9, 0.86], atol=1e-15)


def test_adam_after_two_hand_worked_steps(float64):
    # t = 1: m^ = g = 2, v^ = g^2 = 4: theta = 1 - 0.1 * 2 / 2.
    # t = 2, g = -2: m = 0.9 * 0.2 - 0.2 = -0.02, m^ = -0.02 / 0.19;
    #                v^ = 4: theta = 0.9 + 0.1 * (0.02 / 0.19) / 2.
    optimizer = gdopt.Adam(0.1, epsilon=0.0, epsilon_root=1e-30)
    trajectory = _run(optimizer, [np.array([1.0])], [[np.array([2.0])], [np.array([-2.0])]])
    np.testing.assert_allclose(
        [step[0][0] for step in trajectory], [0.9, 0.9 + 0.001 / 0.19], atol=1e-15
    )


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_equals_torch(betas, rng, float64):
    torch = pytest.importorskip("torch")
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(50, 4, 3))
    ours = _run(gdopt.Adam(0.01, *betas, epsilon=1e-6), [start], [[g] for g in gradients])
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.Adam([weight], lr=0.01, betas=betas, eps=1e-6)
    for g in gradients:
        weight.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(ours[-1][0], weight.detach().numpy(), rtol=0, atol=1e-13)


def test_keras_adam_is_another_rule(rng, float64):
    """Why the class differs: Keras adds epsilon before the bias correction."""
    gradient = np.full((3,), 1e-7)
    ours = _run(gdopt.Adam(0.1, epsilon=1e-7), [np.zeros(3)], [[gradient]])
    keras_s = _run(keras.optimizers.Adam(0.1, epsilon=1e-7), [np.zeros(3)], [[gradient]])
    np.testing.assert_allclose(ours[-1][0], -0.05, rtol=1e-12)  # g / (|g| + eps) = 1/2
    np.testing.assert_allclose(keras_s[-1][0], -0.1 / (1 + 1000**0.5), rtol=1e-4)


@every_rule
def test_learning_rate_and_step_may_be_arrays(case, rng, float64):
    """A stacked population has members of different ages and rates."""
    optimizer = case()
    members, shape = 3, (4, 2)
    gradient = rng.normal(size=(members, *shape))
    slots = {
        name: np.abs(rng.normal(size=(members, *shape)))
        for name in case.initial_slots(shape, optimizer)
    }
    rates, ages = np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 7.0])
    stacked, _ = optimizer.update_rule(
        tf.constant(gradient),
        {name: tf.constant(slot) for name, slot in slots.items()},
        tf.constant(rates.reshape(-1, 1, 1)),
        tf.constant(ages.reshape(-1, 1, 1)),
    )
    for i in range(members):
        alone, _ = optimizer.update_rule(
            tf.constant(gradient[i]),
            {name: tf.constant(slot[i]) for name, slot in slots.items()},
            tf.constant(rates[i]),
            tf.constant(ages[i]),
        )
        np.testing.assert_allclose(stacked[i], alone, rtol=1e-14)


# The first rate, and what is left of it after 50 updates, where 0.2 and 0.8 are slow:
# Adadelta's rate multiplies small steps, Adagrad's declines by itself, gathered steps
# of one size swing.
RATES = {"Adadelta": (20.0, 0.8), "Adagrad": (2.0, 0.8), "RMSprop": (0.1, 0.6)}


@every_optimizer
def test_reaches_the_optimum_of_a_convex_problem(case, float64):
    hessian, optimum = tf.linalg.diag(tf.constant([1.0, 3.0], "float64")), np.array([1.0, -2.0])
    variable = keras.Variable(np.zeros(2))
    rate, decay = RATES.get(case.cls.__name__, (0.2, 0.8))
    optimizer = case(learning_rate=keras.optimizers.schedules.ExponentialDecay(rate, 50, decay))
    optimizer.build([variable])

    @tf.function
    def step():
        optimizer.apply([tf.linalg.matvec(hessian, variable - optimum)])

    for _ in range(600):
        step()
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(variable.numpy(), optimum, atol=1e-5)


def test_a_rule_of_ones_own_becomes_an_optimizer(rng, float64):
    class SignDescent(gdopt.GradientOptimizer):
        def __init__(self, learning_rate=0.01, **kwargs):
            super().__init__(learning_rate, **kwargs)

        def update_rule(self, gradient, slots, learning_rate, step):
            return -learning_rate * keras.ops.sign(gradient), {}

    start, gradients = rng.normal(size=(4,)), rng.normal(size=(5, 4))
    received = _run(SignDescent(0.1), [start], [[g] for g in gradients])
    expected = start - 0.1 * np.cumsum(np.sign(gradients), axis=0)
    np.testing.assert_allclose([step[0] for step in received], expected, atol=1e-14)


def test_a_class_without_a_rule_says_so():
    class Empty(gdopt.GradientOptimizer):
        pass

    with pytest.raises(NotImplementedError, match="Empty has no `update_rule`"):
        Empty(0.1).apply([tf.constant([1.0])], [keras.Variable([1.0])])


@every_rule
def test_has_the_slots_of_its_transcription(case):
    optimizer = case()
    declared = {**optimizer.slots, **optimizer.scalar_slots}
    assert declared == case.reference.slots(**case.hyperparameters(optimizer))
