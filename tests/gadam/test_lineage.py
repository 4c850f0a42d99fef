"""Who descends from whom, and how it is written down."""

from keras_gdopt.gadam import Lineage


def _family():
    lineage = Lineage()
    first, second, third = (lineage.born(0) for _ in range(3))
    child = lineage.born(1, parents=[first, second], crossover_probability=0.5)
    grandchild = lineage.born(2, parents=[child, third])
    return lineage, grandchild


def test_ancestry_holds_each_ancestor_once_youngest_first():
    lineage, grandchild = _family()
    inbred = lineage.born(3, parents=[grandchild, grandchild])
    assert [one["id"] for one in lineage.ancestry(grandchild)] == [4, 3, 2, 1, 0]
    assert [one["id"] for one in lineage.ancestry(inbred)] == [5, 4, 3, 2, 1, 0]
    assert [one["id"] for one in lineage.ancestry(1)] == [1]


def test_the_first_fitness_is_the_one_it_was_born_with():
    lineage, grandchild = _family()
    lineage.selected(grandchild, 1, 0.5, True)
    lineage.selected(grandchild, 2, 0.25, False)
    assert lineage[grandchild]["fitness"] == 0.5
    assert lineage[grandchild]["selections"] == [[1, 0.5, True], [2, 0.25, False]]


def test_json_lines_there_and_back(tmp_path):
    lineage, _ = _family()
    lineage.to_json_lines(tmp_path / "family.jsonl")
    assert len((tmp_path / "family.jsonl").read_text().splitlines()) == 5
    assert list(Lineage.from_json_lines(tmp_path / "family.jsonl")) == list(lineage)
