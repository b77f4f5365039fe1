"""What is said of two sets: how they are described, what is pointed out, published rows, and the table."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lion_triton.evaluation import record, table
from lion_triton.evaluation.memorising import Nearest, Training
from lion_triton.evaluation.published import REFERENCES, published
from lion_triton.evaluation.record import Remarks
from lion_triton.evaluation.sets import Preparation, fingerprint, open_clouds
from lion_triton.kernels import pairwise_chamfer
from tests.evaluation import clouds, source
from tests.evaluation.test_sets import layout


def described(points: np.ndarray, among: int | None = None) -> dict[str, Any]:
    x = torch.from_numpy(points)
    return record.described(source(points), points, pairwise_chamfer(x, x), len(points) if among is None else among)


def test_a_set_is_described_as_it_was_compared() -> None:
    # Boxes of 4 x 2 x 1 around (1, 0, 0) and (2, 0, 0), and one that is larger and far off.
    box = np.array([[-2, -1, 0.5], [2, 1, -0.5]], np.float32)
    points = np.stack([box + np.array([1, 0, 0]), box + np.array([2, 0, 0]), 3 * box + 30]).astype(np.float32)
    got = described(points)
    assert got == {
        "source": "mine",
        "clouds": 3,
        "points": 2,
        "sha256": hashlib.sha256(points.astype("<f4").tobytes()).hexdigest(),
        "size": [4, 2, 1],
        "size_error": pytest.approx([x * 0.9291 / 3**0.5 for x in (4, 2, 1)], rel=1e-3),  # quartiles: 1 and 2 boxes
        "center": [2, 0, 0],
        "center_error": pytest.approx([x * 0.9291 / 3**0.5 for x in (14.5, 15, 15)], rel=1e-3),
        "nearest_other": 2,  # one apart, squared, both ways
        "repeated": 0,
        "outside_sphere": 1,
    }
    assert described(points[:1])["nearest_other"] is None
    assert described(points[[0, 2, 1]])["nearest_other"] == 2
    # Of two of four clouds, the first and the third: without those that are nearest.
    assert described(points[[0, 1, 2, 2]], among=2)["nearest_other"] > 1000
    assert described(points[[0, 2, 1, 2]], among=2)["nearest_other"] == 2


def test_the_error_of_a_median_is_that_of_many_such_sets() -> None:
    rng = np.random.default_rng(0)
    sets = [np.stack([np.zeros((40, 3)), rng.normal(5, 1, (40, 3))], 1).astype(np.float32) for _ in range(200)]
    got = [described(points) for points in sets]
    spread = np.std([of["size"] for of in got], axis=0)
    np.testing.assert_allclose(np.mean([of["size_error"] for of in got], axis=0), spread, rtol=0.2)
    np.testing.assert_allclose(np.mean([of["center_error"] for of in got], axis=0), spread / 2, rtol=0.2)


def test_clouds_that_equal_an_earlier_one_and_points_outside_the_sphere_are_counted() -> None:
    points = np.zeros((4, 5, 3), np.float32)
    points[1, 0] = points[3, 0] = 0.3, 0.3, 0.3  # 0.52 from the origin, though in the box
    points[2, 0] = 0.5, 0, 0  # on the sphere
    got = described(points)
    assert got["repeated"] == 1
    assert got["outside_sphere"] == pytest.approx(2 / 20)
    assert described(points[[0, 0, 0, 1]])["repeated"] == 2


GOOD: dict[str, Any] = {
    "clouds": 50,
    "points": 64,
    "size": [0.8, 1.0, 0.4],
    "size_error": [0.0, 0.0, 0.0],
    "center": [0.0, 0.0, 0.1],
    "center_error": [0.0, 0.0, 0.0],
    "nearest_other": 0.02,
    "repeated": 0,
    "outside_sphere": 0.09,
}


def remarks(samples: dict[str, Any], references: dict[str, Any], norm_box: bool = False) -> Remarks:
    found = Remarks()
    record.remark_on_sets(GOOD | samples, GOOD | references, norm_box, found)
    return found


@pytest.mark.parametrize(
    "samples",
    [
        {},
        {"size": [1.0, 1.2, 0.2]},
        {"size": [0.6, 0.8, 0.6]},
        {"center": [0.1, -0.1, 0.2]},
        {"nearest_other": 0.0101},
        {"nearest_other": 5.0},
        {"size": [1.6, 2.0, 0.8], "size_error": [0.26, 0.26, 0.26]},  # differs by less than four errors
        {"center": [0.0, 1.0, 0.0], "center_error": [0.0, 0.26, 0.0]},
    ],
)
def test_of_two_good_sets_nothing_is_pointed_out(samples: dict[str, Any]) -> None:
    assert remarks(samples, {}) == Remarks()


def test_of_few_clouds_none_is_called_alike() -> None:
    for count, near, warned in ((10, 0.0099, True), (9, 0.0099, False), (1, None, False)):
        few = {"clouds": count, "nearest_other": near}
        assert bool(remarks(few, {"clouds": count, "nearest_other": near and 0.02}).warnings) == warned


def test_the_errors_of_both_sets_count() -> None:
    for errors in ((0.2, 0.0), (0.0, 0.2), (0.15, 0.15)):
        both = [{"size_error": [error] * 3} for error in errors]
        assert remarks({"size": [1.6, 1.0, 0.4], **both[0]}, both[1]) == Remarks()  # 0.8, and at most four times 0.21
        assert remarks({"size": [1.7, 1.0, 0.4], **both[0]}, both[1]).warnings


def test_of_sets_too_small_to_measure_none_is_called_unlike() -> None:
    double = {"size": [1.6, 2.0, 0.8], "nearest_other": None}
    for count, warned in ((3, False), (4, True)):
        assert bool(remarks(double | {"clouds": count}, {}).warnings) == warned
        assert bool(remarks(double, {"clouds": count}).warnings) == warned


def test_references_that_are_training_shapes_are_warned_of() -> None:
    points, found = clouds(6, 40, 0), Remarks()
    training = Training.read(source(points[:4], "training"), Preparation(None, 0), 8)  # fewer points than they have
    record.remark_on_leaks([*map(fingerprint, points[4:])], training, found)
    assert found == Remarks()
    record.remark_on_leaks([*map(fingerprint, points[2:])], training, found)
    assert found.warnings == ["2 of 4 references are training shapes: the figures reward copies."]


def test_with_boxes_fitted_fitting_them_is_no_advice() -> None:
    (warning,) = remarks({"size": [0.4, 1.0, 0.8]}, {}, norm_box=True).warnings
    assert warning.endswith("are axes and proportions the same?")


def test_samples_that_are_references_are_warned_of() -> None:
    points = clouds(6, 4, 0)

    def warnings(samples: np.ndarray, references: np.ndarray, accuracy: float) -> list[str]:
        found = Remarks()
        record.remark_on_copies([*map(fingerprint, samples)], [*map(fingerprint, references)], accuracy, found)
        assert not found.notes
        return found.warnings

    assert warnings(points[:3], points[3:], 0.4) == []
    assert warnings(points[[0, 0, 1, 2]], points[[5, 0, 1]], 0.4) == ["3 of 4 samples equal a reference."]
    many = np.concatenate([clouds(200, 1, 1)] * 2)
    assert warnings(clouds(200, 1, 2), many[:200], 0.40) == []
    (warning,) = warnings(clouds(200, 1, 2), many[:200], 0.39)
    assert warning.startswith("1-NNA of 0.390 is far below its best value, 0.499")
    assert warnings(clouds(50, 1, 2), many[:50], 0.30) == []  # fewer are more often so by chance
    assert warnings(clouds(50, 1, 2), many[:50], 0.29)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"size": [1.1, 1.0, 0.4]}, "Samples measure 1.1 x 1 x 0.4 around (0, 0, 0.1)"),
        ({"size": [0.8, 0.7, 0.4]}, "Samples measure 0.8 x 0.7 x 0.4"),
        ({"size": [0.8, 0.4, 1.0]}, "are units, axes and origin the same?"),
        ({"size": [1.6, 2.0, 0.8]}, "--norm-box takes away place and size"),
        ({"center": [0.0, 0.2, 0.1]}, "references 0.8 x 1 x 0.4 around (0, 0, 0.1)"),
        ({"center": [0.0, 0.0, -0.1]}, "around (0, 0, -0.1), references"),
    ],
)
def test_other_units_axes_and_places_are_warned_of(samples: dict[str, Any], words: str) -> None:
    (warning,) = remarks(samples, {}).warnings
    assert warning.startswith("Samples measure ")
    assert words in warning


@pytest.mark.parametrize(("side", "warned"), [(0.09, True), (0.11, False), (19.0, False), (21.0, True)])
def test_units_that_the_approximate_emd_is_not_made_for_are_warned_of(side: float, warned: bool) -> None:
    measures = {"size": [side / 2, side, side / 3], "center": [0.0, 0.0, 0.0]}
    found = remarks(measures, measures).warnings
    assert [f"References are {side:.2g} long" in warning for warning in found] == [True] * warned


def test_size_and_place_are_measured_by_the_references() -> None:
    """0.2 more are much for small references, and little for large ones."""
    small, large = [[0.1, 0.2, 0.1], [4.0, 2.0, 1.0]]
    for key, more in (("size", [0.2, 0.2, 0.2]), ("center", [0.0, 0.2, 0.0])):
        for size, warned in ((small, True), (large, False)):
            references = {"size": size, "center": [0.0, 0.0, 0.0]}
            samples = references | {key: [a + b for a, b in zip(references[key], more, strict=True)]}
            assert bool(remarks(samples, references).warnings) == warned, (key, size)
    # Samples of another size than the references', large though they are themselves.
    assert remarks({"size": [9.0, 9.0, 9.0]}, {"size": [7.0, 7.0, 7.0]}).warnings


def test_samples_that_resemble_each_other_are_warned_of() -> None:
    (warning,) = remarks({"nearest_other": 0.0099}, {}).warnings
    assert warning.startswith(
        "Samples resemble each other: their median distance to the nearest other sample is 0.0099"
    )
    assert "nearest other reference 0.02" in warning


def test_repeated_clouds_are_warned_of() -> None:
    assert remarks({"repeated": 3}, {}) == Remarks(warnings=["3 of 50 samples equal an earlier one."])
    assert remarks({}, {"repeated": 4}) == Remarks(warnings=["4 of 50 references equal an earlier one."])


def test_points_outside_the_sphere_of_jsd_are_noted() -> None:
    for samples, references in ((0.11, 0.04), (0.04, 0.11)):
        found = remarks({"outside_sphere": samples}, {"outside_sphere": references})
        assert not found.warnings
        (note,) = found.notes
        assert note.startswith(f"{samples:.0%} of the points of samples and {references:.0%} of references lie outside")


def test_copies_are_warned_of_where_the_references_have_fewer() -> None:
    def warnings(samples: int, references: int, count: int = 100) -> list[str]:
        found = Remarks()
        memory = {"samples_as_near_as_two_draws": samples, "references_as_near_as_two_draws": references}
        record.remark_on_memorising(memory, 200, count, found)
        assert not found.notes
        return found.warnings

    assert warnings(0, 0) == warnings(20, 0) == warnings(40, 10) == warnings(0, 100) == []
    (warning,) = warnings(45, 11, 100)
    assert warning.startswith(
        "45 of 200 samples are as near to a training shape as two draws of its points are, and 11"
    )
    assert "11 of 100 references: were training shapes memorised?" in warning
    assert warnings(45, 11, 50) == []


def test_sets_of_other_sizes_are_noted() -> None:
    few = {"clouds": 3, "nearest_other": 0.02}
    assert remarks({"clouds": 7}, few) == Remarks(
        notes=["7 samples against 3 references: all are compared; the best 1-NNA is 0.533 at these sizes, not 0.5."]
    )
    (note,) = remarks(few, {"clouds": 7}).notes
    assert note.endswith("these sizes, not 0.5; COV is at most 0.429.")
    (note,) = remarks({"clouds": 50}, {"clouds": 60}).notes  # 1-NNA is 0.499 at best
    assert note == "50 samples against 60 references: all are compared; COV is at most 0.833."


def near(*distances: float) -> Nearest:
    index = np.arange(len(distances))[::-1].copy()
    return Nearest(index, np.array(distances, np.float32), np.zeros((len(distances), 1, 3), np.float32))


def test_the_nearest_of_each_sample_and_reference() -> None:
    samples, references = source(clouds(2, 4, 0)).clouds, source(clouds(3, 4, 1)).clouds
    cross = np.array([[5, 1, 4], [6, 2, 3]], np.float32)
    training = Training.read(source(clouds(2, 4, 2)), Preparation(None, 0), 4)
    assert record.per_sample(samples, references, cross, training, near(7, 8)) == [
        {"sample": "0", "reference": "1", "reference_index": 1, "reference_distance": 1}
        | {"training": "1", "training_index": 1, "training_distance": 7},
        {"sample": "1", "reference": "1", "reference_index": 1, "reference_distance": 2}
        | {"training": "0", "training_index": 0, "training_distance": 8},
    ]
    assert record.per_reference(samples, references, cross, near(7, 8, 9)) == [
        {"reference": "0", "sample": "0", "sample_index": 0, "sample_distance": 5}
        | {"covered": False, "training_distance": 7},
        {"reference": "1", "sample": "0", "sample_index": 0, "sample_distance": 1}
        | {"covered": True, "training_distance": 8},
        {"reference": "2", "sample": "1", "sample_index": 1, "sample_distance": 3}
        | {"covered": False, "training_distance": 9},
    ]
    assert "training" not in record.per_sample(samples, references, cross, None, None)[0]
    assert "training_distance" not in record.per_reference(samples, references, cross, None)[0]


def test_published_rows_are_in_per_cent_and_cannot_be_beyond_their_best() -> None:
    """Were 1-NNA and COV exchanged, a row would be better than any can be."""
    for category in REFERENCES:
        rows = [row.to_json() for row in published(category)]
        assert {"LION", "PVD", "PointFlow"} <= {row["method"] for row in rows}
        for row in rows:
            assert row.keys() == {"method", *table.PUBLISHED, "split"}
            for name in table.PUBLISHED:
                value = row[name]
                if value is not None:
                    assert isinstance(value, float)
                    assert 50 <= value <= 100 if name.startswith("1nna") else 1 < value < 60, row
    lion = {row.method: row.to_json() for row in published("airplane")}["LION"]
    assert lion == {
        "method": "LION",
        "1nna_cd": 67.41,
        "1nna_emd": 61.23,
        "cov_cd": 47.16,
        "cov_emd": 49.63,
        "split": "first10k",
    }
    assert published("bathtub") == published(None) == ()


@pytest.mark.parametrize(
    ("category", "count", "points", "subset", "expected"),
    [
        ("03001627", 3, (2048, 2048), "test", ["of 662 references, these of 3"]),
        ("02691156", 405, (2048, 2048), "test", []),
        ("02691156", 405, (2048, 2000), "test", ["of clouds of 2048 points, these of 2048 and 2000"]),
        ("02691156", 405, (2048, 2048), "val", ["of the test shapes, these of val"]),
    ],
)
def test_what_keeps_figures_from_comparing_with_published_ones(
    tmp_path: Path, category: str, count: int, points: tuple[int, int], subset: str, expected: list[str]
) -> None:
    path = layout(tmp_path, clouds(count, 1, 0), subset=subset, category=category)
    references = open_clouds("reference", str(path), subset)  # type: ignore[arg-type]
    found = Remarks()
    rows = record.published_rows(references.clouds, points, True, found)
    assert rows["category"] == {"03001627": "chair", "02691156": "airplane"}[category]
    assert rows["published"]
    assert rows["published_source"]
    assert found == Remarks(notes=[f"Published figures are {words}." for words in expected])


def test_published_rows_are_those_of_shapenet_in_its_own_units(tmp_path: Path) -> None:
    for name, known in (("04256520", "sofa"), ("airplane", None)):
        opened = open_clouds("reference", str(layout(tmp_path / name, clouds(2, 1, 0), category=name)), "test")
        rows = record.published_rows(opened.clouds, (2048, 2048), True, Remarks())
        assert rows == {"category": known, "published": [], "published_source": None}
    both = layout(layout(tmp_path, clouds(405, 1, 0), category="02691156"), clouds(2, 1, 0), category="03001627")
    rows = record.published_rows(open_clouds("reference", str(both), "test").clouds, (1, 1), True, Remarks())
    assert rows["category"] is None
    one, found = open_clouds("reference", str(both), "test", ("airplane",)), Remarks()
    assert record.published_rows(one.clouds, (1, 1), False, found)["published"] == []
    assert found.notes == ["No published figures are known here for airplane in these units."]


def test_ones_own_row_is_in_per_cent_and_its_emd_approximate() -> None:
    figures = {"1nna_cd": 0.5, "1nna_emd": 0.625, "cov_cd": 0.25, "cov_emd": 0.125, "mmd_cd": 1.0}
    full: dict[str, Any] = {"emd": "approx", "figures": figures, "split": "last5k", "other_split": None}
    expected = {"method": "these samples", "1nna_cd": 50, "1nna_emd": 62.5, "cov_cd": 25, "cov_emd": 12.5}
    assert table.own_rows(full) == [expected | {"split": "last5k"}]
    for emd in ("exact", "none"):
        (row,) = table.own_rows(full | {"emd": emd, "figures": {k: figures[k] for k in ("1nna_cd", "cov_cd")}})
        assert row == expected | {"1nna_emd": None, "cov_emd": None, "split": "last5k"}
    other = {"split": "first10k", "figures": {name: value / 2 for name, value in figures.items()}}
    both = table.own_rows(full | {"other_split": other})
    assert [row["split"] for row in both] == ["last5k", "first10k"]
    assert both[1]["1nna_emd"] == 31.25


TABLE = """
samples     50 clouds of 64 points: mine
references  40 clouds of 32 points: theirs
units       metres
split       first10k
warning     Odd.
note        Known.

                            best     figure  95% interval          floor
1-NNA, CD                  0.498     0.7500  0.700 to 0.812        0.4600 fresh
1-NNA, EMD approx          0.498     0.8750                        0.4980 halves
COV, CD                     high     0.1250                        0.6000 fresh
COV, EMD approx             high    0.06250
MMD, CD                      low   0.001200                        0.0009000 fresh
MMD, EMD approx              low   0.003400                        0.0002000 redrawn
JSD                          low    0.09876
thickness                      1      1.380  1.30 to 1.46
reconstruction, CD           low  0.0002100
reconstruction, F-score     high     0.5000
bound of the shape prior     low      1.500  1.49 to 1.51 nats/dim
bound of both priors         low not finite  nats/dim
floor       fresh: other shapes of the references' generator, as many as there are samples
floor       halves: one half of the references against the other, 20 each: means over halves drawn by lot
floor       redrawn: the same references with other points: MMD, CD 0.0001000; MMD, EMD approx 0.0002000

last5k      1-NNA, CD 0.7000; 1-NNA, EMD approx 0.8000; COV, CD 0.1000; COV, EMD approx 0.05000

distance to the nearest other cloud of the set, of equally many of either (median Chamfer)
  samples                    0.02000
  references                       -

distance to the nearest training shape (median Chamfer)
  samples                    0.01100
  references                 0.02200
  one shape drawn twice      0.03300
  as near to a training shape as two draws of its points are: 4 of 50 samples and 3 of 40 references

published   chair, in per cent; a table
            a 1-NNA near 50 of 662 shapes against as many has a standard deviation of 1.4 or more
                    1-NNA, CD     EMD   COV, CD     EMD  split
  these samples         75.00   87.50     12.50    6.25  first10k
  these samples         70.00   80.00     10.00    5.00  last5k
  PVD                   56.26   53.32         -       -  mostly last5k"""


def test_the_table_says_everything() -> None:
    full: dict[str, Any] = {
        "samples": GOOD | {"source": "mine"},
        "references": GOOD | {"source": "theirs", "clouds": 40, "points": 32, "nearest_other": None},
        "normalization": "metres",
        "split": "first10k",
        "warnings": ["Odd."],
        "notes": ["Known."],
        "emd": "approx",
        "chance_1nna": 0.498,
        "figures": {
            **{"1nna_cd": 0.75, "1nna_emd": 0.875, "cov_cd": 0.125, "cov_emd": 0.0625},
            **{"mmd_cd": 0.0012, "mmd_emd": 0.0034, "jsd": 0.09876, "thickness": 1.38},
            **{"reconstruction_cd": 0.00021, "reconstruction_f_score": 0.5, "bound_shape": 1.5, "bound_joint": None},
        },
        "intervals": {"1nna_cd": [0.7, 0.8123], "thickness": [1.3, 1.46], "bound_shape": [1.49, 1.51]},
        "floors": {
            "fresh": {"1nna_cd": 0.46, "cov_cd": 0.6, "mmd_cd": 0.0009, "cov_emd": None},
            "halves": {"1nna_cd": 0.498, "1nna_emd": 0.498},
            "redrawn": {"mmd_cd": 0.0001, "mmd_emd": 0.0002},
        },
        "other_split": {
            "split": "last5k",
            "figures": {"1nna_cd": 0.7, "1nna_emd": 0.8, "cov_cd": 0.1, "cov_emd": 0.05},
        },
        "memorising": {
            **{"samples_median": 0.011, "references_median": 0.022, "samples_nearer_than_any_reference": 9},
            **{"one_shape_drawn_twice": 0.033},
            **{"samples_as_near_as_two_draws": 4, "references_as_near_as_two_draws": 3},
        },
        "category": "chair",
        "published_source": "a table",
        "published": [row.to_json() for row in published("chair") if row.method == "PVD"],
    }
    assert table.render(full) == TABLE
    figures = {name: value for name, value in full["figures"].items() if not name.endswith("emd")}
    less = full | {"emd": "none", "figures": figures, "published": [], "floors": {}, "other_split": None}
    short = table.render(less)
    assert "EMD" not in short
    assert "per cent" not in short
    assert "fresh" not in short
    assert "training" not in table.render(less | {"memorising": None})


def test_only_in_a_terminal_lines_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "warning     " + "word " * 30
    assert table._wrapped(line) == [line]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    wrapped = table._wrapped(line)
    assert len(wrapped) == 4
    assert max(map(len, wrapped)) <= 60
    assert all(part.startswith(" " * 12 + "word") for part in wrapped[1:])
