"""The example of embeddings, from its arguments to its table and picture."""

import numpy as np
import pytest

from tests.examples import scripts

SCRIPT = scripts.EXAMPLES / "embeddings.py"
TRAIN = "earn\tprofit up profit\ncrude\toil price up\nearn\tnet profit\ncrude\toil oil\n"
TEST = "crude\tthe oil\nearn\tprofit fell\nship\tnot a label to train on\n"


def _table(output):
    lines = output[output.index("test accuracy") :].splitlines()[1:]
    rows = lines[: lines.index("")]
    return {row[:16].strip(): [float(n) for n in row[16:].split()] for row in rows}


@pytest.fixture(scope="module")
def example():
    with scripts.imported(SCRIPT) as module:
        yield module


@pytest.mark.slow
def test_ends_with_a_table_and_a_picture(tmp_path, output_of):
    """On the built-in texts; exact equals dense gradients, the others do not."""
    pytest.importorskip("sklearn")
    small = ("--epochs", 2, "--texts", 600, "--words", 300, "--steps", 4)
    output = output_of(SCRIPT, *small)
    assert "600 texts to train on" in output and " 300 words\n" in output
    table = _table(output)
    assert list(table) == ["Adam, exact", "Adam, lazy", "Adam, Keras"]
    for accuracy, loss, milliseconds, _ in table.values():
        assert 0.25 < accuracy < 1
        assert 0 < loss < np.log(4)
        assert milliseconds > 0
    exact, lazy, of_keras = (row[-1] for row in table.values())
    assert exact < 1e-5
    assert lazy > 0.01 and of_keras > 0.01
    for name in ("embeddings", "embeddings_first_steps"):
        assert (tmp_path / "runs" / f"{name}.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
def test_texts_of_ones_own(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text(TRAIN)
    (tmp_path / "mine" / "test.txt").write_text(TEST)
    arguments = "--data mine --rules Adagrad --epochs 9 --steps 1"
    example.main(arguments.split())
    output = capsys.readouterr().out
    assert "mine: 4 texts to train on, 2 to test with, 2 labels, 7 words" in output
    table = _table(output)
    assert list(table) == ["Adagrad, exact", "Adagrad, lazy", "Adagrad, Keras"]
    assert {row[0] for row in table.values()} == {1.0}


def test_a_folder_for_each_label(example, tmp_path):
    for label in ("ham", "spam"):
        (tmp_path / label / "2003").mkdir(parents=True)
        for number in range(5):
            name = tmp_path / label / "2003" / f"{number}.txt"
            name.write_bytes(f"{label} caf\u00e9 {number}".encode("latin-1"))
    train, test = example.given_texts(tmp_path, seed=0)
    assert (len(train), len(test)) == (8, 2)
    assert len({*train, *test}) == 10
    assert all(text.startswith(f"{label} caf") for label, text in train + test)


def test_words_become_ids_by_their_frequency(example):
    train = [("b", "One two, TWO three?"), ("a", "two one 4")]
    data = example.as_ids(train, [("a", "one four"), ("c", "one")], words=4)
    assert data.words == 4 and data.labels == ["a", "b"]
    assert data.x_train[:, :5].tolist() == [[3, 2, 2, 1, 0], [2, 3, 0, 0, 0]]
    assert data.y_train.tolist() == [1, 0]
    assert data.x_test[:, :3].tolist() == [[3, 1, 0]] and data.y_test.tolist() == [0]


def test_docstrings_give_nothing_away(example, tmp_path):
    """The prose of three, one of them too short; no names, sections and examples."""
    prose = "One two three four five six seven eight nine ten"
    (tmp_path / "module.py").write_text(
        f'''
"""{prose} NumPy arrays, numpy_like; np.dot of an input."""

class A:
    """{prose}
    eleven.

    Parameters
    ----------
    size : int
    """

    def a(self):
        """{prose}: twelve

        >>> 13
        """

def b():
    """Too short.

    Args:
        size: {prose}
    """
'''
    )
    assert list(example._prose(tmp_path / "module.py")) == [
        f"{prose.lower()} arrays like dot of an input",
        f"{prose.lower()} eleven",
        f"{prose.lower()} twelve",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rules", "Adam", "Magic"), "unknown --rules Magic; expected some of Adam RMSprop"),
        (("--words", 2), "--words must be at least 3; received 2"),
        (("--logdir", "file/runs"), "cannot write to --logdir file/runs: Not a directory"),
        (("--data", "nowhere"), "cannot read nowhere: No such file or directory"),
        (("--data", "half"), "cannot read half/test.txt: No such file or directory"),
        (("--data", "empty"), "--data empty needs texts of at least two labels"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tmp_path, error_of):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.txt").write_text(TRAIN)
    assert error_of(SCRIPT, *arguments).startswith(f"embeddings: error: {message}")
