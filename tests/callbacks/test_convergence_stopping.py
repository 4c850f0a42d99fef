"""Stops after the epoch that one computes by hand."""

import keras
import numpy as np
import pytest

import keras_gdopt as gdopt
from keras_gdopt.callbacks import ConvergenceStopping

ONE = np.ones((1, 1), "float32")


@pytest.fixture(scope="module")
def model():
    """A weight that each epoch halves: its loss w² has the gradient 2 w, η = 1/4.

    After epoch k, from 0, the weight is start/2^(k+1), and the epoch's logs show the loss
    before its update, start²/4^k. One model for all tests, as each would compile its own.
    """
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(gdopt.GradientDescent(0.25), "mse")
    return model


def _set(model, weight):
    model.set_weights([np.full((1, 1), weight)])


def _stopped_after(callback, model, start=1.0, **arguments):
    """How many epochs were trained."""
    _set(model, start)
    arguments = {"epochs": 12, "verbose": 0, "callbacks": [callback], **arguments}
    return len(model.fit(ONE, 0 * ONE, **arguments).epoch)


def _told(callback, model, losses, weights):
    """After which epoch it stopped that was told of these losses and weights."""
    _set(model, weights[0])
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, (loss, weight) in enumerate(zip(losses, weights[1:], strict=True)):
        assert callback.stopped_epoch is None
        _set(model, weight)
        callback.on_epoch_end(epoch, {"loss": loss})
    return callback.stopped_epoch


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        # |4^-k - 4^-(k-1)| = 3/4^k: 3/1024 at k = 5.
        ({"loss_change": 3 / 1024}, 5),
        ({"loss_change": 2.9 / 1024}, 6),
        # The change of the weight is 1/2^(k+1): 1/32 at k = 4.
        ({"weight_change": 1 / 32}, 4),
        ({"weight_change": 0.9 / 32}, 5),
        # One of both is enough.
        ({"loss_change": 3 / 1024, "weight_change": 1 / 32}, 4),
        ({"loss_change": 3 / 64, "weight_change": 1 / 32}, 3),
        # In a row, from the first that holds on.
        ({"loss_change": 3 / 1024, "patience": 3}, 7),
        ({"weight_change": 1 / 32, "patience": 2}, 5),
        # Relative to the larger loss 3/4, to the weight after the update 1: in the first epochs.
        ({"loss_change": 0.75, "relative": True}, 1),
        ({"weight_change": 1.0, "relative": True}, 0),
    ],
)
def test_stops_after_the_epoch_computed_by_hand(arguments, last, model):
    callback = ConvergenceStopping(**arguments)
    assert _stopped_after(callback, model) == last + 1
    assert callback.stopped_epoch == last


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        # The weights change by (3, 4), (0.3, 0.4), (0, 0).
        ({"norm": "max", "weight_change": 4.0}, 0),
        ({"norm": "max", "weight_change": 0.41}, 1),
        ({"norm": "euclidean", "weight_change": 4.9}, 1),
        ({"norm": "euclidean", "weight_change": 5.01}, 0),
        ({"norm": "euclidean", "weight_change": 0.49}, 2),
        # Against (3, 4) and (3.3, 4.4): 1, then 1 / 11 by both norms.
        ({"norm": "euclidean", "weight_change": 0.99, "relative": True}, 1),
        ({"norm": "euclidean", "weight_change": 0.09, "relative": True}, 2),
        ({"norm": "euclidean", "weight_change": 0.092, "relative": True}, 1),
    ],
)
def test_norms_of_a_change_of_several_weights(arguments, last):
    layers = [keras.layers.Dense(1, use_bias=False), keras.layers.Dense(1, use_bias=False)]
    model = keras.Sequential([keras.Input((1,)), *layers])
    callback = ConvergenceStopping(**arguments)
    callback.set_model(model)
    steps = [(0.0, 0.0), (3.0, 4.0), (3.3, 4.4), (3.3, 4.4)]
    for epoch, weights in enumerate(steps, start=-1):
        model.set_weights([np.full((1, 1), weight) for weight in weights])
        if epoch < 0:
            callback.on_train_begin()
        elif callback.stopped_epoch is None:
            callback.on_epoch_end(epoch, {"loss": 0.0})
    assert callback.stopped_epoch == last


@pytest.mark.parametrize("arguments", [{"loss_change": 0.74}, {"weight_change": 0.99}])
def test_relative_changes_of_the_same_size_never_stop(arguments, model):
    callback = ConvergenceStopping(**arguments, relative=True)
    assert _stopped_after(callback, model) == 12
    assert callback.stopped_epoch is None and callback.reason is None


def test_relative_thresholds_do_not_depend_on_the_unit(model):
    """Losses fall by 1/2, then by 1/10; the weight grows by a half, then by a tenth of itself."""
    for unit in (1e-6, 1.0, 1e6):
        losses, weights = np.array([4, 2, 1.8]) * unit, np.array([1, 2, 4, 4.4]) * unit
        callback = ConvergenceStopping(loss_change=0.11, relative=True)
        assert _told(callback, model, losses, weights) == 2
        callback = ConvergenceStopping(weight_change=0.1, relative=True)
        assert _told(callback, model, losses, weights) == 2


def test_the_largest_entry_of_all_weights_counts():
    """In one of three variables, downwards; frozen ones do not count."""
    layers = [keras.layers.Dense(2), keras.layers.Dense(1, trainable=False)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    kernel, *others = (np.zeros(v.shape) for v in model.weights)
    for change, expected in ((0.24, 0), (0.26, None)):
        model.set_weights([kernel, *others])
        callback = ConvergenceStopping(weight_change=0.25)
        callback.set_model(model)
        callback.on_train_begin()
        moved = kernel.copy()
        moved[1, 0] -= change
        model.set_weights([moved, others[0], *(other + 9 for other in others[1:])])
        callback.on_epoch_end(0, {"loss": 1.0})
        assert callback.stopped_epoch == expected


def test_thresholds_of_zero_are_no_change_at_all(model):
    """A weight of 0 stays: no change in the first epoch; two losses by the second."""
    assert _stopped_after(ConvergenceStopping(weight_change=0.0), model, 0.0) == 1
    assert _stopped_after(ConvergenceStopping(loss_change=0.0), model, 0.0) == 2


def test_patience_is_broken_by_an_epoch_that_does_not_hold(model):
    losses = [1.0, 1.05, 2.0, 2.05, 2.1]
    callback = ConvergenceStopping(loss_change=0.1, patience=2)
    assert _told(callback, model, losses, np.zeros(6)) == 4
    assert model.stop_training


def test_conditions_are_not_added_up(model):
    """Each holds in every other epoch: neither two times in a row."""
    callback = ConvergenceStopping(loss_change=0.1, weight_change=0.1, patience=2)
    assert _told(callback, model, [0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 2, 2, 3, 3, 4]) is None


@pytest.mark.parametrize("losses", [[np.nan] * 4, [np.inf] * 4, [1.0, np.nan, 1.0, np.inf]])
def test_what_is_not_finite_is_no_convergence(losses, model):
    callback = ConvergenceStopping(loss_change=1e9, weight_change=1e9)
    assert _told(callback, model, losses, [0.0] + [np.nan] * 4) is None


def test_a_second_fit_starts_anew(model):
    callback = ConvergenceStopping(loss_change=3 / 1024)
    assert _stopped_after(callback, model) == 6
    assert _stopped_after(callback, model, epochs=3) == 3
    assert callback.stopped_epoch is None and callback.reason is None


def test_another_loss_is_watched(model):
    """A validation loss is that after the update, 1/4^(k+1): an epoch ahead of the training's."""
    callback = ConvergenceStopping(loss_change=3 / 1024, monitor="val_loss")
    assert _stopped_after(callback, model, validation_data=(ONE, 0 * ONE)) == 5


def test_a_loss_that_is_no_number_is_warned_of(model):
    class Notes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["note"] = "a"

    callback = ConvergenceStopping(loss_change=1.0, monitor="note")
    with pytest.warns(UserWarning, match=r"`note`, which is not a number .* Available: loss$"):
        assert _stopped_after(callback, model, epochs=2, callbacks=[Notes(), callback]) == 2


def test_weights_that_are_built_or_frozen_by_training(model):
    """Only what trained at the start of the epoch and at its end can be compared."""

    class Freezes(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.layers[0].trainable = epoch < 1

    layers = [keras.layers.Dense(1), keras.layers.Dense(1)]
    late = keras.Sequential(layers)
    late.compile(gdopt.GradientDescent(0.0), "mse")
    callback = ConvergenceStopping(weight_change=0.0)
    arguments = {"epochs": 5, "verbose": 0, "callbacks": [Freezes(), callback]}
    late.fit(ONE, ONE, **arguments)
    assert callback.stopped_epoch == 2


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="needs Keras 3.15")
@pytest.mark.parametrize(
    ("arguments", "last"), [({"loss_change": 3 / 1024}, 5), ({"weight_change": 1 / 32}, 4)]
)
def test_an_optimizer_inside_another(arguments, last):
    """As `test_stops_after_the_epoch_computed_by_hand`, by two optimizers."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    chosen = keras.optimizers.OptimizerMap(gdopt.Adam(), {".*dense.*": gdopt.GradientDescent(0.25)})
    model.compile(keras.optimizers.MultiOptimizer(chosen), "mse")
    callback = ConvergenceStopping(**arguments)
    assert _stopped_after(callback, model) == last + 1


def test_a_loss_that_is_not_there_is_warned_of(model):
    callback = ConvergenceStopping(loss_change=1.0, monitor="val_loss")
    with pytest.warns(UserWarning, match=r"`val_loss`.* Available: loss"):
        assert _stopped_after(callback, model, epochs=2) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"loss_change": 3 / 1024},
            "Epoch 6: stopped, as `loss` changed by 0.00293 (threshold 0.00292969)\n",
        ),
        (
            {"weight_change": 1 / 32},
            "Epoch 5: stopped, as the weights changed by 0.0312 (threshold 0.03125)\n",
        ),
        (
            {"loss_change": 0.75, "relative": True},
            "Epoch 2: stopped, as `loss` changed by 0.75 of 1 (threshold 0.75)\n",
        ),
    ],
)
def test_says_why_it_stopped(arguments, said, model, capsys):
    callback = ConvergenceStopping(**arguments, verbose=1)
    _stopped_after(callback, model)
    assert capsys.readouterr().out == said
    assert callback.reason in said
    _stopped_after(ConvergenceStopping(**arguments), model)
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_lbfgs_says_itself_that_it_has_converged(rng):
    """A least-squares problem: its exact solution, then no more epochs."""
    x = rng.normal(size=(20, 3)).astype("float32")
    y = x @ np.array([[1.0], [-2.0], [3.0]], "float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(gdopt.LBFGS(gradient_tolerance=1e-4), "mse")
    model.optimizer.attach(model)
    callback = ConvergenceStopping(patience=2)
    history = model.fit(x, y, batch_size=20, epochs=50, verbose=0, callbacks=[callback])
    assert callback.reason == "the optimizer has converged"
    assert callback.stopped_epoch == len(history.epoch) - 1 < 20
    weights = model.get_weights()[0][:, 0]
    gradient = 2 * x.T @ (x @ weights - y[:, 0]) / 20
    assert np.max(np.abs(gradient)) <= 1.1e-4
    # Once converged nothing moves: patience took one more epoch.
    assert history.history["loss"][-1] == history.history["loss"][-2]


def test_stops_gadam_after_a_generation(model):
    """Against the best members' weights and fitness, noted by another callback."""
    _set(model, 1.0)
    gadam = gdopt.Gadam(model, population_size=2, mutation_rate=0.0, seed=1)
    weights = [1.0]
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()[0].item())
    )
    of_weights = ConvergenceStopping(weight_change=0.05)
    arguments = {"batch_size": 1, "generations": 12, "verbose": 0}
    gadam.fit(ONE, 0 * ONE, callbacks=[of_weights, note], **arguments)
    changes = np.abs(np.diff(weights))
    assert of_weights.stopped_epoch == len(changes) - 1 < 11
    assert changes[-1] <= 0.05 < changes[:-1].min()

    of_fitness = ConvergenceStopping(loss_change=1e-7, monitor="fitness")
    history = gadam.fit(ONE, 0 * ONE, callbacks=[of_fitness], **arguments)
    changes = np.abs(np.diff(history.history["fitness"]))
    assert of_fitness.stopped_epoch == history.epoch[-1]
    assert changes[-1] <= 1e-7 < changes[:-1].min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_change": -1e-3}, "Received: loss_change=-0.001 "),
        ({"loss_change": float("inf")}, "Received: loss_change=inf "),
        ({"weight_change": "small"}, "Received: weight_change='small' "),
        ({"loss_change": 1, "relative": 1}, "Received: relative=1 "),
        ({"loss_change": 1, "patience": 0}, "Received: patience=0 "),
        ({"weight_change": 1, "norm": "l1"}, "Received: norm='l1'"),
        ({"loss_change": 1, "verbose": -1}, "Received: verbose=-1 "),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvergenceStopping(**arguments)


def test_nothing_to_look_at(model):
    with pytest.raises(ValueError, match=r"nothing to monitor.* Received: <.*GradientDescent"):
        _stopped_after(ConvergenceStopping(), model)
