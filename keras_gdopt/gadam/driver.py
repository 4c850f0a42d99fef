"""Gadam: trains a population of clones of a model, and evolves it."""

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_gdopt.functional import Data
from keras_gdopt.gadam import genetics, population
from keras_gdopt.gadam.breeding import CROSSOVERS, SELECTIONS, Breeding
from keras_gdopt.gadam.callback import PopulationCallbackList
from keras_gdopt.gadam.checkpoint import PopulationCheckpoint
from keras_gdopt.gadam.cluster.engine import RayEngine
from keras_gdopt.gadam.contracts import Population
from keras_gdopt.gadam.data import DataArguments, GenerationData
from keras_gdopt.gadam.engine import ENGINES, chosen_engine
from keras_gdopt.gadam.ensemble import averaged
from keras_gdopt.gadam.generation_results import GenerationResults
from keras_gdopt.gadam.hyperparameters import Evolution, Values, checked_ranges
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.lineage import Lineage, record_generation
from keras_gdopt.gadam.local_population import LocalPopulation
from keras_gdopt.gadam.model_checks import check_model, pure_step_of
from keras_gdopt.gadam.progress import Progress
from keras_gdopt.gadam.run_identity import identify_run
from keras_gdopt.gadam.training import Fitness, Training
from keras_gdopt.gadam.validation import Validation, number_or_array, split_off_validation
from keras_gdopt.optimizers.argument_checks import (
    check_tensorflow,
    checked_choice,
    checked_count,
    checked_flag,
    checked_number,
)
from keras_gdopt.optimizers.pure_step import pure_step

STARTS = ("initializers", "model")

_FITNESS_SAMPLES = 1024


class Gadam:
    r"""Trains a population of clones of a model, and evolves it between generations.

    In each generation of g members

    1. every member trains on its own with the model's optimizer (Adam, in the paper);
    2. its fitness loss $L_i$ is taken on a sampled batch, and normalized:
       $\hat L_i = (L_i - \min L) / (\max L - \min L)$ (Eq. 44);
    3. g pairs of parents are drawn with replacement, each member with probability
       $P_i = \exp(-\hat L_i) / \sum_j \exp(-\hat L_j)$ (Eq. 45);
    4. each entry of a child's weights is its first parent's with probability
       $\exp(-\hat L_i) / (\exp(-\hat L_i) + \exp(-\hat L_j))$, else the second one's
       (Eq. 46-47);
    5. each entry mutates with probability $p_{mut} \cdot (1 - P_i - P_j)$: it is drawn
       anew (Eq. 48-49);
    6. the children train as in 1;
    7. of parents and children the g fittest on a new batch survive.

    With `evolve`, each member has hyper-parameters of its own, which children inherit from the
    fitter parent and move by a small step: population based training. On a scale
    $u = \varphi(h)$, log h where factors count and log(1 - h) for momenta and β, the first
    members' are uniform over the range, of width w, and a child's are

    $$u_{child} = u_{parent} + \sigma w z, \qquad z \sim N(0, 1)$$

    reflected at the ends of the range. Then by default only the fitter half become parents,
    children begin with the weights and the optimizer's state of the fitter parent, and no weights
    mutate.

    A survivor keeps its optimizer's state. Without `inherit_optimizer_state` a child starts with
    a fresh one, so that a learning rate schedule begins anew with it. It has the non-trainable
    state (statistics of batch normalization) of its fitter parent. Fitness losses are means over
    the batch, as Keras's losses are, where the paper has sums: that changes no choice, only the
    unit of `tolerance`.
    At the end of each training the optimizer finalizes its weights, as it does at the end of
    `fit`. All that is random depends on the seed, the generation, the member and the purpose
    only.

    Keras has no counterpart.

    Args:
        model: A built and compiled `keras.Model` that can be cloned: Sequential,
            functional, or subclassed with a `get_config`. Members are trained with its
            optimizer, loss and settings; the optimizer is one of this package, or a `Lookahead`
            or `keras.optimizers.MultiOptimizer` around some. `fit` leaves the best member in it.
        population_size: How many members g, at least 2. Defaults to 10. Training makes
            2 g times the steps that `model.fit` would.
        mutation_rate: The probability $p_{mut}$ in [0, 1]. Defaults to 0.01, with `evolve` to 0.
        mutation: What a mutated entry becomes: `"uniform"`, a draw from U(0, 1), as in the
            paper, or `"normal"`, one from N(0, `mutation_stddev`²). Defaults to
            `"uniform"`.
        mutation_stddev: Above 0. Defaults to 0.1.
        tolerance: λ: `fit` ends after a generation in which the sum of the fitness losses
            changes by no more (Eq. 50). Defaults to `None`: never.
        fitness_batch_size: Samples that fitness is taken on. Defaults to `None`: 1,024,
            or all where there are fewer.
        initializer: A `keras.initializers.Initializer` that all members' weights are
            drawn from. Defaults to `None`: the first member starts from the model's
            weights, and the layers' own initializers, seeded anew for each, draw the
            others'. Frozen weights are the model's.
        engine: `"stacked"` makes each operation one of all members, in a function that XLA
            compiles; `"mapped"` goes through the members side by side. Defaults to `"auto"`:
            stacked where the layers can be and gain from it. A `RayEngine` trains in many
            processes or on many machines, in the better of both. (`"unrolled"` is an old name
            of `"mapped"`.)
        seed: An integer. Defaults to `None`: a random one, then in `gadam.seed`.
        evolve: The range of each hyper-parameter that evolves, `(lowest, highest)` by name:
            `"learning_rate"`, `"weight_decay"`, and what the optimizer's rule declares as
            `evolvable`, such as `"beta_1"` or `"momentum"`; inside a `Lookahead` those of the
            inner optimizer. Defaults to `None`: all members have the optimizer's.
        perturbation: σ above, not negative. Defaults to 0.1, about a factor of 2 on a range of
            three decades.
        selection: Who can be a parent: `"all"` members, or with `"truncation"` only the fitter
            half (rounded up), in which case Eq. 44-48 are taken over that half alone. Defaults
            to `"all"`, with `evolve` to `"truncation"`.
        crossover: What a child's weights are: `"entries"` of both parents as above; their
            `"mean"`, weighed by the probability of Eq. 46; those of the `"fitter"` parent.
            Defaults to `"entries"`, with `evolve` to `"fitter"`. (Members that were trained
            apart have their hidden units in different orders, so mixing them harms a child.)
        inherit_optimizer_state: Whether a child goes on with the optimizer's state of its fitter
            parent. Defaults to False, with `evolve` to True.
        start: `"model"` gives all members the model's weights, as for fine-tuning: they stay
            close to one another, so mixing them does no harm. Defaults to `"initializers"`,
            see `initializer`.
        fitness: What members are judged by: `"loss"`, or a compiled metric with its direction,
            such as `("accuracy", "max")`. Fitness losses are then the metric, or where more is
            better its negative. Defaults to `"loss"`.

    Raises:
        ValueError: If the model is not compiled, has no trainable weights or some that are not
            floating, cannot be cloned, trains in mixed float16 or is too large; if its optimizer
            is not of this package, or `lazy`; if an argument is out of range.
        RuntimeError: With another backend than TensorFlow.

    Attributes:
        fitness: The members' fitness, the fittest first: losses, or what `fitness` names.
        lineage: Who descends from whom, see `Lineage`.
        seed: Of the run.
        engine: The name of the engine.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 64).reshape(64, 1).astype("float32")
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Adam(0.1), "mse")
    >>> gadam = gdopt.Gadam(model, population_size=4, seed=1)
    >>> history = gadam.fit(x, 3 * x + 1, generations=2, epochs=20, verbose=0)
    >>> bool(gadam.fitness[0] < 0.01)
    True

    Source: Zhang 2019, *Gradient Descent based Optimization Algorithms for Deep Learning
    Models Training* (arXiv 1903.03614), section 6.1, Eq. 43-50; Zhang and Gouza 2018,
    *GADAM: Genetic-Evolutionary ADAM for Deep Neural Network Optimization* (arXiv
    1805.07500). `evolve`: Jaderberg et al. 2017, *Population Based Training of Neural
    Networks* (arXiv 1711.09846).
    """

    def __init__(
        self,
        model: keras.Model,
        population_size: int = 10,
        mutation_rate: float | None = None,
        mutation: str = "uniform",
        mutation_stddev: float = 0.1,
        tolerance: float | None = None,
        fitness_batch_size: int | None = None,
        initializer: Any = None,
        engine: "str | RayEngine" = "auto",
        seed: int | None = None,
        *,
        evolve: dict[str, tuple[float, float]] | None = None,
        perturbation: float = 0.1,
        selection: str | None = None,
        crossover: str | None = None,
        inherit_optimizer_state: bool | None = None,
        start: str = "initializers",
        fitness: str | tuple[str, str] = "loss",
    ) -> None:
        check_tensorflow(type(self).__name__)
        check_model(model)
        self.model = model
        self.population_size = checked_count("population_size", population_size, minimum=2)
        evolves = evolve is not None
        if mutation_rate is None:
            mutation_rate = 0.0 if evolves else 0.01
        self.mutation_rate = checked_number("mutation_rate", mutation_rate, most=1.0)
        self.mutation = checked_choice("mutation", mutation, ("uniform", "normal"))
        self.mutation_stddev = checked_number("mutation_stddev", mutation_stddev, above=0.0)
        self.perturbation = checked_number("perturbation", perturbation)
        if selection is None:
            selection = "truncation" if evolves else "all"
        self.selection = checked_choice("selection", selection, SELECTIONS)
        if crossover is None:
            crossover = "fitter" if evolves else "entries"
        self.crossover = checked_choice("crossover", crossover, CROSSOVERS)
        if inherit_optimizer_state is None:
            inherit_optimizer_state = evolves
        self.inherit_optimizer_state = checked_flag(
            "inherit_optimizer_state", inherit_optimizer_state
        )
        self.start = checked_choice("start", start, STARTS)
        if self.start == "model" and initializer is not None:
            raise ValueError(
                "`start='model'` gives all members the weights of the model, and an `initializer` "
                f"draws them. Expected one or the other. Received: {start=}, {initializer=}"
            )
        self._judge = _checked_fitness(fitness)
        self.tolerance = None if tolerance is None else checked_number("tolerance", tolerance)
        if fitness_batch_size is not None:
            checked_count("fitness_batch_size", fitness_batch_size, minimum=1)
        self.fitness_batch_size = fitness_batch_size
        self.initializer = None if initializer is None else keras.initializers.get(initializer)
        self._cluster = engine if isinstance(engine, RayEngine) else None
        if self._cluster is not None:
            engine = "auto"
        if engine == "unrolled":
            warnings.warn(
                "The engine 'unrolled' is called 'mapped' now: `Gadam(engine='mapped')`.",
                DeprecationWarning,
                stacklevel=2,
            )
            engine = "mapped"
        engine = checked_choice("engine", engine, ENGINES)
        if seed is None:
            seed = random.SystemRandom().randrange(2**31)
        self.seed = checked_count("seed", seed, minimum=0)
        self.lineage = Lineage()
        self._generation = 0
        self._breeding_settings: dict[str, Any] = {
            "mutation_rate": self.mutation_rate,
            "mutation": self.mutation,
            "mutation_stddev": self.mutation_stddev,
            "selection": self.selection,
            "crossover": self.crossover,
            "inherit_optimizer_state": self.inherit_optimizer_state,
        }
        self._breeding = Breeding(**self._breeding_settings, seed=self.seed)
        self._population: Population[Any, Any] | None = None  # with the first `fit`
        self._made_with = [model._compile_config, *model.trainable_variables]
        self._identities: list[int] = []
        self._fitness = np.array([])
        model.optimizer.build(model.trainable_variables)
        self._step = pure_step_of(model)
        self.evolve = checked_ranges(evolve, self._step) if evolves else {}
        self._evolution = Evolution(
            self.evolve, self._step.evolvable, perturbation=self.perturbation, seed=self.seed
        )
        self._hyperparameters: Values = {}
        times = _times_held_here(self._cluster)
        population.check_fits_in_memory(model, model.optimizer, self.population_size, times)
        self.engine, self._engine_reason = chosen_engine(model, engine)

    # --- what came out -------------------------------------------------------

    @property
    def fitness(self) -> np.ndarray:
        """The members' fitness, the fittest first; empty before `fit`."""
        return self._judge.sign * self._fitness[self._ranks()]

    def member(self, rank: int) -> keras.Model:
        """A member as a model of its own, with its weights and its optimizer's state.

        Args:
            rank: 0 for the fittest.

        Raises:
            RuntimeError: Before `fit`.
            IndexError: If there is no such member.
        """
        self._check_is_fitted()
        place = int(self._ranks()[rank])
        twin = population.compiled_as(self.model, population.clone(self.model, seed=0))
        self._load(place, twin)
        return twin

    def ensemble(self, size: int | None = None) -> keras.Model:
        """The fittest members as one model, whose output is the mean of theirs.

        Where the compiled loss takes logits (a Keras loss with `from_logits=True`), it is the
        logarithm of the mean of their probabilities, so that loss and metrics hold for it; the
        outputs of any other loss are averaged as they are. Compiled as the model is, with a
        fresh optimizer, unless the model's class has a `compute_loss`, `compute_metrics` or
        `test_step` of its own, which it would lose; predicts, saves and exports like any other.
        Penalties, of regularizers and `add_loss`, are those of all its members.

        Args:
            size: How many members. Defaults to `None`: all whose fitness is finite.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: If there are not as many members, or the model has no `inputs`.
        """
        self._check_is_fitted()
        finite = int(np.sum(np.isfinite(self._fitness)))
        size = checked_count("size", finite if size is None else size, minimum=1)
        if size > finite:
            raise ValueError(
                f"Expected an ensemble of at most {finite} members, as many as the population has "
                f"with a finite fitness. Received: size={size}"
            )
        members = []
        for rank in range(size):
            plain = population.clone(self.model, seed=0)
            plain.set_weights(self.member(rank).get_weights())
            members.append(plain)
        together = averaged(members, self.model)
        if any(
            getattr(type(self.model), name) is not getattr(keras.Model, name)
            for name in ("compute_loss", "compute_metrics", "test_step")
        ):
            return together
        return population.compiled_as(self.model, together)

    def found_schedule(self) -> keras.optimizers.schedules.PiecewiseConstantDecay:
        """The learning rates of the fittest member and its ancestors, over the steps they made.

        To train one model with. The ancestors are the fitter parents, whose learning rate a child
        inherits, and by default their weights and optimizer's state, too.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: If the learning rate does not evolve.
        """
        if "learning_rate" not in self.evolve:
            raise ValueError(
                "Gadam finds a learning rate only if it evolves: `Gadam(evolve={'learning_rate': "
                f"(1e-4, 1e-1)}})`. Received: evolve={self.evolve}"
            )
        self._check_is_fitted()
        line = self.lineage.line(self._identities[self._best()])[::-1]
        rates = [one["hyperparameters"]["learning_rate"] for one in line]
        # The rate of a step up to and including a boundary, counted from 0.
        boundaries = [one["first_step"] - 1 for one in line[1:]]
        if not boundaries:
            boundaries, rates = [line[0]["steps"] - 1], rates * 2
        return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, rates)

    def _check_is_fitted(self) -> None:
        if not self._fitness.size:
            raise RuntimeError("There are members only after `fit`.")

    # --- training ------------------------------------------------------------

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        *,
        generations: int = 10,
        epochs: int = 1,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        fitness_data: Any = None,
        validation_data: Any = None,
        validation_split: float = 0.0,
        validation_freq: int = 1,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        verbose: str | int = "auto",
        checkpoint_dir: str | None = None,
        checkpoint_freq: int = 1,
    ) -> keras.callbacks.History:
        """Trains and evolves the population; leaves the best member in the model.

        A generation is an epoch to Keras's callbacks, whose `model` holds the best member
        at its end. A second `fit` goes on with the population as it is.

        Args:
            x: Inputs: an array or tensor, or a structure of them, or a `tf.data.Dataset`
                or `keras.utils.PyDataset` of batches. Each member goes through arrays in
                an order of its own; batches of a dataset are dealt out to the members.
                `None` only where a `RayEngine` has a `data_fn`.
            y: Targets, for arrays.
            generations: How many to train; with a `checkpoint_dir` in all, those that are
                in it included. Defaults to 10.
            epochs: Of a member in a generation. Defaults to 1.
            batch_size: For arrays. Defaults to 32, or to all samples where there are fewer.
            steps_per_epoch: Batches of a member in an epoch. Defaults to one pass; a dataset that
                does not tell its length is counted once for it.
            sample_weight: For arrays, a weight for each sample.
            class_weight: A weight for each class, for models with one output and without sample
                weights. A label is rounded; one without a weight counts once.
            fitness_data: `(x, y)` or `(x, y, sample_weight)`, or a dataset of such
                batches with an end, that fitness batches are sampled from. Defaults to the
                training data.
            validation_data: As in Keras's `fit`, and with an end; reported for the best member,
                never selected on.
            validation_split: The part of the arrays, from their end, to validate on.
            validation_freq: Generations from one validation to the next. Defaults to 1.
            callbacks: Keras's, and `PopulationCallback`s.
            verbose: 0 for silence, 1 for a progress bar, 2 for a line a generation.
            checkpoint_dir: Where to save the run, and to go on where one stopped. An
                interrupted `fit` that is called again ends as if it had not been. (What
                callbacks remember is theirs. A dataset that shuffles must be made anew, with
                a seed: one that was used before shuffles in another order.)
            checkpoint_freq: Generations from one checkpoint to the next; the last is
                always saved. Defaults to 1.

        Returns:
            A history of `loss` (of the best member's last epoch), its metrics and
            `fitness` on the survival batch, `fitness_mean` and `fitness_worst` of the
            survivors, the best one's hyper-parameters that evolve, `members_not_finite` (of
            parents and children), `diversity` (mean distance of two members' weights),
            `children_survived`, and `val_*`.

        Raises:
            ValueError: If the data is empty, unequal in length, endless or not what the model
                takes, an argument is out of range, or `checkpoint_dir` is of another run.
            FloatingPointError: If no member of a generation has a finite loss.
        """
        generations = checked_count("generations", generations, minimum=1)
        checkpoint_freq = checked_count("checkpoint_freq", checkpoint_freq, minimum=1)
        validation_freq = checked_count("validation_freq", validation_freq, minimum=1)
        if self._cluster and self._cluster.safekeeping == "checkpoint_dir" and not checkpoint_dir:
            raise ValueError(
                "`RayEngine(safekeeping='checkpoint_dir')` keeps the survivors in files. Expected "
                f"a `checkpoint_dir` that all nodes share. Received: {checkpoint_dir=}"
            )
        (x, y, sample_weight), validation_data = split_off_validation(
            (x, y, sample_weight), validation_data, validation_split
        )
        self._check_callbacks(callbacks or ())
        arguments = DataArguments(
            x,
            y,
            sample_weight,
            class_weight=class_weight,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            fitness_data=fitness_data,
            fitness_samples=self.fitness_batch_size or _FITNESS_SAMPLES,
            epochs=epochs,
            members=self.population_size,
            seed=self.seed,
            data_fn=self._cluster.data_fn if self._cluster else None,
            fixed_batch_size=population.batch_size_of(self.model),
        )
        data = arguments.made()
        self._check_metric_of_fitness(data)
        verbose = 1 if verbose == "auto" else int(verbose)
        is_new = self._population is None
        everyone = self._start_population()
        everyone.use(data, arguments, checkpoint_dir)

        checkpoint = record = None
        if checkpoint_dir is not None:
            checkpoint = PopulationCheckpoint(checkpoint_dir, self._run_identity())
            record = everyone.restore(checkpoint)
        if record is not None:
            self._resume(record)
        done = self._generation
        last = generations if checkpoint_dir is not None else done + generations
        callback_list = PopulationCallbackList(
            callbacks, self, epochs=last, steps=2 * data.steps, verbose=verbose
        )

        def save(generation: int, is_last: bool) -> None:
            if checkpoint is not None and (is_last or (generation + 1) % checkpoint_freq == 0):
                everyone.save(checkpoint, self._record(callback_list.history))

        if verbose:
            self._announce(done, last)
        self.model.stop_training = False
        callback_list.on_train_begin()
        if record is not None:
            callback_list.history.history = {k: list(v) for k, v in record["history"].items()}
            callback_list.history.epoch = list(record["epochs"])
        try:
            logs = self._train_generations(
                range(done, last),
                everyone,
                data,
                Validation(validation_data, batch_size, validation_freq),
                callback_list,
                save,
                verbose=verbose,
                first_waits_for=self._first_waits_for() if is_new else None,
            )
        except BaseException:
            if self._fitness.size:
                self._load(self._best(), self.model)
            raise
        callback_list.on_train_end(logs)
        return callback_list.history

    def _train_generations(
        self,
        generations: range,
        everyone: Population[Any, Any],
        data: GenerationData,
        validation: Validation,
        callbacks: PopulationCallbackList,
        save: Callable[[int, bool], None],
        *,
        verbose: int,
        first_waits_for: str | None,
    ) -> dict[str, Any]:
        """Trains generations until the last one or until the run is to stop.

        Args:
            generations: Their numbers.
            everyone: The population.
            data: To train on and to judge by.
            validation: Of the best member, after each generation in which it is due.
            callbacks: Called for each generation.
            save: Called at the end of each with its number and whether it is the last.
            verbose: See `fit`; 0, 1 or 2.
            first_waits_for: What is done before the first step, if anything.

        Returns:
            The logs of the last generation; none if there was no generation left.
        """
        logs: dict[str, Any] = {}
        for generation in generations:
            callbacks.on_generation_begin(generation)
            progress = Progress(
                verbose,
                generation,
                generations.stop,
                2 * data.steps,
                callbacks,
                first_waits_for if generation == generations.start else None,
            )
            results = self._one_generation(generation, everyone, data.steps, progress)
            logs = {
                **self._logs(results, everyone, data.fitness_batch(generation, Phase.SURVIVAL)),
                **validation.logs(self.model, generation, callbacks),
            }
            progress.end(logs)
            details = {
                **results.details(),
                "identities": np.array(self._identities),
                **everyone.report(),
            }
            callbacks.on_generation_end(generation, logs, details)
            is_last = (
                self._has_settled(results)
                or self.model.stop_training
                or generation + 1 == generations.stop
            )
            save(generation, is_last)
            if is_last:
                break
        if not generations:
            self._load(self._best(), self.model)  # all of them were in the checkpoint
        return logs

    def _one_generation(
        self, generation: int, everyone: Population[Any, Any], steps: int, progress: Progress
    ) -> GenerationResults:
        """From parents to survivors; the model then holds the fittest.

        Args:
            generation: Its number.
            everyone: The population.
            steps: How many each member trains.
            progress: Shows the steps.
        """
        own = self._hyperparameters
        parents, parent_losses = everyone.train_parents(generation, progress, own)
        fitness = everyone.parents_fitness(parents)
        self._check_any_finite(fitness, generation, "parents")
        plan = self._breeding.plan(fitness, generation)
        inherited = self._evolution.perturbed(
            {name: values[plan.fitter] for name, values in own.items()},
            generation,
            range(self.population_size),
        )
        both, child_losses, mutated = everyone.train_children(parents, plan, progress, inherited)
        parent_fitness, child_fitness = everyone.survival_fitness(both)
        places = genetics.surviving(parent_fitness, child_fitness).numpy()
        results = GenerationResults(
            plan,
            parent_losses=parent_losses,
            child_losses=child_losses,
            parent_fitness=parent_fitness,
            child_fitness=child_fitness,
            parent_hyperparameters=own,
            child_hyperparameters=inherited,
            mutated=mutated,
            places=places,
        )
        survival = results.survival_fitness
        self._check_any_finite(survival, generation, "parents and children")

        everyone.select(both, places)
        self._fitness = survival[places].astype("float64")
        self._identities = record_generation(
            self.lineage,
            self._identities,
            plan,
            steps=steps,
            mutated=mutated,
            fitness=fitness,
            survival=survival,
            places=places,
            hyperparameters=[
                self._evolution.of_one(inherited, child) for child in range(self.population_size)
            ],
        )
        self._hyperparameters = results.surviving_hyperparameters
        self._generation = generation + 1
        self._load(self._best(), self.model)
        return results

    def _logs(
        self, results: GenerationResults, everyone: Population[Any, Any], batch: Data | list[Data]
    ) -> dict[str, Any]:
        """What the epoch of a generation logs; the metrics are those of the survival batch."""
        best, survival = self._best(), results.survival_fitness
        finite = self._fitness[np.isfinite(self._fitness)]
        return {
            "loss": float(results.surviving_losses[best]),
            **self._metrics(batch),
            "fitness": self._judge.sign * float(self._fitness[best]),
            "fitness_mean": self._judge.sign * float(np.mean(finite)),
            "fitness_worst": self._judge.sign * float(np.max(finite)),
            "members_not_finite": int(np.sum(~np.isfinite(survival))),
            "diversity": everyone.diversity(),
            "children_survived": results.children_survived,
            **{name: float(values[best]) for name, values in self._hyperparameters.items()},
        }

    def _has_settled(self, results: GenerationResults) -> bool:
        """Whether the sum of the fitness losses changed by no more than `tolerance`."""
        if self.tolerance is None:
            return False
        change = abs(float(np.sum(results.parent_fitness)) - float(np.sum(self._fitness)))
        return change <= self.tolerance

    # --- the parts -----------------------------------------------------------

    def _announce(self, done: int, last: int) -> None:
        where = f" in {self._cluster.num_workers} workers of Ray" if self._cluster else ""
        print(
            f"Gadam: {self.population_size} members of '{self.model.name}', engine "
            f"'{self.engine}'{where} ({self._engine_reason}), generations {done + 1} to {last}"
        )

    def _first_waits_for(self) -> str:
        """What is done before the first step of a population."""
        work = "Tracing the step of one member"
        if self.engine == "stacked":
            work = "Tracing the step of all members, and compiling it"
        return f"{work}, in each worker." if self._cluster else f"{work}."

    def _start_population(self) -> Population[Any, Any]:
        """Makes the first population and what trains it, once."""
        made_with = [self.model._compile_config, *self.model.trainable_variables]
        if [id(part) for part in made_with] != [id(part) for part in self._made_with]:
            raise ValueError(
                f"The model '{self.model.name}' was compiled anew, or layers were frozen, since "
                "its `Gadam` was made. Compile it with a new optimizer, and make a new "
                "`Gadam(model)`, whose first member has the model's weights."
            )
        if self._population is not None:
            return self._population
        size = self.population_size
        if self._cluster is None:
            starts = [
                population.new_member(self.model, place, self.seed, self.initializer, self.start)
                for place in range(size)
            ]
            training = Training(
                self.model,
                self.engine,
                size,
                breeding=self._breeding,
                fitness=self._judge,
                seed=self.seed,
            )
            self._population = LocalPopulation(training, starts)
        else:
            # Here, as only it needs Ray.
            from keras_gdopt.gadam.cluster.population import RayPopulation

            self._population = RayPopulation(
                self._cluster,
                self.model,
                self.engine,
                size,
                initializer=self.initializer,
                start=self.start,
                breeding=self._breeding_settings,
                fitness=self._judge,
                seed=self.seed,
            )
        self._hyperparameters = self._evolution.drawn(range(size))
        of_all = [self._evolution.of_one(self._hyperparameters, place) for place in range(size)]
        self._identities = [self.lineage.born(0, hyperparameters=own) for own in of_all]
        return self._population

    def _ranks(self) -> np.ndarray:
        finite = np.where(np.isfinite(self._fitness), self._fitness, np.inf)
        return np.argsort(finite, kind="stable")

    def _best(self) -> int:
        return int(self._ranks()[0])

    def _load(self, place: int, model: keras.Model) -> None:
        assert self._population is not None
        self._population.load(place, model)
        own = self._evolution.of_one(self._hyperparameters, place)
        if own:
            pure_step(model.optimizer).set_hyperparameters(own)

    def _metrics(self, batch: Data | list[Data]) -> dict[str, float]:
        """The compiled metrics of the model, which holds the best member."""
        self.model.reset_metrics()
        population.forget_sequences(self.model)
        for one in batch if isinstance(batch, list) else [batch]:
            values = self.model.test_on_batch(**one, return_dict=True)
        self.model.reset_metrics()
        return {name: number_or_array(value) for name, value in values.items() if name != "loss"}

    def _check_any_finite(self, losses: np.ndarray, generation: int, who: str) -> None:
        if not np.any(np.isfinite(losses)):
            raise FloatingPointError(
                f"In generation {generation} no member has a finite loss: all {len(losses)} "
                f"{who} ({', '.join(map(str, range(len(losses))))}) are at "
                f"{', '.join(sorted({str(loss) for loss in losses.tolist()}))}. Lower the learning "
                "rate, clip the gradients, or look for broken samples. With a `checkpoint_dir`, "
                "`fit` goes on from its last checkpoint."
            )

    def _check_metric_of_fitness(self, data: GenerationData) -> None:
        """Raises if there is no such metric to judge by."""
        if self._judge.name == "loss":
            return
        batch = data.first_batch()
        if isinstance(batch, list):
            raise ValueError(
                "A metric is computed on one batch, and this data has batches that differ in shape "
                "or have a fixed size. Use `fitness='loss'`, or samples of one shape as "
                f"`fitness_data`. Received: fitness={tuple(self._judge)}"
            )
        values = self._metrics(batch)
        if np.ndim(values.get(self._judge.name, np.nan)) or self._judge.name not in values:
            known = [name for name, value in values.items() if np.ndim(value) == 0]
            raise ValueError(
                "Expected `fitness` to be 'loss' or a compiled metric with one number and its "
                f"direction, one of {known}. Received: fitness={tuple(self._judge)}"
            )

    def _check_callbacks(self, callbacks: Sequence[Any]) -> None:
        """Raises for a callback that sets what evolves."""
        of_the_rate = (
            keras.callbacks.LearningRateScheduler,
            keras.callbacks.ReduceLROnPlateau,
        )
        setting = [c for c in callbacks if isinstance(c, of_the_rate)]
        if setting and "learning_rate" in self.evolve:
            raise ValueError(
                "The learning rate evolves, with one for each member, so no callback can set it. "
                "Leave the callback out, or `learning_rate` out of `evolve`. Received: "
                f"{type(setting[0]).__name__}"
            )

    # --- checkpoints ---------------------------------------------------------

    def _run_identity(self) -> dict[str, Any]:
        settings = {
            "population_size": self.population_size,
            "seed": self.seed,
            "engine": self.engine,
            "members": self._cluster.safekeeping if self._cluster else "driver",
            # `None` is how it was before there was a choice.
            "evolve": {name: list(bounds) for name, bounds in self.evolve.items()} or None,
            "perturbation": self.perturbation if self.evolve else None,
            "selection": None if self.selection == "all" else self.selection,
            "crossover": None if self.crossover == "entries" else self.crossover,
            "inherit_optimizer_state": self.inherit_optimizer_state or None,
            "fitness": None if self._judge.name == "loss" else list(self._judge),
            "start": None if self.start == "initializers" else self.start,
        }
        return identify_run(self.model, self.evolve, settings)

    def _record(self, history: keras.callbacks.History) -> dict[str, Any]:
        return {
            "generation": self._generation,
            "identities": self._identities,
            "fitness": self._fitness.tolist(),
            "hyperparameters": {n: values.tolist() for n, values in self._hyperparameters.items()},
            "learning_rate": self._step.learning_rates(),
            "history": {k: np.asarray(vs).tolist() for k, vs in history.history.items()},
            "epochs": history.epoch,
            "lineage": list(self.lineage),
        }

    def _resume(self, record: dict[str, Any]) -> None:
        self._generation = record["generation"]
        self._identities = record["identities"]
        self._fitness = np.array(record["fitness"])
        own = record.get("hyperparameters", {})  # before version 0.2.0 there were none
        self._hyperparameters = {name: np.array(values) for name, values in own.items()}
        self.lineage = Lineage(record["lineage"])
        rates = record["learning_rate"]
        # Version 0.1.0 knew of one only.
        self._step.set_learning_rates(rates if isinstance(rates, list) else [rates])


def _checked_fitness(fitness: Any) -> Fitness:
    if isinstance(fitness, str) and fitness == "loss":
        return Fitness("loss", "min")
    if (
        isinstance(fitness, (tuple, list))
        and len(fitness) == 2
        and isinstance(fitness[0], str)
        and fitness[1] in ("min", "max")
        and tuple(fitness) != ("loss", "max")
    ):
        return Fitness(*fitness)
    raise ValueError(
        "Expected `fitness` to be 'loss', or the name of a compiled metric with 'min' or 'max', "
        f"such as ('accuracy', 'max'). Received: fitness={fitness!r}"
    )


def _times_held_here(cluster: RayEngine | None) -> int:
    """How often this machine holds a member."""
    # Parents, children, what training makes of them, and what a step computes.
    where_trained = 4 if cluster is None or cluster.address is None else 0
    copied = cluster is not None and cluster.safekeeping == "driver"
    return where_trained + copied
