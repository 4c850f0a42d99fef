"""The example of closure optimizers, from its arguments to its table and picture."""

import pytest

from tests.examples import scripts

SCRIPT = scripts.EXAMPLES / "regression_to_precision.py"


@pytest.mark.slow
def test_ends_with_a_table_and_a_picture(tmp_path, output_of):
    pytest.importorskip("sklearn")
    # Two units, little to compile; from these weights all end in the same minimum.
    arguments = ("--units", 2, "--l2", 0.1, "--seed", 1, "--evaluations", 600)
    output = output_of(SCRIPT, *arguments)
    lines = output[output.index("final loss") :].splitlines()[1:7]
    table = {
        name: [float(n.replace(",", "")) for n in rest] for name, *rest in map(str.split, lines)
    }
    adam, *others = table
    assert adam.startswith("Adam(")
    assert others == [
        "ConjugateGradient",
        "Newton(solver='cg')",
        "LBFGS",
        "BFGS",
        "LevenbergMarquardt",
    ]
    for name in others:
        _, above, gradient_norm, evaluations, seconds, _ = table[name]
        # Levenberg-Marquardt's steps leave out the curvature of residuals, which stay large here.
        is_slow = name == "LevenbergMarquardt"
        assert above < (1e-6 if is_slow else 1e-14)
        assert gradient_norm < (1e-3 if is_slow else 1e-9)
        assert evaluations <= 600 + is_slow  # its last step tries two
        assert seconds > 0
    products = int(output.split("Newton(solver='cg'): ")[-1].split()[0])
    assert 0 < products < table["Newton(solver='cg')"][3]
    assert (tmp_path / "runs" / "regression_to_precision.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--evaluations", 0), "--evaluations must be at least 1; received 0"),
        (("--l2", -1), "--l2 must not be negative; received -1.0"),
        (("--logdir", "file/runs"), "cannot write to --logdir file/runs: Not a directory"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tmp_path, error_of):
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("in the way")
    assert error_of(SCRIPT, *arguments) == f"regression_to_precision: error: {message}"
