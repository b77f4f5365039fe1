"""``python -m lion_triton.evaluate``: what it compares, says and writes, and how it fails."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from lion_triton import evaluate, metrics, page, sample, train
from lion_triton.data.clouds import Normalization
from lion_triton.data.sources import load_sources
from lion_triton.evaluate import Preparation
from lion_triton.kernels import pairwise_chamfer
from tests.test_train import TINY, fails

Record = dict[str, Any]


def clouds(count: int, points: int, seed: int, scale: float = 0.1) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, points, 3)) * scale).astype(np.float32)


def score(samples: Path, out: Path, *more: str) -> Record:
    """Run the command line and return what it wrote."""
    evaluate.main([str(samples), "--out", str(out), *more])
    return json.loads((out / "evaluation.json").read_text())


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; ``scored`` below and tests/test_page.py draw."""
    monkeypatch.setattr(page, "thumbnails", lambda clouds: [b"" for _ in clouds])


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    np.savez(tmp_path / "samples.npz", points=clouds(5, 40, 1))
    np.save(tmp_path / "references.npy", clouds(5, 40, 2))
    return tmp_path / "samples.npz", tmp_path / "references.npy"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train.main(["quickstart", "--out", str(out), *TINY])
    return out


@pytest.fixture(scope="module")
def scored(finished: Path) -> Path:
    evaluate.main([str(finished)])
    return finished / "evaluation"


def test_a_run_is_sampled_and_scored(finished: Path, scored: Path) -> None:
    assert {p.name for p in scored.iterdir()} == {"evaluation.json", "evaluation.html", "samples.npz"}
    record = json.loads((scored / "evaluation.json").read_text())
    samples = np.load(scored / "samples.npz")["points"]
    assert samples.shape == (6, 130, 3)
    assert record["samples"]["sha256"] == hashlib.sha256(samples.astype("<f4").tobytes()).hexdigest()
    # All that is needed to repeat it.
    for key in ("lion_triton", "python", "torch", "numpy", "scipy", "device", "command", "seed", "split", "emd"):
        assert record[key] not in (None, ""), key
    assert "commit" in record
    assert record["normalization"].startswith("data units")
    for name in ("samples", "references"):
        assert (record[name]["clouds"], record[name]["points"]) == (6, 130)
        assert len(record[name]["sha256"]) == 64
    sampling = record["samples"]["sampling"]
    assert (sampling["sampler"], sampling["steps"], sampling["eta"], sampling["seed"]) == ("ddim", 3, 0.0, 0)
    assert sampling["clip_x0"] == 5.0
    assert sampling["classes"] == "those of the references"
    assert sampling["checkpoint"].endswith("step-00000008")
    assert set(sampling["weights_sha256"]) == {"model.safetensors", "ema.safetensors"}
    figures = record["figures"]
    assert {"mmd_cd", "cov_cd", "1nna_cd", "mmd_emd", "cov_emd", "1nna_emd", "jsd"} < figures.keys()
    assert {"reconstruction_cd", "reconstruction_emd", "reconstruction_f_score"} < figures.keys()
    assert figures["bound_joint"] == pytest.approx(
        (32 * figures["bound_shape"] + 520 * figures["bound_point"]) / 552, rel=1e-6
    )
    assert len(record["per_sample"]) == len(record["per_reference"]) == 6
    assert {row["training"].split("/")[0] for row in record["per_sample"]} <= {
        "chair",
        "table",
        "sofa",
        "lamp",
        "shelf",
    }


def test_the_command_that_it_writes_down_repeats_it(finished: Path, scored: Path, tmp_path: Path) -> None:
    before = json.loads((scored / "evaluation.json").read_text())
    python, flag, module, *arguments = shlex.split(before["command"])
    assert (python, flag, module) == ("python", "-m", "lion_triton.evaluate")
    after = score(Path(arguments[0]), tmp_path / "again", *arguments[1:])
    for record in (before, after):
        del record["command"], record["options"]["out"]
    assert after == before


def test_the_samples_it_writes_can_be_scored_again(finished: Path, scored: Path, tmp_path: Path) -> None:
    """The same references, drawn by another route, are the same points."""
    before = json.loads((scored / "evaluation.json").read_text())
    after = score(scored / "samples.npz", tmp_path / "again", "--reference", "procedural")
    for name in ("samples", "references"):
        assert after[name]["sha256"] == before[name]["sha256"]
    shared = after["figures"].keys()
    assert {name: before["figures"][name] for name in shared} == after["figures"]
    assert after["training"] is None
    assert any("No training shapes were given" in note for note in after["notes"])


def test_options_of_a_run(finished: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", points=clouds(4, 140, 0))
    more = "--num-samples 3 --sampler ddpm --steps 2 --num-points 120 --seed 3 --emd none --norm-box".split()
    record = score(finished, tmp_path / "out", "--reference", str(tmp_path / "mine.npz"), *more)
    assert (record["samples"]["clouds"], record["samples"]["points"]) == (3, 120)
    assert (record["references"]["clouds"], record["references"]["points"]) == (4, 120)
    sampling = record["samples"]["sampling"]
    assert (sampling["sampler"], sampling["steps"], sampling["seed"]) == ("ddpm", 2, 3)
    assert sampling["classes"] == "in turn"
    assert any("No bound of the priors" in note for note in record["notes"])
    assert not {"bound_shape", "mmd_emd", "reconstruction_emd"} & record["figures"].keys()
    raw = np.load(tmp_path / "out" / "samples.npz")["points"]  # what was generated, not yet fitted to the box
    boxed = np.stack([Normalization("box").apply(c) / np.float32(2) for c in raw])
    assert record["samples"]["sha256"] == hashlib.sha256(boxed.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["global", "box"])
def test_samples_and_references_of_a_run_are_in_one_unit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A perfect model, which generates the references: as the networks see them, with the labels they have."""
    out = tmp_path / "run"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("evaluation"))
    config = json.loads((out / "config.json").read_text())
    if kind == "box":
        config["normalization"] = Normalization("box").to_json()
        (out / "config.json").write_text(json.dumps(config))
    run = evaluate.open_run(out)
    sources = load_sources(run.config.data, run.config.evaluate_shapes)
    references = sources.held_out.subset(range(5, -1, -1))  # whose classes are not in turn
    monkeypatch.setattr(evaluate, "load_sources", lambda *_: replace(sources, held_out=references))

    def perfect(_: object, __: object, args: sample.SampleArguments, labels: np.ndarray) -> np.ndarray:
        np.testing.assert_array_equal(labels, references.labels)
        assert (args.num_samples, args.num_points) == (6, 130)
        whole = Preparation("first10k", 0, None, False)(references, 130, evaluate.REFERENCE)
        scales = [run.normalization.center_and_scale(cloud) for cloud in references]
        return np.stack([(x - c) / s for x, (c, s) in zip(whole, scales, strict=True)]).astype(np.float32)

    monkeypatch.setattr(evaluate, "generate", perfect)
    record = score(out, tmp_path / "out", "--emd", "none")
    assert record["figures"]["mmd_cd"] == pytest.approx(0, abs=1e-10)
    assert record["figures"]["cov_cd"] == 1
    assert record["normalization"].startswith({"global": "data units", "box": "each cloud's box fitted"}[kind])
    size = np.ptp(np.load(tmp_path / "out" / "samples.npz")["points"], axis=1).max()
    assert size == pytest.approx({"global": 1, "box": 2}[kind], rel=0.05)  # of the longest side of a shape


def test_default_steps_are_written_as_a_number(finished: Path) -> None:
    run = evaluate.open_run(finished)
    for sampler, steps in (("ddpm", 1000), ("ddim", 3), ("ode", None)):
        assert sample.resolved(run, sample.SampleArguments(finished, sampler=sampler)).steps == steps


def test_a_run_whose_data_are_gone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moved"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("evaluation"))
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"source": "procedural"', '"source": "/nowhere"'))
    line = fails(capsys, evaluate.main, [str(out)])
    assert line.startswith("error: reference: the run's own data cannot be read")
    assert not (out / "evaluation").exists()
    np.save(tmp_path / "r.npy", clouds(2, 130, 0))
    more = ["--num-samples", "2", "--steps", "1", "--emd", "none"]
    record = score(out, tmp_path / "out", "--reference", str(tmp_path / "r.npy"), *more)
    assert record["memorising"] is None
    assert any("training shapes cannot be read" in note for note in record["notes"])


def test_a_model_that_generates_nan_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = clouds(6, 130, 0)
    points[4, 7, 1] = np.nan
    monkeypatch.setattr(evaluate, "generate", lambda *_: points)
    line = fails(capsys, evaluate.main, [str(finished), "--out", str(tmp_path / "out")])
    assert line == "error: samples: expected finite coordinates, got NaN or infinity in cloud 4"
    assert not (tmp_path / "out").exists()


def _npy(folder: Path, points: np.ndarray) -> Path:
    np.save(folder / "set.npy", points)
    return folder / "set.npy"


def _npz(folder: Path, points: np.ndarray) -> Path:
    np.savez(folder / "set.npz", anything=points.astype(np.float64))
    return folder / "set.npz"


def _samples_folder(folder: Path, points: np.ndarray) -> Path:
    np.savez(folder / "clouds.npz", points=points, labels=np.zeros(len(points)), classes=np.array(["a"]))
    return folder


def _files(folder: Path, points: np.ndarray) -> Path:
    np.save(folder / "0.npy", points[0])
    trimesh.PointCloud(points[1]).export(folder / "1.ply")
    np.savetxt(folder / "2.xyz", points[2], fmt="%.9g")
    for i, cloud in enumerate(points[3:], 3):
        np.savez(folder / f"{i}.npz", points=cloud)
    return folder


def _layout(folder: Path, points: np.ndarray) -> Path:
    (folder / "chair" / "test").mkdir(parents=True)
    (folder / "chair" / "train").mkdir(parents=True)
    for i, cloud in enumerate(points):
        np.save(folder / "chair" / "test" / f"{i}.npy", cloud)
    np.save(folder / "chair" / "train" / "0.npy", points[0] + 1)
    return folder


@pytest.mark.parametrize("write", [_npy, _npz, _samples_folder, _files, _layout])
def test_every_form_of_a_set_is_the_same_set(
    sets: tuple[Path, Path], tmp_path: Path, write: Callable[[Path, np.ndarray], Path]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    record = score(sets[0], tmp_path / "out", "--emd", "none", "--reference", str(write(folder, clouds(5, 40, 2))))
    assert record["references"]["sha256"] == hashlib.sha256(clouds(5, 40, 2).tobytes()).hexdigest()
    a, b = torch.from_numpy(clouds(5, 40, 1)), torch.from_numpy(clouds(5, 40, 2))
    assert record["figures"] == metrics.evaluate(a, b, emd=None)


def test_a_folder_of_samples_without_an_out(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    evaluate.main([str(_samples_folder(folder, clouds(2, 40, 1))), "--reference", str(sets[1]), "--emd", "none"])
    assert (folder / "evaluation" / "evaluation.html").exists()
    evaluate.main([str(sets[0]), "--reference", str(sets[1]), "--emd", "none"])
    assert (tmp_path / "samples-evaluation" / "evaluation.json").exists()


def test_the_split_of_the_points() -> None:
    """A cloud of 15,000 is divided, a shorter one is not."""
    cloud = np.arange(15_000, dtype=np.float32)[:, None].repeat(3, 1)
    for split, low, high in (("first10k", 0, 10_000), ("last5k", 10_000, 15_000)):
        prepare = Preparation(split, 0, None, False)  # type: ignore[arg-type]
        drawn = prepare.draw(cloud, 4000, np.random.default_rng(0))[:, 0]
        assert low <= drawn.min() < low + 50
        assert high - 50 < drawn.max() < high
        assert len(np.unique(drawn)) == 4000
        assert prepare.available(15_000) == high - low
        np.testing.assert_array_equal(prepare.draw(cloud, high - low, np.random.default_rng(0)), cloud[low:high])
        assert prepare.draw(cloud[:14_999], 14_999, np.random.default_rng(0))[-1, 0] == 14_998
        assert prepare.available(14_999) == 14_999


def test_the_split_is_named_with_the_figures(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two halves of a cloud that differ: the split decides the figures."""
    folder = tmp_path / "data" / "chair" / "test"
    folder.mkdir(parents=True)
    for i in range(2):
        cloud = clouds(1, 15_000, i)[0]
        cloud[10_000:] += 0.3
        np.save(folder / f"{i}.npy", cloud)
    given = ["--reference", str(tmp_path / "data"), "--emd", "none"]
    first, last = (score(sets[0], tmp_path / s, *given, "--split", s) for s in ("first10k", "last5k"))
    assert (first["split"], last["split"]) == ("first10k", "last5k")
    assert first["figures"]["mmd_cd"] < 0.1 < last["figures"]["mmd_cd"]
    assert not any("split" in note for note in first["notes"])
    short = score(sets[0], tmp_path / "short", "--reference", str(sets[1]), "--emd", "none")
    assert "The split first10k changes nothing: no reference has 15000 points." in short["notes"]
    out = capsys.readouterr().out
    assert "split       last5k" in out
    assert "changes nothing" in out


def test_norm_box_takes_away_place_and_size(sets: tuple[Path, Path], tmp_path: Path) -> None:
    moved = clouds(5, 40, 2) * np.array([2, 3, 4, 5, 6], np.float32)[:, None, None] + 7
    np.save(tmp_path / "moved.npy", moved)
    more = ["--emd", "none", "--norm-box"]
    a, b = (score(sets[0], tmp_path / p.stem, "--reference", str(p), *more) for p in (sets[1], tmp_path / "moved.npy"))
    assert a["figures"] == pytest.approx(b["figures"], rel=1e-4)
    assert "[-0.5, 0.5]" in a["normalization"]
    plain = score(sets[0], tmp_path / "plain", "--reference", str(sets[1]), "--emd", "none")
    assert plain["figures"]["mmd_cd"] != pytest.approx(a["figures"]["mmd_cd"], rel=0.1)


def test_sets_of_other_sizes_are_all_compared_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "s.npy", clouds(7, 50, 1))
    np.save(tmp_path / "r.npy", clouds(3, 30, 2))
    record = score(tmp_path / "s.npy", tmp_path / "out", "--reference", str(tmp_path / "r.npy"))
    assert (record["samples"]["clouds"], record["samples"]["points"]) == (7, 50)
    assert (record["references"]["clouds"], record["references"]["points"]) == (3, 30)
    a, b = torch.from_numpy(clouds(7, 50, 1)), torch.from_numpy(clouds(3, 30, 2))
    assert record["figures"] == metrics.evaluate(a, b)
    out = capsys.readouterr().out
    for text in (
        "7 samples against 3 references: all are compared",
        "References have only 30 points, fewer than the 50",
    ):
        assert any(text in note for note in record["notes"])
        assert text in out
    line = fails(
        capsys,
        evaluate.main,
        [*f"{tmp_path / 's.npy'} --reference {tmp_path / 'r.npy'} --emd exact --out {tmp_path / 'x'}".split()],
    )
    assert "exact needs equally many points" in line
    assert "--num-points 30" in line
    exact = score(
        tmp_path / "s.npy",
        tmp_path / "x",
        "--reference",
        str(tmp_path / "r.npy"),
        *"--emd exact --num-points 30".split(),
    )
    assert exact["figures"]["mmd_emd"] > 0
    reverse = score(tmp_path / "r.npy", tmp_path / "y", "--reference", str(tmp_path / "s.npy"), "--emd", "none")
    assert any("COV is at most 0.429" in note for note in reverse["notes"])
    assert reverse["references"]["points"] == 30  # drawn of 50


def test_clouds_of_different_lengths(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for i, points in enumerate((20, 35, 50)):
        np.save(folder / f"{i}.npy", clouds(1, points, i)[0])
    np.save(tmp_path / "r.npy", clouds(3, 60, 9))
    record = score(folder, tmp_path / "out", "--reference", str(tmp_path / "r.npy"), "--emd", "none")
    assert record["samples"]["points"] == record["references"]["points"] == 20
    assert "Samples have 20 to 50 points: 20 are drawn of each." in record["notes"]
    more = score(
        folder, tmp_path / "more", "--reference", str(tmp_path / "r.npy"), *"--emd none --num-points 30".split()
    )
    assert more["samples"]["points"] == 20
    assert "Samples have only 20 points, not the 30 asked for." in more["notes"]


@pytest.mark.parametrize("name", ["one", "duplicates", "coincident", "same"])
def test_hard_sets(name: str, tmp_path: Path) -> None:
    samples, references = clouds(3, 20, 1), clouds(3, 20, 2)
    if name == "one":
        samples, references = samples[:1], references[:1]
    elif name == "duplicates":
        samples, references = samples[[0, 0, 1, 1]], references[[2, 2, 2]]
    elif name == "coincident":
        samples[0], references[1] = samples[0, 0], 0
    else:
        references = samples
    for path, points in (("s.npy", samples), ("r.npy", references)):
        np.save(tmp_path / path, points)
    given = ["--reference", str(tmp_path / "r.npy"), "--training", str(tmp_path / "r.npy")]
    for box in ([], ["--norm-box"]):
        record = score(tmp_path / "s.npy", tmp_path / "out", *given, *box)
        assert all(np.isfinite(value) for value in record["figures"].values())
        covered = sum(row["covered"] for row in record["per_reference"])
        assert covered / len(references) == pytest.approx(record["figures"]["cov_cd"])


@pytest.mark.parametrize("option", ["samples", "reference", "training"])
@pytest.mark.parametrize("form", [_npy, _files, _layout])
def test_nan_in_one_cloud_is_named(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, form: Callable[..., Path]
) -> None:
    bad = clouds(5, 40, 3)
    bad[2, 17, 0] = np.nan
    folder = tmp_path / "bad"
    folder.mkdir()
    path = form(folder, bad)
    if form is _layout and option == "training":
        (folder / "chair" / "train").rename(folder / "chair" / "val")
        (folder / "chair" / "test").rename(folder / "chair" / "train")
    given = {"samples": sets[0], "reference": sets[1], "training": sets[1]} | {option: path}
    target = given.pop("samples")
    args = [str(target), "--out", str(tmp_path / "out"), "--emd", "none"]
    for name, value in given.items():
        args += [f"--{name}", str(value)]
    line = fails(capsys, evaluate.main, args)
    expected = {
        _npy: f"{option}: expected finite coordinates, got NaN or infinity in cloud 2",
        _files: f"{option}: cloud 2,",
    }
    assert expected.get(form, "2.npy: point 17 is not finite (nan)") in line
    assert not (tmp_path / "out").exists()


def test_bad_input_ends_with_one_line(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, references = map(str, sets)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    np.save(tmp_path / "flat.npy", clouds(1, 40, 0)[0])
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=clouds(1, 4, 0), b=clouds(1, 4, 0))
    (tmp_path / "empty").mkdir()
    mesh = tmp_path / "mesh"
    mesh.mkdir()
    trimesh.creation.box().export(mesh / "box.obj")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "evaluation.html").write_text("mine")
    cases = [
        ([samples], "reference: expected the clouds to compare with, as --reference DATA"),
        ([str(tmp_path / "no")], f"samples: {tmp_path / 'no'} does not exist"),
        ([str(tmp_path / "no"), "--reference", references], f"samples: {tmp_path / 'no'} does not exist"),
        ([samples, "--reference", str(tmp_path / "no")], f"reference: {tmp_path / 'no'} does not exist"),
        ([samples, "--reference", str(tmp_path / "broken.npz")], "is not a readable .npy or .npz of clouds"),
        ([samples, "--reference", str(tmp_path / "pickle.npy")], "is not a readable .npy or .npz of clouds"),
        ([samples, "--reference", str(tmp_path / "two.npz")], "is not a readable .npy or .npz of clouds"),
        ([samples, "--reference", str(tmp_path / "flat.npy")], "expected numbers of shape (S, P, 3)"),
        ([samples, "--reference", str(tmp_path / "empty")], "reference: no <category>/test/<id>.npy in"),
        ([samples, "--reference", str(mesh)], "is a mesh: python -m lion_triton.prepare"),
        ([samples, "--reference", references, "--num-samples", "3"], "num-samples: is for a run folder"),
        ([samples, "--reference", references, "--steps", "3"], "steps: is for a run folder"),
        ([samples, "--reference", references, "--num-points", "0"], "num-points: expected at least 1, got 0"),
        ([samples, "--reference", references, "--seed", "-1"], "seed: expected 0 to"),
        ([samples, "--reference", references, "--out", str(tmp_path / "taken")], "exists and is no evaluation"),
        ([samples, "--reference", references, "--out", samples], "exists and is no evaluation"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for args, message in cases:
        assert message in fails(capsys, evaluate.main, args), args
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken" / "evaluation.html").read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["drawing", "first file", "second file"])
def test_nothing_is_left_half_written(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, failure: BaseException
) -> None:
    args = [str(sets[0]), "--reference", str(sets[1]), "--emd", "none", "--out"]
    old, new = tmp_path / "old", tmp_path / "new"
    evaluate.main([*args, str(old)])
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    written = 0
    real = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        nonlocal written
        written += 1
        if written == (1 if when == "first file" else 2):
            real(path, content[:100])
            raise failure
        return real(path, content)

    def draw(*_: object) -> str:
        raise failure

    if when == "drawing":
        monkeypatch.setattr(evaluate.page, "render", draw)
    else:
        monkeypatch.setattr(Path, "write_bytes", write)
    for out in (old, new):
        written = 0
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*args, str(out), "--seed", "1"])
        assert stop.value.code == (2 if isinstance(failure, OSError) else 130)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert not new.exists()


@pytest.mark.parametrize("points", [200, 300])
def test_copies_of_training_shapes_are_found(tmp_path: Path, points: int) -> None:
    """Also where the training shapes are screened with fewer points first; against all pairs with all points."""
    training = clouds(30, points, 5) * np.linspace(0.5, 2, 30, dtype=np.float32)[:, None, None]
    samples = clouds(8, points, 6)
    samples[[2, 5]] = training[[11, 29]]
    for name, value in (("t", training), ("s", samples), ("r", clouds(4, points, 7))):
        np.save(tmp_path / f"{name}.npy", value)
    given = ["--reference", str(tmp_path / "r.npy"), "--training", str(tmp_path / "t.npy"), "--emd", "none"]
    record = score(tmp_path / "s.npy", tmp_path / "out", *given)
    brute = pairwise_chamfer(torch.from_numpy(samples), torch.from_numpy(training)).min(1)
    rows = record["per_sample"]
    assert [row["training_index"] for row in rows] == brute.indices.tolist()
    np.testing.assert_allclose([row["training_distance"] for row in rows], brute.values, rtol=1e-4, atol=1e-7)
    assert rows[2]["training_distance"] == rows[5]["training_distance"] == 0
    assert (rows[2]["training"], rows[5]["training"]) == ("11", "29")
    assert record["memorising"]["samples_nearer_than_any_reference"] >= 2
    assert record["memorising"]["one_shape_drawn_twice"] is None  # the shapes have no points for two draws


def test_two_draws_of_one_training_shape_are_the_scale_of_memorising(sets: tuple[Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", clouds(4, 100, 5))
    given = ["--reference", str(sets[1]), "--training", str(tmp_path / "t.npy"), "--emd", "none"]
    floor = score(sets[0], tmp_path / "out", *given)["memorising"]["one_shape_drawn_twice"]
    expected = pairwise_chamfer(*(torch.from_numpy(clouds(20, 40, seed)) for seed in (8, 9))).median().item()
    assert floor == pytest.approx(expected, rel=0.2)


def test_copies_of_training_shapes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three samples are draws of one of the training shapes, which share no point with what is compared."""
    rng = np.random.default_rng(1)
    shapes = clouds(3, 8, 5) * 3  # eight corners each; points scatter a little around them
    training = shapes[:, rng.integers(0, 8, 100)] + rng.normal(0, 0.05, (3, 100, 3))
    copies = shapes[0][rng.integers(0, 8, (2, 40))] + rng.normal(0, 0.05, (2, 40, 3))
    for name, points in (("t", training), ("s", [*copies, clouds(1, 40, 9)[0]]), ("r", clouds(4, 40, 2))):
        np.save(tmp_path / f"{name}.npy", np.asarray(points, dtype=np.float32))
    given = ["--reference", str(tmp_path / "r.npy"), "--training", str(tmp_path / "t.npy"), "--emd", "none"]
    record = score(tmp_path / "s.npy", tmp_path / "out", *given)
    assert record["memorising"]["samples_as_near_as_two_draws"] == 2
    assert "2 of 3 samples are as near to a training shape as two draws of one are" in capsys.readouterr().out
    assert "those may be copies" in (tmp_path / "out" / "evaluation.html").read_text()


def test_published_rows_stand_beside_shapenet_and_nothing_else(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("02691156", "airplane"):
        folder = tmp_path / name / name / "test"
        folder.mkdir(parents=True)
        for i, cloud in enumerate(clouds(5, 40, 2)):
            np.save(folder / f"{i}.npy", cloud)
    shapenet = ["--reference", str(tmp_path / "02691156"), "--emd", "none"]
    record = score(sets[0], tmp_path / "a", *shapenet)
    assert record["category"] == "airplane"
    row = next(row for row in record["published"] if row["method"] == "LION")
    assert row == {"method": "LION", "cd": 67.41, "emd": 61.23, "split": "first10k"}
    assert "Published figures are of 405 references, these of 5." in record["notes"]
    assert "Published figures are of clouds of 2048 points, these of 40 and 40." in record["notes"]
    out = capsys.readouterr().out
    assert "PVD" in out
    assert "67.41" in out
    assert "67.41" in (tmp_path / "a" / "evaluation.html").read_text()
    for emd, shown in (("exact", "-"), ("approx", None)):
        mine = score(sets[0], tmp_path / emd, *shapenet[:2], "--emd", emd)["figures"]["1nna_emd"]
        (line,) = (x for x in capsys.readouterr().out.splitlines() if "these samples" in x)
        assert line.split()[3] == (shown or f"{100 * mine:.2f}")  # published EMD is approximate
    boxed = score(sets[0], tmp_path / "b", *shapenet, "--norm-box")
    assert boxed["published"] == []
    assert "No published figures are known here for airplane in these units." in boxed["notes"]
    own = score(sets[0], tmp_path / "c", "--reference", str(tmp_path / "airplane"), "--emd", "none")
    assert own["category"] is None
    assert own["published"] == []
