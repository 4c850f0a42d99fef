"""Each rule against its transcription, and against other packages."""

import sys
from fractions import Fraction

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.optimizers.compilation import SMALLEST_COMPILED
from tests.optimizer_cases import A_FEW, RULES, VARIANTS, every_optimizer, every_rule

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


@pytest.mark.parametrize(
    ("case", "scheduled"),
    [
        *(pytest.param(case, False, id=f"{case}-constant") for case in VARIANTS),
        # The rate is an argument of the rule, whatever its hyper-parameters.
        *(
            pytest.param(
                case,
                True,
                id=f"{case}-scheduled",
                marks=[] if case in A_FEW else pytest.mark.slow,
            )
            for case in VARIANTS
        ),
    ],
)
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


@pytest.mark.parametrize("size", [10_000, SMALLEST_COMPILED], ids=["plain", "cluster"])
@every_rule
def test_a_float32_step_is_right_to_five_units_in_the_last_place(case, size, rng):
    """Of its largest term, from any state: the rule starts from the same float32 state.

    Adam rounds nine times on the way to the change, those under the root count half, and
    its four constants are rounded: five units together.
    """
    optimizer = case(learning_rate=0.01)
    hyperparameters = case.hyperparameters(optimizer)
    eta = float(np.float32(0.01))
    variable = keras.Variable(np.zeros(size, "float32"))
    optimizer.build([variable])
    for t in range(1, 31):
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
        assert np.all(error <= 5 * np.spacing(largest.astype("float32"))), f"step {t}"


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


def _trained_by_torch(optimizer_class, start, gradients, **arguments):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = optimizer_class(torch)([weight], **arguments)
    trajectory = []
    for g in gradients:
        weight.grad = torch.tensor(g)
        optimizer.step()
        trajectory.append(weight.detach().numpy().copy())
    return trajectory, optimizer.state[weight]


# Our optimizer, torch's, and torch's arguments with its conventions mapped.
TORCH = {
    "Momentum": (
        lambda: gdopt.Momentum(0.05, momentum=0.8, classical=True),
        lambda torch: torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.8},
    ),
    "Adam(amsgrad=True)": (
        lambda: gdopt.Adam(0.05, beta_2=0.9, epsilon=1e-6, amsgrad=True),
        lambda torch: torch.optim.Adam,
        {"lr": 0.05, "betas": (0.9, 0.9), "eps": 1e-6, "amsgrad": True},
    ),
    "Adagrad": (
        lambda: gdopt.Adagrad(0.05, 0.25, epsilon=1e-6, epsilon_root=0.0),
        lambda torch: torch.optim.Adagrad,
        {"lr": 0.05, "initial_accumulator_value": 0.25, "eps": 1e-6},
    ),
    "RMSprop": (
        lambda: gdopt.RMSprop(0.05, rho=0.8, epsilon=1e-6, epsilon_root=0.0),
        lambda torch: torch.optim.RMSprop,
        {"lr": 0.05, "alpha": 0.8, "eps": 1e-6},
    ),
    "RMSprop(momentum, centered)": (
        lambda: gdopt.RMSprop(0.05, 0.8, 0.7, epsilon=1e-6, epsilon_root=0.0, centered=True),
        lambda torch: torch.optim.RMSprop,
        {"lr": 0.05, "alpha": 0.8, "momentum": 0.7, "eps": 1e-6, "centered": True},
    ),
    "Adadelta": (
        lambda: gdopt.Adadelta(0.5, rho=0.8, epsilon_root=1e-5),
        lambda torch: torch.optim.Adadelta,
        {"lr": 0.5, "rho": 0.8, "eps": 1e-5},
    ),
    # torch adds epsilon before the bias correction, so it must not matter here.
    "RAdam": (
        lambda: gdopt.RAdam(0.05, beta_2=0.95, epsilon=1e-16, sma_threshold=5.0),
        lambda torch: torch.optim.RAdam,
        {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-16},
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name, rng, float64):
    ours, its, arguments = TORCH[name]
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(50, 4, 3))
    received = _run(ours(), [start], [[g] for g in gradients])
    expected, _ = _trained_by_torch(its, start, gradients, **arguments)
    np.testing.assert_allclose([step[0] for step in received], expected, rtol=0, atol=1e-12)


def test_nadam_equals_torch_but_for_the_step_it_looks_ahead(rng, float64, monkeypatch):
    """torch's first moment is corrected with the decays of one more step.

    An endless `momentum_decay` switches Dozat's schedule off, so that its decay is beta_1.
    """
    torch = pytest.importorskip("torch")
    # It keeps the product of its decays in the default dtype.
    monkeypatch.setattr(
        sys.modules["torch.optim.nadam"], "_get_scalar_dtype", lambda: torch.float64
    )
    eta, beta_1, beta_2, eps = 0.05, 0.9, 0.95, 1e-6
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(20, 4, 3))
    ours = _run(gdopt.Nadam(eta, beta_1, beta_2, eps), [start], [[g] for g in gradients])
    before = start
    for t in range(1, 21):
        trajectory, state = _trained_by_torch(
            lambda torch: torch.optim.NAdam,
            start,
            gradients[:t],
            lr=eta,
            betas=(beta_1, beta_2),
            eps=eps,
            momentum_decay=1e9,
        )
        its_before = trajectory[-2] if t > 1 else start
        m, v = state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
        root = np.sqrt(v / (1 - beta_2**t)) + eps
        mapped = 1 / (1 - beta_1**t) - 1 / (1 - beta_1 ** (t + 1))
        expected = trajectory[-1] - its_before - eta * beta_1 * m * mapped / root
        np.testing.assert_allclose(ours[t - 1][0] - before, expected, rtol=0, atol=1e-12)
        before = ours[t - 1][0]


# Powers of two, and for Adadelta a rate of 1: Keras keeps them in float32.
KERAS = {
    "Adagrad": (
        lambda: gdopt.Adagrad(0.125, 0.25, epsilon_root=2.0**-20),
        lambda: keras.optimizers.Adagrad(0.125, 0.25, epsilon=2.0**-20),
    ),
    "RMSprop": (
        lambda: gdopt.RMSprop(0.125, 0.75, 0.5, epsilon_root=2.0**-20),
        lambda: keras.optimizers.RMSprop(0.125, 0.75, 0.5, epsilon=2.0**-20),
    ),
    "RMSprop(centered=True)": (
        lambda: gdopt.RMSprop(0.125, 0.75, epsilon_root=2.0**-20, centered=True),
        lambda: keras.optimizers.RMSprop(0.125, 0.75, epsilon=2.0**-20, centered=True),
    ),
    "Adadelta": (
        lambda: gdopt.Adadelta(1.0, 0.75, epsilon_root=2.0**-20),
        lambda: keras.optimizers.Adadelta(1.0, 0.75, epsilon=2.0**-20),
    ),
}


@pytest.mark.parametrize("name", KERAS)
def test_equals_keras_where_the_docstring_says_so(name, rng, float64):
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(50, 4, 3))
    ours, its = (_run(new(), [start], [[g] for g in gradients]) for new in KERAS[name])
    np.testing.assert_allclose(ours, its, rtol=0, atol=1e-12)


def test_centered_rmsprop_is_right_where_the_difference_cancels():
    """Gradients of 8192 with a variance of 1: in float32 their squares round to 4."""
    gradients = 8192.0 + np.tile([-1.0, 1.0], 150).reshape(300, 1)
    optimizer = gdopt.RMSprop(0.125, centered=True)
    received = _run(optimizer, [np.zeros(1, "float32")], [[g.astype("float32")] for g in gradients])
    case = next(c for c in RULES if str(c) == "RMSprop(centered=True)")
    expected = case.transcribed(np.zeros(1), gradients, [0.125] * 300, optimizer)
    np.testing.assert_allclose([step[0] for step in received], expected, rtol=2e-3)


def test_nadam_after_two_hand_worked_steps(float64):
    # t = 1, g = 2: m = 0.2, m^ = 2, v^ = 4: 0.9 * 2 + 0.1 * 2 / 0.1 = 3.8 over 2.
    # t = 2, g = -2: m = -0.02, m^ = -0.02 / 0.19, v^ = 4:
    #                0.9 * (-0.02 / 0.19) + 0.1 * (-2) / 0.19 = -0.218 / 0.19 over 2.
    optimizer = gdopt.Nadam(0.1, epsilon=0.0, epsilon_root=1e-30)
    trajectory = _run(optimizer, [np.array([1.0])], [[np.array([2.0])], [np.array([-2.0])]])
    np.testing.assert_allclose(
        [step[0][0] for step in trajectory], [0.81, 0.81 + 0.0109 / 0.19], atol=1e-15
    )


def _rectified_at(threshold, beta_2, dtype, steps=8):
    """For each step, its change in units of the rate: unrectified ones are the gradient."""
    keras.backend.set_floatx(dtype)
    optimizer = gdopt.RAdam(0.125, beta_2=beta_2, sma_threshold=threshold)
    variable, changes = keras.Variable([0.0], dtype=dtype), []
    for _ in range(steps):
        variable.assign([0.0])  # so that the change is not rounded to the weight's size
        optimizer.apply([tf.constant([16.0], dtype)], [variable])
        changes.append(-float(variable.numpy()[0]) / 0.125)
    return changes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("threshold", "first"), [(4.0, 5), (5.0, 6)])
def test_radam_rectifies_from_the_step_its_length_passes_the_threshold(threshold, first, dtype):
    """At beta_2 = 0.999, rho_4 = 3.998 and rho_5 = 4.996: between 4 and 5 lies step 5.

    Of a constant gradient of 16, m^ = 16 and v^ = 256: a change of 16, or of r.
    """
    changes = _rectified_at(threshold, 0.999, dtype)
    np.testing.assert_allclose(changes[: first - 1], 16.0, rtol=1e-6)
    for t in range(first, 9):
        beta_2 = Fraction(999, 1000)
        longest = 2 / (1 - beta_2) - 1
        length = longest - 2 * t * beta_2**t / (1 - beta_2**t)
        r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        np.testing.assert_allclose(changes[t - 1], float(r) ** 0.5, rtol=1e-5)


def test_radam_is_exact_where_float32_would_cancel():
    """At beta_2 = 0.99996, rho_5 is 5, as the difference of two numbers of 50,000."""
    changes = _rectified_at(4.0, 0.99996, "float32", steps=5)
    np.testing.assert_allclose(changes[:4], 16.0, rtol=1e-6)
    beta_2 = Fraction(99996, 100000)
    longest = 2 / (1 - beta_2) - 1
    length = longest - 10 * beta_2**5 / (1 - beta_2**5)
    r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    np.testing.assert_allclose(changes[4], float(r) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("beta_2", [0.0, 0.5, 0.6])
def test_radam_never_rectifies_a_short_average(beta_2):
    np.testing.assert_allclose(_rectified_at(4.0, beta_2, "float64"), 16.0, rtol=1e-12)


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
