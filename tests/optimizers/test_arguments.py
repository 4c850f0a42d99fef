"""What bad input gets: the argument, what was expected and what was received."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from tests.optimizer_cases import (
    closure_classes,
    every_optimizer,
    every_rule,
    rule_classes,
    wrapper_classes,
)

NOT_A_RATE = [-0.1, float("nan"), float("inf"), "fast", None, True, [0.1]]
NOT_A_FRACTION = [-0.1, 1.0, 1.5, float("nan"), "0.9", None, True]
NOT_AN_EPSILON = [-1e-8, float("nan"), float("inf"), "small", None]

FRACTIONS = [
    (cls, name)
    for cls in rule_classes()
    for name in ("momentum", "beta_1", "beta_2", "rho")
    if name in cls.hyperparameters
]
EPSILONS = [
    (cls, name)
    for cls in rule_classes()
    for name in ("epsilon", "epsilon_root")
    if name in cls.hyperparameters
]
WITH_EPSILONS = sorted({cls for cls, _ in EPSILONS}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("value", NOT_A_RATE, ids=repr)
@every_optimizer
def test_learning_rate_out_of_range(case, value):
    with pytest.raises(ValueError, match=r"`learning_rate` must be .*Received: learning_rate="):
        case(learning_rate=value)


@every_optimizer
def test_learning_rates_that_are_fine(case):
    for value in (0, 1, 0.0, np.float32(0.5), keras.optimizers.schedules.CosineDecay(0.1, 10)):
        case(learning_rate=value)
    optimizer, variable = case(learning_rate=lambda: 0.5), keras.Variable([1.0, 2.0])
    optimizer.apply([tf.constant([1.0, -1.0])], [variable])
    assert np.all(variable.numpy() != [1.0, 2.0])


@pytest.mark.parametrize("value", NOT_A_FRACTION, ids=repr)
@pytest.mark.parametrize(("cls", "name"), FRACTIONS)
def test_decay_rate_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .* below 1\. Received: {name}="):
        cls(**{name: value})


@pytest.mark.parametrize("value", NOT_AN_EPSILON, ids=repr)
@pytest.mark.parametrize(("cls", "name"), EPSILONS)
def test_epsilon_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: {name}="):
        cls(**{name: value})


@pytest.mark.parametrize("cls", WITH_EPSILONS)
def test_both_epsilons_zero(cls):
    for tiny in (0.0, 1e-40):
        with pytest.raises(ValueError, match=r"At least one of `epsilon`(,| and) `epsilon_root`"):
            cls(epsilon=tiny, epsilon_root=tiny)


@pytest.mark.parametrize("epsilons", [(1e-30, 0.0), (0.0, 1e-30)])
@pytest.mark.parametrize("cls", WITH_EPSILONS)
def test_the_smallest_epsilons_leave_a_zero_gradient_alone(cls, epsilons):
    variable = keras.Variable([1.0])
    cls(epsilon=epsilons[0], epsilon_root=epsilons[1]).apply([tf.zeros(1)], [variable])
    assert variable.numpy() == [1.0]


def test_switches_take_only_booleans():
    with pytest.raises(ValueError, match=r"`classical` must be True or False\. Received"):
        gdopt.Momentum(classical=1)
    with pytest.raises(ValueError, match=r"`lazy` must be True or False\. Received"):
        gdopt.Adam(lazy="yes")


@pytest.mark.parametrize("name", ["nesterov_momentum", "decay", "lr"])
@every_optimizer
def test_unknown_keyword(case, name):
    with pytest.raises(ValueError, match=rf"does not take the argument\(s\) \['{name}'\]"):
        case(**{name: 0.1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", -0.1),
        ("clipnorm", 0.0),
        ("clipvalue", -1.0),
        ("global_clipnorm", float("nan")),
        ("loss_scale_factor", 0.0),
        ("gradient_accumulation_steps", 1),
        ("gradient_accumulation_steps", 2.5),
        ("use_ema", 1),
        ("ema_overwrite_frequency", 0),
    ],
)
def test_base_argument_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: {name}="):
        gdopt.Adam(**{name: value})


def test_two_kinds_of_clipping():
    with pytest.raises(ValueError, match="Only one of `clipnorm`"):
        gdopt.Adam(clipnorm=1.0, clipvalue=1.0)


@every_optimizer
def test_float16_variables_are_refused(case):
    with pytest.raises(
        ValueError, match=r"mixed_float16.*Received: variable 'half' of dtype float16"
    ):
        case().build([keras.Variable([1.0], dtype="float16", name="half")])


@pytest.mark.parametrize(
    ("value", "dtype"), [([1 + 2j], "complex64"), ([3], "int32"), ([True], "bool")]
)
@every_optimizer
def test_only_floating_variables_are_updated(case, value, dtype):
    variable = keras.Variable(np.array(value), dtype=dtype, name="no_float")
    gradient = tf.cast(variable.value, dtype)
    message = rf"float32, float64 and bfloat16.*Received: variable 'no_float' of dtype {dtype}"
    with pytest.raises(ValueError, match=message):
        case().apply([gradient], [variable])


@every_rule
def test_only_floating_variables_are_updated_by_themselves(case):
    variable = keras.Variable([3], dtype="int32", name="no_float")
    optimizer = case()
    optimizer.build([variable])
    with pytest.raises(ValueError, match="Received: variable 'no_float' of dtype int32"):
        optimizer.update_step(tf.constant([1]), variable, 0.1)


@pytest.mark.parametrize("cls", closure_classes())
@pytest.mark.parametrize(
    "around",
    [lambda inner: inner, keras.optimizers.LossScaleOptimizer],
    ids=["itself", "LossScaleOptimizer"],
)
def test_no_wrapper_around_an_optimizer_that_evaluates_the_loss(cls, around):
    for wrapper in wrapper_classes():
        with pytest.raises(ValueError, match=f"from gradients.*{cls.__name__} evaluates the loss"):
            wrapper(around(cls()))


@every_optimizer
def test_a_gradient_that_does_not_fit_names_the_variable(case):
    variables = [keras.Variable([1.0], name="one"), keras.Variable([[1.0, 2.0]], name="two")]
    with pytest.raises(ValueError, match=r"variable 'two' must .* \(1, 2\)\. Received.*\(2, 1\)"):
        case().apply([tf.ones(1), tf.ones((2, 1))], variables)
    with pytest.raises(ValueError, match=r"variable 'two' must .* \(1, 2\)"):
        case().apply([tf.ones(1), tf.IndexedSlices(tf.ones((1, 3)), tf.constant([0]))], variables)
    with pytest.raises(ValueError, match=r"1 gradient\(s\) for 2 variable\(s\): \['one', 'two'\]"):
        case().apply([tf.ones(1)], variables)


@every_optimizer
def test_an_unknown_variable_is_named(case):
    optimizer, known = case(), keras.Variable([1.0], name="known")
    optimizer.apply([tf.ones(1)], [known])
    with pytest.raises(ValueError, match=r"not built for the variable 'stranger'.*\['known'\]"):
        optimizer.apply([tf.ones(1)], [keras.Variable([1.0], name="stranger")])


def test_the_same_variable_twice_is_named():
    variable = keras.Variable([1.0], name="shared")
    with pytest.raises(ValueError, match=r"Expected each variable once\. Received: 'shared' twice"):
        gdopt.GradientDescent().apply([tf.ones(1), tf.ones(1)], [variable, variable])


def test_a_gradient_may_be_a_list():
    variable = keras.Variable([1.0, 2.0])
    gdopt.GradientDescent(1.0).apply([[1.0, 1.0]], [variable])
    np.testing.assert_array_equal(variable.numpy(), [0.0, 1.0])


def test_a_rule_that_forgets_a_slot_is_named():
    class Forgetful(gdopt.GradientOptimizer):
        slots = {"a": 0.0, "b": 0.0}

        def update_rule(self, gradient, slots, learning_rate, step):
            return -learning_rate * gradient, {"a": gradient}

    with pytest.raises(ValueError, match=r"Forgetful.update_rule.*\['a', 'b'\].*\['a'\]"):
        Forgetful(0.1).apply([tf.ones(1)], [keras.Variable([1.0])])


def test_apply_without_variables_before_build():
    with pytest.raises(ValueError, match="not built yet"):
        gdopt.Adam().apply([tf.ones(1)])


def test_metrics_every_negative_number_of_steps():
    with pytest.raises(ValueError, match=r"`every` must be an integer of at least 0\. Received"):
        gdopt.Adam().record_step_metrics(-1)


def test_weight_decay_is_excluded_before_build_or_not_at_all():
    optimizer = gdopt.Adam(weight_decay=0.1)
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="must be called before the optimizer is"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
