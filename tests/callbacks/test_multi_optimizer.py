"""Curves of the optimizers inside Keras's `MultiOptimizer`, against norms by NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.callbacks.optimizer_parts import named_optimizers
from keras_gdopt.optimizers.recording import TIERS
from tests.callbacks.test_optimizer_tensorboard import (
    _buckets,
    _data,
    _hparams,
    _norm,
    _Weights,
    read,
)
from tests.optimizer_cases import RULES, every_optimizer_alike
from tests.parameters import slow

pytestmark = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="needs Keras 3.15"
)


def _multi(body, head):
    chosen = keras.optimizers.OptimizerMap(body, {".*head.*": head})
    return keras.optimizers.MultiOptimizer(chosen)


def _model(optimizer, *, is_built=True, **compile_arguments):
    model = keras.Sequential(
        [
            keras.layers.Dense(5, activation="tanh", name="body"),
            keras.layers.Dense(1, name="head"),
        ]
    )
    if is_built:
        model.build((None, 4))
    model.compile(optimizer, "mse", **compile_arguments)
    return model


def _fit(model, log_dir, callbacks=(), **arguments):
    callback = gdopt.callbacks.OptimizerTensorBoard(log_dir, **arguments)
    data = _data(np.random.default_rng(0))
    return model.fit(
        *data, batch_size=4, shuffle=False, verbose=0, callbacks=[*callbacks, callback]
    )


@every_optimizer_alike
@pytest.mark.parametrize("tier", [slow(TIERS[0]), slow(TIERS[1]), TIERS[2]])
def test_curves_of_each_inner_optimizer(case, tier, tmp_path):
    model = _model(_multi(gdopt.GradientDescent(0.05, name="low"), case.brisk(0.01)))
    weights = _Weights()
    _fit(model, tmp_path, [weights], update_freq=5, tier=tier)
    written = read(tmp_path)
    kind = case.cls.__name__
    twin = _model("sgd")
    x, y = _data(np.random.default_rng(0))
    for step in (5, 10):
        before, after = weights.after[step - 1], weights.after[step]
        twin.set_weights(before)
        with tf.GradientTape() as tape:
            prediction = twin(x[(step - 1) * 4 : step * 4])
            loss = tf.reduce_mean(tf.square(prediction - y[(step - 1) * 4 : step * 4]))
        gradients = [g.numpy() for g in tape.gradient(loss, twin.trainable_variables)]
        changes = [new - old for new, old in zip(after, before, strict=True)]
        parts = {"low/": slice(0, 2), f"{kind}/": slice(2, 4), "": slice(0, 4)}
        for name, of_part in parts.items():
            expected = {"grad_norm": _norm(gradients[of_part])}
            if case in RULES or name == "low/":
                expected["update_norm"] = _norm(changes[of_part])
                expected["weight_norm"] = _norm(after[of_part])
                ratio = np.log10(expected["update_norm"] / expected["weight_norm"])
                expected["update_ratio_log10"] = ratio
            for tag, value in expected.items():
                found = written[f"optimizer/{name}{tag}"][step]
                assert found == pytest.approx(value, rel=2e-3), (name, tag)
    assert written["optimizer/low/learning_rate"][5] == pytest.approx(0.05)
    rate = keras.ops.convert_to_numpy(model.optimizer.optimizers[0].learning_rate)
    assert written[f"optimizer/{kind}/learning_rate"][5] == pytest.approx(float(rate))
    assert "optimizer/learning_rate" not in written
    layers = {tag for tag in written if tag.startswith("layer_grad_norm/")}
    paths = {v.path for v in model.trainable_variables} if tier != "scalars" else set()
    assert layers == {f"layer_grad_norm/{path}" for path in paths}


@pytest.mark.parametrize("is_inside", [True, False])
def test_optimizers_of_keras_have_their_rates(is_inside, tmp_path):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.0)
    optimizer = keras.optimizers.SGD(schedule)
    model = _model(_multi(optimizer, gdopt.Adam()) if is_inside else optimizer)
    weights = _Weights()
    with pytest.warns(UserWarning, match=r"keras\.\S*SGD records no step metrics"):
        _fit(model, tmp_path, [weights], update_freq=1)
    written = read(tmp_path)
    own = "optimizer/SGD" if is_inside else "optimizer"
    # Step t is the t-th update, made at the rate of iteration t - 1.
    rates = {t: 0.1 * (1 - (t - 1) / 10) for t in range(1, 11)}
    assert written[f"{own}/learning_rate"] == pytest.approx(rates, rel=1e-5)
    of_body = {t: _norm(weights.after[t][: 2 if is_inside else 4]) for t in range(1, 11)}
    assert written[f"{own}/weight_norm"] == pytest.approx(of_body, rel=1e-5)
    # Of all weights together there is the norm alone.
    of_all = {t: _norm(weights.after[t]) for t in range(1, 11)}
    assert written["optimizer/weight_norm"] == pytest.approx(of_all, rel=1e-5)
    assert "optimizer/grad_norm" not in written


def test_names_are_the_same_in_every_run():
    for _ in range(2):  # Keras numbers the second round's
        optimizers = [
            gdopt.Adam(),
            gdopt.Adam(),
            keras.optimizers.Adam(),
            gdopt.RMSprop(name="head"),
            gdopt.Momentum(name="adam_head"),
        ]
        patterns = dict(zip("abcd", optimizers[1:], strict=True))
        chosen = keras.optimizers.OptimizerMap(optimizers[0], patterns)
        named = named_optimizers(keras.optimizers.MultiOptimizer(chosen))
        assert list(named) == ["Adam", "Adam#2", "head", "adam_head", "Adam#3"]
        assert list(named.values()) == [*optimizers[1:], optimizers[0]]


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"jit_compile": True}, [2, 4, 6, 8, 10]),
        slow({"is_built": False}, [2, 4, 6, 8, 10]),
        slow({"steps_per_execution": 2}, [4, 6, 8, 10]),
    ],
)
def test_a_function_that_chooses_optimizers(arguments, steps, tmp_path):
    """They are there after the first batch; a second `fit` traces nothing again."""
    optimizers = {"body": gdopt.Adam(), "head": gdopt.Momentum(gradient_accumulation_steps=2)}
    choose = keras.optimizers.MultiOptimizer(
        lambda variable: optimizers["head" if "head" in variable.path else "body"]
    )
    model = _model(choose, **arguments)
    _fit(model, tmp_path, update_freq=2)
    written = read(tmp_path)
    for tag in ("Adam/grad_norm", "Momentum/grad_norm", "grad_norm"):
        assert list(written[f"optimizer/{tag}"]) == steps, tag
    values, _, ended = _hparams(tmp_path)
    assert values["optimizer"] == "MultiOptimizer" and ended
    assert values["Momentum/momentum"] == 0.9 and values["Adam/learning_rate"] == 0.001
    train_function = model.train_function
    _fit(model, tmp_path, update_freq=2)
    assert model.train_function is train_function
    assert list(read(tmp_path)["optimizer/grad_norm"])[-1] == 20


def test_inside_a_loss_scale_optimizer(tmp_path):
    multi = _multi(gdopt.Adam(), gdopt.Lookahead(gdopt.Momentum()))
    model = _model(keras.optimizers.LossScaleOptimizer(multi, initial_scale=2.0**10))
    _fit(model, tmp_path, update_freq=5)
    written = read(tmp_path)
    assert written["optimizer/loss_scale"] == {5: 2.0**10, 10: 2.0**10}
    for tag in ("Adam/grad_norm", "Lookahead/slow_fast_distance", "grad_norm"):
        assert list(written[f"optimizer/{tag}"]) == [5, 10]
        assert max(written[f"optimizer/{tag}"].values()) < 100  # not scaled


class _Twins(keras.Model):
    """Two layers of one name, so that their variables have the same paths."""

    def __init__(self):
        super().__init__(name="twins")
        self.first, self.second = (keras.layers.Dense(1, name="twin") for _ in range(2))

    def call(self, x):
        return self.second(self.first(x))


def test_the_same_path_in_two_optimizers(tmp_path):
    model = _Twins()
    adam, momentum = gdopt.Adam(), gdopt.Momentum()

    def choose(variable):
        return momentum if any(variable is v for v in model.second.variables) else adam

    model.compile(keras.optimizers.MultiOptimizer(choose), "mse")
    _fit(model, tmp_path, update_freq=10, tier="histograms")
    written = read(tmp_path)
    of_adam, of_momentum = (o.variable_metrics["twins/twin/kernel"] for o in (adam, momentum))
    tag = "layer_grad_norm/twins/twin/kernel"
    assert written[tag] == pytest.approx({10: of_adam["grad_norm"]})
    assert written[f"{tag}#2"] == pytest.approx({10: of_momentum["grad_norm"]})
    names = {f"twins/twin/{name}" for name in ("kernel", "bias", "kernel#2", "bias#2")}
    for kind in ("weights", "velocity", "gradients"):
        assert {tag for tag in _buckets(tmp_path) if tag.startswith(kind)} == {
            f"{kind}/{name}" for name in names
        }
