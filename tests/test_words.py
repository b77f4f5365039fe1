"""From words and pictures: CLIP embeddings made, stored, trained on, sampled by; with a tiny CLIP of random weights."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from lion_triton import interpolate, mesh, prepare, sample, train, vary, view
from lion_triton.clip import CLIP
from lion_triton.config import DistillTraining, check, with_clip
from lion_triton.data.clouds import Clouds, Normalization
from lion_triton.data.embeddings import Embeddings, load_embeddings, read_embeddings, write_embeddings
from lion_triton.data.sources import DataConfig, load_sources
from lion_triton.generation import output, prompts
from lion_triton.generation.inputs import open_model
from lion_triton.generation.prompts import read_prompts
from lion_triton.models.lion import LION, posterior
from lion_triton.models.priors import ShapePrior
from lion_triton.pictures import CELL, views
from lion_triton.runs import Checkpoint, Run, create_run, open_run, save_checkpoint
from lion_triton.train import Arguments
from lion_triton.training.objectives import prior_loss
from tests.test_train import fails
from tests.tiny import POINTS, tiny_config, tiny_lion
from tests.tiny_clip import IMAGE_SIZE, TOKENS, tiny_clip

NARROW, WIDE = torch.nn.functional.normalize(torch.randn(2, 512, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clips") / "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Run:
    """A run with random weights that is conditioned on CLIP."""
    config = with_clip(tiny_config())
    config = replace(config, priors=replace(config.priors, drop_condition=0.1))
    lion = tiny_lion(config)
    folder = tmp_path_factory.mktemp("runs") / "clip"
    made = create_run(folder, config, ("chair",), Normalization("global"), str(clip_folder))
    priors = {name: value for name, value in lion.state_dict().items() if "prior" in name}
    save_checkpoint(made, 8, Checkpoint("priors", 4, lion.state_dict(), priors, {}))
    rows = np.random.default_rng(1).standard_normal((3, 1, 512))
    write_embeddings(Embeddings.of(rows / 23, ("chair/a", "chair/b", "chair/c"), None), made.embeddings)
    return made


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.standard_normal((*shape, 512))
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# The CLIP


def test_texts_and_pictures_are_embedded(clip_folder: Path) -> None:
    clip = CLIP(clip_folder)
    texts = clip.texts(["a narrow chair", "a sofa"])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    torch.testing.assert_close(clip.texts(["a sofa"])[0], texts[1])  # whatever stands beside it

    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"shortest_edge": IMAGE_SIZE}
    model: Any = CLIPModel.from_pretrained(clip_folder)
    processor: Any = CLIPImageProcessorPil(size=size, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    rng = np.random.default_rng(0)
    for shape in ((50, 40), (37, 81)):
        picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        theirs = model.get_image_features(**processor(picture, return_tensors="pt"))
        expected = torch.nn.functional.normalize(theirs.pooler_output.detach(), dim=-1)
        torch.testing.assert_close(clip.images([picture]), expected)
        torch.testing.assert_close(clip.images([picture], normalize=False), theirs.pooler_output.detach())


def test_a_clip_that_is_not_at_hand_is_one_line(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"^text: expected at most {TOKENS} tokens, got 32 in 'abc"):
        CLIP(clip_folder).texts(["a sofa", "abc" * 10])
    with pytest.raises(ValueError, match=r"^clip: expected embeddings of 512 numbers, as openai/.* has, got 768$"):
        CLIP(tiny_clip(tmp_path / "large", dim=768))
    with pytest.raises(ValueError, match=r"^clip: no CLIP could be read from .*: give a folder that holds one"):
        CLIP(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r"^clip: needs the package transformers \(pip install 'lion-triton\[clip\]'\)"
    ):
        CLIP(clip_folder)


# The networks


@pytest.mark.parametrize("denoiser", ["shape", "point"])
def test_a_zero_embedding_is_no_condition(denoiser: str) -> None:
    """It gives what the projection without weights and bias gives to any; a row beside it keeps its own."""
    lion = LION(with_clip(tiny_config()).model).eval()
    prior, t = getattr(lion, f"{denoiser}_prior"), torch.tensor([3, 900])
    inputs = (torch.randn(2, 8), t) if denoiser == "shape" else (torch.randn(2, POINTS, 4), t, torch.randn(2, 8))
    half = torch.stack((NARROW, torch.zeros(512)))
    with torch.no_grad():
        prior.clip_projection.bias.fill_(1)
        mixed, full, none = prior(*inputs, half), prior(*inputs, NARROW.expand(2, -1)), prior(*inputs, 0 * half)
        for parameter in prior.clip_projection.parameters():
            parameter.zero_()
        without = prior(*inputs, half)
    torch.testing.assert_close(mixed, torch.stack((full[0], none[1])))
    torch.testing.assert_close(none, without)
    assert (full - none).abs().amax(tuple(range(1, full.ndim))).min() > 1e-4


def test_embeddings_are_withheld_in_training_and_guide_sampling() -> None:
    """As classes are, see test_guidance."""
    lion = LION(with_clip(tiny_config()).model).eval()
    told: dict[str, torch.Tensor] = {}
    for name, prior, place in (("shape", lion.shape_prior, 2), ("point", lion.point_prior, 3)):
        prior.register_forward_pre_hook(lambda _, args, name=name, place=place: told.update({name: args[place]}))
    clip = NARROW.expand(64, -1)
    with torch.no_grad():
        latents = posterior(lion.vae, torch.randn(64, POINTS, 3), torch.tensor([0, 0]))
        prior_loss(lion, latents, torch.tensor([1, 0]), clip=clip, drop_condition=0.5)
        withheld = ~told["point"].any(-1)
        assert torch.equal(told["shape"], told["point"])
        assert torch.equal(told["point"][~withheld], clip[~withheld])
        assert 16 < withheld.sum() < 48  # 64 draws: 32 +- 4 deviations
        z, t = torch.randn(2, 8), torch.tensor([3, 500])
        given, without = (lion.shape_denoiser(clip=c)(z, t) for c in (clip[:2], 0 * clip[:2]))
        guided = lion.shape_denoiser(clip=clip[:2], guidance=2.0)(z, t)
    torch.testing.assert_close(guided, 3 * given - 2 * without, rtol=1e-4, atol=1e-5)


def test_an_embedding_of_length_1_is_heard_from_the_start() -> None:
    """Hidden states are of size 1; without a start of its own the projection's would be forty times smaller."""
    torch.manual_seed(0)
    projected = ShapePrior(replace(tiny_config().model.shape_prior, clip=True), 8).clip_projection
    assert projected is not None
    assert 0.3 < projected(torch.stack((NARROW, WIDE))).std() < 1


# Embeddings beside the data


def test_prepare_embeds_views_of_every_shape(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "VIEWS", 2)
    source, out = tmp_path / "shapes", tmp_path / "data"
    for name, extents in (("a", (1, 3, 1)), ("b", (3, 0.2, 3))):
        (source / "box").mkdir(parents=True, exist_ok=True)
        trimesh.creation.box(extents=extents).export(source / "box" / f"{name}.stl")
    options = prepare.PrepareConfig(source, out, points=300, val=0, test=0, clip=True, clip_model=str(clip_folder))
    prepare.prepare(options)
    assert json.loads((out / "index.json").read_text())["clip"] == {"model": str(clip_folder), "views": 2}
    stored = [np.load(out / "box" / "train" / "clip" / f"{name}.npy") for name in "ab"]
    for name, rows in zip("ab", stored, strict=True):
        assert (rows.shape, rows.dtype) == ((2, 512), np.float16)
        cloud = np.load(out / "box" / "train" / f"{name}.npy")
        chosen = np.random.default_rng(0).permutation(300)
        expected = CLIP(clip_folder).images(list(views(cloud[chosen], 2)))
        np.testing.assert_allclose(rows, expected, atol=1e-4)
    assert np.abs(stored[0] - stored[1]).max() > 1e-3

    paths = tuple(out / "box" / "train" / f"{name}.npy" for name in "ab")
    clouds = Clouds(paths, np.zeros(2, np.int64), ("box",), ("box/a", "box/b"))
    found = load_embeddings(DataConfig(source=str(out)), clouds)
    assert (found.model, found.ids, len(found)) == (str(clip_folder), clouds.names, 2)
    np.testing.assert_array_equal(found.rows, np.concatenate(stored))
    paths[1].with_name("clip").joinpath("b.npy").unlink()
    with pytest.raises(
        ValueError, match=r"^data.source: 1 of 2 clouds in .* have no CLIP embeddings .* with --clip, or"
    ):
        load_embeddings(DataConfig(source=str(out)), clouds)


def test_views_show_a_shape_from_all_sides() -> None:
    rng = np.random.default_rng(0)
    pole = np.concatenate((rng.random((400, 3)) * (0.1, 1, 0.1), rng.random((400, 3)) * (1, 0.1, 0.1)))  # an L
    pictures = views(pole, 4)
    assert (pictures.shape, pictures.dtype) == ((4, CELL, CELL, 3), np.uint8)
    ink = (pictures[..., 0] < 160).mean((1, 2))
    assert (ink > 0.02).all()
    left = np.array(
        [(picture[:, : CELL // 2, 0] < 160).sum() > (picture[:, CELL // 2 :, 0] < 160).sum() for picture in pictures]
    )
    assert left.any()
    assert not left.all()  # the foot of the L points left from one side and right from the other


def test_views_are_drawn_by_the_samples_numbers() -> None:
    rng = np.random.default_rng(0)
    found = Embeddings.of([unit(rng, 3), unit(rng, 1), unit(rng, 2)], "abc", None)
    drawn = found.draw(7, range(200), [i % 3 for i in range(200)])
    assert torch.equal(found.draw(7, range(100, 104), [1, 2, 0, 1]), drawn[100:104])  # as in an unbroken run
    assert not torch.equal(found.draw(8, range(200), [i % 3 for i in range(200)]), drawn)
    for shape, views_of in enumerate((3, 1, 2)):
        rows, counts = np.unique(drawn[shape::3].numpy(), axis=0, return_counts=True)
        own = found.rows[found.starts[shape] : found.starts[shape + 1]].astype(np.float32)
        assert len(rows) == views_of
        assert counts.min() > 0.5 * counts.mean()
        assert {tuple(row) for row in rows} == {tuple(row) for row in own}
    some = found.some(2)
    assert len(some) == len(some.rows) == 2
    assert set(some.ids) < set("abc")


def test_a_file_of_embeddings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = unit(rng, 5)
    clouds = Clouds(np.zeros((2, 4, 3), np.float32), np.zeros(2, np.int64), ("box",), ("box/a", "box/b"))
    np.savez(
        tmp_path / "e.npz", embeddings=7 * rows, ids=["box/b", "box/a", "box/b", "box/c", "box/b"], model="some/clip"
    )
    found = load_embeddings(DataConfig(embeddings=str(tmp_path / "e.npz")), clouds)
    assert (found.ids, found.model, found.starts.tolist()) == (("box/a", "box/b"), "some/clip", [0, 1, 4])
    np.testing.assert_allclose(found.rows, rows[[1, 0, 2, 4]], atol=1e-3)
    write_embeddings(found, tmp_path / "again.npz")
    again = read_embeddings("x", tmp_path / "again.npz")
    assert (again.ids, again.model) == (found.ids, found.model)
    np.testing.assert_array_equal(again.starts, found.starts)
    np.testing.assert_array_equal(again.rows, found.rows)

    np.save(tmp_path / "e.npy", rows[:4].reshape(2, 2, 512))
    numbered = load_embeddings(DataConfig(embeddings=str(tmp_path / "e.npy")), clouds)
    assert (numbered.ids, numbered.starts.tolist()) == (clouds.names, [0, 2, 4])


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"embeddings": np.ones((2, 512))}, "expected arrays called embeddings and ids, .* holds others"),
        (
            {"embeddings": np.ones((2, 511)), "ids": ["a", "b"]},
            r"expected floating-point \(..., 512\), .* \(2, 511\) in",
        ),
        ({"embeddings": np.ones((2, 512), int), "ids": ["a", "b"]}, r"expected floating-point .* got int64"),
        ({"embeddings": np.ones((2, 512)), "ids": ["a"]}, "expected one name in ids for each of 2 rows, got"),
        ({"embeddings": np.ones((2, 512)), "ids": [1, 2]}, "expected one name in ids for each of 2 rows, got int64"),
        ({"embeddings": np.zeros((2, 512)), "ids": ["a", "b"]}, "expected finite embeddings other than zero"),
        ({"embeddings": np.full((2, 512), np.nan), "ids": ["a", "b"]}, "expected finite embeddings other than zero"),
        ({"embeddings": np.ones((2, 512)), "ids": ["a", "b"]}, ".* holds none of 1 of 1 training shapes, as box/a"),
    ],
)
def test_a_wrong_file_of_embeddings_is_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], line: str) -> None:
    clouds = Clouds(np.zeros((1, 4, 3), np.float32), np.zeros(1, np.int64), ("box",), ("box/a",))
    np.savez(tmp_path / "e.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^data.embeddings: {line}"):
        load_embeddings(DataConfig(embeddings=str(tmp_path / "e.npz")), clouds)


def test_embeddings_and_clip_belong_together(tmp_path: Path) -> None:
    config = tiny_config()
    given = replace(config, data=replace(config.data, embeddings="e.npz"))
    with pytest.raises(ValueError, match=r"^data.embeddings: is for a run with --clip, got e.npz$"):
        check(given)
    check(with_clip(given))
    one = replace(config.model, shape_prior=with_clip(config).model.shape_prior)
    with pytest.raises(ValueError, match=r"^clip: expected both priors to be conditioned on CLIP, or neither$"):
        check(replace(config, model=one))
    clouds = Clouds(np.zeros((1, 4, 3), np.float32), np.zeros(1, np.int64), ("box",), ("box/a",))
    np.save(tmp_path / "e.npy", np.ones((2, 512)))
    for source, path, line in (
        ("procedural", None, "data.embeddings: the embedded shapes have none"),
        ("procedural", tmp_path / "e.npy", "data.embeddings: expected those of 1 training shapes, .* holds 2"),
        ("folder", tmp_path / "e.npy", "data.embeddings: a .npy file goes by number"),
        ("folder", tmp_path / "none.npz", "data.embeddings: .* is no file"),
    ):
        with pytest.raises(ValueError, match=f"^{line}"):
            load_embeddings(DataConfig(source=source, embeddings=path and str(path)), clouds)


def test_the_page_makes_embeddings_of_words(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command beneath takes them."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "words.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for old, new in (("openai/clip-vit-base-patch32", str(clip_folder)), ("2000", "4"), ("200)", "2)")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, {})
    (command,) = re.findall(r"python -m lion_triton.train (quickstart .*)", page)
    args = train.parse(command.split())
    assert (args.clip, args.config.data.embeddings) == (True, "words.npz")
    sources = load_sources(replace(args.config.data, num_shapes=4), 2)
    found = load_embeddings(args.config.data, sources.train)
    assert (found.model, found.ids) == (str(clip_folder), sources.train.names)
    words = CLIP(clip_folder).texts([f"a {name.split('/')[0]}" for name in found.ids])
    np.testing.assert_allclose(found.rows, words, atol=1e-4)


# Whole runs


def test_two_embeddings_make_two_kinds_of_shapes(tmp_path: Path) -> None:
    """Trained on poles under one embedding and plates under another, from a file: the embedding decides which comes."""
    rng = np.random.default_rng(0)
    ids, rows = [], []
    for name, size, embedding in (("pole", (0.1, 2, 0.1), NARROW), ("plate", (1, 0.1, 1), WIDE)):
        for i in range(8):
            path = tmp_path / "data" / name / ("test" if i == 7 else "train") / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, ((rng.random((200, 3)) - 0.5) * size).astype(np.float32))
            ids.append(f"{name}/{i}")
            rows.append(embedding.numpy() + 0.01 * rng.standard_normal((2, 512)))
    np.savez(tmp_path / "e.npz", embeddings=np.array(rows), ids=ids)
    config = tiny_config()
    config = replace(
        config,
        data=replace(config.data, source=str(tmp_path / "data"), embeddings=str(tmp_path / "e.npz")),
        vae=replace(config.vae, steps=6, batch_size=8, occupancy_weight=0.0),
        priors=replace(config.priors, steps=70, batch_size=14, learning_rate=5e-3, ema_decay=0.8),
        evaluate_shapes=2,
    )
    out = tmp_path / "run"
    train.train(Arguments(config, out=out, clip=True))
    run = open_run(out)
    assert (run.clip, read_embeddings("run", run.embeddings).model) == (None, None)
    assert set(read_embeddings("run", run.embeddings).ids) == {name for name in ids if not name.endswith("7")}

    np.savez(tmp_path / "asked.npz", embeddings=torch.stack((NARROW, WIDE)).numpy(), ids=["narrow", "wide"])
    args = sample.SampleArguments(out, num_samples=6, clip_embedding=tmp_path / "asked.npz", out=tmp_path / "made")
    extent = np.ptp(sample.sample(args).points, axis=1)
    ratio = extent[:, 1] / extent[:, [0, 2]].max(1)
    assert ratio[:6].min() > 2 * ratio[6:].max(), ratio

    # Priors for few steps learn from the same embeddings.
    settings = DistillTraining(teacher_steps=4, counts=(2,), steps=1, batch_size=4)
    train.train(Arguments(replace(config, distill=settings), out=out, stage="distill"))
    few = sample.sample(replace(args, num_samples=1, steps=2, out=tmp_path / "few")).points
    assert few.shape == (2, POINTS, 3)


def test_sampling_by_words_and_pictures(run: Run, clip_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "chair.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(picture)
    asked = ["--text", "a narrow chair", "a sofa", "--image", str(picture)]
    options = [str(run.folder), "--num-samples", "2", "--steps", "2", "--guidance", "1", *asked]
    sample.main([*options, "--out", str(tmp_path / "a")])
    made, record = np.load(tmp_path / "a" / "clouds.npz"), json.loads((tmp_path / "a" / "samples.json").read_text())
    assert made["points"].shape == (6, POINTS, 3)
    names = ["a narrow chair", "a sofa", "chair.png"]
    assert (record["prompts"], record["clip"], list(made["ids"])) == (names, str(clip_folder), names)
    clip = CLIP(clip_folder)
    expected = torch.cat((clip.texts(names[:2]), clip.images([Image.open(picture)])))
    np.testing.assert_allclose(made["embeddings"], expected, atol=1e-4)
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.height == 3 * CELL
        assert grid.width > 2 * CELL  # and a strip for the names

    again = {name: value for name, value in record["options"].items() if value not in (None, [], False)}
    words = [word for name in ("text", "image") for word in (f"--{name}", *again.pop(name))]
    words += [w for k, v in again.items() if k not in ("run", "out") for w in (f"--{k.replace('_', '-')}", str(v))]
    sample.main([again["run"], *words, "--out", str(tmp_path / "b")])
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "clouds.npz")["points"], made["points"])
    # The embeddings that were kept do without the CLIP.
    kept = ["--clip-embedding", str(tmp_path / "a" / "clouds.npz")]
    sample.main([*options[: -len(asked)], *kept, "--out", str(tmp_path / "c")])
    np.testing.assert_array_equal(np.load(tmp_path / "c" / "clouds.npz")["points"], made["points"])


def test_a_shape_is_varied_as_words_say(
    run: Run, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without words as the likeliest training shape is described."""
    monkeypatch.setattr(vary, "draw_grid", lambda rows, path: path.write_bytes(b""))
    np.save(tmp_path / "sofa.npy", CLIP(clip_folder).texts(["a sofa"])[0].numpy())
    given = {
        "words": ["--text", "a sofa"],
        "embedding": ["--clip-embedding", str(tmp_path / "sofa.npy")],
        "others": ["--text", "a narrow chair"],
        "none": [],
    }
    options = ["procedural:0", "--num-samples", "1", "--steps", "4", "--strength", "0.5"]
    found = {}
    for name, words in given.items():
        vary.main([str(run.folder), *options, *words, "--out", str(tmp_path / name)])
        found[name] = np.load(tmp_path / name / "clouds.npz")
    np.testing.assert_allclose(found["words"]["points"], found["embedding"]["points"], atol=1e-4)
    for name in ("others", "none"):
        assert np.abs(found[name]["points"] - found["words"]["points"]).max() > 1e-3
        np.testing.assert_array_equal(found[name]["reconstruction"], found["words"]["reconstruction"])
    record = json.loads((tmp_path / "words" / "samples.json").read_text())
    assert (record["prompts"], record["clip"], record["given"]["class"]) == (["a sofa"], str(clip_folder), "a sofa")
    assert list(found["words"]["ids"]) == ["a sofa"]
    printed = capsys.readouterr().out
    assert "procedural:0 (a sofa): Chamfer distance" in printed
    assert re.search(r"procedural:0: described as chair/[abc] is, the likeliest training shape", printed)


@pytest.mark.parametrize("words", [(), ("--text", "a sofa"), ("--text", "a sofa", "a narrow chair")])
def test_between_seeds_of_words_the_ends_are_those_of_sample(
    run: Run, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((output, "grid"), (interpolate, "grid"), (output, "animate"), (prompts, "draw_grid")):
        monkeypatch.setattr(owner, name, lambda *args, **_: args[1].write_bytes(b""))
    options = ["--frames", "3", "--steps", "3", *words, "--out", str(tmp_path / "way")]
    interpolate.main([str(run.folder), "3", "14", *options])
    frames = np.load(tmp_path / "way" / "clouds.npz")["points"]
    for seed, frame, word in (("3", frames[0], words[1:2]), ("14", frames[-1], words[-1:])):
        asked = [*words[:1], *word, "--steps", "3", "--num-samples", "1", "--seed", seed]
        sample.main([str(run.folder), *asked, "--out", str(tmp_path / seed)])
        made = np.load(tmp_path / seed / "clouds.npz")["points"]
        np.testing.assert_allclose(made, frame[None], atol=1e-5)  # a text beside another may round otherwise


def test_between_shapes_of_words_the_ends_come_back(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((interpolate, "grid"), (output, "animate")):
        monkeypatch.setattr(owner, name, lambda *args, **_: args[1].write_bytes(b""))
    words = ["--text", "a sofa", "a narrow chair", "--out", str(tmp_path / "out")]
    interpolate.main([str(run.folder), "procedural:0", "procedural:2", "--frames", "3", "--steps", "8", *words])
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [row["class"] for row in record["given"]] == record["prompts"] == ["a sofa", "a narrow chair"]
    for row in record["given"]:
        assert row["chamfer"] < 2 * row["reconstruction_chamfer"]


def test_meshes_are_made_of_words(run: Run, tmp_path: Path) -> None:
    """By the clouds that sample makes of them."""
    options = ["--num-samples", "1", "--text", "a sofa", "a narrow chair", "--out"]
    mesh.main([str(run.folder), "--normals", "estimated", "--resolution", "16", *options, str(tmp_path / "meshes")])
    sample.main([str(run.folder), *options, str(tmp_path / "clouds")])
    ours, theirs = (np.load(tmp_path / name / "clouds.npz")["points"] for name in ("meshes", "clouds"))
    np.testing.assert_array_equal(ours, theirs)
    record = json.loads((tmp_path / "meshes" / "meshes.json").read_text())
    assert record["prompts"] == ["a sofa", "a narrow chair"]


def test_the_page_takes_words(run: Run) -> None:
    pytest.importorskip("viser")
    from lion_triton.viewer.generate import Generator
    from lion_triton.viewer.page import Page

    page = Page(8491)
    try:
        generator = Generator(page, open_model(run.folder))
        assert page.status.content == f"seed 0, chair/a: {POINTS} points"
        assert generator.asked is not None
        first, generator.asked.value = generator.shown, "chair/c"
        page.do("Resample", generator.resample)
        assert page.status.content == f"seed 0, chair/c: {POINTS} points"
        assert not np.array_equal(generator.shown, first)
        given = read_prompts(run, prompts.PromptArguments(text=("a sofa",)))
        Generator(page, open_model(run.folder), given)
        assert page.status.content == f"seed 0, a sofa: {POINTS} points"
    finally:
        page.server.stop()


def test_without_words_the_training_shapes_embeddings_are_taken(run: Run, tmp_path: Path) -> None:
    """By the run, and by the model that is saved of it; the card says what it is conditioned on."""
    LION.from_pretrained(run.folder).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"conditioned on CLIP embeddings, of texts or pictures, by `{run.clip}`" in card
    assert f'clip = CLIP("{run.clip}").texts(["a chair"])' in card
    assert '--text "a chair"' in card
    options = {"num_samples": 4, "steps": 2}
    a, b = (
        sample.sample(sample.SampleArguments(folder, **options, out=tmp_path / name)).points  # type: ignore[arg-type]
        for name, folder in (("a", run.folder), ("b", tmp_path / "saved"))
    )
    np.testing.assert_array_equal(a, b)
    (tmp_path / "saved" / "embeddings.npz").unlink()
    with pytest.raises(ValueError, match=r"^run: .* keeps no embeddings: give --text$"):
        sample.sample(sample.SampleArguments(tmp_path / "saved", **options, out=tmp_path / "c"))  # type: ignore[arg-type]


def test_wrong_words_are_one_line(
    run: Run, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.png").write_text("no picture")
    folder = str(run.folder)
    for words, line in (
        (["--image", str(tmp_path / "no.png")], "image: .*no.png is not a picture that can be read"),
        (["--image", str(tmp_path / "none.png")], "image: .*none.png is not a picture"),
        (["--clip-embedding", str(tmp_path / "none.npy")], "clip-embedding: .*none.npy is no file"),
        (["--clip-model", str(clip_folder)], "clip-model: is for --text and --image, got none of these"),
        (["--text", "a chair", "--clip-model", str(tmp_path)], "clip: no CLIP could be read from"),
    ):
        assert_line(fails(capsys, sample.main, [folder, *words, "--out", str(tmp_path / "out")]), line)
    plain = create_run(tmp_path / "plain", tiny_config(), ("a", "b"), Normalization("global"))
    assert_line(
        fails(capsys, sample.main, [str(plain.folder), "--text", "x"]), "text: this run was trained without --clip"
    )
    unknown = create_run(tmp_path / "unknown", run.config, ("a",), Normalization("global"))
    assert_line(
        fails(capsys, sample.main, [str(unknown.folder), "--text", "x"]), "text: the run does not say which CLIP"
    )
    way = [interpolate.main, [folder, "1", "2", "--text", "a", "b", "c"]]
    for (command, args), line in (
        ((vary.main, [folder, "procedural:0", "--text", "a", "b"]), "text: expected at most 1 texts, .*, got 2"),
        (way, "text: expected at most 2 texts, images and embeddings together, got 3"),
        ((vary.main, [str(plain.folder), "procedural:0", "--text", "x"]), "text: this run was trained without --clip"),
        ((mesh.main, [str(tmp_path), "--text", "x"]), "text: is for a run folder"),
    ):
        assert_line(fails(capsys, command, [*args, "--out", str(tmp_path / "out")]), line)
    assert_line(fails(capsys, view.main, [str(tmp_path), "--text", "x"]), "text: is for a run folder")
    assert not (tmp_path / "out").exists()


def assert_line(line: str, expected: str) -> None:
    assert re.match(f"error: {expected}", line), line
