"""Hyper-parameters that members have of their own, and all that comes with them."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import keras_gdopt as gdopt
from keras_gdopt.gadam.breeding import Breeding, Plan
from keras_gdopt.gadam.ensemble import AverageOfLogits
from keras_gdopt.gadam.hyperparameters import Evolution
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.lineage import Lineage
from tests.gadam import models
from tests.parameters import slow

RANGES = {
    "rate": ("positive", (1e-6, 10.0)),
    "beta": ("fraction", (0.8, 0.99)),
    "momentum": ("fraction", (0.0, 0.9)),
    "long memory": ("fraction", (0.9, 0.999999)),
}


def _scaled(kind, h):
    return np.log(h) if kind == "positive" else np.log(1 - np.asarray(h))


def _evolution(name, seed=3, perturbation=0.1):
    kind, bounds = RANGES[name]
    return Evolution({name: bounds}, {name: kind}, perturbation=perturbation, seed=seed)


# --- draws -------------------------------------------------------------------------------

# 2,000 draws: a test at the level 1e-6 sees a difference of 0.06 between the distribution
# functions in 1 of 2 cases, of 0.08 in 99 of 100 (Kolmogorov's; 1.22 / sqrt(n) are 0.027).
COUNT, LEVEL = 2000, 1e-6


@pytest.mark.parametrize("name", RANGES)
def test_first_values_are_uniform_on_the_scale(name, float64):
    kind, (low, high) = RANGES[name]
    values = _evolution(name).drawn(range(COUNT))[name]
    assert low <= values.min() and values.max() <= high
    ends = sorted(map(float, _scaled(kind, [low, high])))
    uniform = stats.uniform(ends[0], ends[1] - ends[0])
    assert stats.kstest(_scaled(kind, values), uniform.cdf).pvalue > LEVEL


@pytest.mark.parametrize("perturbation", [0.1, 0.7])
@pytest.mark.parametrize("name", RANGES)
def test_children_take_a_normal_step_that_is_folded_at_the_ends(name, perturbation, float64):
    kind, (low, high) = RANGES[name]
    first, last = sorted(map(float, _scaled(kind, [low, high])))
    width = last - first
    for part in (0.05, 0.6):
        start = first + part * width
        parent = np.exp(start) if kind == "positive" else 1 - np.exp(start)
        inherited = {name: np.full(COUNT, parent)}
        evolution = _evolution(name, perturbation=perturbation)
        values = evolution.perturbed(inherited, 2, range(COUNT))[name]
        assert low <= values.min() and values.max() <= high

        def folded(u, start=start):
            """Its images behind the mirrors at both ends."""
            normal = stats.norm(scale=perturbation * width)
            total = 0.0
            for turn in range(-6, 7):
                shift = 2 * turn * width
                total += normal.cdf(u + shift - start) - normal.cdf(first + shift - start)
                mirrored = 2 * first - u + shift
                total += normal.cdf(first + shift - start) - normal.cdf(mirrored - start)
            return total

        assert stats.kstest(_scaled(kind, values), folded).pvalue > LEVEL


def test_values_are_exact_in_float32_and_never_leave_the_range():
    """The ends are, in float32, outside: 0.1 and 0.3 are more there, 0.7 and 0.9 less."""
    for bounds in ((0.7, 0.70000012), (0.09999996, 0.1), (0.3, 0.7), (1e-4, 1e-1)):
        evolution = Evolution({"h": bounds}, {"h": "positive"}, perturbation=2.0, seed=0)
        values = evolution.drawn(range(300))
        for generation in range(3):
            assert np.all((values["h"] >= bounds[0]) & (values["h"] <= bounds[1]))
            np.testing.assert_array_equal(values["h"].astype("float32"), values["h"])
            values = evolution.perturbed(values, generation, range(300))


def test_draws_depend_on_seed_generation_member_and_name_alone():
    both = {"a": (1e-4, 1.0), "b": (1e-4, 1.0)}
    kinds = dict.fromkeys(both, "positive")

    def evolution(seed, ranges=both):
        return Evolution(ranges, kinds, perturbation=0.1, seed=seed)

    all_of = evolution(1).drawn(range(6))
    some = evolution(1, dict(reversed(both.items()))).drawn([4, 2])
    for name in both:
        np.testing.assert_array_equal(some[name], all_of[name][[4, 2]])
    values = [*all_of["a"], *all_of["b"], *evolution(2).drawn(range(6))["a"]]
    values += [*evolution(1).perturbed({n: np.full(6, 0.01) for n in both}, 1, range(6))["a"]]
    values += [*evolution(1).perturbed({n: np.full(6, 0.01) for n in both}, 2, range(6))["a"]]
    assert len(set(values)) == len(values)


# --- children ----------------------------------------------------------------------------


def _plan():
    return Plan(
        generation=0,
        probabilities=np.array([0.5, 0.3, 0.2]),
        parents=np.array([[0, 1], [2, 1], [2, 2]], "int32"),
        crossover_probabilities=np.array([0.75, 0.25, 0.5]),
        mutation_probabilities=np.zeros(3),
        fitter=np.array([0, 1, 2], "int32"),
    )


@pytest.mark.parametrize(
    ("crossover", "expected"),
    [("mean", [[7.0, 11.0], [28.0, 32.0], [40.0, 44.0]]),
     ("fitter", [[4.0, 8.0], [16.0, 20.0], [40.0, 44.0]])],
)  # fmt: skip
def test_children_by_hand(crossover, expected):
    """Of the parents (4, 8), (16, 20) and (40, 44)."""
    if crossover == "mean":
        expected[1] = [22.0, 26.0]  # 0.25 * 40 + 0.75 * 16
    breeding = Breeding(
        mutation_rate=0.0, mutation="uniform", mutation_stddev=0.1, seed=0, crossover=crossover
    )
    parents = [tf.constant([[4.0, 8.0], [16.0, 20.0], [40.0, 44.0]])]
    (children,), mutated = breeding.children(_plan(), parents, parents)
    np.testing.assert_array_equal(children, expected)
    assert mutated.tolist() == [0, 0, 0]


def _gadam(name="dense", optimizer=None, engine="auto", size=4, **arguments):
    keras.utils.set_random_seed(1)
    model = getattr(models, name)()
    model.compile(optimizer or gdopt.Adam(0.02), "mse", metrics=["mae"])
    return gdopt.Gadam(model, size, seed=5, engine=engine, **arguments)


def _data(count=24):
    x, y = models.samples(np.random.default_rng(0), count=count)
    return {"x": x, "y": y, "batch_size": 8}


EVOLVE = {"learning_rate": (1e-3, 1e-1), "weight_decay": (1e-3, 1.0), "beta_1": (0.0, 0.9)}


@pytest.fixture(scope="module")
def evolved():
    gadam = _gadam(evolve=EVOLVE)
    gadam.logs = []

    class Noted(gdopt.gadam.PopulationCallback):
        def on_generation_end(self, generation, logs=None):
            gadam.logs.append(logs)

    gadam.history = gadam.fit(**_data(), generations=4, verbose=0, callbacks=[Noted()])
    return gadam


def test_children_inherit_from_the_fitter_parent_and_survivors_keep_theirs(evolved):
    lineage = list(evolved.lineage)
    assert any(one["heir_of"] is not None for one in lineage)
    for one in lineage:
        assert set(one["hyperparameters"]) == set(EVOLVE)
        for name, (low, high) in EVOLVE.items():
            assert low <= one["hyperparameters"][name] <= high
        if one["heir_of"] is None:
            continue
        assert one["heir_of"] in one["parents"]
        if one["parents"][0] != one["parents"][1]:  # all of it is one parent's
            is_first = one["parents"][0] == one["heir_of"]
            assert one["crossover_probability"] == float(is_first)
        parents = [lineage[parent]["selections"] for parent in one["parents"]]
        assert parents[0] and parents[1]
        for name, (low, high) in EVOLVE.items():
            kind = "fraction" if name == "beta_1" else "positive"
            own, of_parent = (
                _scaled(kind, of["hyperparameters"][name]) for of in (one, lineage[one["heir_of"]])
            )
            width = abs(np.diff(_scaled(kind, [low, high]))[0])
            assert 0 < abs(own - of_parent) <= 6 * 0.1 * width
    for logs in evolved.logs:
        both = {
            name: np.concatenate([values, logs["child_hyperparameters"][name]])
            for name, values in logs["parent_hyperparameters"].items()
        }
        for place, identity in enumerate(logs["identities"]):
            for name, values in both.items():
                own = lineage[identity]["hyperparameters"][name]
                assert own == values[logs["survivors"][place]]


def test_logs_the_model_and_members_have_the_values(evolved):
    for name in EVOLVE:
        assert evolved.history.history[name] == [logs[name] for logs in evolved.logs]
    for rank, model in ((0, evolved.model), (0, evolved.member(0)), (2, evolved.member(2))):
        identity = evolved._identities[evolved._ranks()[rank]]
        for name, value in evolved.lineage[identity]["hyperparameters"].items():
            received = float(keras.ops.convert_to_numpy(getattr(model.optimizer, name)))
            np.testing.assert_allclose(received, value, rtol=1e-7)
    assert evolved.history.history["learning_rate"][-1] == pytest.approx(
        float(evolved.model.optimizer.learning_rate)
    )


def test_the_fitter_half_are_the_parents(evolved):
    """By the defaults that `evolve` brings."""
    assert evolved.selection == "truncation"
    for logs in evolved.logs:
        fitter = set(np.argsort(logs["parent_fitness"])[:2])
        assert set(np.unique(logs["parents"])) <= fitter
        assert set(np.flatnonzero(logs["selection_probabilities"])) == fitter
    everyone = _gadam(evolve=EVOLVE, selection="all")
    everyone.fit(**_data(), generations=3, verbose=0)
    probabilities = [one["selection_probabilities"] for one in everyone.lineage]
    assert everyone.selection == "all" and min(p[0] for p in probabilities if p) > 0


def test_fitter_children_keep_weights_and_optimizer(evolved):
    """By the defaults that `evolve` brings: nothing mutates."""
    assert (evolved.crossover, evolved.inherit_optimizer_state) == ("fitter", True)
    assert all(not one["mutated_entries"] for one in evolved.lineage)
    steps = {int(evolved.member(rank).optimizer.iterations) for rank in range(4)}
    assert steps <= {3 * 4 + 3 * n for n in range(5)} and max(steps) >= 3 * 5


def test_a_child_begins_as_its_fitter_parent_ended(monkeypatch):
    gadam, begun = _gadam(evolve=EVOLVE, size=12), []
    gadam._start_population()
    population = gadam._population
    trained = population._training.trained

    def noted(members, places, generation, phase, *rest, **arguments):
        after, losses = trained(members, places, generation, phase, *rest, **arguments)
        begun.append(after if phase == Phase.TRAIN_PARENTS else members)
        return after, losses

    monkeypatch.setattr(population._training, "trained", noted)
    gadam.fit(**_data(), generations=1, verbose=0)
    parents, children = begun
    heirs = [gadam.lineage[12 + child]["heir_of"] for child in range(12)]  # places in generation 0
    assert any(heir != gadam.lineage[12 + c]["parents"][0] for c, heir in enumerate(heirs))
    for a, b in zip(tf.nest.flatten(parents), tf.nest.flatten(children), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[heirs], b)


# --- trained with values of its own ------------------------------------------------------

OPTIMIZERS = {
    "learning_rate": (gdopt.Adam, (1e-3, 1e-1)),
    "weight_decay": (gdopt.Adam, (1e-2, 1.0)),
    "beta_1": (gdopt.Adam, (0.0, 0.99)),
    "momentum": (gdopt.NAG, (0.0, 0.9)),
    "rho": (gdopt.RMSprop, (0.5, 0.99)),
}


BY_EVERY_CHANGE = [("mapped", "weight_decay", False), ("stacked", "momentum", True)]


@pytest.mark.parametrize(
    ("engine", "name", "wrapped"),
    [
        one if one in BY_EVERY_CHANGE else slow(*one)
        for one in itertools.product(("stacked", "mapped"), OPTIMIZERS, (False, True))
    ],
)
def test_a_member_trains_as_one_model_with_its_values(engine, name, wrapped, float64):
    """All samples are a batch, so that a loop of Keras's can make the same steps."""
    cls, bounds = OPTIMIZERS[name]

    def optimizer(**arguments):
        inner = cls(**{"learning_rate": 0.02, **arguments})
        return gdopt.Lookahead(inner, sync_period=2) if wrapped else inner

    gadam = _gadam(optimizer=optimizer(), engine=engine, evolve={name: bounds}, size=3)
    x, y = (part.astype("float64") for part in models.samples(np.random.default_rng(0), count=12))
    starts = _first_weights(gadam)
    values = gadam._evolution.drawn(range(3))[name]
    trained = _train_once(gadam, x, y)
    assert len(set(values)) == 3
    for member in range(3):
        model = models.dense()
        model.compile(optimizer(**{name: float(values[member])}), "mse")
        model.set_weights(starts[member])
        for _ in range(5):
            model.train_on_batch(x, y)
        model.optimizer.finalize_variable_values(model.trainable_variables)
        for received, expected in zip(trained.weights, model.get_weights(), strict=True):
            np.testing.assert_allclose(received[member], expected, rtol=1e-10, atol=1e-12)


def _first_weights(gadam):
    gadam._start_population()
    members = gadam._population.members
    return [[np.asarray(weight[member]) for weight in members.weights] for member in range(3)]


def _train_once(gadam, x, y):
    from keras_gdopt.gadam.data import DataArguments

    data = DataArguments(x, y, batch_size=12, epochs=5, members=3).made()
    population = gadam._population
    members, _ = population._training.trained(
        population.members, range(3), 0, Phase.TRAIN_PARENTS, gadam._hyperparameters, data
    )
    return members


@pytest.mark.parametrize("crossover", [slow("mean"), slow("entries"), slow("fitter")])
def test_both_maps_agree(crossover, float64):
    runs = []
    for engine in ("stacked", "mapped"):
        gadam = _gadam(engine=engine, evolve=EVOLVE, crossover=crossover, mutation_rate=0.1)
        history = gadam.fit(**_data(), generations=3, verbose=0)
        runs.append((gadam, history.history))
    (one, expected), (other, received) = runs
    for name, values in expected.items():
        np.testing.assert_allclose(received[name], values, rtol=1e-8, err_msg=name)
    for a, b in zip(one.lineage, other.lineage, strict=True):
        assert (a["parents"], a["hyperparameters"]) == (b["parents"], b["hyperparameters"])


def test_nothing_is_traced_again_for_other_values():
    gadam = _gadam(evolve=EVOLVE)
    gadam.fit(**_data(), generations=1, verbose=0)
    train = gadam._population._training.engine._train
    traced = train.experimental_get_tracing_count()
    gadam.fit(**_data(), generations=3, verbose=0)
    assert train.experimental_get_tracing_count() == traced == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_a_resumed_run_goes_on_with_its_values(engine, tmp_path):
    whole = _gadam(engine=engine, evolve=EVOLVE)
    expected = whole.fit(**_data(), generations=4, verbose=0).history
    for generations in (2, 4):
        parts = _gadam(engine=engine, evolve=EVOLVE)
        received = parts.fit(
            **_data(), generations=generations, verbose=0, checkpoint_dir=str(tmp_path)
        ).history
    assert received == expected
    assert list(parts.lineage) == list(whole.lineage)
    for a, b in zip(parts.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    others = {**EVOLVE, "beta_1": (0.5, 0.9)}
    with pytest.raises(ValueError, match=r"evolve was .*\[0.0, 0.9\].* and is .*\[0.5, 0.9\]"):
        _gadam(engine=engine, evolve=others).fit(
            **_data(), generations=5, verbose=0, checkpoint_dir=str(tmp_path)
        )
    with pytest.raises(ValueError, match=r"selection was 'truncation' and is None"):
        _gadam(engine=engine, evolve=EVOLVE, selection="all").fit(
            **_data(), generations=5, verbose=0, checkpoint_dir=str(tmp_path)
        )
    with pytest.raises(ValueError, match=r"evolve was .* and is None"):
        _gadam(engine=engine).fit(**_data(), generations=5, verbose=0, checkpoint_dir=str(tmp_path))


def test_a_member_whose_rate_is_too_high_dies_out():
    gadam = _gadam(
        optimizer=gdopt.GradientDescent(), evolve={"learning_rate": (1e-2, 1e30)}, size=8
    )
    history = gadam.fit(**_data(), generations=3, epochs=4, verbose=0).history
    assert history["members_not_finite"][0] > 0
    assert np.all(np.isfinite(gadam.fitness))
    assert history["learning_rate"][-1] < 100


# --- start ------------------------------------------------------------------------------


def test_all_members_start_from_the_model():
    gadam = _gadam("normalization", start="model")
    gadam._start_population()
    model = gadam.model
    for part, variables in (
        ("weights", model.trainable_variables),
        ("state", model.non_trainable_variables),
    ):
        for received, variable in zip(
            getattr(gadam._population.members, part), variables, strict=True
        ):
            for member in range(4):
                np.testing.assert_array_equal(received[member], variable.numpy())
    with pytest.raises(ValueError, match="Expected one or the other"):
        _gadam(start="model", initializer="ones")
    with pytest.raises(ValueError, match="`start` must be one of"):
        _gadam(start="weights")


# --- fitness ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "direction"),
    [("stacked", "max"), slow("mapped", "min"), slow("stacked", "min"), slow("mapped", "max")],
)
def test_members_are_judged_by_a_metric(engine, direction):
    """`mae` as a gain is nonsense, and shows which way the selection goes."""
    gadam = _gadam(engine=engine, fitness=("mae", direction), start="model", mutation_rate=0.2)
    data = _data()
    history = gadam.fit(**data, generations=2, verbose=0).history
    del data["batch_size"]
    judged = [
        gadam.member(rank).evaluate(**data, verbose=0, return_dict=True)["mae"] for rank in range(4)
    ]
    np.testing.assert_allclose(gadam.fitness, judged, rtol=1e-5)
    assert judged == sorted(judged, reverse=direction == "max")
    np.testing.assert_allclose(history["fitness"][-1], judged[0], rtol=1e-5)
    np.testing.assert_allclose(history["fitness_worst"][-1], judged[-1], rtol=1e-5)
    np.testing.assert_allclose(history["fitness_mean"][-1], np.mean(judged), rtol=1e-5)
    np.testing.assert_allclose(history["mae"][-1], judged[0], rtol=1e-5)


@pytest.mark.slow
def test_members_are_judged_by_a_weighted_metric_of_one_of_several_outputs():
    x, y = models.samples(np.random.default_rng(0), count=24)
    inputs = keras.Input((6,))
    p, q = keras.layers.Dense(3, name="p")(inputs), keras.layers.Dense(3, name="q")(inputs)
    model = keras.Model(inputs, {"p": p, "q": q})
    weighted = {"q": [keras.metrics.MeanAbsoluteError(name="mae")]}
    model.compile(gdopt.Adam(0.1), {"p": "mse", "q": "mse"}, weighted_metrics=weighted)
    gadam = gdopt.Gadam(model, 4, seed=1, fitness=("q_mae", "min"))
    weights = {name: np.linspace(0.0, 3.0, 24) for name in ("p", "q")}
    data = {"y": {"p": y, "q": -y}, "sample_weight": weights}
    gadam.fit(x, **data, generations=1, verbose=0)
    errors = [np.abs(gadam.member(rank).predict(x, verbose=0)["q"] + y) for rank in range(4)]
    expected = [np.average(error.mean(axis=-1), weights=weights["q"]) for error in errors]
    assert expected == sorted(expected)
    np.testing.assert_allclose(gadam.fitness, expected, rtol=1e-5)


def test_a_loss_that_is_not_finite_has_no_metric():
    """The accuracy of NaN is a number."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(gdopt.GradientDescent(), "mse", metrics=["binary_accuracy"])
    judge, ranges = ("binary_accuracy", "max"), {"learning_rate": (1e-3, 1e12)}
    gadam = gdopt.Gadam(model, 8, seed=1, fitness=judge, evolve=ranges)
    x, y = models.samples(np.random.default_rng(0), count=24)
    history = gadam.fit(x, y[:, :1] > 0, generations=1, epochs=3, batch_size=8, verbose=0).history
    assert history["members_not_finite"][0] > 0
    assert 0.0 <= gadam.fitness[0] <= 1.0


@pytest.mark.slow
def test_judging_by_a_metric_leaves_the_stream_of_data_where_it_is(tmp_path):
    """A resumed run sees the batches of a shuffled dataset that a whole one sees."""

    def gadam():
        return _gadam("linear", fitness=("mae", "min"))

    def data():
        x, y = (part.astype("float32") for part in models.samples(np.random.default_rng(0), 40))
        return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(40, seed=1).batch(16)

    whole = gadam()
    expected = whole.fit(data(), generations=3, verbose=0).history
    for generations in (2, 3):
        parts = gadam()
        received = parts.fit(
            data(), generations=generations, verbose=0, checkpoint_dir=str(tmp_path)
        ).history
    assert received == expected
    assert list(parts.lineage) == list(whole.lineage)


def test_a_metric_of_batches_that_differ_in_shape_is_refused_before_training():
    model = models.texts()
    model.compile(gdopt.Adam(), "mse", metrics=["mae"])
    ids = tf.RaggedTensor.from_row_lengths(np.arange(6) % 5, [1, 3, 2])
    dataset = tf.data.Dataset.from_tensor_slices((ids, np.ones((3, 1)))).ragged_batch(2)
    gadam = gdopt.Gadam(model, 2, fitness=("mae", "min"))
    with pytest.raises(ValueError, match="A metric is computed on one batch"):
        gadam.fit(dataset, verbose=0)
    assert not gadam.fitness.size


def test_the_loss_is_the_less_the_better():
    assert _gadam(fitness=("loss", "min"))._run_identity()["fitness"] is None
    with pytest.raises(ValueError, match="Expected `fitness` to be 'loss'"):
        _gadam(fitness=("loss", "max"))


@pytest.mark.parametrize("fitness", ["accuracy", ("mae", "least"), ("mae",), 3, ("mae", "min", 1)])
def test_fitness_is_the_loss_or_a_metric_with_its_direction(fitness):
    with pytest.raises(ValueError, match=r"such as \('accuracy', 'max'\)"):
        _gadam(fitness=fitness)


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"one of \['mae'\]. Received: fitness=\('auc', 'max'\)"):
        _gadam(fitness=("auc", "max")).fit(**_data(), verbose=0)


# --- the found schedule -----------------------------------------------------------------


def test_the_found_schedule_by_hand():
    """Two trainings of 10 steps, then a child that is trained twice, then its child once."""
    gadam = _gadam(evolve={"learning_rate": (1e-3, 1e-1)})
    lineage = Lineage()
    grandparent = lineage.born(0, hyperparameters={"learning_rate": 0.1})
    lineage.trained(grandparent, 10)
    lineage.trained(grandparent, 10)
    other = lineage.born(0, hyperparameters={"learning_rate": 0.5})
    parent = lineage.born(
        2, parents=[other, grandparent], heir_of=grandparent, hyperparameters={"learning_rate": 0.2}
    )
    lineage.trained(grandparent, 10)  # it lives on, but its children do not know that
    lineage.trained(parent, 10)
    lineage.trained(parent, 10)
    child = lineage.born(
        3, parents=[parent, other], heir_of=parent, hyperparameters={"learning_rate": 0.05}
    )
    lineage.trained(child, 10)
    gadam.lineage, gadam._identities, gadam._fitness = lineage, [other, child], np.array([2.0, 1.0])
    schedule = gadam.found_schedule()
    rates = [float(schedule(step)) for step in range(50)]
    np.testing.assert_allclose(rates, [0.1] * 20 + [0.2] * 20 + [0.05] * 10, rtol=1e-6)
    gadam._fitness = np.array([1.0, 2.0])  # no ancestors
    assert [float(gadam.found_schedule()(step)) for step in (0, 9, 30)] == [0.5] * 3


def test_the_found_schedule_counts_the_steps_that_were_made(evolved):
    schedule, winner = evolved.found_schedule(), evolved.model.optimizer
    assert float(schedule(int(winner.iterations) - 1)) == pytest.approx(float(winner.learning_rate))
    line = evolved.lineage.line(evolved._identities[evolved._best()])
    assert line[0]["first_step"] + line[0]["steps"] == int(winner.iterations)


def test_there_is_a_schedule_only_of_a_rate_that_evolves(evolved):
    with pytest.raises(ValueError, match="Gadam finds a learning rate only if it evolves"):
        _gadam(evolve={"beta_1": (0.5, 0.9)}).found_schedule()
    with pytest.raises(RuntimeError, match="only after `fit`"):
        _gadam(evolve=EVOLVE).found_schedule()


# --- ensembles --------------------------------------------------------------------------


def test_an_ensemble_gives_the_mean_of_its_members(evolved, tmp_path):
    x, y = models.samples(np.random.default_rng(2), count=9)
    for size in (None, 2, 1):
        ensemble = evolved.ensemble(size)
        members = [evolved.member(rank).predict(x, verbose=0) for rank in range(size or 4)]
        received = ensemble.predict(x, verbose=0)
        np.testing.assert_allclose(received, np.mean(members, axis=0), rtol=1e-5, atol=1e-6)
        ensemble.save(tmp_path / "ensemble.keras")
        loaded = keras.saving.load_model(tmp_path / "ensemble.keras")
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), received)
        scores = loaded.evaluate(x, y, verbose=0, return_dict=True)
        np.testing.assert_allclose(scores["loss"], np.mean((received - y) ** 2), rtol=1e-5)
        np.testing.assert_allclose(scores["mae"], np.mean(np.abs(received - y)), rtol=1e-5)
    with pytest.raises(ValueError, match="at most 4 members"):
        evolved.ensemble(5)
    with pytest.raises(ValueError, match="size"):
        evolved.ensemble(0)
    with pytest.raises(RuntimeError, match="only after `fit`"):
        _gadam().ensemble()


@pytest.mark.slow
def test_an_ensemble_of_several_outputs_and_kinds_of_logits(tmp_path):
    inputs = {"a": keras.Input((6,), name="a")}
    classes = keras.layers.Dense(3, name="classes")(inputs["a"])
    truth = keras.layers.Dense(1, name="truth")(inputs["a"])
    chance = keras.layers.Dense(1, "sigmoid", name="chance")(inputs["a"])
    model = keras.Model(inputs, {"classes": classes, "truth": truth, "chance": chance})
    loss = {
        "classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "truth": keras.losses.BinaryCrossentropy(from_logits=True),
        "chance": "binary_crossentropy",
    }
    model.compile(gdopt.Adam(0.1), loss, metrics={"classes": "accuracy"})
    x, y = models.samples(np.random.default_rng(0), count=16)
    targets = {"classes": np.arange(16) % 3, "truth": y[:, :1] > 0, "chance": y[:, :1] > 0}
    gadam = gdopt.Gadam(model, 3, seed=2)
    gadam.fit({"a": x}, targets, generations=1, verbose=0)
    received = gadam.ensemble().predict({"a": x}, verbose=0)
    members = [gadam.member(rank).predict({"a": x}, verbose=0) for rank in range(3)]

    def mean(name, link):
        return np.mean([link(member[name].astype("float64")) for member in members], axis=0)

    def softmax(z):
        powers = np.exp(z - z.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    np.testing.assert_allclose(received["classes"], np.log(mean("classes", softmax)), rtol=1e-4)
    p = mean("truth", sigmoid)
    np.testing.assert_allclose(received["truth"], np.log(p / (1 - p)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(received["chance"], mean("chance", lambda p: p), rtol=1e-5)
    scores = gadam.ensemble().evaluate({"a": x}, targets, verbose=0, return_dict=True)
    rows = mean("classes", softmax)[np.arange(16), targets["classes"]]
    np.testing.assert_allclose(scores["classes_loss"], -np.mean(np.log(rows)), rtol=1e-4)


def test_logits_that_are_large_keep_their_mean():
    z = AverageOfLogits("sigmoid")([np.array([[200.0]]), np.array([[-200.0]])])
    np.testing.assert_allclose(z, [[0.0]], atol=1e-5)
    z = AverageOfLogits("softmax")([np.array([[900.0, 0.0]]), np.array([[0.0, 900.0]])])
    np.testing.assert_allclose(z, np.log([[0.5, 0.5]]), rtol=1e-6)
    with pytest.raises(ValueError, match="`link` must be one of"):
        AverageOfLogits("tanh")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_class_that_no_member_considers_possible_stays_impossible(dtype):
    logits = np.array([[1.0, -np.inf, 2.0]])
    z = AverageOfLogits("softmax", dtype=dtype)([logits.astype(dtype)] * 2)
    expected = logits - np.log(np.sum(np.exp(logits)))
    np.testing.assert_allclose(z, expected, rtol=2e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("axis", [1, -2])
def test_classes_may_lie_on_any_axis(axis):
    logits = np.random.default_rng(0).normal(size=(3, 2, 5, 4))  # members, samples, classes, places
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    received = AverageOfLogits("softmax", axis)(list(logits))
    np.testing.assert_allclose(received, np.log(p.mean(axis=0)), rtol=1e-5)


@pytest.mark.slow
def test_an_ensemble_of_one_keeps_its_output_s_name():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="out")(inputs))
    model.compile(gdopt.Adam(), {"out": "mse"}, metrics={"out": "mae"})
    gadam = gdopt.Gadam(model, 2, seed=1)
    x, y = models.samples(np.random.default_rng(0), count=16)
    gadam.fit(x, y, generations=1, verbose=0)
    expected = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(gadam.ensemble(1).evaluate(x, y, verbose=0), expected, rtol=1e-5)


@pytest.mark.slow
def test_an_ensemble_of_nested_outputs():
    """Of which one alone has logits."""
    x, y = models.samples(np.random.default_rng(0), count=16)
    inputs = keras.Input((6,))
    b, c, d = (keras.layers.Dense(3)(inputs) for _ in range(3))
    model = keras.Model(inputs, {"z": {"d": d, "b": b}, "c": c})
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(gdopt.Adam(0.1), {"z": {"d": logits, "b": "mse"}, "c": "mae"})
    targets = {"z": {"d": np.arange(16) % 3, "b": y}, "c": y}
    gadam = gdopt.Gadam(model, 2, seed=1)
    gadam.fit(x, targets, generations=1, verbose=0)
    received = gadam.ensemble().predict(x, verbose=0)
    members = [gadam.member(rank).predict(x, verbose=0) for rank in range(2)]

    def mean(of):
        return np.mean([of(member) for member in members], axis=0)

    def probabilities(member):
        powers = np.exp(member["z"]["d"])
        return powers / powers.sum(axis=-1, keepdims=True)

    np.testing.assert_allclose(received["z"]["d"], np.log(mean(probabilities)), rtol=1e-5)
    np.testing.assert_allclose(received["z"]["b"], mean(lambda one: one["z"]["b"]), rtol=1e-5)
    np.testing.assert_allclose(received["c"], mean(lambda one: one["c"]), rtol=1e-5)


@keras.saving.register_keras_serializable("tests")
class Absolute(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.abs(y - y_pred))


@keras.saving.register_keras_serializable("tests")
class Counting(keras.Model):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "count": 7.0}


@keras.saving.register_keras_serializable("tests")
class Halving(keras.Model):
    def test_step(self, data):
        return {name: value / 2 for name, value in super().test_step(data).items()}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Absolute, Counting, Halving])
def test_an_ensemble_of_models_with_an_evaluation_of_their_own_is_not_compiled(cls):
    """It is a plain functional model, and would evaluate something else in silence."""
    x, y = models.samples(np.random.default_rng(0), count=16)
    inputs = keras.Input((6,))
    model = cls(inputs, keras.layers.Dense(3)(inputs))
    model.compile(gdopt.Adam(0.1), "mse")
    gadam = gdopt.Gadam(model, 2, seed=1)
    gadam.fit(x, y.astype("float32"), generations=1, verbose=0)
    ensemble = gadam.ensemble()
    expected = np.mean([gadam.member(rank).predict(x, verbose=0) for rank in range(2)], axis=0)
    np.testing.assert_allclose(ensemble.predict(x, verbose=0), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="must call `compile"):
        ensemble.evaluate(x, y, verbose=0)


@pytest.mark.parametrize("policy", [slow("float32"), "mixed_bfloat16"])
def test_an_ensemble_keeps_masks_and_the_precision_of_outputs(policy):
    keras.mixed_precision.set_global_policy(policy)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Embedding(5, 3, mask_zero=True),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )
    model.compile(gdopt.Adam(0.1), [loss])
    gadam = gdopt.Gadam(model, 3, seed=1)
    x = np.array([[1, 2, 0, 0], [3, 4, 1, 0]] * 4)
    y = x % 3
    gadam.fit(x, y, generations=1, verbose=0)
    ensemble = gadam.ensemble()
    members = np.stack([gadam.member(rank)(x) for rank in range(3)])
    powers = np.exp(members.astype("float64"))
    mean = np.mean(powers / powers.sum(axis=-1, keepdims=True), axis=0)
    received = ensemble.predict(x, verbose=0)
    np.testing.assert_allclose(received, np.log(mean), rtol=1e-5, atol=1e-5)
    losses = -np.log(np.take_along_axis(mean, y[..., None], axis=-1))[..., 0]
    # In mixed precision Keras 3.11 loses a mask where a layer casts its input.
    is_masked = getattr(gadam.model(x), "_keras_mask", None) is not None
    assert is_masked or policy == "mixed_bfloat16"
    expected = np.mean(losses, where=x > 0 if is_masked else True)
    np.testing.assert_allclose(ensemble.evaluate(x, y, verbose=0), expected, rtol=1e-4)


@pytest.mark.slow
def test_a_subclassed_model_has_no_ensemble():
    gadam = _gadam("subclassed")
    gadam.fit(**_data(), generations=1, verbose=0)
    with pytest.raises(ValueError, match="has no `inputs`"):
        gadam.ensemble()


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evolve", "message"),
    [
        ({}, "Expected `evolve` to be a dictionary of ranges"),
        (["learning_rate"], "Expected `evolve` to be a dictionary of ranges"),
        ({"gamma": (0.1, 0.2)}, r"'gamma' cannot evolve.*Expected one of \['beta_1', 'beta_2'"),
        ({"amsgrad": (0, 1)}, "'amsgrad' cannot evolve"),
        ({"learning_rate": (0.1, 0.1)}, "two numbers above 0, the lower one first"),
        ({"learning_rate": (0.1, 0.01)}, "the lower one first"),
        ({"learning_rate": (0.0, 0.1)}, "above 0"),
        ({"learning_rate": (0.1, np.inf)}, "above 0"),
        ({"learning_rate": 0.1}, "two numbers"),
        ({"learning_rate": ("a", 1)}, "two numbers"),
        ({"learning_rate": (0.1, 0.2, 0.3)}, "two numbers"),
        ({"learning_rate": "12"}, "two numbers"),
        ({"learning_rate": (1e-50, 0.1)}, "above 0"),  # 0 in float32
        ({"learning_rate": (1e-3, 1e39)}, "above 0"),  # infinity
        ({"beta_1": (0.9, 0.99999999)}, "below 1"),  # 1
        ({"beta_1": (0.9, 0.90000001)}, "the lower one first"),  # one number
        ({"epsilon": (1e-37, 1), "epsilon_root": (1e-37, 1)}, "are not allowed. At least one of"),
        ({"beta_1": (0.9, 1.0)}, "of at least 0 and below 1"),
        ({"beta_1": (-0.1, 0.9)}, "of at least 0 and below 1"),
        ({"epsilon": (1e-37, 1e-3)}, "are not allowed. At least one of"),
    ],
)
def test_ranges_that_are_none(evolve, message):
    with pytest.raises(ValueError, match=message):
        _gadam(evolve=evolve)


def test_a_schedule_and_a_range_exclude_each_other():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    for rate in (schedule, lambda: 0.1):
        with pytest.raises(ValueError, match="exclude each other"):
            _gadam(optimizer=gdopt.Adam(rate), evolve={"learning_rate": (1e-3, 1e-1)})
    gadam = _gadam(evolve={"learning_rate": (1e-3, 1e-1)})
    for callback in (
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
        keras.callbacks.ReduceLROnPlateau("loss"),
    ):
        with pytest.raises(ValueError, match=f"no callback can.*{type(callback).__name__}"):
            gadam.fit(**_data(), verbose=0, callbacks=[callback])
    _gadam(optimizer=gdopt.Adam(schedule), evolve={"beta_1": (0.5, 0.9)})


def test_what_decides_slots_does_not_evolve():
    with pytest.raises(ValueError, match="'momentum' cannot evolve"):
        _gadam(optimizer=gdopt.RMSprop(), evolve={"momentum": (0.0, 0.9)})
    _gadam(optimizer=gdopt.RMSprop(momentum=0.5), evolve={"momentum": (0.0, 0.9)})


def test_a_rule_that_declares_nothing_evolves_its_rate_and_decay():
    class Own(gdopt.GradientOptimizer):
        hyperparameters = ("power",)

        def __init__(self, learning_rate=0.01, power=1.0, **kwargs):
            super().__init__(learning_rate, **kwargs)
            self.power = power

        def update_rule(self, gradient, slots, learning_rate, step):
            return -learning_rate * gradient, {}

    with pytest.raises(ValueError, match=r"Expected one of \['learning_rate', 'weight_decay'\]"):
        _gadam(optimizer=Own(), evolve={"power": (1.0, 2.0)})
    gadam = _gadam(optimizer=Own(), evolve={"learning_rate": (1e-3, 1e-1)})
    gadam.fit(**_data(), generations=1, verbose=0)

    class OfAdam(gdopt.Adam):
        """Its rule is another one, of which Adam's declaration says nothing."""

        def update_rule(self, gradient, slots, learning_rate, step):
            sign = 1.0 if self.beta_1 > 0.5 else -1.0
            return -sign * learning_rate * gradient, dict(slots)

    with pytest.raises(ValueError, match="'beta_1' cannot evolve"):
        _gadam(optimizer=OfAdam(), evolve={"beta_1": (0.5, 0.9)})

    class Misspelt(Own):
        evolvable = {"power": "postive"}

    with pytest.raises(ValueError, match="Received: 'postive'"):
        _gadam(optimizer=Misspelt(), evolve={"power": (1.0, 2.0)})


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer"
)
def test_several_optimizers_have_no_one_to_evolve():
    optimizers = keras.optimizers.OptimizerMap(gdopt.Adam(), {".*bias": gdopt.NAG()})
    with pytest.raises(ValueError, match="a `MultiOptimizer` has several"):
        _gadam(
            optimizer=keras.optimizers.MultiOptimizer(optimizers),
            evolve={"learning_rate": (1e-3, 1e-1)},
        )


@pytest.mark.parametrize("name", ["selection", "crossover"])
def test_an_unknown_choice(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of"):
        _gadam(**{name: "uniform"})
