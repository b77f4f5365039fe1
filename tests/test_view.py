"""The viewer in a browser without a network: it opens, draws, and answers clicks."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import trimesh

from lion_triton import view
from lion_triton.generation.inputs import open_model
from tests.browser import CHROMIUM, Tab, tab, wait
from tests.test_train import fails
from tests.tiny import POINTS, tiny_run

pytest.importorskip("viser")
from lion_triton.viewer.files import add_files, find_items
from lion_triton.viewer.generate import FRAMES, Generator
from lion_triton.viewer.page import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny").folder


@contextmanager
def served(page: Page) -> Iterator[Page]:
    try:
        yield page
    finally:
        page.server.stop()


def drawn(opened: Tab) -> int:
    """How many pixels left of the panel are coloured, as points are, not grey, as messages are."""
    picture = opened.picture()[200:, :640].astype(int)
    return int((np.ptp(picture, axis=-1) > 40).sum())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_click_resamples(run: Path, tmp_path: Path) -> None:
    with served(view.open_page(view.ViewArguments(run, 8431))) as page, tab(page.url, tmp_path) as opened:
        wait(lambda: drawn(opened) > 500)
        text = opened.evaluate("document.body.innerText")
        for word in (f"seed 0, chair: {POINTS} points", "class", "steps", "points", "Between two shapes"):
            assert word in text
        before = opened.picture()
        opened.click("Resample")
        wait(lambda: f"seed 1, chair: {POINTS} points" in opened.evaluate("document.body.innerText"))
        wait(lambda: (np.abs(opened.picture()[200:, :640].astype(int) - before[200:, :640]) > 40).sum() > 500)
        opened.click("Nearest training shape")
        wait(lambda: "nearest training shape:" in opened.evaluate("document.body.innerText"))
        assert opened.requests
        assert all(url.split("/")[2] == page.url.split("/")[2] for url in opened.requests)


@pytest.fixture
def page() -> Iterator[Page]:
    with served(Page(8461)) as made:
        yield made


def test_a_seed_is_a_shape_and_its_denoising(run: Path, page: Page) -> None:
    generator = Generator(page, open_model(run))
    first = generator.shown
    assert generator.clouds.shape == (8, POINTS, 3)  # seven steps before it
    assert generator.slider.value == generator.slider.max == 7
    assert page.status.content == f"seed 0, chair: {POINTS} points"
    page.do("Resample", generator.resample)
    assert int(generator.seed.value) == 1
    assert not np.array_equal(generator.shown, first)
    generator.seed.value = 0
    page.do("Resample", generator.resample)
    assert np.array_equal(generator.shown, first)
    generator.steps.value, generator.points.value, generator.label.value = 3, 30, "lamp"
    page.do("Resample", generator.resample)
    assert generator.clouds.shape == (3, 30, 3)
    assert page.status.content == "seed 0, lamp: 30 points"
    generator.slider.value = 0
    generator.show()
    assert page.file[0] == "seed0-0.ply"
    file = trimesh.load(io.BytesIO(page.file[1]), file_type="ply")
    np.testing.assert_allclose(file.vertices, generator.clouds[0], atol=1e-6)


def test_between_two_shapes_and_the_nearest_one(run: Path, page: Page) -> None:
    generator = Generator(page, open_model(run))
    generator.ends[0].value, generator.ends[1].value = "procedural:1", "4"
    page.do("Interpolate", generator.interpolate)
    assert page.status.content == "from procedural:1 (table) to 4 (chair): move the slider"
    assert generator.clouds.shape == (FRAMES, POINTS, 3)
    page.do("Nearest training shape", generator.nearest)
    assert page.status.content.startswith("nearest training shape: ")
    generator.ends[1].value = "nowhere.obj"
    page.do("Interpolate", generator.interpolate)
    assert page.status.content.startswith("**b: expected a file of a shape")
    assert generator.clouds.shape == (FRAMES, POINTS, 3)
    generator.points.value = 3
    page.do("Resample", generator.resample)
    assert page.status.content == "**num-points: this model needs at least 16, got 3**"


def test_one_piece_of_work_at_a_time(page: Page) -> None:
    running, most = 0, 0
    begun = threading.Event()

    def work() -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        begun.set()
        threading.Event().wait(0.05)
        running -= 1
        return "done"

    threads = [threading.Thread(target=page.do, args=("work", work)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert page.status.content == "done"


def test_files_of_every_kind_are_found(tmp_path: Path, page: Page) -> None:
    clouds = np.random.default_rng(0).normal(size=(3, 20, 3)).astype(np.float32)
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    trimesh.creation.box().export(meshes / "0.ply")
    trimesh.creation.box().export(meshes / "0.glb")
    trimesh.creation.icosphere().export(meshes / "1.obj")
    np.save(meshes / "2.npy", clouds[0])
    np.savez(tmp_path / "clouds.npz", points=clouds)
    np.save(tmp_path / "one.npy", clouds[0])
    layout = tmp_path / "data" / "chair" / "test"
    layout.mkdir(parents=True)
    np.save(layout / "a.npy", clouds[0])
    names = {
        meshes: ["0.glb", "1.obj", "2.npy"],
        meshes / "1.obj": ["1.obj"],
        tmp_path / "one.npy": ["one.npy"],
        tmp_path / "clouds.npz": ["0", "1", "2"],
        tmp_path / "data": ["chair/a"],
    }
    for path, expected in names.items():
        assert [item.name for item in find_items(path)] == expected
    add_files(page, find_items(meshes))
    assert page.status.content == "0.glb: 12 faces"
    assert page.file[0] == "0.ply"


def test_what_cannot_be_shown_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "what: nowhere does not exist" in fails(capsys, view.main, ["nowhere"])
    assert "port: expected 1 to 65535, got 0" in fails(capsys, view.main, [str(run), "--port", "0"])
    (tmp_path / "empty").mkdir()
    assert "error: what: " in fails(capsys, view.main, [str(tmp_path / "empty")])
    (tmp_path / "bad.ply").write_bytes(b"no")
    assert "bad.ply: " in fails(capsys, view.main, [str(tmp_path / "bad.ply")])
    monkeypatch.setitem(sys.modules, "viser", None)
    for name in ("files", "generate", "page"):
        monkeypatch.delitem(sys.modules, f"lion_triton.viewer.{name}")
    assert "needs viser: pip install 'lion-triton[view]'" in fails(capsys, view.main, [str(run)])
