"""How unlike the clients are, with the arithmetic; a partition that the user brings; the picture."""

import io
import json
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from unfed.base.errors import ArtifactError, DataError
from unfed.data.given import clients_of, read_given
from unfed.data.ownership import Ownership, ownership_of
from unfed.data.partition import DEALERS, Partition, PartitionSpec, make_partition
from unfed.report.figures import panel
from unfed.report.ownership import by_owner, owns


def rows(count: int = 12, author_rows: int = 3) -> list[dict]:
    return [
        {"id": f"r{n:02}", "question": f"word{n % 5}", "answer": f"thing{n % 4}", "author": f"P{n // author_rows}"}
        for n in range(count)
    ]


def owned(*counts: tuple[int, ...]) -> Ownership:
    groups = tuple(f"g{n}" for n in range(len(counts[0])))
    return Ownership("author", groups, {f"client_{c}": n for c, n in enumerate(counts)}, {})


# --- the figure ------------------------------------------------------------------------------------------------------


def test_two_clients_with_groups_of_their_own():
    """p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): KL(p || m) = log2(4/3), KL(q || m) = (log2(2/3) + log2(2)) / 2."""
    divergence = (math.log2(4 / 3) + (math.log2(2 / 3) + 1) / 2) / 2
    found = owned((5, 0), (0, 5)).heterogeneity
    assert found.distance == pytest.approx(math.sqrt(divergence), abs=1e-12)
    assert found.size_variation == 0
    assert (found.clients, found.groups, found.by) == (2, 2, "author")


def test_clients_that_are_alike_are_at_no_distance_whatever_their_sizes():
    """Sizes 30 and 10: mean 20, standard deviation 10, so a variation of 1/2."""
    found = owned((10, 20), (5, 5)).heterogeneity, owned((10, 20), (10 // 2, 10)).heterogeneity
    assert found[0].distance > 0.05
    assert found[1].distance == pytest.approx(0, abs=1e-8)
    assert owned((30, 0), (10, 0)).heterogeneity.size_variation == pytest.approx(0.5)


def test_a_client_without_rows_counts_for_sizes_alone():
    """Sizes 4, 4, 0: mean 8/3, variance (2 (4/3)^2 + (8/3)^2) / 3 = 32/9, so sqrt(32/9) / (8/3) = sqrt(1/2)."""
    with_it, without = owned((4, 0), (0, 4), (0, 0)), owned((4, 0), (0, 4))
    assert with_it.heterogeneity.distance == pytest.approx(without.heterogeneity.distance)
    assert with_it.heterogeneity.size_variation == pytest.approx(math.sqrt(0.5))
    assert "client_2" not in with_it.distances
    empty = owned((0, 0)).heterogeneity
    assert (empty.distance, empty.size_variation) == (0.0, 0.0)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_figure_is_between_0_and_1_and_order_does_not_matter(clients, groups, random):
    table = [tuple(random.choice([0, 1, 3, 1000]) for _ in range(groups)) for _ in range(clients)]
    one, other = owned(*table).heterogeneity, owned(*[row[::-1] for row in table[::-1]]).heterogeneity
    assert 0 <= one.distance <= 1
    assert one.distance == pytest.approx(other.distance, abs=1e-7)
    assert one.size_variation == pytest.approx(other.size_variation)


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*(PartitionSpec(s) for s in DEALERS), PartitionSpec("dirichlet", over="topic")])
def test_every_row_is_counted_once(spec, tmp_path: Path):
    data, forget = rows(60, 6), ["r01", "r02", "r59"]
    made = make_partition(data, 3, spec, seed=2)
    found = ownership_of(made, data, forget)
    assert found.by == ("topic" if spec.by_topic else "author")
    assert found.sizes == {c: len(ids) for c, ids in made.clients.items()}
    assert found.table.shape == (3, len(found.groups))
    assert found.forget == {c: len(ids) for c, ids in made.owners(forget).items()}
    expected = [len(t.ids) for t in made.topics] if spec.by_topic else [6] * 10
    assert found.table.sum(axis=0).tolist() == expected
    found.write(tmp_path / "ownership.json")
    assert Ownership.read(tmp_path / "ownership.json") == found


def test_names_of_groups():
    data = rows()
    assert ownership_of(make_partition(data, 2, PartitionSpec("iid")), data).groups == ("P0", "P1", "P2", "P3")
    bare = [{k: v for k, v in r.items() if k != "author"} for r in rows(45)]
    assert ownership_of(make_partition(bare, 2, PartitionSpec("iid")), bare).groups == (
        "author 1",
        "author 2",
        "author 3",
    )
    made = make_partition(data[:9], 2, PartitionSpec("topic"))
    more = Partition({**made.clients, "late": ("r10",)}, made.scheme, 0, "", made.topics)
    assert ownership_of(more, data).groups[-1] == "no topic"
    assert ownership_of(more, data).sizes["late"] == 1, "and r09, r11 are nobody's"


def test_a_table_that_was_altered_is_refused(tmp_path: Path):
    file = tmp_path / "ownership.json"
    owned((1, 2)).write(file)
    file.write_text(file.read_text().replace('"1": 2', '"1": 3'))
    with pytest.raises(ArtifactError, match="altered"):
        Ownership.read(file)


# --- a file that the user brings -------------------------------------------------------------------------------------


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_a_plain_file_of_numbers_or_ids_is_a_partition(tmp_path: Path):
    data = rows(5)
    file = write(tmp_path / "p.json", {"hospital_b": [4, 0], "hospital_a": ["r01", 2, "r03"]})
    made = read_given(file, data)
    assert made.clients == {"hospital_b": ("r00", "r04"), "hospital_a": ("r01", "r02", "r03")}
    assert made.client_ids == clients_of(file) == ("hospital_b", "hospital_a"), "in the order of the file"
    made.write(tmp_path / "partition.json")
    assert read_given(tmp_path / "partition.json", data) == made
    assert clients_of(tmp_path / "partition.json") == made.client_ids


@pytest.mark.parametrize(("given_rows", "said"), [
    ({"a": [0, 1, 2], "b": [2, 3]}, "b: row 2 belongs to a already"),
    ({"a": [0, 1, 2], "b": [3, "r00"]}, "b: row r00 belongs to a already"),
    ({"a": [0, 1, 2], "b": [4]}, "b: 4 is no row: use numbers from 0 to 3"),
    ({"a": [0, 1, 2], "b": ["x"]}, "b: 'x' is no row"),
    ({"a": [0, 1, 2], "b": [True]}, "b: True is no row"),
    ({"a": [0, 1, 2, 3], "b": []}, "b has no rows"),
    ({"a": [0, 3]}, r"2 of 4 rows belong to no client .the first: 1"),
])  # fmt: skip
def test_a_plain_file_that_does_not_deal_every_row_once_is_refused(given_rows, said, tmp_path: Path):
    with pytest.raises(DataError, match=said):
        read_given(write(tmp_path / "p.json", given_rows), rows(4))


def test_row_numbers_are_refused_where_the_rows_are_others(tmp_path: Path):
    file = write(tmp_path / "p.json", {"a": ["r00", "r01"], "b": [2]})
    with pytest.raises(DataError, match=r"b: row numbers are those of a fine-tuning's data"):
        read_given(file, rows(3), numbers=False)
    with pytest.raises(ArtifactError, match="not a partition manifest"):
        read_given(write(tmp_path / "q.json", {"a": 3}), rows(3))


# --- the picture -----------------------------------------------------------------------------------------------------


def test_groups_stand_in_the_order_of_the_clients_that_own_most_of_them():
    table = np.array([[0, 5, 1, 9], [7, 5, 0, 0], [1, 0, 8, 0]])
    assert by_owner(table) == [3, 1, 0, 2]


@pytest.mark.parametrize(("clients", "groups"), [(1, 1), (3, 10), (60, 200)])
def test_the_picture_is_a_png_with_a_cell_for_each_client_and_group(clients, groups):
    generator = np.random.default_rng(0)
    found = owned(*[tuple(row) for row in generator.integers(0, 9, (clients, groups)).tolist()])
    draw, height = owns(found)
    assert plt.imread(io.BytesIO(panel(draw, height)), format="png").shape[0] == pytest.approx(200 * height, abs=1)
    with mpl.rc_context():
        _, axes = plt.subplots()
        draw(axes)
        shown = np.asarray(axes.images[0].get_array())
        assert shown.shape == (clients, groups)
        assert shown.sum() == found.table.sum()
        if clients == 3:
            assert [t.get_text() for t in axes.get_yticklabels()] == [f"{c} ({n})" for c, n in found.sizes.items()]
        plt.close("all")
