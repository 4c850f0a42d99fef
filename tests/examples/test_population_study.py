"""The study of populations, from its arguments to its table and picture."""

import gzip
import json

import numpy as np
import pytest

from tests.callbacks.test_event_files import read
from tests.examples import scripts
from tests.parameters import slow

SCRIPT = scripts.EXAMPLES / "population_study.py"
SMALL = "--data digits --seeds 1 --members 2 --generations 1 --epochs 1 --output study.png"

CONTENDERS = [
    "best of as many Adams",
    "random search",
    "one Adam with all the steps",
    "Gadam, as published",
    "Gadam, evolving",
]


@pytest.mark.parametrize("contenders", [CONTENDERS[1::3], slow(CONTENDERS)], ids=["two", "all"])
def test_ends_with_a_table_and_a_picture_and_goes_on(contenders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = f"{SMALL} --logdir runs --results kept.json --contenders".split() + contenders
    with scripts.imported(SCRIPT) as example:
        assert list(example.CONTENDERS) == CONTENDERS
        example.main(arguments)
        table = _table(capsys.readouterr().out)
        monkeypatch.setattr(example, "CONTENDERS", dict.fromkeys(contenders))
        example.main(arguments)  # all is kept, so nobody is called
        assert _table(capsys.readouterr().out) == table
    expected = [
        each
        for name in contenders
        for each in (name, f"{name}: ensemble")
        if each == name or name in ("random search", "Gadam, evolving")
    ]
    assert [line[:32].strip() for line in table] == expected
    assert all(0.1 < float(line[32:].split()[0]) <= 1.0 for line in table)
    populations = {path.name for path in (tmp_path / "runs").iterdir()}
    of_gadam = [name for name in contenders if name.startswith("Gadam")]
    assert populations == {f"digits, {name}, seed 100" for name in of_gadam}
    for name in populations:
        assert "best/accuracy" in read(tmp_path / "runs" / name / "population")
    assert len(json.loads((tmp_path / "kept.json").read_text())) == len(contenders)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def _table(output):
    lines = output[output.index("test accuracy     ") :].splitlines()[1:]
    return lines[: lines.index("")]


def test_p_values_are_scipy_s_by_hand():
    """Differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.46, two degrees of freedom."""
    with scripts.imported(SCRIPT) as example:
        assert example.p_value([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == "0.074"
        assert example.p_value([2.0, 4.0], [1.0, 2.0]) == ""


@pytest.mark.slow
def test_pictures_of_clothes_and_a_convolutional_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 6000), ("t10k", 300)):
        pictures = rng.integers(0, 256, count * 784, "uint8").tobytes()
        labels = (np.arange(count, dtype="uint8") % 10).tobytes()
        for name, content in (
            ("images-idx3", bytes(16) + pictures),
            ("labels-idx1", bytes(8) + labels),
        ):
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content, 1))
    with scripts.imported(SCRIPT) as example:
        data = example.fashion(tmp_path, 3)
        assert [part.shape for part in data[::2]] == [(3500, 784), (500, 784), (300, 784)]
        assert data.x.min() >= 0.0 and data.x.max() == 1.0
        arguments = SMALL.replace("digits", "fashion --fashion . --model cnn").split()
        example.main([*arguments, "--contenders", "Gadam, evolving"])


@pytest.mark.parametrize("name", ["seeds", "generations"])
def test_bad_arguments_get_one_line(name, error_of):
    assert error_of(SCRIPT, f"--{name}", 0) == f"--{name} must be at least 1; received 0"


def test_fashion_needs_its_files(error_of):
    assert "needs --fashion" in error_of(SCRIPT, "--data", "fashion")
