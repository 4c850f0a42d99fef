"""`Gadam.fit` as users of Keras's `fit` expect it: data, callbacks, output, errors."""

import csv
import gc
import re
import types
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.gadam import PopulationCallback, population, samples
from keras_gdopt.gadam.array_data import ArrayData
from keras_gdopt.gadam.data import GenerationData
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.samples import as_dataset
from keras_gdopt.gadam.stream_data import StreamData
from tests.gadam import models
from tests.parameters import slow

SIZE = 4


@pytest.fixture
def data(rng):
    x, y = models.samples(rng, count=48)
    return x.astype("float32"), y.astype("float32")


def _model(build=models.linear, optimizer=None, **kwargs):
    model = build()
    model.compile(optimizer or gdopt.Adam(0.02), kwargs.pop("loss", "mse"), **kwargs)
    return model


def _gadam(model=None, **kwargs):
    return gdopt.Gadam(model or _model(), **{"population_size": SIZE, "seed": 5, **kwargs})


def _fit(gadam, data, **kwargs):
    return gadam.fit(*data, **{"generations": 2, "batch_size": 16, "verbose": 0, **kwargs})


def _trace_counts(gadam):
    members, breeding = gadam._population, gadam._breeding
    runner = members._training.engine
    functions = [breeding._choose, breeding._breed, members._diversity]
    functions += [runner._train, runner._losses]
    functions += [runner._finalize]
    return [function.experimental_get_tracing_count() for function in functions]


# --- one run, looked at from all sides ---------------------------------------------------


class _Population(PopulationCallback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_generation_begin(self, generation, logs=None):
        self.seen.append(generation)

    def on_generation_end(self, generation, logs=None):
        self.seen.append(logs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five generations with metrics and callbacks."""
    keras.utils.set_random_seed(0)
    x, y = models.samples(np.random.default_rng(0), count=48)
    data = x.astype("float32"), y.astype("float32")
    model = _model(metrics=["mae"])
    gadam = _gadam(model, fitness_batch_size=48, mutation_rate=0.1)
    directory, population, calls = tmp_path_factory.mktemp("run"), _Population(), []
    note = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: calls.append("begin"),
        on_epoch_begin=lambda epoch, logs: calls.append(epoch),
        on_epoch_end=lambda epoch, logs: calls.append(sorted(logs)),
        on_train_end=lambda logs: calls.append("end"),
    )
    saved = keras.callbacks.ModelCheckpoint(
        str(directory / "best.keras"), monitor="fitness", mode="min"
    )
    table = keras.callbacks.CSVLogger(directory / "log.csv")
    history = _fit(gadam, data, generations=5, callbacks=[population, note, saved, table])
    return types.SimpleNamespace(
        gadam=gadam, model=model, data=data, history=history, directory=directory,
        population=population, calls=calls,
    )  # fmt: skip


def test_the_model_holds_the_best_member(run):
    history, fitness = run.history.history, run.gadam.fitness
    assert list(fitness) == sorted(fitness)
    assert len(fitness) == SIZE
    loss, mae = run.model.evaluate(*run.data, verbose=0)
    np.testing.assert_allclose(loss, fitness[0], rtol=1e-5)
    np.testing.assert_allclose(history["fitness"][-1], fitness[0], rtol=1e-6)
    np.testing.assert_allclose(history["mae"][-1], mae, rtol=1e-5)
    np.testing.assert_allclose(history["fitness_worst"][-1], fitness[-1], rtol=1e-6)
    np.testing.assert_allclose(history["fitness_mean"][-1], np.mean(fitness), rtol=1e-6)
    assert run.history.epoch == [0, 1, 2, 3, 4]
    assert run.history is run.model.history


def test_the_best_optimizer_is_in_the_model_so_that_training_goes_on(run):
    best = run.gadam.member(0)
    for a, b in zip(run.model.optimizer.variables, best.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_checkpointed_model_loads_and_predicts_the_same(run):
    loaded = keras.models.load_model(run.directory / "best.keras")
    x, _ = run.data
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), run.model.predict(x, verbose=0))
    assert int(loaded.optimizer.iterations) == int(run.model.optimizer.iterations) > 0


def test_csv_logger_writes_a_line_a_generation(run):
    with (run.directory / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3", "4"]
    written = [float(row["fitness"]) for row in rows]
    np.testing.assert_allclose(written, run.history.history["fitness"])


def test_lambda_callback_sees_generations_as_epochs(run):
    names = ["children_survived", "diversity", "fitness", "fitness_mean", "fitness_worst"]
    names += ["loss", "mae", "members_not_finite"]
    of_generations = [call for epoch in range(5) for call in (epoch, names)]
    assert run.calls == ["begin", *of_generations, "end"]


def test_a_population_callback_sees_the_whole_population(run):
    gadam, seen = run.gadam, run.population.seen
    assert run.population.gadam is gadam
    assert seen[::2] == [0, 1, 2, 3, 4]
    logs = seen[-1]
    for name in ("parent_losses", "child_losses", "parent_fitness", "child_fitness",
                 "selection_probabilities", "mutated_entries", "identities"):  # fmt: skip
        assert logs[name].shape == (SIZE,), name
    both = np.concatenate([logs["parent_fitness"], logs["child_fitness"]])
    np.testing.assert_array_equal(np.sort(both[logs["survivors"]]), np.sort(both)[:SIZE])
    np.testing.assert_allclose(gadam.fitness, np.sort(both)[:SIZE], rtol=1e-6)
    assert logs["children_survived"] == np.sum(logs["survivors"] >= SIZE)
    assert abs(logs["selection_probabilities"].sum() - 1) < 1e-12
    for identity in logs["identities"]:
        individual = gadam.lineage[identity]
        assert individual["selections"][-1][2] is True
    children = [one for one in gadam.lineage if one["generation"] == 5]
    assert [one["mutated_entries"] for one in children] == logs["mutated_entries"].tolist()
    assert any(logs["mutated_entries"])
    chosen = [list(map(float, logs["selection_probabilities"][pair])) for pair in logs["parents"]]
    assert [one["selection_probabilities"] for one in children] == chosen


def test_an_individuals_fitness_is_that_of_the_member_in_its_slot(run):
    out_of_order = 0
    for generation, logs in enumerate(run.population.seen[1::2]):
        both = np.concatenate([logs["parent_fitness"], logs["child_fitness"]])
        selections = [
            {g: loss for g, loss, _ in run.gadam.lineage[identity]["selections"]}[generation]
            for identity in logs["identities"]
        ]
        np.testing.assert_array_equal(selections, both[logs["survivors"]])
        out_of_order += bool(np.any(np.diff(logs["identities"]) < 0))
    assert out_of_order  # a child in a slot before a parent's, so that it can go wrong


# --- what comes out ----------------------------------------------------------------------


@pytest.mark.parametrize("engine", [slow("stacked"), "mapped"])
def test_each_member_is_a_model_with_its_optimizer(engine, data):
    gadam = _gadam(engine=engine, fitness_batch_size=48)
    _fit(gadam, data)
    for rank in range(SIZE):
        member = gadam.member(rank)
        loss = member.evaluate(*data, verbose=0)
        np.testing.assert_allclose(loss, gadam.fitness[rank], rtol=1e-5)
        place = gadam._ranks()[rank]
        assert int(member.optimizer.iterations) == int(gadam._population.members.batches[place])
        assert any(np.any(v.numpy()) for v in member.optimizer._slots["momentum"])
    before = gadam.member(0).get_weights()
    member.fit(*data, verbose=0)
    for a, b in zip(gadam.member(0).get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(IndexError):
        gadam.member(SIZE)


def test_diversity_is_the_mean_distance_of_two_members(rng):
    weights = [rng.normal(size=(5, 3, 2)).astype("float32"), rng.normal(size=(5, 4)) + 100.0]
    flat = np.concatenate([w.reshape(5, -1) for w in weights], axis=1)
    distances = [np.linalg.norm(flat[i] - flat[j]) for i in range(5) for j in range(i)]
    received = population.diversity([tf.constant(w) for w in weights])
    np.testing.assert_allclose(received, np.mean(distances), rtol=1e-5)


def test_training_makes_the_best_member_better(data):
    model = _model()
    before = model.evaluate(*data, verbose=0)
    gadam = _gadam(model)
    history = _fit(gadam, data, generations=6, epochs=10)
    assert model.evaluate(*data, verbose=0) < 0.5 * before
    assert history.history["fitness"][-1] < history.history["fitness"][0]


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_another(data):
    results = []
    start = models.linear().get_weights()
    for seed in (1, 1, 2):
        model = _model()
        model.set_weights(start)
        _fit(_gadam(model, seed=seed), data)
        results.append(model.get_weights()[0])
    np.testing.assert_array_equal(results[0], results[1])
    assert np.any(results[0] != results[2])
    assert _gadam(seed=None).seed != _gadam(seed=None).seed


def test_a_second_fit_goes_on_with_the_population(data):
    gadam, once = _gadam(), _gadam()
    once.model.set_weights(gadam.model.get_weights())
    _fit(gadam, data, generations=1)
    history = _fit(gadam, data, generations=2)
    _fit(once, data, generations=3)
    assert history.epoch == [1, 2]
    for a, b in zip(
        gadam._population.members.weights, once._population.members.weights, strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_validation_is_reported_and_never_selected_on(data):
    x, y = data
    start = models.linear().get_weights()
    results = []
    for extra in ({}, {"validation_data": (x[:8], -y[:8]), "validation_freq": 2}):
        model = _model()
        model.set_weights(start)
        history = _fit(_gadam(model), data, generations=4, **extra)
        results.append((model.get_weights(), history.history))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(results[1][1]["val_loss"]) == 2
    np.testing.assert_allclose(
        results[1][1]["val_loss"][-1], model.evaluate(x[:8], -y[:8], verbose=0), rtol=1e-5
    )


@pytest.mark.slow
def test_validation_on_a_part_of_the_data(data):
    history = _fit(_gadam(), data, generations=4, validation_split=0.25, validation_freq=2)
    assert len(history.history["val_loss"]) == 2


class _Changes(PopulationCallback):
    """By how much each generation changed the sum of the fitness losses, on one batch."""

    def set_gadam(self, gadam):
        super().set_gadam(gadam)
        self.of_generations = []

    def on_generation_end(self, generation, logs=None):
        both = np.concatenate([logs["parent_fitness"], logs["child_fitness"]])
        change = np.sum(logs["parent_fitness"]) - np.sum(both[logs["survivors"]])
        self.of_generations.append(float(abs(change)))


def test_it_stops_when_the_sum_of_losses_hardly_changes(data):
    changes = _Changes()
    keras.utils.set_random_seed(1)
    _fit(_gadam(fitness_batch_size=8), data, generations=6, callbacks=[changes])
    tolerance = min(changes.of_generations) + 1e-5
    last = [change <= tolerance for change in changes.of_generations].index(True)
    keras.utils.set_random_seed(1)
    gadam = _gadam(fitness_batch_size=8, tolerance=tolerance)
    assert _fit(gadam, data, generations=9).epoch == list(range(last + 1))
    assert len(_fit(_gadam(tolerance=1e9), data, generations=9).epoch) == 1


# --- the first population ----------------------------------------------------------------


def test_the_first_member_has_the_models_weights_and_the_others_their_own(data):
    model = _model()
    start = model.get_weights()
    gadam = _gadam(model)
    gadam._start_population()
    kernels = gadam._population.members.weights[0].numpy()
    np.testing.assert_array_equal(kernels[0], start[0])
    assert len({kernel.tobytes() for kernel in kernels}) == SIZE
    for a, b in zip(model.get_weights(), start, strict=True):
        np.testing.assert_array_equal(a, b)


def test_initializers_with_a_seed_do_not_make_members_alike():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=1)),
        ]
    )
    model.compile(gdopt.Adam(), "mse")
    gadam = _gadam(model)
    gadam._start_population()
    assert (
        len({kernel.tobytes() for kernel in gadam._population.members.weights[0].numpy()}) == SIZE
    )


def test_an_initializer_draws_all_members():
    model = _model()
    initializer = keras.initializers.RandomNormal(stddev=2.0, seed=1)
    gadam = _gadam(model, population_size=200, initializer=initializer)
    gadam._start_population()
    kernels, biases = (gadam._population.members.weights[i].numpy() for i in (0, 1))
    assert len({kernel.tobytes() for kernel in kernels}) == 200
    assert abs(kernels.std() - 2.0) < 0.1
    assert abs(biases.std() - 2.0) < 0.2


@pytest.mark.slow
def test_frozen_weights_stay_the_models(data):
    def build():
        model = models.dense()
        model.layers[0].trainable = False
        return model

    model = _model(build)
    frozen = model.layers[0].get_weights()
    gadam = _gadam(model)
    _fit(gadam, data)
    for member in range(SIZE):
        for a, b in zip(gadam.member(member).layers[0].get_weights(), frozen, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_state_of_pythons_random_numbers_is_left_alone():
    import random

    random.seed(1)
    expected = [random.random() for _ in range(3)]
    gadam = _gadam()
    random.seed(1)
    gadam._start_population()
    assert [random.random() for _ in range(3)] == expected


@pytest.mark.slow
def test_a_subclassed_model(data):
    model = models.Subclassed()
    model(np.zeros((1, 6), "float32"))
    model.compile(gdopt.Adam(0.02), "mse")
    gadam = _gadam(model, fitness_batch_size=48)
    _fit(gadam, data)
    np.testing.assert_allclose(model.evaluate(*data, verbose=0), gadam.fitness[0], rtol=1e-5)


# --- data --------------------------------------------------------------------------------


def test_each_member_goes_through_all_samples_in_an_order_of_its_own():
    data = ArrayData(np.arange(22.0), batch_size=8, seed=1)
    assert data.steps_per_epoch == 3
    epochs = []
    for epoch in (0, 1):
        portions = list(data.epoch(0, Phase.TRAIN_PARENTS, epoch, range(3)))
        assert [portion.steps for portion in portions] == [2, 1]
        orders = [np.swapaxes(p.order.numpy(), 0, 1).reshape(3, -1) for p in portions]
        epochs.append(np.concatenate(orders, axis=1))
    rows = [tuple(row) for epoch in epochs for row in epoch]
    assert all(sorted(row) == list(range(22)) for row in rows)
    assert len(set(rows)) == 6
    some = list(ArrayData(np.arange(22.0), batch_size=8, steps_per_epoch=5, seed=1).epoch(
        0, Phase.TRAIN_PARENTS, 0, range(3)))  # fmt: skip
    assert [portion.order.shape.as_list() for portion in some] == [[5, 3, 8]]


@pytest.mark.parametrize(("batches", "members"), [(4, 2), (5, 2), (7, 4), (12, 10), (6, 4), (3, 8)])
def test_batches_are_dealt_in_turn_so_that_each_member_sees_all(batches, members):
    """In as many epochs (each of as many passes) as there are members."""
    dataset = tf.data.Dataset.from_tensor_slices(np.arange(2 * batches)).batch(2)
    stream = StreamData(dataset, members=members)
    seen = [[] for _ in range(members)]
    for epoch in range(members):
        for portion in stream.epoch(0, Phase.TRAIN_PARENTS, epoch, range(members)):
            for step in portion.data["x"].numpy():
                for member in range(members):
                    seen[member].append(int(step[member][0]) // 2)
    assert [one[0] for one in seen] == [member % batches for member in range(members)]
    assert sorted(b for one in seen for b in one) == sorted(list(range(batches)) * members**2)
    assert all(set(one) == set(range(batches)) for one in seen)


@pytest.mark.parametrize(
    "dataset",
    [
        tf.data.Dataset.range(4).filter(lambda _: True).batch(1),  # of unknown length
        tf.data.Dataset.range(4).batch(1).repeat(),
    ],
    ids=["unknown", "endless"],
)
def test_each_member_sees_all_batches_where_a_pass_has_no_known_length(dataset):
    def steps_of(stream):
        portions = stream.epoch(0, Phase.TRAIN_PARENTS, 0, range(2))
        return np.concatenate([portion.data["x"].numpy()[:, :, 0] for portion in portions])

    steps = steps_of(StreamData(dataset, members=2, steps_per_epoch=40))
    pairs = [(0, 1), (2, 3)] * 20  # two batches in each step
    assert [tuple(sorted(step)) for step in steps] == pairs
    assert set(steps[:, 0]) == set(steps[:, 1]) == {0, 1, 2, 3}
    again = steps_of(StreamData(dataset, members=2, steps_per_epoch=40))
    np.testing.assert_array_equal(again, steps)


PHASES = (Phase.TRAIN_PARENTS, Phase.FITNESS, Phase.TRAIN_CHILDREN, Phase.SURVIVAL)


def _of_a_stream(own_fitness_data):
    dataset = tf.data.Dataset.range(22).batch(4)  # the last batch is filled up
    judged_by_it = None if own_fitness_data else 8
    stream = StreamData(dataset, members=2, epochs=2, fitness_samples=judged_by_it)
    assert stream.steps_per_epoch == 6
    own = {"x": tf.range(100, 108)} if own_fitness_data else None
    data = GenerationData(stream, fitness_data=own, fitness_samples=8, epochs=2, seed=1)

    def of(generation, phase, places=range(2)):
        if phase in (Phase.FITNESS, Phase.SURVIVAL):
            return [data.fitness_batch(generation, phase)["x"].numpy()]
        epochs = [data.epoch(generation, phase, epoch, places) for epoch in (0, 1)]
        return [portion.data["x"].numpy() for epoch in epochs for portion in epoch]

    return of


@pytest.mark.parametrize("own_fitness_data", [False, True])
def test_a_stream_depends_on_the_phase_alone(own_fitness_data):
    """As a resumed run needs it, and a worker that trains some of the members."""
    of = _of_a_stream(own_fitness_data)
    whole = {(g, phase): of(g, phase) for g in range(3) for phase in PHASES}
    assert [part.shape for part in whole[0, Phase.TRAIN_PARENTS]] == [(6, 2, 4)] * 2
    assert [part.shape for part in whole[0, Phase.FITNESS]] == [(8,)]
    drawn = [p.flatten() for parts in whole.values() for p in parts if p.max() < 100]
    assert np.ptp(np.bincount(np.concatenate(drawn))) <= 1  # each sample as often
    for asked in [(2, Phase.FITNESS), (1, Phase.TRAIN_CHILDREN), (0, Phase.SURVIVAL)]:
        for one in (of, _of_a_stream(own_fitness_data)):
            for a, b in zip(one(*asked), whole[asked], strict=True):
                np.testing.assert_array_equal(a, b)
    parts = of(1, Phase.TRAIN_PARENTS, places=[1])
    for a, b in zip(parts, whole[1, Phase.TRAIN_PARENTS], strict=True):
        np.testing.assert_array_equal(a, b[:, 1:])


class _PyDataset(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(16 * index, 16 * (index + 1))
        return self.x[rows], self.y[rows]


def _padded(count=8, size=2):
    """Texts in batches, each as long as its longest."""
    texts = [[1 + (i * j) % 4 for j in range(1 + (5 * i) % 7)] for i in range(count)]
    targets = np.linspace(-1, 1, count, dtype="float32")[:, None]
    return [
        (tf.ragged.constant(texts[i : i + size], tf.int32).to_tensor(), targets[i : i + size])
        for i in range(0, count, size)
    ]


def _dataset(batches):
    return tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=(tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, 1])),
    )


def test_batches_of_different_lengths_are_dealt_as_they_are():
    """In turn, each with its last smaller batch, and without counting at hand."""
    batches = _padded(count=9)
    stream = StreamData(_dataset(batches), members=2, fitness_samples=8)
    assert stream.steps_per_epoch == 5
    data = GenerationData(stream, fitness_data=None, fitness_samples=8, epochs=1, seed=1)
    (portion,) = data.epoch(0, Phase.TRAIN_PARENTS, 0, range(2))
    dealt = [batch for step in portion.data for batch in step]
    assert len(dealt) == 10
    for place, batch in enumerate(dealt):
        np.testing.assert_array_equal(batch["x"], batches[place % 5][0])
    judged = data.fitness_batch(0, Phase.FITNESS)
    for batch, place in zip(judged, (1, 0, 3, 2), strict=True):  # the deal has moved on
        np.testing.assert_array_equal(batch["x"], batches[place][0])
    (again,) = data.epoch(0, Phase.TRAIN_PARENTS, 0, [1])
    for step, both in zip(again.data, portion.data, strict=True):
        np.testing.assert_array_equal(step[0]["x"], both[1]["x"])


def test_counting_for_long_says_so(monkeypatch):
    monkeypatch.setattr(samples, "_PATIENCE", 0.0)
    with pytest.warns(UserWarning, match="counts the batches.*1 batches so far.*steps_per_epoch"):
        StreamData(_dataset(_padded()), members=2)


@pytest.mark.slow
def test_fewer_samples_than_a_batch_are_one_batch(data):
    x, y = data[0][:20], data[1][:20]
    assert ArrayData(x, y, seed=1).steps_per_epoch == 1
    start = models.linear().get_weights()
    results = []
    for batch_size in (20, 32, None):
        model = _model()
        model.set_weights(start)
        _fit(_gadam(model), (x, y), batch_size=batch_size, generations=1)
        results.append(model.get_weights()[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.slow
def test_a_model_with_a_batch_size_of_its_own():
    """A stateful LSTM is judged in batches of that size, too; others are refused in words."""
    x, y = np.ones((8, 3, 2), "float32"), np.ones((8, 1), "float32")
    model = keras.Sequential(
        [keras.Input(batch_shape=(4, 3, 2)), keras.layers.LSTM(2, stateful=True),
         keras.layers.Dense(1)]
    )  # fmt: skip
    model.compile(gdopt.Adam(0.02), "mse")
    gadam = _gadam(model, population_size=2)
    with pytest.raises(ValueError, match=r"expected batches of 4 samples.*the last of 3"):
        _fit(gadam, (x[:7], y[:7]), batch_size=4)
    _fit(gadam, (x, y), batch_size=4, generations=1)
    model.layers[0].reset_state()
    losses = model.evaluate(x, y, batch_size=4, verbose=0)
    np.testing.assert_allclose(gadam.fitness[0], losses, rtol=1e-5)


def test_losses_and_metrics_of_each_output(rng):
    x, y = models.samples_of_two(rng, count=40)
    model = models.two_inputs()
    model.compile(gdopt.Adam(0.02), {"one": "mse", "other": "mae"}, metrics={"one": ["mae"]})
    history = _fit(_gadam(model), (x, y), validation_data=(x, y), generations=1).history
    expected = model.evaluate(x, y, batch_size=40, verbose=0, return_dict=True)
    np.testing.assert_allclose(history["fitness"][-1], expected.pop("loss"), rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(history[name][-1], value, rtol=1e-5)
        assert history[f"val_{name}"][-1] > 0


KINDS_OF_DATA = {
    "numpy": lambda x, y: (x, y),
    "tensors": lambda x, y: (tf.constant(x), tf.constant(y)),
    "lists": lambda x, y: (x.astype("float64"), y.tolist()),
    "dataset": lambda x, y: (tf.data.Dataset.from_tensor_slices((x, y)).batch(16),),
    "shuffled": lambda x, y: (tf.data.Dataset.from_tensor_slices((x, y)).shuffle(48, 1).batch(20),),
    "weighted": lambda x, y: (tf.data.Dataset.from_tensor_slices((x, y, np.ones(48))).batch(16),),
    "py_dataset": lambda x, y: (_PyDataset(x, y),),
}


# An engine sees arrays or a stream, whatever they were made of.
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        *(slow(kind, "stacked") for kind in KINDS_OF_DATA),
        *((kind, "mapped") if kind == "lists" else slow(kind, "mapped") for kind in KINDS_OF_DATA),
    ],
)
def test_kinds_of_data(kind, engine, data):
    arrays = KINDS_OF_DATA[kind](*data)
    gadam = _gadam(engine=engine)
    batch_size = 16 if len(arrays) == 2 else None
    history = _fit(gadam, arrays, batch_size=batch_size)
    assert np.all(np.isfinite(history.history["fitness"]))
    traces = _trace_counts(gadam)
    _fit(gadam, arrays, batch_size=batch_size)
    assert _trace_counts(gadam) == traces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (lambda classes: np.eye(3)[classes], keras.losses.CategoricalCrossentropy),
        (lambda classes: classes, keras.losses.SparseCategoricalCrossentropy),
    ],
    ids=["one_hot", "integers"],
)
def test_class_weights_weigh_samples(labels, loss, rng):
    x, classes = rng.normal(size=(40, 6)).astype("float32"), np.arange(40) % 3
    weights = {0: 0.5, 1: 3.0, 2: 1.0}
    by_hand = np.array([weights[c] for c in classes], "float32")
    start, results = models.linear().get_weights(), []
    for extra in ({"class_weight": weights}, {"sample_weight": by_hand}):
        model = _model(loss=loss(from_logits=True))
        model.set_weights(start)
        _fit(_gadam(model), (x, labels(classes)), generations=1, **extra)
        results.append(model.get_weights()[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def _weights_of_keras(x, y, class_weight):
    """What Keras's `fit` trains with, seen by a loss."""
    seen = []

    class Seen(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            seen.append(sample_weight.numpy())
            return keras.ops.mean(y_pred)

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", Seen(), run_eagerly=True)
    model.fit(x, y, class_weight=class_weight, batch_size=len(x), shuffle=False, verbose=0)
    return seen[-1]


@pytest.mark.parametrize(
    ("labels", "class_weight"),
    [
        ([[-1.0], [1.0], [1.0], [-1.0]], {-1: 5.0, 1: 2.0}),
        ([0, 1, 2, 7], {1: 3.0}),
        ([0.9999, 0.0, 1.4, 2.6], {0: 2.0, 1: 3.0, 2: 4.0}),
        (np.eye(4)[[2, 0, 3, 1]], {0: 2.0, 3: 0.5}),
        ([True, False, True, True], {0: 2.0, 1: 3}),
        ([0, 1, 1, 0], {}),
    ],
    ids=["signs", "missing", "floats", "one_hot", "bools", "none"],
)
def test_class_weights_are_keras_own(labels, class_weight):
    """Of arrays. In a dataset Keras's TensorFlow fails on what is below 0 or above the last."""
    x, y = np.zeros((4, 1), "float32"), np.array(labels)
    expected = _weights_of_keras(x, y, class_weight)
    arrays = ArrayData(x, y, class_weight=class_weight, seed=1).data
    dataset = as_dataset(tf.data.Dataset.from_tensors((x, y)), class_weight)
    for received in (arrays, next(iter(dataset))):
        np.testing.assert_array_equal(received["sample_weight"], expected)


def test_a_hinge_loss_with_class_weights_of_signs(data):
    x, y = data[0], np.sign(data[1])
    model = _model(loss="hinge")
    assert _gadam(model).engine == "mapped"
    _fit(_gadam(model, engine="auto"), (x, y[:, :1]), class_weight={-1: 5.0, 1: 1.0}, generations=1)


def test_fitness_data_of_ones_own(data):
    x, y = data
    for own in ((x[:8], y[:8]), tf.data.Dataset.from_tensor_slices((x[:8], y[:8])).batch(3)):
        model = _model()
        gadam = _gadam(model)
        _fit(gadam, data, fitness_data=own)
        np.testing.assert_allclose(
            gadam.fitness[0], model.evaluate(x[:8], y[:8], verbose=0), rtol=1e-5
        )


# --- callbacks ---------------------------------------------------------------------------


def test_early_stopping_restores_the_best_of_all_generations(data):
    stopping = keras.callbacks.EarlyStopping(
        monitor="fitness", mode="max", patience=1, restore_best_weights=True
    )
    kept = []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kept.append((logs["fitness"], model.get_weights()))
    )
    model = _model()
    history = _fit(_gadam(model), data, generations=20, callbacks=[stopping, keep])
    assert len(history.epoch) < 20
    _, weights = max(kept, key=lambda pair: pair[0])
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("engine", ["stacked", slow("mapped")])
def test_reduce_lr_on_plateau_slows_the_members(engine, data):
    """To nothing, so that training, but for its genetics, stands still."""
    reduce = keras.callbacks.ReduceLROnPlateau(
        monitor="fitness", mode="max", factor=1e-30, patience=1, min_delta=1e9
    )
    weights = []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(
            gadam._population.members.weights[0].numpy()
        )
    )
    gadam = _gadam(engine=engine, mutation_rate=0.0, fitness_batch_size=48)
    _fit(gadam, data, generations=5, callbacks=[reduce, keep])
    assert float(gadam.model.optimizer.learning_rate) < 1e-20
    entries = set(weights[2].flatten().tolist())
    assert set(weights[3].flatten().tolist()) <= entries
    assert not set(weights[1].flatten().tolist()) <= set(weights[0].flatten().tolist())


@pytest.mark.slow
def test_terminate_on_nan_sees_that_no_member_is_finite(data):
    """Which ends `fit` by itself; one member that is finite keeps it going."""
    x, y = data
    gadam = _gadam()
    with pytest.raises(FloatingPointError):
        _fit(gadam, (x, y * np.nan), callbacks=[keras.callbacks.TerminateOnNaN()])
    assert gadam.model.stop_training
    gadam = _gadam()
    gadam._start_population()
    broken = [w * tf.reshape([1.0, np.nan, np.nan, np.nan], [4] + [1] * (w.shape.rank - 1))
              for w in gadam._population.members.weights]  # fmt: skip
    gadam._population.members = gadam._population.members._replace(weights=broken)
    history = _fit(gadam, (x, y), callbacks=[keras.callbacks.TerminateOnNaN()])
    assert history.epoch == [0, 1]
    assert history.history["members_not_finite"][0] >= 3


def test_what_is_printed(data, capsys):
    gadam = _gadam()
    _fit(gadam, data, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"Gadam: 4 members of 'sequential\S*', engine 'stacked' \(all", lines[0])
    assert lines[1] == "Tracing the step of all members, and compiling it."
    assert re.fullmatch(r"First losses after [\d.]+ s\.", lines[2])
    assert re.match(r"Generation 1/2 - [\d.]+s - loss: .* - children_survived: \d", lines[3])
    assert len(lines) == 5
    _fit(_gadam(), data, verbose=1)
    printed = capsys.readouterr().out
    assert "Generation 2/2" in printed
    assert "6/6" in printed
    assert "fitness" in printed
    _fit(gadam, data, verbose=0)
    assert capsys.readouterr().out == ""


def test_an_interrupted_fit_leaves_the_best_member_so_far(data):
    def interrupt(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    model = _model()
    gadam = _gadam(model, fitness_batch_size=48)
    stop = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with pytest.raises(KeyboardInterrupt):
        _fit(gadam, data, generations=9, callbacks=[stop])
    np.testing.assert_allclose(model.evaluate(*data, verbose=0), gadam.fitness[0], rtol=1e-5)
    assert gadam._generation == 2


# --- what must not happen ----------------------------------------------------------------


@pytest.mark.parametrize("engine", ["stacked", slow("mapped")])
def test_nothing_is_traced_again_over_fifty_generations(engine, data):
    gadam = _gadam(engine=engine)
    _fit(gadam, data, generations=1)
    traces = _trace_counts(gadam)
    _fit(gadam, data, generations=50)
    assert _trace_counts(gadam) == traces


def test_members_that_are_not_finite_die_out(data):
    gadam = _gadam()
    gadam._start_population()
    broken = [tf.tensor_scatter_nd_update(w, [[1], [3]], w[:2] * np.nan)
              for w in gadam._population.members.weights]  # fmt: skip
    gadam._population.members = gadam._population.members._replace(weights=broken)
    _fit(gadam, data, generations=1)
    assert np.all(np.isfinite(gadam.fitness))
    first = [one for one in gadam.lineage if one["generation"] == 0]
    assert [one["selections"][0][2] for one in first if np.isnan(one["fitness"])] == [False, False]
    assert not {1, 3} & {p for one in gadam.lineage for p in one["parents"]}


def test_when_no_member_is_finite_it_says_so(data, tmp_path):
    x, y = data
    gadam = _gadam()
    _fit(gadam, data, generations=1, checkpoint_dir=tmp_path)
    with pytest.raises(FloatingPointError, match=r"In generation 1 no member has a finite.*0, 1"):
        _fit(gadam, (x, y * np.nan), generations=3, checkpoint_dir=tmp_path)
    assert np.all(np.isfinite(gadam.model.get_weights()[0]))
    again = _gadam()
    assert _fit(again, data, generations=2, checkpoint_dir=tmp_path).epoch == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"population_size": 1}, "`population_size` must be .*Received: population_size=1"),
        ({"mutation_rate": 1.5}, "`mutation_rate` must be .*Received: mutation_rate=1.5"),
        ({"mutation_rate": -0.1}, "`mutation_rate` must be"),
        ({"mutation": "cauchy"}, "`mutation` must be one of .*Received: mutation='cauchy'"),
        ({"mutation_stddev": 0.0}, "`mutation_stddev` must be"),
        ({"tolerance": -1.0}, "`tolerance` must"),
        ({"engine": "warp"}, "`engine` must be one of .*Received: engine='warp'"),
        ({"fitness_batch_size": 0}, "`fitness_batch_size` must be"),
        ({"seed": -1}, "`seed` must"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        _gadam(**arguments)


LISTS = [[1, 2, 3], [1], [2, 3]]
DATA_OF_TORCH = type("DataLoader", (), {"__module__": "torch.utils.data.dataloader"})()
ENDLESS = tf.data.Dataset.from_tensors((np.zeros((4, 6)), np.zeros((4, 3)))).repeat()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generations": 0}, "`generations` must be"),
        ({"epochs": 0}, "`epochs` must be"),
        ({"y": np.zeros((47, 3))}, "must have the same number of samples"),
        ({"x": np.zeros((0, 6)), "y": np.zeros((0, 3))}, "The training data is empty"),
        ({"x": iter([1]), "y": None}, "A generator can be read only once"),
        ({"x": DATA_OF_TORCH, "y": None}, "Data of PyTorch is not read"),
        ({"sample_weight": np.ones(3)}, r"sample_weight of 3 sample\(s\)"),
        ({"x": LISTS}, r"`x` must be arrays.*Received: x with a list of list$"),
        (
            {"x": np.array(LISTS, object)},
            r"`x` must be.*array of objects \(list\) of shape \(3,\)$",
        ),
        ({"x": np.array(LISTS, object), "validation_split": 0.3}, "`x` must be arrays"),
        ({"sample_weight": LISTS}, "`sample_weight` must be arrays.*a list of list$"),
        ({"x": np.zeros((48, 5))}, r"does not train on this data: .* value 6.*'x': \(48, 5\)"),
        ({"fitness_data": ENDLESS}, r"`fitness_data` must be finite.*dataset\.take\(n\)"),
        ({"validation_data": ENDLESS}, r"`validation_data` must be finite.*dataset\.take\(n\)"),
        ({"validation_data": iter([1])}, "A generator can be read only once.*validation_data="),
        ({"x": tf.data.Dataset.range(4), "y": None, "batch_size": None}, r"Call `dataset\.batch"),
        ({"class_weight": {"dog": 2.0}}, r"`class_weight` must be a dict.*\{'dog': 2.0\}$"),
        ({"class_weight": [1.0, 2.0]}, "`class_weight` must be a dict"),
        ({"class_weight": {0: 2.0}, "y": np.array(["a"] * 48)}, "y of shape .* type string"),
        ({"class_weight": {0: 2.0}, "y": {"a": np.ones(48)}}, "one output.*Received: y in a dict$"),
        ({"class_weight": {0: 2.0}, "y": None}, "`class_weight` needs the targets.*no y$"),
        ({"class_weight": {0: 2.0}, "sample_weight": np.ones(48)}, "Expected `class_weight` or"),
        ({"validation_split": 1.5}, "`validation_split` must be between 0 and 1"),
        ({"validation_split": 0.999}, "leaves nothing to train or to validate on"),
        ({"validation_split": 0.5, "validation_data": (1, 2)}, "Expected `validation_split` or"),
        ({"fitness_data": 3}, "`fitness_data` must be"),
        ({"fitness_data": (np.zeros((0, 6)), np.zeros((0, 3)))}, "`fitness_data` is empty"),
        ({"fitness_data": tf.data.Dataset.range(0).batch(2)}, "`fitness_data` is empty"),
        ({"fitness_data": (np.zeros((2, 6)), np.zeros((3, 3)))}, "Received: `fitness_data` with"),
        ({"x": tf.data.Dataset.range(0).batch(2), "y": None, "batch_size": None}, "is empty"),
        (
            {"x": tf.data.Dataset.range(4).batch(2).repeat(), "y": None, "batch_size": None},
            "`steps_per_epoch` must be given",
        ),
        ({"x": tf.data.Dataset.range(4).batch(2)}, "A dataset already has its"),
    ],
)
def test_bad_data(arguments, message, data):
    given = {"x": data[0], "y": data[1], "batch_size": 16, "verbose": 0, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        _gadam().fit(**given)
    assert len(str(error.value)) < 700
    assert "user code" not in str(error.value)


def test_integers_among_the_trainable_weights_are_refused():
    """Mutation would draw fractions into them."""
    model = models.dense()
    layer = model.layers[0]
    layer._tracker.unlock()
    layer.add_weight(shape=(), initializer="zeros", dtype="int32", name="counter")
    model.compile(gdopt.Adam(), "mse")
    with pytest.raises(ValueError, match=r"Gadam updates .*'.*counter' of dtype int32"):
        gdopt.Gadam(model, 2)


def test_models_that_cannot_be_populations(monkeypatch):
    with pytest.raises(ValueError, match="must be compiled with a loss"):
        gdopt.Gadam(models.dense())
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    unbuilt.compile("adam", "mse")
    with pytest.raises(ValueError, match="is not built"):
        gdopt.Gadam(unbuilt)
    with pytest.raises(ValueError, match=r"Expected a `keras\.Model`"):
        gdopt.Gadam("model")

    class Own(keras.Sequential):
        def train_step(self, data):
            return {}

    frozen = _model()
    frozen.trainable = False
    with pytest.raises(ValueError, match="has no trainable weights"):
        gdopt.Gadam(frozen)
    own = Own([keras.Input((6,)), keras.layers.Dense(3)])
    own.compile(gdopt.Adam(), "mse")
    with pytest.raises(ValueError, match="has a `train_step` of its own"):
        gdopt.Gadam(own)

    class Closed(keras.Model):
        def __init__(self, units):
            super().__init__()
            self.out = keras.layers.Dense(units)

        def call(self, inputs):
            return self.out(inputs)

    closed = Closed(3)
    closed(np.zeros((1, 6)))
    closed.compile(gdopt.Adam(), "mse")
    with pytest.raises(ValueError, match="cannot be cloned"):
        _gadam(closed)._start_population()
    monkeypatch.setattr(population, "_available_memory", lambda: 1_000)
    with pytest.raises(ValueError, match=r"A population of 4 clones .* needs about .*GiB"):
        _gadam()


@pytest.mark.slow
def test_a_model_that_a_closure_optimizer_trained_before(data):
    model = _model()
    model.compile(gdopt.LBFGS(), "mse")
    model.optimizer.attach(model)
    with pytest.raises(ValueError, match="LBFGS"):
        _gadam(model)
    model.compile(gdopt.Adam(), "mse")
    _fit(_gadam(model), data, generations=1)


def test_mixed_float16_is_refused_with_the_reason():
    keras.mixed_precision.set_global_policy("mixed_float16")
    with pytest.raises(ValueError, match="does not train in mixed float16: the loss scale"):
        _gadam()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_mixed_bfloat16_trains(engine, data):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    gadam = _gadam(engine=engine)
    _fit(gadam, data)
    assert gadam._population.members.weights[0].dtype == tf.float32
    assert np.all(np.isfinite(gadam.fitness))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.recurrent, "the recurrence of the layer 'lstm.*' is a loop"),
        (models.remembering, "the layer 'lstm.*' remembers the batch before"),
    ],
)
def test_what_cannot_be_stacked(model, message):
    with pytest.raises(ValueError, match=f"{message}.*engine='mapped'"):
        _gadam(_model(model), engine="stacked")
    assert _gadam(_model(model)).engine == "mapped"


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (keras.optimizers.Adam, r"keras_gdopt\.Adam has its rule .*Received: Adam of keras"),
        (keras.optimizers.Lion, r"subclass of keras_gdopt\.GradientOptimizer.*Received: Lion"),
        (lambda: gdopt.Lookahead("adam"), r"keras_gdopt\.Adam has its rule"),
        (lambda: gdopt.Adam(lazy=True), r"leave `lazy` out.*Received: lazy=True with Adam"),
    ],
)
def test_optimizers_whose_step_needs_variables(optimizer, message):
    with pytest.raises(ValueError, match=f"cannot train the model 'sequential.*{message}"):
        _gadam(_model(optimizer=optimizer()))


def test_an_optimizer_that_was_built_for_other_weights():
    model = _model(models.dense)
    model.optimizer.build(model.trainable_variables)
    model.layers[0].trainable = False
    with pytest.raises(ValueError, match=r"Compile the model again.*4 variables, and 2 trainable"):
        _gadam(model)


def test_the_old_name_of_an_engine():
    with pytest.warns(DeprecationWarning, match="engine='mapped'"):
        assert _gadam(engine="unrolled").engine == "mapped"


def test_a_model_is_not_held_by_what_trained_it(data):
    gadam = _gadam()
    _fit(gadam, data)
    model, driver = gadam.model, weakref.ref(gadam)
    model.fit(*data, verbose=0)
    del gadam
    gc.collect()
    assert driver() is None


# --- models as users have them -----------------------------------------------------------


def _own_loss(y, prediction):
    return keras.ops.mean(keras.ops.abs(y - prediction), axis=-1)


class _OwnMetric(keras.metrics.Mean):
    def update_state(self, y, prediction, sample_weight=None):
        super().update_state(keras.ops.abs(y - prediction))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_raw_operations_and_losses_and_metrics_that_nobody_registered(engine, data):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(3, activation="tanh")(inputs)
    model = keras.Model(inputs, keras.ops.sin(keras.layers.Dense(3)(hidden) + hidden))
    by_class = keras.metrics.F1Score(threshold=0.5)
    metrics = [_OwnMetric(), keras.metrics.MeanMetricWrapper(_own_loss, name="own"), by_class]
    model.compile(gdopt.Adam(0.02), _own_loss, metrics=metrics)
    gadam = _gadam(model, engine=engine, fitness_batch_size=48)
    x, y = data[0], (data[1] > 0).astype("float32")
    history = _fit(gadam, (x, y), verbose=2, validation_data=(x, y))
    member = gadam.member(0)
    results = member.evaluate(x, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(results["own"], gadam.fitness[0], rtol=1e-5)
    assert np.shape(history.history["f1_score"]) == (2, 3)
    assert model.compiled


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_adapted_layers_stay_adapted(engine, data):
    x, y = 5 * data[0] + 30, data[1]
    normalization = keras.layers.Normalization()
    normalization.adapt(x)
    model = keras.Sequential([keras.Input((6,)), normalization])
    for _ in range(2):  # models deep, of which Keras's `clone_model` enters one before 3.14
        inputs = keras.Input((6,))
        model = keras.Model(inputs, model(inputs))
    model = keras.Sequential([keras.Input((6,)), model, keras.layers.Dense(3)])
    model.compile(gdopt.Adam(0.02), "mse")
    gadam = _gadam(model, engine=engine, fitness_batch_size=48)
    _fit(gadam, (x, y))
    for trained in (model, gadam.member(0)):
        np.testing.assert_allclose(trained.evaluate(x, y, verbose=0), gadam.fitness[0], rtol=1e-4)
    assert gadam.fitness[-1] < 100


class Adapted(keras.Model):
    """Whose config does not tell what its layer learned."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.normalization = keras.layers.Normalization()
        self.out = keras.layers.Dense(3)

    def call(self, inputs):
        return self.out(self.normalization(inputs))

    def get_config(self):
        return {}


def test_a_clone_has_what_layers_of_a_subclassed_model_learned(data):
    model = Adapted()
    model.normalization.adapt(5 * data[0] + 30)
    model(data[0])
    twin = population.clone(model, seed=1)
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(
        twin.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )


def test_clones_do_not_call_the_lambdas_of_the_model(data):
    """Each call would be kept in the layer, and with it a clone."""
    factor = 3.0
    layer = keras.layers.Lambda(lambda x, shift: x * factor + shift, arguments={"shift": 1.0})
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))
    model.compile(gdopt.Adam(), "mse")
    gadam = _gadam(model)
    _fit(gadam, data, generations=1)
    assert len(layer._inbound_nodes) == 1
    x = np.ones((2, 6), "float32")
    (kernel, bias), received = gadam.member(1).get_weights(), gadam.member(1).predict(x, verbose=0)
    np.testing.assert_allclose(received, (x * 3.0 + 1.0) @ kernel + bias, rtol=1e-4)


def test_layers_that_do_not_compile_are_mapped():
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.RandomRotation(0.1), keras.layers.Flatten(),
         keras.layers.Dense(3)]
    )  # fmt: skip
    model.compile(gdopt.Adam(), "mse")
    assert _gadam(model).engine == "mapped"
    with pytest.raises(ValueError, match="XLA does not compile the layer 'random_rotation"):
        _gadam(model, engine="stacked")


def test_a_model_compiled_anew_needs_a_new_population(data):
    gadam = _gadam()
    _fit(gadam, data)
    gadam.model.compile(gdopt.Adam(0.0), "mae")
    with pytest.raises(ValueError, match="was compiled anew, or layers were frozen"):
        _fit(gadam, data)


@pytest.mark.parametrize("engine", [slow("stacked"), "mapped"])
def test_an_interrupted_fit_keeps_the_learning_rate_of_callbacks(engine, data):
    def act(epoch, logs):
        if epoch == 1:
            gadam.model.optimizer.learning_rate = 0.125
            raise KeyboardInterrupt

    gadam = _gadam(engine=engine)
    with pytest.raises(KeyboardInterrupt):
        _fit(gadam, data, callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=act)])
    assert float(gadam.model.optimizer.learning_rate) == 0.125


def test_parents_and_children_are_trained_and_judged_with_keys_of_their_own(data, monkeypatch):
    asked = []
    for name in ("epoch", "fitness_batch"):
        original = getattr(ArrayData, name)

        def noted(self, generation, phase, *rest, original=original):
            asked.append((generation, phase, *rest))
            return original(self, generation, phase, *rest)

        monkeypatch.setattr(ArrayData, name, noted)
    _fit(_gadam(fitness_batch_size=8), data, generations=2, epochs=2)
    expected = []
    for generation in (0, 1):
        expected += [(generation, Phase.TRAIN_PARENTS, epoch, range(SIZE)) for epoch in (0, 1)]
        expected += [(generation, Phase.FITNESS, 8)]
        expected += [(generation, Phase.TRAIN_CHILDREN, epoch, range(SIZE)) for epoch in (0, 1)]
        expected += [(generation, Phase.SURVIVAL, 8)]
    assert asked == expected
