"""The page of an evaluation: whole by itself, escaped, true to the record, with all visible in a real browser."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from lion_triton import evaluate
from lion_triton.evaluation import galleries, page
from lion_triton.evaluation.table import PUBLISHED
from lion_triton.pictures import CELL, thumbnails

HOSTILE = '<script>alert("1")</script>&lt;\'x\'" onerror="document.title=1'
VOID = {"meta", "link", "img", "br"}
SAMPLES, REFERENCES = 27, 11  # more samples than are shown in a section
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Parsed(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@dataclass(frozen=True)
class Made:
    """A page, and what it was made of."""

    file: Path
    record: dict[str, Any]
    clouds: tuple[np.ndarray, np.ndarray, np.ndarray]  # samples, references, nearest training shapes
    charts: list[Figure]

    @property
    def html(self) -> str:
        return self.file.read_text()

    @property
    def text(self) -> str:
        return Parsed(self.html).text

    def again(self, record: dict[str, Any], training: bool = True) -> str:
        """The page of another record of these clouds."""
        return page.render(record, *self.clouds[:2], self.clouds[2] if training else None, quiet)

    def changed(self) -> dict[str, Any]:
        return copy.deepcopy(self.record)


def quiet(title: str, total: int, unit: str) -> tqdm[Any]:
    return tqdm(desc=title, total=total, unit=unit, disable=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A page with all its sections, its names as bad as can be."""
    root = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.2, (SAMPLES, 24, 3)).astype(np.float32) * rng.uniform(0.5, 1.5, (SAMPLES, 1, 1))
    samples[-1] = samples[0]  # which is warned of
    np.save(root / "samples.npy", samples)
    folder = root / "shapes" / "03001627" / "test"
    folder.mkdir(parents=True)
    for i in range(REFERENCES):
        cloud = rng.normal(0, 0.2 if i % 2 else 0.1 * (i + 3), (24, 3))  # every other one is far from any sample
        np.save(folder / f"{HOSTILE.replace('/', '')}{i}{i * 12 * 'w'}.npy", cloud.astype(np.float32))
    np.save(root / "training.npy", rng.normal(0, 0.2, (5, 60, 3)).astype(np.float32))
    args = [str(root / "samples.npy"), "--reference", str(root / "shapes"), "--training", str(root / "training.npy")]
    given: list[Any] = []
    charts: list[Figure] = []
    render, histogram = page.render, page.histogram

    def kept(*args: Any) -> str:
        given.extend(args)
        return render(*args)

    def drawn(*args: Any) -> Figure:
        charts.append(histogram(*args))
        return charts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", kept)
        patch.setattr(page, "histogram", drawn)
        evaluate.main([*args, "--out", str(root / "out")])
    record = json.loads((root / "out" / "evaluation.json").read_text())
    return Made(root / "out" / "evaluation.html", record, (given[1], given[2], given[3]), charts)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time."""
    monkeypatch.setattr(galleries, "thumbnails", lambda clouds: [b"" for _ in clouds])


def section(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    assert found is not None, name
    return found[0]


def cards(html: str, gallery: str) -> list[list[tuple[str, str, str, bytes]]]:
    """Kind, name, distance and picture of every cloud of every card."""
    _, start, rest = html.partition(f'<div class="cards" id="{gallery}-cards">')
    whole = rest.partition("</figure></div></div>")[0] if start else ""
    picture = r'src="data:image/png;base64,([^"]*)".*?<b>(.*?)</b>(.*?)<span class="name">(.*?)</span>'
    return [
        [(kind, unescape(name), near, base64.b64decode(png)) for png, kind, near, name in re.findall(picture, card)]
        for card in whole.split('<div class="card">')[1:]
    ]


def cells(html: str, row: str) -> list[str]:
    """The cells of a table's row after its name."""
    found = re.search(rf'<th scope="row">{row}(?:<small>.*?</small>)?</th>(.*?)</tr>', html)
    assert found is not None, row
    return [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", found[1])]


def test_the_page_needs_nothing_else(made: Made) -> None:
    parsed = Parsed(made.html)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    anchors = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(anchors)) == len(anchors)
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            target = attributes.get(name) or "data:"
            assert target.startswith("data:") or target[1:] in anchors, (tag, name)
    style = re.search(r"<style>(.*?)</style>", made.html, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "http" not in re.sub(r'src="data:[^"]*"', "", made.html)
    assert ("meta", {"charset": "utf-8"}) in parsed.tags
    assert len(made.html) < 6e6


def test_headings_tables_and_scrolling_areas_are_for_everybody(made: Made) -> None:
    parsed = Parsed(made.html)
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [tag for tag, _ in parsed.tags].count("main") == 1
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in parsed.tags if tag == "th")
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")
    tables = re.findall(r'<div class="scroll" ([^>]*)><table[^>]*><caption>(.+?)</caption>', made.html)
    assert len(tables) == made.html.count("<table") == 5
    for attributes, caption in tables:
        assert attributes == f'tabindex="0" role="region" aria-label="{caption}"'
    contents = re.findall(r'<li><a href="#(\w+)">(.*?)</a>', made.html)
    assert contents == re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', made.html)


def test_every_picture_is_a_picture(made: Made) -> None:
    images = [attributes for tag, attributes in Parsed(made.html).tags if tag == "img"]
    missed = sum(not row["covered"] for row in made.record["per_reference"])
    assert missed >= 3
    # In order; nearest to training; most and least typical; each with reference and training. Then uncovered ones.
    assert len(images) == 1 + 3 * (galleries.SHOWN + 3 * galleries.EXTREMES) + 2 * min(missed, galleries.SHOWN)
    for attributes in images:
        kind, data = str(attributes["src"]).split(",")
        assert kind == "data:image/png;base64"
        word = str(attributes["alt"]).split()[0]
        assert word in ("sample", "reference", "training", "Histogram")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format == "PNG"
            assert word == "Histogram" or image.size == (CELL, CELL)
            assert np.ptp(np.asarray(image.convert("RGB")), axis=-1).max() > 30  # something coloured
            assert (attributes["width"], attributes["height"]) == tuple(map(str, image.size))


def test_every_card_shows_the_clouds_that_it_names(made: Made) -> None:
    samples, references, training = made.clouds
    rows, others = made.record["per_sample"], made.record["per_reference"]

    def of_sample(i: int) -> list[tuple[str, str, str, bytes]]:
        row = rows[i]
        drawn = thumbnails([samples[i], references[row["reference_index"]], training[i]])
        near = [(k, row[k], f"CD {row[f'{k}_distance']:#.3g}") for k in ("reference", "training")]
        return [(*words, png) for words, png in zip([("sample", row["sample"], ""), *near], drawn, strict=True)]

    def of_reference(j: int) -> list[tuple[str, str, str, bytes]]:
        row = others[j]
        drawn = thumbnails([references[j], samples[row["sample_index"]]])
        near = ("sample", row["sample"], f"CD {row['sample_distance']:#.3g}")
        return [("reference", row["reference"], "", drawn[0]), (*near, drawn[1])]

    def order(key: str) -> list[int]:
        return [int(i) for i in np.argsort([row[key] for row in rows], kind="stable")]

    missed = [j for j in np.argsort([-row["sample_distance"] for row in others]) if not others[j]["covered"]]
    assert cards(made.html, "samples") == [of_sample(i) for i in range(galleries.SHOWN)]
    assert cards(made.html, "copies") == [of_sample(i) for i in order("training_distance")[: galleries.EXTREMES]]
    assert cards(made.html, "typical") == [of_sample(i) for i in order("reference_distance")[: galleries.EXTREMES]]
    assert cards(made.html, "untypical") == [
        of_sample(i) for i in order("reference_distance")[: -1 - galleries.EXTREMES : -1]
    ]
    assert cards(made.html, "uncovered") == [of_reference(j) for j in missed]
    for heading, gallery in (("Most", "typical"), ("Least", "untypical")):
        assert f'<h3>{heading} typical</h3><div class="cards" id="{gallery}-cards">' in made.html


@pytest.mark.parametrize(("count", "shown"), [(1, 0), (8, 0), (9, 3), (17, 3), (18, 6), (27, 6)])
@pytest.mark.usefixtures("undrawn")
def test_the_best_and_the_worst_are_not_the_same_ones(made: Made, count: int, shown: int) -> None:
    record = made.changed()
    record["per_sample"] = record["per_sample"][:count]
    html = made.again(record)
    assert [len(cards(html, name)) for name in ("copies", "typical", "untypical")] == [shown] * 3
    assert ("typical samples" in Parsed(html).text) == (shown > 0)
    assert ("Nearest to a training shape" in Parsed(html).text) == (shown > 0)


def test_the_page_says_what_the_record_says(made: Made) -> None:
    record, text = made.record, made.text
    for figure in record["figures"].values():
        assert f"{figure:.4g}" in text
    for clouds in (record["samples"], record["references"], record["training"]):
        assert f"{clouds['clouds']} clouds: {clouds['source']}; SHA-256 {clouds['sha256']}" in text
    for wanted in (record["command"], record["lion_triton"], *record["notes"], *record["warnings"]):
        assert " ".join(wanted.split()) in text
    for row in record["per_sample"]:
        assert f"{row['training_distance']:.4g}" in text
        assert f"{row['reference_distance']:.4g}" in text
    for row in record["per_reference"]:
        assert f"{row['sample_distance']:.4g}" in text
    assert "24 of 27 samples, as they come in the set" in text
    assert f"{sum(not row['covered'] for row in record['per_reference'])} of 11 references are the nearest" in text


@pytest.mark.usefixtures("undrawn")
def test_every_tile_shows_its_figure(made: Made) -> None:
    record = made.changed()
    record["figures"] = figures = {name: 1 / (3 + i) for i, name in enumerate(record["figures"])}
    record["intervals"] = {"1nna_cd": [0.3, 0.4]}
    record["floors"] = {"fresh": {"1nna_cd": 0.25}, "halves": {"cov_cd": 0.5, "1nna_cd": 0.45}, "redrawn": {}}
    html = made.again(record)
    shown, best = {name: f"{value:#.4g}" for name, value in figures.items()}, f"{record['chance_1nna']:.3f} is best"
    lines = "<small>95%: 0.300 to 0.400</small><small>floor 0.250</small>"
    assert re.findall(r'<div class="tile">(.*?)<b>(.*?)</b>(.*?)</div>', html) == [
        ("1-NNA, CD", shown["1nna_cd"], f"{lines}<small>{best}</small>"),
        ("1-NNA, EMD", shown["1nna_emd"], f"<small>{best}</small>"),
        ("COV, CD", shown["cov_cd"], "<small>floor 0.500</small><small>higher is better</small>"),
        ("COV, EMD", shown["cov_emd"], "<small>higher is better</small>"),
        ("MMD, CD", shown["mmd_cd"], "<small>lower is better</small>"),
        ("thickness", shown["thickness"], "<small>1 is best</small>"),
    ]
    table = section(html, "figures")
    for kind, name in (("1nna", "1-NNA"), ("cov", "COV"), ("mmd", "MMD")):
        for distance, words in (("cd", "CD"), ("emd", "EMD approx")):
            assert cells(table, f"{name}, {words}")[0] == shown[f"{kind}_{distance}"]
    assert cells(table, "1-NNA, CD")[1:3] == ["0.300 to 0.400", "0.2500<small>fresh</small>"]
    assert cells(table, "COV, CD")[1:3] == ["", "0.5000<small>halves</small>"]
    assert cells(table, "1-NNA, EMD approx")[1:] == ["", ""]
    assert cells(table, "JSD")[0] == shown["jsd"]
    for words in (
        "Floor, fresh: other shapes of the",
        "Floor, halves: one half of the references against the other, 5 each",
    ):
        assert words in unescape(table)
    assert "redrawn" not in table
    record["figures"] |= {"jsd": 0.0}
    assert cells(section(made.again(record), "figures"), "JSD")[0] == "0"


def test_the_best_1nna_is_one_number_everywhere(made: Made) -> None:
    best = f"{made.record['chance_1nna']:.3f}"
    assert made.text.count(f"{best} is best") == 4  # two tiles and two rows of the table
    assert f"drawn from one source give {best}" in made.text
    assert "0.5 is best" not in made.text
    assert "50 is best" not in made.text


def test_these_samples_stand_in_per_cent_beside_published_ones(made: Made) -> None:
    html, figures = section(made.html, "published"), made.record["figures"]
    assert cells(html, "these samples") == [*(f"{100 * figures[name]:.2f}" for name in PUBLISHED), "all points"]
    assert cells(html, "LION") == ["53.70", "52.34", "48.94", "52.11", "first10k"]
    assert cells(html, "PVD")[2:4] == ["–", "–"]
    assert re.findall(r'<tr class="mine"><th scope="row">(.*?)</th>', html) == ["these samples"]
    assert f"{100 * made.record['chance_1nna']:.1f} is best for these samples and 50.0 for the published" in made.text


def test_warnings_stand_out_and_notes_do_not(made: Made) -> None:
    for kind in ("warnings", "notes"):
        found = re.search(rf'class="{kind}".*?</ul>', made.html, re.DOTALL)
        assert found is not None
        assert made.record[kind]
        assert [unescape(x) for x in re.findall("<li>(.*?)</li>", found[0])] == made.record[kind]
    record = made.changed() | {"warnings": [], "notes": []}
    html = made.again(record | {"per_sample": record["per_sample"][:1], "per_reference": record["per_reference"][:1]})
    assert 'class="warnings"' not in html
    assert 'class="notes"' not in html


def test_both_sets_are_described(made: Made) -> None:
    for name in ("samples", "references"):
        clouds = made.record[name]
        size = " × ".join(f"{x:#.3g}" for x in clouds["size"])
        wanted = [str(clouds["clouds"]), "24", size, f"{clouds['nearest_other']:#.4g}"]
        assert cells(section(made.html, "sets"), name) == wanted


@pytest.mark.usefixtures("undrawn")
def test_only_what_is_shown_is_explained(made: Made) -> None:
    assert "Fan et al. 2017" in made.text
    for word in ("F-score", "0.001", "density", "best assignment"):
        assert word not in made.text
    record = made.changed()
    record["figures"] |= {"reconstruction_f_score": 0.25, "bound_shape": None}
    text = Parsed(made.again(record | {"emd": "exact"})).text
    for word in ("best assignment", "at a squared distance below 0.001", "bound of the shape prior", "not finite"):
        assert word in text
    assert "Fan et al." not in text
    record = made.changed() | {"emd": "none", "published": [], "notes": [], "warnings": []}
    record["figures"] = {name: value for name, value in record["figures"].items() if "emd" not in name}
    html = made.again(record)
    assert "EMD" not in Parsed(html).text
    assert len(re.findall('<div class="tile">', html)) == 4


@pytest.mark.usefixtures("undrawn")
def test_what_repeats_it_is_listed_once(made: Made) -> None:
    record = made.changed()
    record["options"] |= {"categories": ["sofa", "bed"], "norm_box": True, "steps": None, "num_points": 24, "eta": 0.0}
    record |= {"commit": "abc+", "scipy": None}
    sampling = {"sampler": "ddim", "steps": 77, "seed": 0, "classes": "in turn", "weights_sha256": {"vae": "f00d"}}
    record["samples"]["sampling"] = sampling
    record["run"] = {
        "folder": "runs/x",
        "data": {"source": "data/x", "categories": []},
        "classes": ["sofa"],
        "normalization": {"kind": "global", "mean": [0.5, 0.25, 0.125], "scale": 2.0},
    }
    html = section(made.again(record), "repeat")
    rows = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html)
    names = [name for name, _ in rows]
    assert len(set(names)) == len(names)
    shown = {name: unescape(value) for name, value in rows}
    for name, value in record["options"].items():
        assert (name.replace("_", "-") in shown) == (name in ("sampler", "steps") or value is not None), name
    for name, wanted in {
        "seed": "0",
        "eta": "0.0",
        "norm-box": "yes",
        "subset": "test",
        "split": "first10k",
        "emd": "approx",
        "categories": "sofa, bed",
        "num-points": "24",
        "steps": "77",
        "sampler": "ddim",
        "weights-sha256": "vae f00d",
        "data": "source data/x",
        "classes": "in turn",
        "its classes": "sofa",
        "normalization": "kind global, mean 0.5, 0.25, 0.125, scale 2.0",
        "units": record["normalization"],
        "commit": "abc+",
    }.items():
        assert shown[name] == wanted, name
    assert "SciPy" not in shown
    assert record["training"]["sha256"] in shown["training set"]


@pytest.mark.usefixtures("undrawn")
def test_every_word_of_the_record_is_escaped(made: Made) -> None:
    name = made.record["per_reference"][0]["reference"]
    assert "<script>" in name
    assert name in "".join(Parsed(made.html).texts)
    assert f"reference {name}" in {attributes.get("alt") for tag, attributes in Parsed(made.html).tags if tag == "img"}

    def worsened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: x if key in ("emd", "category") else worsened(x) for key, x in value.items()}
        if isinstance(value, list):
            return [worsened(x) for x in value]
        return HOSTILE if isinstance(value, str) else value

    record = made.changed()
    record["samples"]["sampling"] = {"sampler": "x", "weights_sha256": {"x": "x"}}
    record["run"] = {"folder": "x", "data": {"source": "x"}, "classes": ["x"]}
    expected, found = (Parsed(made.again(each)) for each in (record, worsened(record)))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags]
    assert [set(attributes) for _, attributes in found.tags] == [set(attributes) for _, attributes in expected.tags]


@pytest.mark.usefixtures("undrawn")
def test_the_progress_bar_knows_its_total(made: Made) -> None:
    bars = []

    def bar(title: str, total: int, unit: str) -> tqdm[Any]:
        bars.append((title, total, quiet(title, total, unit)))
        advance = bars[-1][2].update
        bars[-1][2].update = lambda n: done.append(n) or advance(n)  # type: ignore[func-returns-value]
        return bars[-1][2]

    done: list[int] = []
    html = page.render(made.record, *made.clouds, bar)
    ((title, total, _),) = bars
    assert (title, total) == ("pictures", html.count('<div class="picture"'))
    assert sum(done) == total


def steps(figure: Figure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each series' values and edges, by its name in the legend."""
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    legend = {handle.get_label(): text.get_text() for handle, text in zip(*legend_of(figure), strict=True)}
    assert all(label == text for label, text in legend.items())
    return {patch.get_label(): (patch.get_data().values, patch.get_data().edges) for patch in axes.patches}


def legend_of(figure: Figure) -> tuple[list[Any], list[Any]]:
    (legend,) = figure.legends
    return legend.legend_handles, legend.get_texts()


def test_the_histogram_is_of_the_distances_to_training_shapes(made: Made) -> None:
    (figure,) = made.charts
    series = steps(figure)
    assert set(series) == {"samples", "references"}
    words = next(str(a["alt"]) for tag, a in Parsed(made.html).tags if str(a.get("alt")).startswith("Histogram"))
    for kind in ("sample", "reference"):
        distances = [row["training_distance"] for row in made.record[f"per_{kind}"]]
        values, edges = series[f"{kind}s"]
        counts = [sum(a <= x < b for x in distances) for a, b in zip(edges, edges[1:], strict=False)]
        counts[-1] += sum(x >= edges[-1] for x in distances)
        np.testing.assert_allclose(values, 100 * np.array(counts) / len(distances), atol=1e-6)
        spread = f"{min(distances):#.3g} to {max(distances):#.3g}, median {np.median(distances):#.3g}"
        assert f"{kind.capitalize()}s: {spread}." in words
    assert not np.array_equal(series["samples"][0], series["references"][0])
    floor = made.record["memorising"]["one_shape_drawn_twice"]
    (line,) = figure.axes[0].lines
    assert line.get_label() == "one shape drawn twice"
    assert list(line.get_xdata()) == [floor, floor]
    assert f"One shape drawn twice: {floor:#.3g}." in words
    assert str(made.record["memorising"]["samples_as_near_as_two_draws"]) in section(made.html, "memorising")


@pytest.mark.parametrize(
    ("samples", "references", "floor"),
    [
        ([0.0, 0.0], [0.0], 0.0),
        ([0.0], [0.0], 0.1),
        ([0.25, 0.25], [0.25, 0.25, 0.25], 0.25),
        ([0.0, 0.5, 0.01], [0.25, 1.0], 0.002),
        ([1e-20, 1.0], [1e-30, 2.0], 1e-25),
        ([5.0], [1e9], 0.1),
        (list(np.geomspace(0.1, 1, 5000)), [0.3], 0.2),
    ],
    ids=["all-zero", "all-copies", "all-equal", "some-zero", "tiny", "far-apart", "many"],
)
def test_the_histogram_takes_any_distances(samples: list[float], references: list[float], floor: float) -> None:
    figure = page.histogram(samples, references, floor)
    for values, edges in steps(figure).values():
        assert values.sum() == pytest.approx(100)
        assert np.isfinite(edges).all()
        assert (np.diff(edges) > 0).all()
        assert len(values) <= 32
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes[0].lines) == 1
    assert len(legend_of(figure)[0]) == 3


def test_copies_at_distance_0_are_set_apart() -> None:
    figure = page.histogram([0.0, 0.1, 0.1, 0.1], [0.1, 1.0], 0.2)
    series = steps(figure)
    assert list(series["samples"][0][:3]) == [25, 0, 75]  # nothing between them and all others
    assert list(series["references"][0][:3]) == [0, 0, 50]
    assert [text.get_text() for text in figure.axes[0].texts] == ["near 0"]
    assert not page.histogram([0.1], [0.1, 1.0], 0.2).axes[0].texts


@pytest.mark.parametrize("floor", [0.0, 1e-12])
def test_a_floor_too_small_for_the_axis_is_shown_where_it_begins(floor: float) -> None:
    figure = page.histogram([0.5, 1.0], [0.8, 3.0], floor)
    (line,), (left, _) = figure.axes[0].lines, figure.axes[0].get_xlim()
    _, edges = steps(figure)["samples"]
    assert list(line.get_xdata()) == [edges[0], edges[0]]
    assert edges[0] / 10 < left <= edges[0]


@pytest.mark.usefixtures("undrawn")
def test_copies_are_told_by_how_often_references_are_as_near(made: Made) -> None:
    record = made.changed()
    memory = record["memorising"]
    memory |= {"samples_as_near_as_two_draws": 0, "references_as_near_as_two_draws": 3}
    text = Parsed(made.again(record)).text
    assert "0 of 27 samples and 3 of 11 references are as near" in text
    assert "no sample looks like a copy" in text
    memory |= {"samples_as_near_as_two_draws": 7}  # of 27, a smaller part than 3 of 11
    assert "references are that near at least as often, so this does not tell" in Parsed(made.again(record)).text
    memory |= {"samples_as_near_as_two_draws": 8}
    assert "those may be copies" in Parsed(made.again(record)).text


def test_without_training_shapes_the_page_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "s.npy", rng.normal(size=(2, 9, 3)))
    evaluate.main(
        [str(tmp_path / "s.npy"), "--reference", str(tmp_path / "s.npy"), "--out", str(tmp_path), "--emd", "none"]
    )
    html = (tmp_path / "evaluation.html").read_text()
    parsed = Parsed(html)
    assert "no training shapes to compare with, so this page says nothing about what was memorised" in parsed.text
    assert "None: every reference is the nearest one of some sample." in parsed.text
    alts = [str(attributes["alt"]) for tag, attributes in parsed.tags if tag == "img"]
    assert sorted(alt.split()[0] for alt in alts) == ["reference", "reference", "sample", "sample"]


def test_thumbnails_share_a_scale_and_take_any_number_of_points() -> None:
    ball = np.random.default_rng(0).normal(size=(300, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    pictures = thumbnails([ball, 0.5 * ball[:100], ball[:1]])
    widths = []
    for png in pictures:
        assert len(png) < 40_000
        with Image.open(io.BytesIO(png)) as image:
            colours = np.ptp(np.asarray(image.convert("RGB")), axis=-1) > 12
            widths.append(np.ptp(np.flatnonzero(colours.any(0))))
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.15)
    assert widths[2] < widths[1]
    assert thumbnails([ball]) == thumbnails([ball])
    with pytest.raises(ValueError, match=r"clouds\[1\]: expected finite"):
        thumbnails([ball, ball * np.nan])


# The page as it is, in a frame as wide as a phone or a desk's screen; windows cannot be as narrow as phones. What is
# looked at: pictures, as they are and enlarged as by a tap; tiles and cards; what sticks out at the right, unless it
# scrolls by itself; text with too little contrast to what is behind it.
FRAME = """<!DOCTYPE html><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const all = (name) => [...page.querySelectorAll(name)], box = (e) => e.getBoundingClientRect();
  const images = [...page.images].map(i => {{ const b = box(i), s = view.getComputedStyle(i);
    return [i.complete, i.naturalWidth, b.width, b.height, s.visibility, s.display, b.right]; }});
  const sticking = all("main *").filter(e => !e.closest(".scroll > *, details") && box(e).right > view.innerWidth);
  const light = (c) => c.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {{ const c = e ? view.getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)";
    return c.endsWith(", 0)") ? behind(e.parentElement) : c; }};
  const pale = all("main *").filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).filter(e => {{
    const a = light(view.getComputedStyle(e).color), b = light(behind(e));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5; }});
  const root = page.documentElement, scroll = root.scrollWidth, tall = root.scrollHeight;
  const zoomed = all(".picture").map(p => {{ p.focus(); const b = box(p.querySelector("img"));
    return [b.width, b.height, b.left, b.right, root.scrollWidth, root.scrollHeight]; }});
  const shown = (elements) => elements.map(e => e.outerHTML.slice(0, 90));
  const found = {{images, zoomed, tall, scroll, width: view.innerWidth, title: page.title,
    sticking: shown(sticking), pale: shown(pale),
    cut: shown(all(".name").filter(e => e.scrollWidth > 1.2 * e.clientWidth)),
    tiles: all(".tile").map(t => [box(t).left, box(t).top, box(t).width, box(t).height].map(Math.round)),
    cards: all("#typical-cards .card").map(c => Math.round(box(c).top)),
    loaded: view.performance.getEntriesByType("resource").map(r => r.name.slice(0, 60))}};
  const pre = document.createElement("pre");
  pre.id = "probe"; pre.textContent = btoa(JSON.stringify(found)); document.body.append(pre);
}});</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str, int], dict[str, Any]]:
    def probe(html: str, width: int) -> dict[str, Any]:
        frame = tmp_path / "frame.html"
        frame.write_text(FRAME.format(width=width, page=escape(html)))
        # Blocks: no name resolves, and addresses lead to a proxy that is not there.
        options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
        network = ["--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
        profile = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
        command = [str(CHROMIUM), *options.split(), *network, *profile, "--dump-dom", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = re.search(r'<pre id="probe">([^<]*)</pre>', done.stdout)
        assert found is not None, done.stderr[-2000:]
        answer: dict[str, Any] = json.loads(base64.b64decode(found[1]))
        return answer

    return probe


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "columns", "tiles"), [(400, 1, 2), (768, 2, 3), (1280, 3, 6)])
def test_in_a_browser_without_a_network_everything_is_seen(
    made: Made, browse: Callable[[str, int], dict[str, Any]], width: int, columns: int, tiles: int
) -> None:
    found = browse(made.html, width)
    assert found["width"] == width
    assert found["scroll"] <= width  # nothing to scroll sideways
    assert found["sticking"] == []
    assert found["pale"] == []
    assert found["cut"] == []
    assert found["title"] == "27 generated shapes against 11 references"
    assert not [name for name in found["loaded"] if not name.startswith("data:")]
    assert len(found["images"]) == made.html.count("<img ")
    for complete, natural, wide, high, visibility, display, right in found["images"]:
        assert complete
        assert natural == CELL or wide > 300  # of the histogram
        assert natural != CELL or wide == pytest.approx(high)
        assert wide >= 80
        assert right <= width
        assert (visibility, display) == ("visible", "block")
    for wide, high, left, right, scroll, tall in found["zoomed"]:
        assert (wide, high) == (CELL, CELL)
        assert 0 <= left < right <= width
        assert (scroll, tall) == (found["scroll"], found["tall"])  # nothing moves
    tops = [top for _, top, _, _ in found["tiles"]]
    assert [tops.count(top) for top in sorted(set(tops))] == [tiles] * (6 // tiles)
    assert len({(wide, high) for _, _, wide, high in found["tiles"]}) == 1
    rows = found["cards"]
    assert [rows.count(top) for top in sorted(set(rows))] == [columns] * (galleries.EXTREMES // columns)
