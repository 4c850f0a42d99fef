"""The example of Gadam, from its arguments to its table and picture."""

import pytest

from tests.callbacks.test_event_files import read
from tests.examples import scripts
from tests.parameters import slow

SCRIPT = scripts.EXAMPLES / "gadam_mnist.py"


CONTENDERS = [
    "Gadam (mutation from U(0, 1))",
    "Gadam, mutation='normal'",
    "Gadam without mutation",
    "Gadam without crossover",
    "best of as many Adams",
    "one Adam with all the steps",
]


@pytest.mark.parametrize("contenders", [slow(CONTENDERS)], ids=["all"])
def test_ends_with_a_table_and_a_picture(contenders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--seeds 1 --members 2 --generations 1 --epochs 1 --output races.png --logdir runs"
    with scripts.imported(SCRIPT) as example:
        assert list(example.CONTENDERS) == CONTENDERS
        chosen = {name: example.CONTENDERS[name] for name in contenders}
        monkeypatch.setattr(example, "CONTENDERS", chosen)
        example.main(small.split())
    output = capsys.readouterr().out
    table = output[output.index("test accuracy  ") :].splitlines()[1 : len(contenders) + 1]
    assert [line[:32].strip() for line in table] == contenders
    assert all(0.7 < float(line[32:].split()[0]) < 1.0 for line in table)
    populations = {path.name for path in (tmp_path / "runs").iterdir()}
    assert populations == {f"{name}, seed 0" for name in contenders if name.startswith("Gadam")}
    for name in populations:
        assert "best/accuracy" in read(tmp_path / "runs" / name / "population")
    assert (tmp_path / "races.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["seeds", "generations"])
def test_bad_arguments_get_one_line(name, error_of):
    assert error_of(SCRIPT, f"--{name}", 0) == f"--{name} must be at least 1; received 0"
