"""The page of an evaluation: whole by itself, escaped, with every picture visible; also in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lion_triton import evaluate, page
from lion_triton.pictures import CELL, thumbnails

HOSTILE = '<script>alert("1")</script>&lt;\'x\'" onerror="document.title=1'
VOID = {"meta", "link", "img", "br"}
SAMPLES = 27  # more than are shown in a section
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page with all its sections, its names and notes as bad as can be."""
    root = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(SAMPLES, 24, 3)).astype(np.float32)
    np.save(root / "samples.npy", samples)
    folder = root / "shapes" / "03001627" / "test"
    folder.mkdir(parents=True)
    for i in range(8):
        np.save(folder / f"{HOSTILE.replace('/', '')}{i}.npy", rng.normal(size=(24, 3)).astype(np.float32))
    np.save(root / "training.npy", rng.normal(size=(5, 24, 3)).astype(np.float32))
    args = [str(root / "samples.npy"), "--reference", str(root / "shapes"), "--training", str(root / "training.npy")]
    evaluate.main([*args, "--out", str(root / "out")])
    record = json.loads((root / "out" / "evaluation.json").read_text())
    return root / "out" / "evaluation.html", record


def test_the_page_needs_nothing_else(made: tuple[Path, dict[str, Any]]) -> None:
    text = made[0].read_text()
    parsed = Parsed(text)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)
    assert ("meta", {"charset": "utf-8"}) in parsed.tags


def test_every_picture_is_a_picture(made: tuple[Path, dict[str, Any]]) -> None:
    images = [attributes for tag, attributes in Parsed(made[0].read_text()).tags if tag == "img"]
    missed = sum(not row["covered"] for row in made[1]["per_reference"])
    # In order; nearest to training; most and least typical; each with reference and training. Then uncovered ones.
    assert len(images) == 3 * (page.SHOWN + 3 * page.EXTREMES) + 2 * min(missed, page.SHOWN)
    for attributes in images:
        kind, data = str(attributes["src"]).split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format == "PNG"
            assert image.size == (CELL, CELL)
            assert np.ptp(np.asarray(image.convert("RGB")), axis=-1).max() > 30  # something coloured
        assert str(attributes["alt"]).split()[0] in ("sample", "reference", "training")
        assert (attributes["width"], attributes["height"]) == (str(CELL), str(CELL))


def test_the_page_says_what_the_record_says(made: tuple[Path, dict[str, Any]]) -> None:
    record = made[1]
    text = " ".join(" ".join(Parsed(made[0].read_text()).texts).split())
    for figure in record["figures"].values():
        assert f"{figure:.4g}" in text
    for clouds in (record["samples"], record["references"]):
        assert clouds["sha256"] in text
    for wanted in (record["command"], record["lion_triton"], *record["notes"]):
        assert " ".join(wanted.split()) in text
    for wanted in (
        "24 of 27 samples",
        "8 of 27 samples",
        "higher is better",
        "lower is better",
        "LION 53.70",
    ):
        assert wanted in text, wanted
    assert f"{record['chance_1nna']:.3f} is best, for sets of these sizes" in text
    for row in record["per_sample"]:
        assert f"{row['training_distance']:.4g}" in text
        assert f"{row['reference_distance']:.4g}" in text
    assert "check against memorising" in text


def test_names_are_escaped(made: tuple[Path, dict[str, Any]]) -> None:
    parsed = Parsed(made[0].read_text())
    name = made[1]["per_reference"][0]["reference"]
    assert "<script>" in name
    assert name in "".join(parsed.texts)
    assert f"reference {name}" in {attributes.get("alt") for tag, attributes in parsed.tags if tag == "img"}


def test_without_training_shapes_the_page_says_so(tmp_path: Path, made: tuple[Path, dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "s.npy", rng.normal(size=(2, 9, 3)))
    evaluate.main(
        [str(tmp_path / "s.npy"), "--reference", str(tmp_path / "s.npy"), "--out", str(tmp_path), "--emd", "none"]
    )
    parsed = Parsed((tmp_path / "evaluation.html").read_text())
    text = " ".join(parsed.texts)
    assert "says nothing about what was memorised" in text
    assert "None: every reference is the nearest one of some sample." in text
    alts = [str(attributes["alt"]) for tag, attributes in parsed.tags if tag == "img"]
    assert len(alts) == 3 * 2 * 2
    assert not [alt for alt in alts if alt.startswith("training")]


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


# The page as it is, in a frame as wide as a phone or a desk's screen; windows cannot be as narrow as phones.
FRAME = """<!DOCTYPE html><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const images = [...page.images].map(i => {{ const b = i.getBoundingClientRect(), s = view.getComputedStyle(i);
    return [i.complete, i.naturalWidth, b.width, b.height, s.visibility, s.display, b.right]; }});
  const found = {{images, width: view.innerWidth, scroll: page.documentElement.scrollWidth, title: page.title,
    loaded: view.performance.getEntriesByType("resource").map(r => r.name.slice(0, 60))}};
  const pre = document.createElement("pre");
  pre.id = "probe"; pre.textContent = btoa(JSON.stringify(found)); document.body.append(pre);
}});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser_without_a_network_every_picture_is_seen(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, width: int
) -> None:
    text = made[0].read_text()
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=escape(text)))
    # Blocks: no name resolves, and addresses lead to a proxy that is not there.
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    network = ["--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    profile = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
    command = [str(CHROMIUM), *options.split(), *network, *profile, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">([^<]*)</pre>', done.stdout)
    assert found is not None, done.stderr[-2000:]
    probe = json.loads(base64.b64decode(found[1]))
    assert probe["width"] == width
    assert probe["scroll"] <= width  # nothing to scroll sideways
    assert probe["title"] == "27 generated shapes against 8 references"
    assert not [name for name in probe["loaded"] if not name.startswith("data:")]
    assert len(probe["images"]) == text.count("<img ")
    for complete, natural, wide, high, visibility, display, right in probe["images"]:
        assert complete
        assert natural == CELL
        assert wide == pytest.approx(high)
        assert wide >= 80
        assert right <= width
        assert (visibility, display) == ("visible", "block")
