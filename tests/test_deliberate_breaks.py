"""The default run is worth its while: it catches thirty slips, one in each corner of the code.

Each is one that a contributor might make: a sign, a line that is gone, arguments that are
swapped. The project is copied, a slip is made in the copy, and the tests that are meant to
notice must fail there, and pass without it.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_contributing import COPIED, copy_project

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Break:
    """A slip, and the test files that should catch it."""

    name: str
    path: str
    """Of the source, from the root of the repository."""
    old: str
    """Text that is there once."""
    new: str
    tests: tuple[str, ...]


BREAKS = [
    # Update rules.
    Break(
        "nag_without_the_look_ahead",
        "keras_gdopt/optimizers/nag.py",
        "change = (move * (1 + rho) - ahead) * velocity +",
        "change = (move - ahead) * velocity +",
        ("tests/optimizers/test_nag.py",),
    ),
    Break(
        "amsgrad_forgets_the_largest_moment",
        "keras_gdopt/optimizers/adam.py",
        'ops.maximum(slots["velocity_hat"], v)',
        'ops.maximum(slots["velocity"], v)',
        ("tests/optimizers/test_rules.py",),
    ),
    Break(
        "centered_rmsprop_without_a_factor",
        "keras_gdopt/optimizers/rmsprop.py",
        "added = self.rho * (1 - self.rho) * ops.square(gradient - mean)",
        "added = (1 - self.rho) * ops.square(gradient - mean)",
        ("tests/optimizers/test_rules.py",),
    ),
    Break(
        "lookahead_goes_on_with_its_cycle_after_finalizing",
        "keras_gdopt/optimizers/lookahead.py",
        "        self._fast_updates.assign(0)\n",
        "",
        ("tests/optimizers/test_lookahead.py",),
    ),
    # The order of a step.
    Break(
        "the_first_moving_average_is_not_the_weight",
        "keras_gdopt/optimizers/dense_step.py",
        "tf.cast(step > 1, dtype)",
        "tf.cast(step > 0, dtype)",
        ("tests/optimizers/test_settings.py",),
    ),
    Break(
        "accumulation_updates_at_the_first_step",
        "keras_gdopt/optimizers/tensorflow_step.py",
        "tf.equal((iterations + 1) % accumulated, 0)",
        "tf.equal(iterations % accumulated, 0)",
        ("tests/optimizers/test_settings.py",),
    ),
    Break(
        "the_clipped_norm_leaves_out_the_rows",
        "keras_gdopt/optimizers/dense_step.py",
        "clip(list(gradients.values()), settings, common_dtype(variables), norm)",
        "clip(list(gradients.values()), settings, common_dtype(variables))",
        ("tests/optimizers/test_sparse_rows.py",),
    ),
    # Compilation.
    Break(
        "the_cluster_is_not_compiled",
        "keras_gdopt/optimizers/compilation.py",
        "tf.function(function, jit_compile=is_worth_compiling(tensors), autograph=False)",
        "tf.function(function, autograph=False)",
        ("tests/optimizers/test_compilation.py",),
    ),
    Break(
        "a_new_learning_rate_compiles_anew",
        "keras_gdopt/optimizers/base.py",
        'is_built_in = not name.startswith("_") and name != "learning_rate"',
        'is_built_in = not name.startswith("_")',
        ("tests/optimizers/test_compilation.py",),
    ),
    # Sparse rows.
    Break(
        "repeated_rows_are_not_merged",
        "keras_gdopt/optimizers/sparse_rows.py",
        "rows, positions = tf.unique(gradient.indices)",
        "rows, positions = gradient.indices, tf.range(tf.size(gradient.indices))",
        ("tests/optimizers/test_sparse_rows.py",),
    ),
    # Saved state.
    Break(
        "state_with_more_slots_is_accepted",
        "keras_gdopt/optimizers/saved_state.py",
        "if saved == own:",
        "if saved >= own:",
        ("tests/optimizers/test_saved_state.py",),
    ),
    Break(
        "state_is_not_restored_in_build",
        "keras_gdopt/optimizers/base.py",
        "        self._restore_loaded_state()\n",
        "",
        ("tests/optimizers/test_saved_state.py",),
    ),
    # Line searches and closures.
    Break(
        "any_negative_slope_is_flat",
        "keras_gdopt/closures/line_search.py",
        "flat = tf.abs(trial.slope) <= -curvature * start.slope",
        "flat = trial.slope <= -curvature * start.slope",
        ("tests/closures/test_line_search.py",),
    ),
    Break(
        "lbfgs_keeps_a_pair_without_curvature",
        "keras_gdopt/closures/lbfgs.py",
        "kept = product > machine_epsilon",
        "kept = product >= 0 * machine_epsilon",
        ("tests/closures/test_convergence.py",),
    ),
    Break(
        "beta_divides_by_the_new_gradient",
        "keras_gdopt/closures/conjugate_gradient.py",
        "scale = norm(before.gradient)",
        "scale = norm(after.gradient)",
        ("tests/closures/test_convergence.py",),
    ),
    Break(
        "a_smaller_last_chunk_counts_as_much",
        "keras_gdopt/closures/batch_loss.py",
        "value * tf.cast(size / count, self.dtype)",
        "value / self.chunks",
        ("tests/closures/test_batch_loss.py",),
    ),
    # Genetics and breeding.
    Break(
        "children_of_fit_parents_mutate_more",
        "keras_gdopt/gadam/genetics.py",
        "mutation_rate * tf.maximum(1.0 - of_both, 0.0)",
        "mutation_rate * tf.maximum(of_both, 0.0)",
        ("tests/gadam/test_genetics.py",),
    ),
    Break(
        "state_comes_from_the_less_fit_parent",
        "keras_gdopt/gadam/breeding.py",
        "fitness[:, 1] < fitness[:, 0]",
        "fitness[:, 1] > fitness[:, 0]",
        ("tests/gadam/test_breeding.py",),
    ),
    # Engines.
    Break(
        "members_do_not_count_their_steps",
        "keras_gdopt/optimizers/pure_step.py",
        "return moved, new, batches + 1",
        "return moved, new, batches",
        ("tests/gadam/test_training.py",),
    ),
    Break(
        "members_are_judged_as_in_training",
        "keras_gdopt/gadam/engine.py",
        "Batch(**batch), training=False)",
        "Batch(**batch), training=True)",
        ("tests/gadam/test_training.py",),
    ),
    # Data and driver.
    Break(
        "the_last_batch_repeats_the_first_samples",
        "keras_gdopt/gadam/array_data.py",
        "rest = order[None, :, needed : needed + self._rest]",
        "rest = order[None, :, : self._rest]",
        ("tests/gadam/test_driver.py",),
    ),
    Break(
        "the_worst_member_is_left_in_the_model",
        "keras_gdopt/gadam/driver.py",
        "return int(self._ranks()[0])",
        "return int(self._ranks()[-1])",
        ("tests/gadam/test_driver.py",),
    ),
    Break(
        "a_resumed_run_forgets_who_its_members_are",
        "keras_gdopt/gadam/driver.py",
        '        self._identities = record["identities"]\n',
        "",
        ("tests/gadam/test_checkpoint.py",),
    ),
    # Checkpoints and cluster.
    Break(
        "the_oldest_checkpoint_is_tried_first",
        "keras_gdopt/gadam/checkpoint.py",
        "for path in reversed(paths):",
        "for path in paths:",
        ("tests/gadam/test_checkpoint.py",),
    ),
    Break(
        "every_worker_trains_with_the_first_places",
        "keras_gdopt/gadam/cluster/worker.py",
        "            self._fill_up(shard.places),\n            shard.generation,",
        "            range(self._training.count),\n            shard.generation,",
        ("tests/gadam/test_cluster.py",),
    ),
    # Callbacks.
    Break(
        "a_restart_keeps_the_event_of_its_first_step",
        "callbacks/event_files.py",
        "if event.step < step or",
        "if event.step <= step or",
        ("tests/callbacks/test_event_files.py",),
    ),
    Break(
        "patience_adds_up_epochs_that_are_apart",
        "callbacks/convergence_stopping.py",
        "self._held[name] + 1 if reason else 0",
        "self._held[name] + bool(reason)",
        ("tests/callbacks/test_convergence_stopping.py",),
    ),
    # Losses, initializers and arguments.
    Break(
        "the_true_class_has_a_term_of_its_own",
        "keras_gdopt/losses.py",
        "losses = ops.sum(ops.where(is_true, 0.0, terms), axis=-1)",
        "losses = ops.sum(terms, axis=-1)",
        ("tests/test_losses.py",),
    ),
    Break(
        "a_unit_has_a_weight_too_many",
        "keras_gdopt/initializers.py",
        "places < self.non_zero",
        "places <= self.non_zero",
        ("tests/test_initializers.py",),
    ),
    Break(
        "an_open_bound_is_allowed",
        "keras_gdopt/optimizers/argument_checks.py",
        "number > above",
        "number >= above",
        ("tests/optimizers/test_arguments.py",),
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project, where it can be broken."""
    root = tmp_path_factory.mktemp("project")
    copy_project(root)
    return root


def _placed(path):
    """Where a file of the repository is in the copy."""
    source = path.partition("/")[0]
    return COPIED[source] + path.removeprefix(source)


def _pytest(root, *arguments):
    env = {**os.environ, "PYTHONPATH": str(root)}
    env.pop("XLA_FLAGS", None)  # as the default run compiles, see `conftest.py`
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *arguments,
        ],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_are_thirty_in_all_and_each_can_be_made():
    assert len({broken.name for broken in BREAKS}) == len(BREAKS) == 30
    for broken in BREAKS:
        count = (ROOT / broken.path).read_text().count(broken.old)
        assert count == 1, (
            f"{broken.path} has {broken.old!r} {count} times, expected once: the code has changed, "
            f"so write the break '{broken.name}' anew"
        )


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name)
def test_the_default_run_catches(broken, copy):
    file = copy / _placed(broken.path)
    whole = file.read_text()
    try:
        file.write_text(whole.replace(broken.old, broken.new))
        run = _pytest(copy, *broken.tests)
    finally:
        file.write_text(whole)
    shown = f"{run.stdout[-3000:]}\n{run.stderr[-1000:]}"
    tests = ", ".join(broken.tests)
    assert run.returncode != 0, (
        f"{tests} passes although in {broken.path} {broken.old!r} became {broken.new!r}: a test "
        "that caught it is gone, or is marked slow"
    )
    assert run.returncode == 1, f"{tests} could not run (exit status {run.returncode}):\n{shown}"
    # A fixture that raises has this exit status, too.
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    assert failed, f"No test of {tests} failed, but something before it:\n{shown}"
    again = _pytest(copy, failed[1])
    assert again.returncode == 0, (
        f"{failed[1]} fails without the break, too, so it says nothing of it:\n"
        f"{again.stdout[-3000:]}"
    )
