"""``python -m lion_triton.evaluate`` as a whole: what it says and writes, and how it fails."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

from lion_triton import evaluate, metrics, sample, train
from lion_triton.data.clouds import Normalization, procedural_clouds
from lion_triton.data.sources import load_sources
from lion_triton.evaluation import galleries, intervals, model, page, phases
from lion_triton.evaluation.sets import FRESH, REFERENCES, SAMPLES, CloudSet, Preparation, open_clouds
from lion_triton.kernels import approx_emd, chamfer_distance, pairwise_chamfer
from lion_triton.models.lion import DiffusionConfig
from lion_triton.reconstruction import Reconstruction
from lion_triton.runs import open_run
from tests.evaluation import clouds, source
from tests.evaluation.test_sets import files, layout, npy, samples_folder
from tests.test_train import TINY, fails

Record = dict[str, Any]
CLASSES = ["chair", "table", "sofa", "lamp", "shelf"]


def score(samples: Path, out: Path, *more: str) -> Record:
    """Run the command line and return what it wrote."""
    evaluate.main([str(samples), "--out", str(out), *more])
    return json.loads((out / "evaluation.json").read_text())


def digest(points: np.ndarray) -> str:
    return hashlib.sha256(points.astype("<f4").tobytes()).hexdigest()


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; ``scored`` below and tests/test_page.py draw."""
    monkeypatch.setattr(galleries, "thumbnails", lambda clouds: [b"" for _ in clouds])


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("something was computed first")

    for owner, name in ((metrics, "all_distances"), (evaluate, "nearest_training"), (model, "generate")):
        monkeypatch.setattr(owner, name, called)


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


# A run


def test_a_run_is_sampled_and_scored(finished: Path, scored: Path) -> None:
    assert {p.name for p in scored.iterdir()} == {"evaluation.json", "evaluation.html", "samples.npz"}
    record = json.loads((scored / "evaluation.json").read_text())
    samples = np.load(scored / "samples.npz")["points"]
    assert samples.shape == (6, 130, 3)
    assert record["samples"]["sha256"] == digest(samples)
    # All that is needed to repeat it.
    for key in ("lion_triton", "python", "torch", "numpy", "scipy", "device", "command", "seed", "split", "emd"):
        assert record[key] not in (None, ""), key
    assert "commit" in record
    assert record["normalization"].startswith("data units")
    for name in ("samples", "references"):
        assert (record[name]["clouds"], record[name]["points"]) == (6, 130)
        assert len(record[name]["sha256"]) == 64
        assert {"size", "center", "nearest_other", "repeated", "outside_sphere"} < record[name].keys()
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
    assert {row["training"].split("/")[0] for row in record["per_sample"]} <= set(CLASSES)


def test_the_record_says_what_the_run_was_trained_with(finished: Path, scored: Path) -> None:
    record, run = json.loads((scored / "evaluation.json").read_text()), open_run(finished)
    assert record["run"] == {
        "folder": str(finished),
        "data": json.loads(json.dumps(asdict(run.config.data))),
        "classes": CLASSES,
        "normalization": run.normalization.to_json(),
    }
    shapes = load_sources(run.config.data, run.config.evaluate_shapes).train
    whole = np.concatenate([cloud.ravel() for cloud in shapes])
    assert record["training"]["sha256"] == digest(whole)
    assert (record["training"]["clouds"], len(shapes)) == (10, 10)


def test_the_command_that_it_writes_down_repeats_it(finished: Path, scored: Path, tmp_path: Path) -> None:
    before = json.loads((scored / "evaluation.json").read_text())
    python, flag, module, *arguments = shlex.split(before["command"])
    assert (python, flag, module) == ("python", "-m", "lion_triton.evaluate")
    # A run that goes on has another newest checkpoint tomorrow.
    assert arguments == [str(finished), "--checkpoint", "step-00000008"]
    after = score(Path(arguments[0]), tmp_path / "again", *arguments[1:])
    assert before["options"]["checkpoint"] == "step-00000008"
    assert after["command"].count("--checkpoint") == 1
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
    assert after["training"] is after["memorising"] is after["run"] is None
    assert any("No training shapes were given" in note for note in after["notes"])


def test_options_of_a_run(finished: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", points=clouds(4, 140, 0))
    more = "--num-samples 3 --sampler ddpm --steps 2 --num-points 120 --seed 3 --batch-size 2".split()
    more += ["--emd", "none", "--norm-box", "--reference", str(tmp_path / "mine.npz")]
    record = score(finished, tmp_path / "out", *more)
    assert (record["samples"]["clouds"], record["samples"]["points"]) == (3, 120)
    assert (record["references"]["clouds"], record["references"]["points"]) == (4, 120)
    sampling = record["samples"]["sampling"]
    assert [sampling[name] for name in ("sampler", "steps", "seed", "batch_size")] == ["ddpm", 2, 3, 2]
    assert sampling["classes"] == "in turn"
    assert any("No bound of the priors" in note for note in record["notes"])
    assert not {"bound_shape", "mmd_emd", "reconstruction_emd"} & record["figures"].keys()
    raw = np.load(tmp_path / "out" / "samples.npz")["points"]  # what was generated, not yet fitted to the box
    boxed = np.stack([Normalization("box").apply(c) / np.float32(2) for c in raw])
    assert record["samples"]["sha256"] == digest(boxed) != digest(raw)


def test_a_checkpoint_can_be_chosen(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "r.npy", clouds(2, 130, 0))
    given = ["--reference", str(tmp_path / "r.npy"), *"--num-samples 2 --emd none --checkpoint".split()]
    hashes = set()
    for name in ("step-00000006", "step-00000008"):
        record = score(finished, tmp_path / name, *given, name)
        folder = finished / "checkpoints" / name
        sampling, state = record["samples"]["sampling"], json.loads((folder / "state.json").read_text())
        assert sampling["checkpoint"] == str(folder)
        for file, sha256 in sampling["weights_sha256"].items():
            assert sha256 == state["files"][file]["sha256"]
        hashes.add(record["samples"]["sha256"])
    assert len(hashes) == 2
    line = fails(capsys, evaluate.main, [str(finished), "--out", str(tmp_path / "x"), "--checkpoint", "step-1"])
    assert line == "error: checkpoint: expected one of step-00000006, step-00000008, got step-1"
    assert not (tmp_path / "x").exists()


def test_options_of_a_run_are_refused_before_its_weights_are_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(model, "load_model", load)
    for options, message in {
        "--sampler ddpm --eta 0.5": "eta: is the stochasticity of ddim, got 0.5 for ddpm",
        "--eta 2": "eta: expected a number in [0, 1], got 2.0",
        "--steps 0": "steps: expected 1 to 1000, got 0",
        "--sampler ode": "sampler: ode needs a linear schedule and prediction of eps, this model has others",
        "--sampler ode --eta 0": "eta: is the stochasticity of ddim, got 0 for ode",
        "--categories chair": "categories: needs --reference DATA, from which it chooses",
        "--subset val": "subset: needs --reference DATA, from which it chooses",
        "--num-samples 0": "num-samples: expected at least 1, got 0",
        "--batch-size 0": "batch-size: expected at least 1, got 0",
    }.items():
        line = fails(capsys, evaluate.main, [str(finished), "--out", str(tmp_path / "out"), *options.split()])
        assert line == f"error: {message}"
    assert not (tmp_path / "out").exists()


def normalized(finished: Path, out: Path, kind: str) -> Path:
    """A copy of the run, as if its clouds had been normalised so."""
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("evaluation"))
    config = json.loads((out / "config.json").read_text())
    if kind != "global":
        config["normalization"] = Normalization(kind).to_json()  # type: ignore[arg-type]
        (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("kind", ["global", "box", "sphere"])
def test_samples_and_references_of_a_run_are_in_one_unit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A perfect model, which generates the references: as the networks see them, with the labels they have."""
    out = normalized(finished, tmp_path / "run", kind)
    run = open_run(out)
    sources = load_sources(run.config.data, run.config.evaluate_shapes)
    references = sources.held_out.subset(range(5, -1, -1))  # whose classes are not in turn
    monkeypatch.setattr(evaluate, "load_sources", lambda *_: replace(sources, held_out=references))

    whole = Preparation("first10k", 0)(CloudSet("reference", "", references), 130, REFERENCES)
    scales = [run.normalization.center_and_scale(cloud) for cloud in references]
    seen = np.stack([(x - c) / s for x, (c, s) in zip(whole, scales, strict=True)]).astype(np.float32)

    def perfect(_: object, __: object, args: sample.SampleArguments, labels: np.ndarray, **___: object) -> np.ndarray:
        np.testing.assert_array_equal(labels, references.labels)
        assert (args.num_samples, args.num_points) == (6, 130)
        return seen

    def rebuild(_: object, clouds: torch.Tensor, *__: object, **___: object) -> Reconstruction:
        np.testing.assert_allclose(clouds, seen, rtol=1e-5, atol=1e-6)
        return Reconstruction(run.normalization.invert(clouds.numpy()), 0, 0, 0)

    monkeypatch.setattr(model, "generate", perfect)
    monkeypatch.setattr(model, "reconstruct", rebuild)
    record = score(out, tmp_path / "out", "--emd", "none")
    assert record["figures"]["mmd_cd"] == pytest.approx(0, abs=1e-10)
    assert record["figures"]["reconstruction_cd"] == pytest.approx(0, abs=1e-10)
    assert record["figures"]["cov_cd"] == 1
    assert not any("measure" in warning for warning in record["warnings"])  # of copies, yes
    assert record["normalization"].startswith("data units" if kind == "global" else f"each cloud's {kind} fitted")
    points = np.load(tmp_path / "out" / "samples.npz")["points"]
    size = np.linalg.norm(points, axis=2) if kind == "sphere" else np.ptp(points, axis=1)
    # Of the longest side of a shape, or of the radius of its sphere.
    assert size.max() == pytest.approx({"global": 1, "box": 2, "sphere": 1}[kind], rel=0.05)


def test_samples_are_of_the_classes_of_the_references(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same parts, however many are generated: the references come class by class."""
    references = layout(layout(tmp_path, clouds(2, 130, 0), category="chair"), clouds(4, 130, 1), category="sofa")
    given = list[str]()

    def generate(_: object, __: object, args: object, labels: np.ndarray, **___: object) -> np.ndarray:
        given[:] = (CLASSES[label] for label in labels)
        return clouds(len(labels), 130, 2)

    monkeypatch.setattr(model, "generate", generate)
    for count, classes in ((3, "chair sofa sofa"), (6, "chair " * 2 + "sofa " * 4), (9, "chair " * 3 + "sofa " * 6)):
        more = ["--reference", str(references), *f"--num-samples {count} --emd none".split()]
        record = score(finished, tmp_path / "out", *more)
        assert given == classes.split()
        assert record["samples"]["sampling"]["classes"] == "those of the references"


def test_a_run_may_go_on_while_it_is_scored(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps two checkpoints; the one that is scored may be gone before its samples are there."""
    run, real = tmp_path / "run", model.generate
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("evaluation"))
    state = json.loads((run / "checkpoints" / "step-00000008" / "state.json").read_text())

    def generate(*args: Any, **more: Any) -> np.ndarray:
        (run / "checkpoints" / "step-00000008").rename(run / "checkpoints" / "step-00000010")
        return real(*args, **more)

    monkeypatch.setattr(model, "generate", generate)
    record = score(run, tmp_path / "out", *"--num-samples 2 --emd none".split())
    sampling = record["samples"]["sampling"]
    assert sampling["checkpoint"].endswith("step-00000008")
    assert sampling["weights_sha256"]["ema.safetensors"] == state["files"]["ema.safetensors"]["sha256"]
    assert record["command"].endswith("--checkpoint step-00000008")


def test_reconstructions_that_are_no_numbers_lose_nothing_else(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model.reconstruct

    def broken(*args: Any, **more: Any) -> Any:
        rebuilt = real(*args, **more)
        rebuilt.points[1, 2, 0] = np.nan
        return rebuilt

    monkeypatch.setattr(model, "reconstruct", broken)
    record = score(finished, tmp_path / "out", *"--num-samples 2 --emd none".split())
    assert record["figures"]["reconstruction_cd"] is None
    assert record["figures"]["mmd_cd"] > 0
    assert any(text.startswith("Not finite: reconstruction, CD.") for text in record["warnings"])


def test_what_only_a_model_has_does_not_depend_on_the_box(finished: Path, tmp_path: Path) -> None:
    given = "--num-samples 2 --steps 1 --emd none".split()
    plain, boxed = (score(finished, tmp_path / f"{len(box)}", *given, *box) for box in ([], ["--norm-box"]))
    names = {name for name in plain["figures"] if name.startswith(("reconstruction", "bound"))}
    assert len(names) == 5
    for name in names:
        assert plain["figures"][name] == boxed["figures"][name], name
    assert plain["figures"]["mmd_cd"] != boxed["figures"]["mmd_cd"]
    # As many held-out shapes as samples.
    assert plain["references"]["clouds"] == plain["samples"]["clouds"] == 2
    assert plain["notes"][0].startswith("Compared with 2 of 6 held-out shapes")


def test_a_figure_that_is_not_finite_is_left_out(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"reconstruction_cd": np.array([np.nan]), "bound_joint": np.array([np.inf, 0]), "bound_point": np.ones(2)}
    monkeypatch.setattr(model.ScoredRun, "scores", lambda *_: scores)
    figures = score(finished, tmp_path / "out", *"--num-samples 2 --steps 1 --emd none".split())["figures"]
    assert (figures["reconstruction_cd"], figures["bound_joint"], figures["bound_point"]) == (None, None, 1)
    assert capsys.readouterr().out.count("not finite") == 2


def test_default_steps_are_written_as_a_number(finished: Path) -> None:
    run = open_run(finished)
    published = replace(run.config, model=replace(run.config.model, diffusion=DiffusionConfig()))
    for sampler, steps in (("ddpm", 1000), ("ddim", 3), ("ode", None)):
        if sampler == "ode":  # which the quickstart's schedule is not for
            run = replace(run, config=published)
        assert sample.resolved(run, sample.SampleArguments(finished, sampler=sampler)).steps == steps  # type: ignore[arg-type]


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
    assert any("training shapes cannot be read" in warning for warning in record["warnings"])


def test_a_model_that_generates_nan_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = clouds(6, 130, 0)
    points[4, 7, 1] = np.nan
    monkeypatch.setattr(model, "generate", lambda *_, **__: points)
    line = fails(capsys, evaluate.main, [str(finished), "--out", str(tmp_path / "out")])
    assert line == "error: samples: expected finite coordinates, got NaN or infinity in cloud 4"
    assert not (tmp_path / "out").exists()


# Sets of clouds


def test_the_default_out_is_with_the_samples(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    evaluate.main([str(samples_folder(folder, clouds(2, 40, 1))), "--reference", str(sets[1]), "--emd", "none"])
    assert (folder / "evaluation" / "evaluation.html").exists()
    evaluate.main([str(sets[0]), "--reference", str(sets[1]), "--emd", "none"])
    assert (tmp_path / "samples-evaluation" / "evaluation.json").exists()


def test_the_subset_is_of_samples_and_references(tmp_path: Path) -> None:
    for number, subset in enumerate(("train", "val", "test")):
        layout(tmp_path / "s", clouds(3, 20, number), subset=subset)
        layout(tmp_path / "r", clouds(3, 20, 10 + number), subset=subset)
    for number, subset in enumerate(("train", "val", "test")):
        more = ["--reference", str(tmp_path / "r"), "--training", str(tmp_path / "r"), "--emd", "none"]
        record = score(tmp_path / "s", tmp_path / "out", *more, "--subset", subset)
        assert record["samples"]["sha256"] == digest(clouds(3, 20, number))
        assert record["references"]["sha256"] == digest(clouds(3, 20, 10 + number))
        assert record["training"]["sha256"] == digest(clouds(3, 20, 10))
    assert score(tmp_path / "s", tmp_path / "out", *more)["references"]["sha256"] == digest(clouds(3, 20, 12))


def test_the_categories_are_of_the_references(sets: tuple[Path, Path], tmp_path: Path) -> None:
    for number, category in enumerate(("chair", "lamp")):
        layout(tmp_path / "r", clouds(3, 40, number), category=category)
    more = ["--reference", str(tmp_path / "r"), "--emd", "none", "--categories", "lamp"]
    assert score(sets[0], tmp_path / "out", *more)["references"]["sha256"] == digest(clouds(3, 40, 1))


def test_two_sets_draw_their_points_apart(tmp_path: Path) -> None:
    """Else a set compared with itself at fewer points would be perfect."""
    np.save(tmp_path / "s.npy", clouds(5, 40, 0))
    given = ["--reference", str(tmp_path / "s.npy"), "--training", str(tmp_path / "s.npy"), "--emd", "none"]
    record = score(tmp_path / "s.npy", tmp_path / "out", *given, "--num-points", "20")
    assert record["figures"]["mmd_cd"] > 1e-4
    for rows, key in (("per_sample", "training_distance"), ("per_reference", "training_distance")):
        assert min(row[key] for row in record[rows]) > 1e-4
    other = score(tmp_path / "s.npy", tmp_path / "seed", *given, "--num-points", "20", "--seed", "1")
    for name in ("samples", "references"):
        assert other[name]["sha256"] != record[name]["sha256"]
    assert other["training"]["sha256"] == record["training"]["sha256"]  # of whole shapes


def test_the_split_is_named_with_the_figures(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two halves of a cloud that differ: the split decides the figures."""
    halves = clouds(2, 15_000, 0)
    halves[:, 10_000:] += 0.3
    given = ["--reference", str(layout(tmp_path / "data", halves)), "--emd", "none"]
    first, last = (score(sets[0], tmp_path / s, *given, "--split", s) for s in ("first10k", "last5k"))
    assert (first["split"], last["split"]) == ("first10k", "last5k")
    assert first["figures"]["mmd_cd"] < 0.1 < last["figures"]["mmd_cd"]
    assert not any("split" in note for note in first["notes"])
    np.save(tmp_path / "long.npy", halves)  # the samples are whole, whatever their number of points
    whole = score(tmp_path / "long.npy", tmp_path / "long", *given, "--split", "last5k", "--num-points", "30")
    assert whole["samples"]["sha256"] == digest(Preparation(None, 0)(source(halves), 30, SAMPLES))
    np.save(tmp_path / "six.npy", clouds(1, 6000, 1))
    six = score(tmp_path / "six.npy", tmp_path / "six", *given, "--split", "last5k")
    assert six["references"]["points"] == 5000
    short = ["--reference", str(sets[1]), "--emd", "none"]
    asked = score(sets[0], tmp_path / "short", *short, "--split", "last5k")
    assert "The split last5k changes nothing: no reference has 15000 points." in asked["notes"]
    assert not any("split" in note for note in score(sets[0], tmp_path / "short", *short)["notes"])
    out = capsys.readouterr().out
    assert "split       last5k" in out
    assert "note        The split last5k changes nothing" in out


def test_norm_box_takes_away_place_and_size(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """Of samples, references and training shapes."""
    moved = clouds(5, 40, 2) * np.array([2, 3, 4, 5, 6], np.float32)[:, None, None] + 7
    np.save(tmp_path / "moved.npy", moved)
    training = ["--emd", "none", "--training", str(tmp_path / "moved.npy")]
    a, b = (
        score(sets[0], tmp_path / p.stem, "--reference", str(p), *training, "--norm-box")
        for p in (sets[1], tmp_path / "moved.npy")
    )
    assert a["figures"] == pytest.approx(b["figures"], rel=1e-4)
    assert a["memorising"]["references_median"] == pytest.approx(0, abs=1e-10)
    assert "[-0.5, 0.5]" in a["normalization"]
    for name in ("samples", "references"):
        assert max(b[name]["size"]) <= 1
    plain = score(sets[0], tmp_path / "plain", "--reference", str(sets[1]), "--emd", "none")
    assert plain["figures"]["mmd_cd"] != pytest.approx(a["figures"]["mmd_cd"], rel=0.1)


def test_sets_of_other_sizes_are_all_compared_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "s.npy", clouds(7, 50, 1))
    np.save(tmp_path / "r.npy", clouds(3, 30, 2))
    given = ["--reference", str(tmp_path / "r.npy")]
    record = score(tmp_path / "s.npy", tmp_path / "out", *given)
    assert (record["samples"]["clouds"], record["samples"]["points"]) == (7, 50)
    assert (record["references"]["clouds"], record["references"]["points"]) == (3, 30)
    a, b = torch.from_numpy(clouds(7, 50, 1)), torch.from_numpy(clouds(3, 30, 2))
    assert record["figures"] == metrics.evaluate(a, b)
    out = capsys.readouterr().out
    for remarks, text in (
        ("notes", "7 samples against 3 references: all are compared"),
        ("warnings", "References have only 30 points, fewer than the 50"),
    ):
        assert any(text in remark for remark in record[remarks])
        assert f"{remarks[:-1]:<12}{text}" in out
    (warning,) = score(tmp_path / "s.npy", tmp_path / "none", *given, "--emd", "none")["warnings"]
    words = "of the samples: thickness and unevenness then do not compare. For both alike give --num-points 30."
    assert warning.endswith(words)
    line = fails(capsys, evaluate.main, [str(tmp_path / "s.npy"), *given, *"--emd exact --out".split(), "x"])
    assert "exact needs equally many points" in line
    assert "--num-points 30" in line
    exact = score(tmp_path / "s.npy", tmp_path / "x", *given, *"--emd exact --num-points 30".split())
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
    given = ["--reference", str(tmp_path / "r.npy"), "--emd", "none"]
    record = score(folder, tmp_path / "out", *given)
    assert record["samples"]["points"] == record["references"]["points"] == 20
    assert "Samples have 20 to 50 points: 20 are drawn of each." in record["notes"]
    more = score(folder, tmp_path / "more", *given, "--num-points", "30")
    assert more["samples"]["points"] == 20
    assert "Samples have only 20 points, not the 30 asked for." in more["warnings"]


@pytest.mark.parametrize("name", ["one", "duplicates", "coincident", "same", "large"])
def test_hard_sets(name: str, tmp_path: Path) -> None:
    samples, references = clouds(3, 20, 1), clouds(3, 20, 2)
    if name == "one":
        samples, references = samples[:1], references[:1]
    elif name == "duplicates":
        samples, references = samples[[0, 0, 1, 1]], references[[2, 2, 2]]
    elif name == "coincident":
        samples[0], references[1] = samples[0, 0], 0
    elif name == "large":
        samples, references = (x / np.abs(x).max() * np.float32(9.9e8) for x in (samples, references))
    else:
        references = samples
    for path, points in (("s.npy", samples), ("r.npy", references)):
        np.save(tmp_path / path, points)
    given = ["--reference", str(tmp_path / "r.npy"), "--training", str(tmp_path / "r.npy")]
    for more in ([], ["--norm-box"], ["--emd", "exact"]):
        record = score(tmp_path / "s.npy", tmp_path / "out", *given, *more)
        assert all(np.isfinite(value) for value in record["figures"].values())
        covered = sum(row["covered"] for row in record["per_reference"])
        assert covered / len(references) == pytest.approx(record["figures"]["cov_cd"])


# Intervals and floors


def test_figures_stand_beside_their_intervals_and_floors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Procedural references: fresh shapes of their generator, halves of them, and other points of theirs."""
    monkeypatch.setattr(intervals, "SUBSETS", 12)
    np.save(tmp_path / "s.npy", clouds(42, 40, 1, 0.3))
    record = score(tmp_path / "s.npy", tmp_path / "out", "--reference", "procedural", "--emd", "none")
    figures = {"1nna_cd", "cov_cd", "mmd_cd", "jsd", "thickness", "unevenness"}
    assert record["figures"].keys() == record["intervals"].keys() == figures
    for name, (low, high) in record["intervals"].items():
        assert low <= record["figures"][name] <= high, name
    prepare, held_out = Preparation("first10k", 0), open_clouds("reference", "procedural", "test", (), 42)
    references = torch.from_numpy(prepare(held_out, 40, REFERENCES))
    fresh = torch.from_numpy(prepare(open_clouds("fresh", "procedural", "test", (), 42), 40, FRESH))
    again = torch.from_numpy(prepare(held_out, 40, REFERENCES, again=True))
    assert digest(references.numpy()) == record["references"]["sha256"]
    assert record["floors"]["fresh"] == metrics.evaluate(fresh, references, None)
    assert record["floors"]["fresh"]["1nna_cd"] < 0.7 < record["figures"]["1nna_cd"]
    assert record["floors"]["halves"].keys() == record["halves_intervals"].keys() == figures
    assert record["floors"]["redrawn"] == {
        "mmd_cd": pytest.approx(chamfer_distance(again, references).mean().item(), rel=1e-6),
        "jsd": metrics.jensen_shannon_divergence(again, references),
        **{name: metrics.evaluate(again, references, None)[name] for name in ("thickness", "unevenness")},
    }
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("1-NNA, CD"))
    assert line.endswith(f"{record['floors']['fresh']['1nna_cd']:#.4g} fresh")


def test_of_a_folder_the_floor_is_of_its_own_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With boxes fitted as they are for the figures; without other points where there are not enough."""
    monkeypatch.setattr(intervals, "SUBSETS", 12)
    points = clouds(40, 60, 2) * np.array([1, 2, 3], np.float32)
    np.save(tmp_path / "s.npy", clouds(25, 30, 1))
    np.save(tmp_path / "r.npy", points)
    given = [tmp_path / "s.npy", tmp_path / "out", "--reference", str(tmp_path / "r.npy"), "--norm-box"]
    record = score(*given)  # type: ignore[arg-type]
    assert record["floors"].keys() == {"halves", "redrawn"}
    assert record["floors"]["halves"].keys() == record["figures"].keys() == record["intervals"].keys()
    prepare = Preparation("first10k", 0, norm_box=True)
    first, again = (torch.from_numpy(prepare(source(points), 30, REFERENCES, again=second)) for second in (False, True))
    assert record["floors"]["redrawn"]["mmd_cd"] == pytest.approx(
        chamfer_distance(again, first).mean().item(), rel=1e-5
    )
    assert record["floors"]["redrawn"]["mmd_emd"] == pytest.approx(approx_emd(first, again).mean().item(), rel=1e-5)
    np.save(tmp_path / "r.npy", points[:39, :59])
    few = score(*given, "--emd", "none")  # type: ignore[arg-type]
    assert few["floors"] == {"halves": {}}
    assert few["intervals"]


def test_of_a_run_on_procedural_shapes_there_are_fresh_ones(scored: Path) -> None:
    record = json.loads((scored / "evaluation.json").read_text())
    assert record["intervals"] == {}  # of six shapes
    assert record["floors"].keys() == {"fresh", "redrawn"}
    assert record["floors"]["fresh"]["mmd_cd"] < record["figures"]["mmd_cd"]
    assert record["floors"]["redrawn"]["mmd_cd"] < record["floors"]["fresh"]["mmd_cd"]


def test_both_splits_are_what_either_is(tmp_path: Path) -> None:
    halves = clouds(3, 15_000, 0)
    halves[:, 10_000:] += 0.1
    np.save(tmp_path / "s.npy", clouds(4, 40, 1))
    given = ["--reference", str(layout(tmp_path / "data", halves, category="02691156")), "--split"]
    first, last, both = (score(tmp_path / "s.npy", tmp_path / s, *given, s) for s in ("first10k", "last5k", "both"))
    assert first["other_split"] is last["other_split"] is None
    assert (both["split"], both["other_split"]["split"]) == ("first10k", "last5k")
    assert both["figures"] == first["figures"] != last["figures"]
    assert both["other_split"]["figures"] == pytest.approx(last["figures"], rel=1e-6)
    text = (tmp_path / "both" / "evaluation.html").read_text()
    assert "With the other points of the references" in text
    assert text.count('<tr class="mine"><th scope="row">these samples') == 2
    more = score(tmp_path / "s.npy", tmp_path / "more", *given, "both", *"--emd none --num-points 39".split())
    assert len(more["other_split"]["figures"]) == 6
    np.save(tmp_path / "six.npy", clouds(2, 6000, 1))
    six = score(tmp_path / "six.npy", tmp_path / "six", *given, "both", "--emd", "none")
    assert six["references"]["points"] == 5000  # as many as either has


# What is pointed out


def test_of_two_good_sets_nothing_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Procedural furniture of two seeds."""
    for name, seed in (("s", 1), ("r", 2)):
        np.save(tmp_path / f"{name}.npy", procedural_clouds(30, 100, seed).source)  # type: ignore[arg-type]
    record = score(tmp_path / "s.npy", tmp_path / "out", "--reference", str(tmp_path / "r.npy"), "--emd", "none")
    assert record["warnings"] == []
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("more", ["samples", "references"])
def test_many_clouds_are_not_called_alike_for_being_many(tmp_path: Path, more: str) -> None:
    """One shape in sizes from a half to twice, in order: twelve against sixty."""
    sizes = {name: np.linspace(0.5, 2, 60 if name == more else 12) for name in ("samples", "references")}
    for name, values in sizes.items():
        np.save(tmp_path / f"{name}.npy", clouds(1, 40, 0) * values[:, None, None])
    given = ["--reference", str(tmp_path / "references.npy"), "--emd", "none"]
    record = score(tmp_path / "samples.npy", tmp_path / "out", *given)
    assert not [warning for warning in record["warnings"] if "resemble" in warning]
    assert record["samples"]["nearest_other"] == pytest.approx(record["references"]["nearest_other"], rel=0.2)


def test_references_are_known_again_also_of_fewer_points(sets: tuple[Path, Path], tmp_path: Path) -> None:
    given = ["--reference", str(sets[0]), "--training", str(sets[0]), *"--emd none --num-points 20".split()]
    record = score(sets[0], tmp_path / "out", *given)
    assert record["split"] == "all points"
    for words in ("5 of 5 samples equal a reference.", "5 of 5 references are training shapes"):
        assert any(words in warning for warning in record["warnings"])


@pytest.mark.parametrize("fault", ["scaled", "axes", "moved", "alike", "repeated"])
def test_what_no_model_should_get_wrong_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    shape = np.array([1, 2, 0.5], np.float32)  # unlike in x, y and z
    samples, references = clouds(20, 40, 1) * shape, clouds(20, 40, 2) * shape
    words = "are units, axes and origin the same? --norm-box takes away place and size."
    if fault == "scaled":
        samples *= 1.5
    elif fault == "axes":
        samples = samples[..., [0, 2, 1]]
    elif fault == "moved":
        samples += np.array([0, 0.4, 0], np.float32)
    elif fault == "alike":
        samples, words = references[:1] + clouds(20, 40, 3, 0.01), "Samples resemble each other"
    else:
        samples[[4, 5]], words = samples[3], "2 of 20 samples equal an earlier one."
    for name, points in (("s", samples), ("r", references)):
        np.save(tmp_path / f"{name}.npy", points)
    record = score(tmp_path / "s.npy", tmp_path / "out", "--reference", str(tmp_path / "r.npy"), "--emd", "none")
    (warning,) = record["warnings"]
    assert words in warning
    assert f"warning     {warning}" in capsys.readouterr().out


# Memorising


def test_copies_of_training_shapes_are_found(tmp_path: Path) -> None:
    training, samples, references = clouds(30, 40, 5), clouds(8, 40, 6), clouds(4, 40, 7)
    samples[[2, 5]] = training[[11, 29]]
    for name, value in (("t", training), ("s", samples), ("r", references)):
        np.save(tmp_path / f"{name}.npy", value)
    given = ["--reference", str(tmp_path / "r.npy"), "--training", str(tmp_path / "t.npy"), "--emd", "none"]
    record = score(tmp_path / "s.npy", tmp_path / "out", *given)
    for rows, points in ((record["per_sample"], samples), (record["per_reference"], references)):
        brute = pairwise_chamfer(torch.from_numpy(points), torch.from_numpy(training)).min(1)
        np.testing.assert_allclose([row["training_distance"] for row in rows], brute.values, rtol=1e-4, atol=1e-7)
    rows = record["per_sample"]
    assert (rows[2]["training"], rows[5]["training"]) == ("11", "29")
    assert rows[2]["training_distance"] == rows[5]["training_distance"] == 0
    assert record["memorising"]["samples_nearer_than_any_reference"] >= 2
    # The shapes have no points for two draws: their halves say how near a copy would be.
    assert record["memorising"]["one_shape_drawn_twice"] > 0
    assert record["memorising"]["samples_as_near_as_two_draws"] >= 2
    assert record["training"] == {"source": str(tmp_path / "t.npy"), "clouds": 30, "sha256": digest(training)}


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
    assert record["memorising"]["references_as_near_as_two_draws"] == 0
    assert any(w.startswith("2 of 3 samples are as near to a training shape") for w in record["warnings"])
    assert "as two draws of its points are: 2 of 3 samples and 0 of 4 references" in capsys.readouterr().out


# Published figures


def test_published_rows_stand_beside_shapenet_and_nothing_else(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("02691156", "airplane"):
        layout(tmp_path / name, clouds(5, 40, 2), category=name)
    shapenet = ["--reference", str(tmp_path / "02691156"), "--emd"]
    for emd in ("none", "exact", "approx"):
        record = score(sets[0], tmp_path / emd, *shapenet, emd)
        assert record["category"] == "airplane"
        row = next(row for row in record["published"] if row["method"] == "LION")
        assert (row["1nna_cd"], row["1nna_emd"], row["cov_cd"], row["cov_emd"]) == (67.41, 61.23, 47.16, 49.63)
        lines = {line[2:18].strip(): line[18:].split() for line in capsys.readouterr().out.splitlines()}
        assert lines["LION"] == ["67.41", "61.23", "47.16", "49.63", "first10k"]
        names = ("1nna_cd", "1nna_emd", "cov_cd", "cov_emd")  # published EMD is approximate
        shown = [n if n.endswith("cd") or emd == "approx" else None for n in names]
        mine = ["-" if n is None else f"{100 * record['figures'][n]:.2f}" for n in shown]
        assert lines["these samples"] == [*mine, "all", "points"]
    assert "Published figures are of 405 references, these of 5." in record["notes"]
    assert "Published figures are of clouds of 2048 points, these of 40 and 40." in record["notes"]
    boxed = score(sets[0], tmp_path / "b", *shapenet, "none", "--norm-box")
    assert boxed["published"] == []
    assert "No published figures are known here for airplane in these units." in boxed["notes"]
    own = score(sets[0], tmp_path / "c", "--reference", str(tmp_path / "airplane"), "--emd", "none")
    assert own["category"] is None
    assert own["published"] == []


@pytest.mark.parametrize("kind", ["global", "box"])
def test_published_rows_stand_beside_runs_in_data_units(finished: Path, tmp_path: Path, kind: str) -> None:
    given = ["--reference", str(layout(tmp_path, clouds(3, 130, 0), category="02691156"))]
    run = normalized(finished, tmp_path / "run", kind)
    record = score(run, tmp_path / "out", *given, *"--num-samples 2 --steps 1 --emd none".split())
    assert record["category"] == "airplane"
    assert bool(record["published"]) == (kind == "global")


# Progress


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every progress bar, each with the ``text`` that a terminal would have shown."""
    made: list[Any] = []

    class Shown(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.text = io.StringIO()
            options |= {"disable": False, "file": self.text, "mininterval": 0, "miniters": 0, "ascii": True}
            super().__init__(*args, **options)
            made.append(self)

    for module in (phases, sample):
        monkeypatch.setattr(module, "ProgressBar", Shown)
    return made


FILES = ("Chamfer distances",)
RUN = ("sampling", "reconstructions", "bound of the priors", "Chamfer distances", "EMD, approx")


@pytest.mark.parametrize(
    ("reference", "training", "emd", "expected"),
    [
        ("", False, "none", FILES),
        ("", True, "exact", (*FILES, "EMD, exact", "nearest training shapes")),
        ("procedural", True, "approx", (*RUN, "fresh shapes", "nearest training shapes")),
        ("of no class", True, "none", (*RUN[:2], "Chamfer distances", "nearest training shapes")),
    ],
)
def test_progress_bars_say_which_part_of_the_whole_they_are(
    finished: Path,
    sets: tuple[Path, Path],
    tmp_path: Path,
    bars: list[Any],
    reference: str,
    training: bool,
    emd: str,
    expected: tuple[str, ...],
) -> None:
    np.save(tmp_path / "r.npy", clouds(4, 64, 0))  # the fewest points that the run's networks take
    mine, target = str(tmp_path / "r.npy"), sets[0]
    given = ["--reference", "procedural" if reference == "procedural" else mine, "--emd", emd]
    given += ["--training", mine] if training else []
    if reference:
        target, given = finished, [*given, *"--num-samples 3 --batch-size 2 --steps 2 --num-points 64".split()]
    score(target, tmp_path / "out", *given)
    titles = [*expected, "pictures"]
    assert [bar.desc for bar in bars] == [f"{i}/{len(titles)} {title}" for i, title in enumerate(titles, 1)]
    for bar in bars[:-1]:
        assert bar.n == pytest.approx(bar.total), bar.desc
        assert bar.total > 0
    if reference:  # clouds of a batch are ready together, and none is half ready
        counts = re.findall(r"\| ([\d.]+)/([\d.]+) \[", bars[0].text.getvalue())
        assert set(counts) == {(str(n), "3") for n in range(4)}


# What is wrong is found before anything is computed


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("option", ["samples", "reference", "training"])
@pytest.mark.parametrize("value", [np.nan, 2e9])
@pytest.mark.parametrize("form", [npy, files, layout])
def test_a_bad_cloud_is_named_before_anything_is_computed(
    sets: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: float,
    form: Callable[..., Path],
) -> None:
    bad = clouds(5, 40, 3)
    bad[2, 17, 0] = value
    (tmp_path / "bad").mkdir()
    subset = {"subset": "train"} if form is layout and option == "training" else {}
    path = form(tmp_path / "bad", bad, **subset)
    given = {"samples": sets[0], "reference": sets[1], "training": sets[1]} | {option: path}
    args = [str(given.pop("samples")), "--out", str(tmp_path / "out"), "--emd", "none"]
    for name, data in given.items():
        args += [f"--{name}", str(data)]
    line = fails(capsys, evaluate.main, args)
    assert line.startswith(f"error: {option}: ")
    assert re.search(r"\bcloud 2\b", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("option", ["reference", "training"])
def test_a_bad_cloud_is_named_before_a_run_is_sampled(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    bad = clouds(5, 140, 3)
    bad[2, 17, 0] = np.nan
    path = layout(tmp_path / "bad", bad, subset="train" if option == "training" else "test")
    line = fails(capsys, evaluate.main, [str(finished), "--out", str(tmp_path / "out"), f"--{option}", str(path)])
    assert line.startswith(f"error: {option}: cloud 2, ")
    assert "2.npy: point 17 is not finite (nan)" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_computed")
def test_bad_input_ends_with_one_line(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, references = map(str, sets)
    given = [samples, "--reference", references]
    nowhere = tmp_path / "no"
    cases = [
        ([samples], f"reference: expected the clouds to compare {samples} with, which is no run"),
        ([str(nowhere)], f"samples: {nowhere} does not exist: expected a run folder, a shipped model (furniture), "),
        ([str(nowhere), "--reference", references], f"samples: {nowhere} does not exist"),
        ([samples, "--reference", str(nowhere)], f"reference: {nowhere} does not exist"),
        ([*given, "--training", str(nowhere)], f"training: {nowhere} does not exist"),
        ([*given, "--num-samples", "3"], "num-samples: is for a run folder"),
        ([*given, "--sampler", "ddim"], "sampler: is for a run folder"),
        ([*given, "--steps", "3"], "steps: is for a run folder"),
        ([*given, "--eta", "0"], "eta: is for a run folder"),
        ([*given, "--checkpoint", "step-1"], "checkpoint: is for a run folder"),
        ([*given, "--num-points", "0"], "num-points: expected at least 1, got 0"),
        ([*given, "--seed", "-1"], "seed: expected 0 to 2^31 - 1, got -1"),
        ([*given, "--seed", str(2**31)], "seed: expected 0 to 2^31 - 1"),
        (
            [*given, "--categories", "chair"],
            f"categories: are chosen of a folder <category>/<subset>/<id>.npy, {references}",
        ),
    ]
    before = content(tmp_path)
    for args, message in cases:
        assert fails(capsys, evaluate.main, args).startswith(f"error: {message}"), args
    assert content(tmp_path) == before


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("case", ["a file", "a folder in the way", "foreign", "read-only", "full"])
def test_where_results_cannot_go_is_said_before_anything_is_computed(
    sets: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    out = tmp_path / "out"
    if case == "a file":
        out.write_text("mine")
    elif case == "a folder in the way":
        (out / "evaluation.html").mkdir(parents=True)
    elif case == "foreign":
        out.mkdir()
        (out / "evaluation.html").write_text("mine")
    else:

        def open_file(dir: Path) -> None:
            number = 30 if case == "read-only" else 28
            raise OSError(number, os.strerror(number), str(dir))

        monkeypatch.setattr(tempfile, "TemporaryFile", open_file)
    before = sorted(tmp_path.rglob("*")), content(tmp_path)
    line = fails(capsys, evaluate.main, [str(sets[0]), "--reference", str(sets[1]), "--out", str(out)])
    assert line.startswith("error: out: ")
    assert line.endswith(": give another --out")
    assert (sorted(tmp_path.rglob("*")), content(tmp_path)) == before


@pytest.mark.usefixtures("nothing_computed")
def test_the_samples_of_a_run_are_not_left_beside_figures_of_others(
    sets: tuple[Path, Path], scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(scored)
    line = fails(capsys, evaluate.main, [str(sets[0]), "--reference", str(sets[1]), "--out", str(scored)])
    assert line == f"error: out: {scored} holds the samples of another evaluation: give another --out"
    assert content(scored) == before


@pytest.mark.usefixtures("nothing_computed")
def test_references_of_too_few_points_for_the_networks_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "r.npy", clouds(2, 63, 0))
    args = [str(finished), "--reference", str(tmp_path / "r.npy"), "--out", str(tmp_path / "out")]
    line = fails(capsys, evaluate.main, args)
    assert line == "error: num-points: this model needs at least 64, got references of 63"


# Writing


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["drawing", "writing"])
def test_figures_are_printed_before_anything_is_drawn_and_nothing_is_left_half_written(
    sets: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
    failure: BaseException,
) -> None:
    args = [str(sets[0]), "--reference", str(sets[1]), "--emd", "none", "--out"]
    old, new = tmp_path / "old", tmp_path / "new"
    evaluate.main([*args, str(old)])
    before, real = content(old), Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if path.name.startswith(".evaluation.html"):
            real(path, content[:100])
            raise failure
        return real(path, content)

    def draw(*_: object) -> str:
        raise failure

    if when == "drawing":
        monkeypatch.setattr(page, "render", draw)
    else:
        monkeypatch.setattr(Path, "write_bytes", write)
    for out in (old, new):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*args, str(out), "--seed", "1"])
        assert stop.value.code == (2 if isinstance(failure, OSError) else 130)
        printed = capsys.readouterr()
        assert re.search(r"^1-NNA, CD .* \d", printed.out, re.MULTILINE)
        assert "evaluation.json" not in printed.out  # which is not there
        assert len(printed.err.splitlines()) == 1
    assert content(old) == before
    assert not new.exists()
