"""How members are trained: as Keras would train each of them, in either engine."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.gadam import keys
from keras_gdopt.gadam.array_data import ArrayData
from keras_gdopt.gadam.data import GenerationData
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.progress import Progress
from keras_gdopt.gadam.stream_data import StreamData
from tests.gadam import models
from tests.optimizer_cases import every_optimizer_with
from tests.parameters import slow

STACKED = ["dense", "convolution", "normalization", "unrolled_recurrent", "embedding", "dropout"]
UNROLLED = [*STACKED, "recurrent"]
MEMBERS = 3


def _gadam(model, engine, optimizer=None, loss="mse", **kwargs):
    model.compile(optimizer or gdopt.Adam(0.01), loss)
    return gdopt.Gadam(model, population_size=MEMBERS, engine=engine, seed=3, **kwargs)


def _data(gadam, x, y, **kwargs):
    return ArrayData(x, y, batch_size=8, seed=gadam.seed, **kwargs)


def _generation_data(data, epochs):
    return GenerationData(data, fitness_data=None, fitness_samples=8, epochs=epochs, seed=3)


def _train(gadam, data, epochs=2):
    """The members before and after the parents' training of generation 4."""
    gadam._start_population()
    before, training = gadam._population.members, gadam._population._training
    data = _generation_data(data, epochs)
    return before, *training.trained(before, range(MEMBERS), 4, Phase.TRAIN_PARENTS, {}, data)


def _train_by_hand(model, gadam, before, data, member, epochs=2):
    """The same batches, one after the other, through Keras's `train_on_batch`."""
    for variable, value in zip(model.trainable_variables, before.weights, strict=True):
        variable.assign(value[member])
    for index, variable in enumerate(model.non_trainable_variables):
        value = before.state[index][member]
        if index in gadam._population._training.engine.seed_generators:
            value = keys.key(3, 4, Phase.TRAIN_PARENTS, member, index).view(np.uint32)
        variable.assign(value)
    losses = []
    for epoch in range(epochs):
        losses = []
        for portion in data.epoch(4, Phase.TRAIN_PARENTS, epoch, range(MEMBERS)):
            for rows in portion.order.numpy()[:, member]:
                batch = keras.tree.map_structure(lambda part, r=rows: part.numpy()[r], data.data)
                model.reset_metrics()
                losses.append(model.train_on_batch(**batch))
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return np.mean([loss[0] if isinstance(loss, list) else loss for loss in losses])


def _assert_members_equal_models(gadam, trained, losses, before, data, twin, rtol=1e-10):
    for member in range(MEMBERS):
        model = twin()
        loss = _train_by_hand(model, gadam, before, data, member)
        np.testing.assert_allclose(losses[member], loss, rtol=rtol)
        for received, expected in zip(
            [*trained.weights, *trained.state], [*model.trainable_variables,
                                                 *model.non_trainable_variables],
            strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(
                received[member], expected.numpy(), rtol=rtol, atol=rtol * 1e-2
            )


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("stacked", name) if name == "normalization" else slow("stacked", name)
        for name in STACKED
        if name != "dropout"
    ]
    + [("mapped", name) if name == "dropout" else slow("mapped", name) for name in UNROLLED],
)
def test_each_member_is_trained_as_keras_would(engine, name, rng, float64):
    """Two epochs of 22 samples in batches of 8, 8 and 6. (Under XLA the dropout of one seed is
    another one.)"""
    x, y = models.samples(rng)
    build = getattr(models, name)
    gadam = _gadam(build(), engine)
    data = _data(gadam, x, y)
    before, trained, losses = _train(gadam, data)

    def twin():
        model = build()
        model.compile(gdopt.Adam(0.01), "mse")
        return model

    _assert_members_equal_models(gadam, trained, losses, before, data, twin)


def _texts(kind, rng):
    """Batches of texts, the last of them smaller: padded, each to its own length, or ragged."""
    lengths = rng.permutation(10) % 3 + 2
    texts = tf.RaggedTensor.from_row_lengths(rng.integers(1, 5, lengths.sum()), lengths)
    y = rng.normal(size=(10, 1))
    batches = [(texts[at : at + 3], y[at : at + 3]) for at in (0, 3, 6, 9)]
    return [(x.to_tensor() if kind == "padded" else x, y) for x, y in batches]


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("stacked", "padded"),
        slow("mapped", "ragged"),
        slow("stacked", "ragged"),
        slow("mapped", "padded"),
    ],
)
def test_batches_that_differ_in_shape_train_and_judge_as_keras_does(engine, kind, rng, float64):
    """Each member on the very batches that it is dealt."""
    batches = _texts(kind, rng)
    spec = tf.TensorSpec([None, None], tf.int64)
    if kind == "ragged":
        spec = tf.RaggedTensorSpec([None, None], tf.int64, ragged_rank=1)
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(batches), output_signature=(spec, tf.TensorSpec([None, 1], tf.float64))
    )
    gadam = _gadam(models.texts(), engine)
    stream = StreamData(dataset, members=MEMBERS, fitness_samples=9)
    data = GenerationData(stream, fitness_data=None, fitness_samples=9, epochs=1, seed=3)
    gadam._start_population()
    before, training = gadam._population.members, gadam._population._training
    trained, losses = training.trained(before, range(MEMBERS), 0, Phase.TRAIN_PARENTS, {}, data)
    fitness = training.fitness(trained, 0, Phase.FITNESS, data)
    for member in range(MEMBERS):
        model = models.texts()
        model.compile(gdopt.Adam(0.01), "mse")
        for variable, value in zip(model.trainable_variables, before.weights, strict=True):
            variable.assign(value[member])
        steps = [batches[(MEMBERS * step + member) % 4] for step in range(4)]
        of_steps = []
        for x, y in steps:
            model.reset_metrics()
            of_steps.append(model.train_on_batch(x, y))
        np.testing.assert_allclose(losses[member], np.mean(of_steps), rtol=1e-10)
        for received, variable in zip(trained.weights, model.trainable_variables, strict=True):
            np.testing.assert_allclose(received[member], variable.numpy(), rtol=1e-10, atol=1e-12)
        judged = data.fitness_batch(0, Phase.FITNESS)
        judged = judged if isinstance(judged, list) else [judged]
        of_batches = []
        for batch in judged:
            model.reset_metrics()
            of_batches.append(model.test_on_batch(**batch))
        expected = np.average(of_batches, weights=[len(batch["y"]) for batch in judged])
        np.testing.assert_allclose(fitness[member], expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_several_inputs_and_outputs_and_weights_of_samples(engine, rng, float64):
    x, y = models.samples_of_two(rng)
    loss = {"one": "mse", "other": "mae"}
    weights = {"one": rng.uniform(size=22), "other": rng.uniform(size=22)}
    gadam = _gadam(models.two_inputs(), engine, loss=loss)
    data = _data(gadam, x, y, sample_weight=weights)
    before, trained, losses = _train(gadam, data)

    def twin():
        model = models.two_inputs()
        model.compile(gdopt.Adam(0.01), loss)
        return model

    _assert_members_equal_models(gadam, trained, losses, before, data, twin)


@every_optimizer_with("engine", ["stacked"], alike=True, slow_values=["mapped"])
def test_every_optimizer_trains_members(case, engine, rng, float64):
    """With a schedule, clipping and decay, over a second training of old members, too."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.8)
    settings = {"global_clipnorm": 0.5, "weight_decay": 0.01}
    x, y = models.samples(rng)
    gadam = _gadam(models.dense(), engine, case(learning_rate=schedule, **settings))
    data = _data(gadam, x, y)
    before, trained, losses = _train(gadam, data)

    def twin():
        model = models.dense()
        model.compile(case(learning_rate=schedule, **settings), "mse")
        return model

    _assert_members_equal_models(gadam, trained, losses, before, data, twin, rtol=1e-9)
    assert trained.batches.numpy().tolist() == [6] * MEMBERS


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_members_accumulate_gradients_of_a_scaled_loss(engine, rng, float64):
    """Six batches, so that the second training begins in the middle of an update."""
    settings = {"gradient_accumulation_steps": 4, "loss_scale_factor": 64.0, "use_ema": True}
    x, y = models.samples(rng)
    gadam = _gadam(models.dense(), engine, gdopt.Adam(0.01, **settings))
    data = _data(gadam, x, y)
    before, trained, losses = _train(gadam, data)

    def twin():
        model = models.dense()
        model.compile(gdopt.Adam(0.01, **settings), "mse")
        return model

    _assert_members_equal_models(gadam, trained, losses, before, data, twin)


@pytest.mark.slow
def test_sequences_that_go_on_in_the_next_batch(rng, float64):
    """Each phase of training begins with none."""
    x, y = models.samples(rng, count=24)
    gadam = _gadam(models.remembering(), "auto")
    assert gadam.engine == "mapped"
    data = _data(gadam, x, y)
    for _ in range(2):
        before, trained, losses = _train(gadam, data)

    def twin():
        model = models.remembering()
        model.compile(gdopt.Adam(0.01), "mse")
        return model

    _assert_members_equal_models(gadam, trained, losses, before, data, twin)


@pytest.mark.slow
def test_words(rng, float64):
    words = np.array([["the cat"], ["a dog"], ["the cat and the dog"], ["mice"]] * 5)[:, 0]
    y = rng.normal(size=(20, 1))
    gadam = _gadam(models.words(words), "auto")
    assert gadam.engine == "mapped"
    data = _data(gadam, tf.constant(words), y)
    before, trained, losses = _train(gadam, data)

    def twin():
        model = models.words(words)
        model.compile(gdopt.Adam(0.01), "mse")
        return model

    _assert_members_equal_models(gadam, trained, losses, before, data, twin)


@pytest.mark.slow
def test_mixed_bfloat16(rng):
    """To the digits that it has."""
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    x, y = (array.astype("float32") for array in models.samples(rng))
    gadam = _gadam(models.dense(), "mapped")
    data = _data(gadam, x, y)
    before, trained, losses = _train(gadam, data)

    def twin():
        model = models.dense()
        model.compile(gdopt.Adam(0.01), "mse")
        return model

    assert all(weight.dtype == "float32" for weight in trained.weights)
    _assert_members_equal_models(gadam, trained, losses, before, data, twin, rtol=2e-2)


@keras.saving.register_keras_serializable("tests")
class Noise(keras.layers.Layer):
    """Of random numbers without a seed of its own."""

    def call(self, inputs):
        return inputs * 0.0 + keras.random.normal((3,))


@pytest.mark.parametrize("engine", ["stacked", slow("mapped")])
def test_random_numbers_without_a_seed(engine, rng):
    """Differ from member to member and from step to step, and depend on Gadam's seed alone."""
    x, y = models.samples(rng)
    data = ArrayData(x.astype("float32"), 0.0 * y.astype("float32"), batch_size=11, seed=3)
    losses = []
    for _ in range(2):
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), Noise()])
        gadam = _gadam(model, engine, gdopt.GradientDescent(0.0))
        _, _, of_epoch = _train(gadam, data, epochs=1)
        _, _, of_epochs = _train(gadam, data, epochs=2)
        losses.append([*of_epoch, *of_epochs])
        keras.random.normal((3,))
    np.testing.assert_array_equal(*losses)
    assert len({round(float(loss), 5) for loss in losses[0]}) == 2 * MEMBERS


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_weights_that_the_loss_does_not_depend_on_stay(engine, rng, float64):
    x, y = models.samples(rng)
    settings = {"weight_decay": 0.1, "gradient_accumulation_steps": 2, "use_ema": True}

    def build():
        inputs = keras.Input((6,))
        outputs = {"a": keras.layers.Dense(3)(inputs), "b": keras.layers.Dense(2)(inputs)}
        model = keras.Model(inputs, outputs)
        model.compile(gdopt.Adam(0.01, **settings), {"a": "mse"})
        return model

    model = build()
    gadam = gdopt.Gadam(model, MEMBERS, engine=engine, seed=3)
    data = _data(gadam, x, {"a": y})
    before, trained, losses = _train(gadam, data)
    _assert_members_equal_models(gadam, trained, losses, before, data, build)


@keras.saving.register_keras_serializable("tests")
class Counting(keras.layers.Layer):
    """Counts its calls, in a raw variable that Keras does not know of."""

    def __init__(self, nested=False, **kwargs):
        super().__init__(**kwargs)
        self.nested = nested
        self.calls = tf.Variable(0.0, trainable=False)

    def call(self, inputs):
        count = lambda: self.calls.assign_add(1.0)  # noqa: E731
        if self.nested:
            tf.function(count)()
        else:
            count()
        return inputs

    def get_config(self):
        return {**super().get_config(), "nested": self.nested}


@keras.saving.register_keras_serializable("tests")
class RawNoise(keras.layers.Layer):
    """Of a generator that Keras does not know of."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = tf.random.Generator.from_seed(1)

    def call(self, inputs):
        return inputs + self.generator.normal((3,))


@keras.saving.register_keras_serializable("tests")
class Untracked(keras.layers.Layer):
    """Hides a variable from Keras."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = (lambda variable: lambda: variable)(keras.Variable(0.0))

    def call(self, inputs):
        self.hidden().assign(self.hidden() + 1.0)
        return inputs


@pytest.mark.parametrize(
    ("layer", "message"),
    [(RawNoise, "a `keras.random.SeedGenerator`"), (Untracked, "that no layer tracks")],
)
def test_other_state_that_members_would_share(layer, message, rng):
    x, y = models.samples(rng)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), layer()])
    with pytest.raises(ValueError, match=message):
        _gadam(model, "mapped").fit(x, y, generations=1, batch_size=8, verbose=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_a_raw_variable_that_all_members_would_share(engine, nested, rng):
    x, y = models.samples(rng)
    model = keras.Sequential(
        [keras.Input((6,)), Counting(nested, name="counts"), keras.layers.Dense(3)]
    )
    gadam = _gadam(model, engine)
    with pytest.raises(ValueError, match=r"(?s)raw `tf.Variable`.*add_weight.*Received: .*counts"):
        gadam.fit(x, y, generations=1, batch_size=8, verbose=0)


@pytest.mark.parametrize("engine", [slow("stacked"), "mapped"])
def test_members_are_judged_as_in_evaluation(engine, rng, float64):
    """With all units that dropout leaves out in training."""
    x, y = models.samples(rng)
    model = models.dropout()
    gadam = _gadam(model, engine)
    _, trained, _ = _train(gadam, _data(gadam, x, y), epochs=1)
    data = _generation_data(_data(gadam, x, y), epochs=1)
    fitness = gadam._population._training.fitness(trained, 4, Phase.FITNESS, data)
    batch = data.fitness_batch(4, Phase.FITNESS)
    for member in range(MEMBERS):
        for variable, value in zip(model.trainable_variables, trained.weights, strict=True):
            variable.assign(value[member])
        model.reset_metrics()
        np.testing.assert_allclose(fitness[member], model.test_on_batch(**batch), rtol=1e-10)


@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_members_drop_different_units(engine, rng):
    """Members that are alike, and see all samples at once, differ in their losses only by
    their dropout; so do the two trainings of a generation."""
    x, y = models.samples(rng)
    model = models.dropout()
    gadam = _gadam(model, engine, gdopt.GradientDescent(0.0), initializer="ones")
    data = ArrayData(x.astype("float32"), y.astype("float32"), batch_size=22, seed=3)
    gadam._start_population()
    training = gadam._population._training
    data = _generation_data(data, epochs=1)
    losses = [
        training.trained(gadam._population.members, range(MEMBERS), 0, phase, {}, data)[1]
        for phase in (Phase.TRAIN_PARENTS, Phase.TRAIN_CHILDREN)
    ]
    assert len({round(float(loss), 5) for of_phase in losses for loss in of_phase}) == 6


@pytest.mark.parametrize("name", [slow("dense"), slow("normalization"), slow("embedding")])
def test_both_engines_agree_over_three_generations(name, rng, float64):
    x, y = models.samples(rng, count=40)
    runs = []
    start = None
    for engine in ("stacked", "mapped"):
        model = getattr(models, name)()
        start = start or model.get_weights()
        model.set_weights(start)
        gadam = _gadam(model, engine, mutation_rate=0.1)
        history = gadam.fit(x, y, generations=3, epochs=2, batch_size=8, verbose=0)
        runs.append((gadam, history, model))
    (one, one_history, one_model), (other, other_history, other_model) = runs
    assert one_history.history["children_survived"] == other_history.history["children_survived"]
    for a, b in zip(one.lineage, other.lineage, strict=True):
        assert [a[k] for k in ("parents", "generation", "mutated_entries")] == [
            b[k] for k in ("parents", "generation", "mutated_entries")
        ]
        assert [s[2] for s in a["selections"]] == [s[2] for s in b["selections"]]
    np.testing.assert_allclose(one.fitness, other.fitness, rtol=1e-8)
    for a, b in zip(
        one._population.members.weights, other._population.members.weights, strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
    for a, b in zip(one_model.get_weights(), other_model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def test_children_begin_with_a_fresh_optimizer_and_survivors_keep_theirs(rng):
    x, y = models.samples(rng)
    gadam = _gadam(models.dense(), "stacked")
    gadam.fit(x, y, generations=4, batch_size=8, verbose=0)
    born = [gadam.lineage[identity]["generation"] for identity in gadam._identities]
    # Born as a child of generation k: three steps as a child, and three in each one after.
    expected = [3 * (4 - generation + (generation > 0)) for generation in born]
    assert gadam._population.members.batches.numpy().tolist() == expected


def test_a_child_has_the_state_of_its_fitter_parent(rng):
    x, y = models.samples(rng)
    frozen_statistics = keras.layers.BatchNormalization(momentum=1.0)
    model = keras.Sequential([keras.Input((6,)), frozen_statistics, keras.layers.Dense(3)])
    gadam = _gadam(model, "stacked")
    gadam._start_population()
    population = gadam._population
    population.use(_generation_data(_data(gadam, x, y), epochs=1), None)
    numbers = [np.broadcast_to([[0.0], [1.0], [2.0]], value.shape).astype("float32")
               for value in population.members.state]  # fmt: skip
    state = [tf.constant(value) for value in numbers]
    population.members = population.members._replace(state=state)
    progress = Progress(0, 0, 1, 6, keras.callbacks.CallbackList())
    trained, _ = population.train_parents(0, progress, {})
    losses, fitter_ones = [2.0, 0.0, 1.0], set()
    for generation in range(4):
        plan = gadam._breeding.plan(losses, generation)
        both, *_ = population.train_children(trained, plan, progress, {})
        for child, parents in enumerate(plan.parents.tolist()):
            fitter = min(parents, key=lambda parent: losses[parent])
            fitter_ones.add(parents.index(fitter))
            for value in both.children.state:
                np.testing.assert_array_equal(value[child], np.full(6, fitter))
    assert fitter_ones == {0, 1}


@pytest.mark.slow
def test_a_rate_for_each_layer():
    """Of 0 for the last one, whose weights stay what all members start from."""
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this version of Keras has no MultiOptimizer")
    model = models.dense()
    rates = {f".*{model.layers[-1].name}.*": gdopt.Momentum(0.0)}
    model.compile(
        keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(gdopt.Adam(0.1), rates)),
        "mse",
    )
    gadam = gdopt.Gadam(model, 2, mutation_rate=0.0, initializer="ones", seed=1)
    gadam.fit(*models.samples(np.random.default_rng(0)), generations=2, verbose=0)
    first, last = model.layers
    assert all(np.all(weight == 1.0) for weight in last.get_weights())
    assert all(np.all(weight != 1.0) for weight in first.get_weights())
