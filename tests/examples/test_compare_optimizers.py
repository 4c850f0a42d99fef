"""The main job, from its arguments to its table and picture."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from tests.callbacks.test_optimizer_tensorboard import read
from tests.examples import scripts
from tests.optimizer_cases import optimizer_classes
from tests.parameters import slow

SCRIPT = scripts.EXAMPLES / "compare_optimizers.py"


def _table(output):
    """The rows of the table at the end, {optimizer: numbers}."""
    lines = output[output.index("final training loss") :].splitlines()[1:]
    rows = [line.split() for line in lines[: lines.index("")]]
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def _hparams(log_dir):
    """The hyper-parameters of a run, as TensorBoard's HParams tab reads them."""
    accumulator = EventAccumulator(str(log_dir))
    accumulator.Reload()
    content = accumulator.PluginTagToContent("hparams")[metadata.SESSION_START_INFO_TAG]
    return metadata.parse_session_start_info_plugin_data(content).hparams


@pytest.mark.parametrize("names", [("Adam", "NAG", "Lookahead"), slow(())], ids=["some", "all"])
def test_races_optimizers_of_the_package(names, tmp_path, output_of):
    pytest.importorskip("sklearn")
    output = output_of(SCRIPT, "--epochs", 2, *(["--optimizers", *names] if names else []))
    table = _table(output)
    assert set(table) == set(names or (cls.__name__ for cls in optimizer_classes()))
    (folder,) = (tmp_path / "runs").iterdir()
    for name, (loss, accuracy, milliseconds) in table.items():
        assert 0 < loss < 5
        assert milliseconds > 0
        assert list(read(folder / name)["optimizer/grad_norm"]) == list(range(10, 91, 10))
        epochs = read(folder / name, "epoch_")
        assert epochs["epoch_loss"][90] == pytest.approx(loss, abs=1e-4)
        assert epochs["epoch_val_accuracy"][90] == pytest.approx(accuracy, abs=1e-4)
        hparams = _hparams(folder / name)
        assert hparams["optimizer"].string_value == name
        assert hparams["learning_rate"].number_value > 0
    assert (folder / "losses.png").stat().st_size > 10_000


@pytest.mark.slow
def test_same_weights_and_batches_for_everyone(tmp_path, output_of):
    """A second race with the same seed, in another order, gives the same losses."""
    pytest.importorskip("sklearn")
    losses = []
    for i, order in enumerate((["Adam", "Momentum"], ["momentum", "adam"])):
        arguments = ["--data", "breast_cancer", "--epochs", 1, "--seed", 3]
        output = output_of(
            SCRIPT, *arguments, "--logdir", tmp_path / str(i), "--optimizers", *order
        )
        losses.append({name: numbers[0] for name, numbers in _table(output).items()})
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "stars"], "unknown --data 'stars'; expected one of digits, mnist"),
        (
            ["--optimizers", "Adam", "Magic"],
            "unknown --optimizers Magic; expected some of NAG",
        ),
        (["--epochs", "0"], "--epochs must be at least 1; received 0"),
        (["--seed", "-1"], "--seed must not be negative; received -1"),
        (["--logdir", "file/runs"], "cannot write to --logdir file/runs: Not a directory"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tmp_path, error_of, capsys):
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("in the way")
    assert error_of(SCRIPT, *arguments).startswith(f"compare_optimizers: error: {message}")
    assert not capsys.readouterr().out
