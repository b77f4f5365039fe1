"""Training, continuing, sampling, and the errors of their command lines, on tiny runs."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lion_triton
from lion_triton import runs, sample, train
from lion_triton.__main__ import COMMANDS
from lion_triton.config import PRESETS, differences, from_json, quickstart, with_networks
from lion_triton.models.files import fingerprint
from lion_triton.models.priors import TransformerConfig
from lion_triton.pictures import CELL
from lion_triton.train import shipped_clouds
from lion_triton.training import loop

TINY = (
    "--data.num-shapes 10 --data.num-points 130 --evaluate-shapes 6 --log-every 1 --picture-every 100 "
    "--vae.steps 4 --vae.batch-size 4 --priors.steps 4 --priors.batch-size 4 --priors.cached-draws 1 "
    "--sampling.steps 3 --checkpoint-every 2 --validate-every 0"
).split()


def run(out: Path, *more: str) -> None:
    train.main(["quickstart", "--out", str(out), *TINY, *more])


def fails(capsys: pytest.CaptureFixture[str], command: object, *args: object) -> str:
    """Run a command that must end with one line on stderr and exit code 2; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*args)  # type: ignore[operator]
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "shipped_clouds", shipped_clouds)  # see conftest.py
        run(out)
    return out


def test_a_run_folder_explains_itself(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["lion_triton"]
    assert "commit" in config
    assert from_json(config["config"]).vae.steps == 4
    assert config["classes"] == ["chair", "table", "sofa", "lamp", "shelf"]
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["total_step"] for r in records] == list(range(1, 9))
    assert {"reconstruction", "kl_z", "kl_h_xyz", "kl_h_feature", "kl_coefficient", "grad_norm"} <= records[0].keys()
    assert {"shape", "point", "grad_norm", "shapes_per_second"} <= records[-1].keys()
    assert list((finished / "tensorboard").glob("events*"))
    assert {p.name for p in (finished / "samples").glob("*.png")} == {
        "overview.png",
        "step-00000004-vae.png",
        "step-00000008-generated.png",
    }
    with Image.open(finished / "samples" / "overview.png") as picture:
        assert picture.height == 4 * CELL  # held out, reconstructed, generated, by the shipped model
    figures = json.loads((finished / "figures.json").read_text())
    assert {"reconstruction_chamfer", "kl_z_nats", "1nna_cd_generated", "1nna_cd_gaussian"} <= figures.keys()
    for measure in ("thickness", "unevenness"):
        assert {f"{measure}_{of}" for of in ("generated", "fresh", "gaussian")} < figures.keys()
    kept = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000008"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    folder = runs.open_run(out).checkpoints()[-1]
    averaged = {f"ema.{name}": value for name, value in load_file(folder / "ema.safetensors").items()}
    return load_file(folder / "model.safetensors") | averaged


@pytest.mark.parametrize(
    ("stage", "step", "number", "code"),
    [("vae", 4, signal.SIGINT, 130), ("priors", 2, signal.SIGTERM, 0)],
)
def test_a_stopped_run_continues_as_if_unbroken(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int, number: int, code: int
) -> None:
    """Stop right after a checkpoint; the same command then gives the very same weights."""
    out = tmp_path / "broken"
    save = loop.save_checkpoint

    def save_and_stop(run: runs.Run, total_step: int, checkpoint: runs.Checkpoint) -> Path:
        path = save(run, total_step, checkpoint)
        if checkpoint.stage == stage and checkpoint.step == step:
            os.kill(os.getpid(), number)
        return path

    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
    with pytest.raises(SystemExit) as stop:
        run(out)
    assert stop.value.code == code
    monkeypatch.undo()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"total_step": 1, "sta')  # as a killed process may leave it
    run(out)
    expected, got = weights(finished), weights(out)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    lines = [[json.loads(line) for line in (o / "metrics.jsonl").read_text().splitlines()] for o in (finished, out)]
    for a, b in zip(*lines, strict=True):
        a.pop("shapes_per_second"), b.pop("shapes_per_second")
        assert a == b


def test_samples_are_written_and_repeatable(finished: Path, tmp_path: Path) -> None:
    args = [str(finished), "--num-samples", "3", "--steps", "2", "--num-points", "140", "--class", "sofa"]
    for name in ("a", "b"):
        sample.main([*args, "--out", str(tmp_path / name)])
    a, b = (np.load(tmp_path / name / "clouds.npz") for name in ("a", "b"))
    assert a["points"].shape == (3, 140, 3)
    assert np.isfinite(a["points"]).all()
    assert list(a["labels"]) == [2, 2, 2]
    np.testing.assert_array_equal(a["points"], b["points"])
    assert len(list((tmp_path / "a" / "ply").glob("*.ply"))) == 3
    assert (tmp_path / "a" / "grid.png").stat().st_size > 1000
    sample.main([*args, "--out", str(tmp_path / "c"), "--seed", "1"])
    assert not np.array_equal(a["points"], np.load(tmp_path / "c" / "clouds.npz")["points"])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samplers_of_the_command_line(finished: Path, tmp_path: Path, sampler: str) -> None:
    out = tmp_path / "out"
    sample.main([str(finished), "--num-samples", "2", "--sampler", sampler, "--steps", "2", "--out", str(out)])
    assert np.load(out / "clouds.npz")["points"].shape == (2, 130, 3)


def test_a_checkpoint_can_be_chosen(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {}
    for name in ("step-00000006", "step-00000008"):
        sample.main([str(finished), "--num-samples", "2", "--checkpoint", name, "--out", str(tmp_path / name)])
        made[name] = np.load(tmp_path / name / "clouds.npz")["points"]
        record = json.loads((tmp_path / name / "samples.json").read_text())
        assert (record["checkpoint"], record["sampling"]["sampler"], record["sampling"]["steps"]) == (name, "ddim", 3)
    sample.main([str(finished), "--num-samples", "2", "--out", str(tmp_path / "newest")])
    np.testing.assert_array_equal(np.load(tmp_path / "newest" / "clouds.npz")["points"], made["step-00000008"])
    assert not np.array_equal(made["step-00000006"], made["step-00000008"])
    line = fails(capsys, sample.main, [str(finished), "--checkpoint", "step-7"])
    assert line == "error: checkpoint: expected one of step-00000006, step-00000008, got step-7"


def test_eta_of_another_sampler_is_refused_before_weights_are_loaded(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    line = fails(capsys, sample.main, [str(finished), "--sampler", "ddpm", "--eta", "0.5"])
    assert line == "error: eta: is the stochasticity of ddim, got 0.5 for ddpm"


def test_another_denoiser_and_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "t", "--denoiser", "transformer", "--attention", "softmax")
    config = runs.open_run(tmp_path / "t").config
    assert isinstance(config.model.point_prior.network, TransformerConfig)
    assert config.model.vae.decoder.attention == "softmax"
    assert np.isfinite(json.loads((tmp_path / "t" / "figures.json").read_text())["1nna_cd_generated"])


def test_stages_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "staged"
    assert "no trained VAE" in fails(capsys, run, out, "--stage", "priors")
    assert not out.exists()
    run(out, "--stage", "vae")
    assert "no trained priors" in fails(capsys, sample.main, [str(out)])
    run(out, "--stage", "priors")
    assert (out / "figures.json").exists()


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "none", "--dry-run", "--attention", "softmax")
    assert not (tmp_path / "none").exists()
    out = capsys.readouterr().out
    for word in ("M parameters", "stage vae", "stage priors", "GiB", "time in all", "softmax attention by "):
        assert word in out


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: tuple[str, ...]
) -> None:
    file, nowhere = tmp_path / "file", tmp_path / "nowhere"
    file.touch()
    for preset, options, message in (
        ("quickstart", ["--out", str(file)], f"out: expected a folder, got the file {file}"),
        ("quickstart", ["--init-from", str(nowhere)], f"init-from: {nowhere} is not a run folder"),
        ("quickstart", ["--stage", "priors", "--out", str(nowhere)], "has no trained VAE yet; run --stage vae first"),
        ("quickstart", ["--data.source", str(nowhere)], f"data.source: {nowhere} is not a folder: python -m lion_"),
    ):
        assert message in fails(capsys, train.main, [preset, *TINY, *options, *dry])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_list_of_commands_has_them_all() -> None:
    package = Path(lion_triton.__file__).parent
    commands = {path.stem for path in package.glob("*.py") if "\ndef main(" in path.read_text()}
    assert commands - {"__main__"} == set(COMMANDS)


def test_the_help_names_every_preset() -> None:
    assert set(PRESETS) <= set(re.findall(r"\w+", train.Arguments.__doc__ or ""))


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_json(name: str) -> None:
    from dataclasses import asdict

    config = PRESETS[name]()
    assert from_json(json.loads(json.dumps(asdict(config)))) == config
    other = with_networks(config, "softmax", "transformer")
    assert from_json(json.loads(json.dumps(asdict(other)))) == other
    assert differences(other.model, config.model)


def test_a_later_stage_is_checked_before_it_begins(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("surface", "encoder", "distill"):
        for option in ("--log-every 0", "--checkpoint-every -2", "--dry-run", "--strict"):
            line = fails(capsys, train.main, [str(finished), "--stage", stage, *option.split()])
            assert line.startswith(f"error: {option.split()[0].removeprefix('--')}: expected ")
    assert not any((finished / name).exists() for name in ("surface", "encoders", "distilled"))


def test_a_later_stage_refuses_what_it_has_from_its_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_preset, of_run = ["quickstart", "--out", str(finished)], [str(finished)]
    config = train.parse([*of_preset, *TINY, "--stage", "surface", "--log-every", "3"]).config  # as the run was made
    assert (config.vae.steps, config.log_every) == (4, 3)
    assert train.parse([*of_run, "--stage", "distill", "--distill.steps", "7"]).config.distill.steps == 7
    for command, stage, option, words in (
        (of_run, "surface", "--vae.steps 300", "from {run}, expected 4, got 300"),  # the preset's, and not the run's
        (of_preset, "encoder", "--priors.batch-size 300", "from {run}, expected 4, got 300"),
        (of_preset, "distill", "--data.num-points 200", "from {run}, expected 130, got 200"),
        (of_run, "distill", "--init-from nowhere", "from {run}, expected None, got nowhere"),
        (of_run, "encoder", "--distill.steps 7", "from {run}, expected 300, got 7"),
        (of_run, "surface", "--clip", "its networks from {run}, which has others"),
        (of_run, "encoder", "--attention softmax", "its networks from {run}, which has others"),
    ):
        line = fails(capsys, train.main, [*command, "--stage", stage, *option.split()])
        assert line.startswith(f"error: {option.split()[0].removeprefix('--')}: the stage {stage} has ")
        assert line.endswith(words.format(run=finished))
    for stage in ("surface", "all"):
        line = fails(capsys, train.main, [*of_run, "--encoder.batch-size", "3", "--stage", stage])
        assert line == f"error: encoder.batch-size: expected the stage encoder, got {stage}"
    assert not any((finished / name).exists() for name in ("surface", "encoders", "distilled"))


def test_unknown_preset_class_and_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, train.main, ["chairs"])
    known = "quickstart, procedural, furniture, furniture_small, lion, lion_all, or a run folder"
    assert line == f"error: preset: expected one of {known}, got chairs"
    line = fails(capsys, sample.main, [str(finished), "--class", "boat"])
    assert line == "error: class: expected one of chair, table, sofa, lamp, shelf, got boat"
    assert "is not a run folder" in fails(capsys, sample.main, [str(tmp_path)])
    wrong = "num-samples 0", "steps 0", "steps 1001", "num-points 0", "num-points 10", "eta 2", "seed -1"
    for option in (f"--{one}" for one in wrong):
        name = option.split()[0].removeprefix("--num-").removeprefix("--")
        assert name in fails(capsys, sample.main, [str(finished), *option.split()])
    assert "sampler" in fails(capsys, sample.main, [str(finished), "--sampler", "ode"])


def test_a_run_of_another_architecture_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in finished.rglob("*"))
    line = fails(capsys, run, finished, "--denoiser", "transformer")
    assert "another architecture (model.point_prior.network" in line
    assert "other settings (seed: 1, was 0)" in fails(capsys, run, finished, "--seed", "1")
    assert sorted(p.name for p in finished.rglob("*")) == before


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = copy_of(finished, tmp_path)
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"shape_dim": 32', '"shape_dim": 48'))
    assert "is of another architecture" in fails(capsys, sample.main, [str(out)])
    (out / "config.json").write_text(text.replace('"shape_dim": 32', '"shape_dim": "many"'))
    assert "config.json is damaged or of another version" in fails(capsys, sample.main, [str(out)])


def copy_of(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    return out, runs.open_run(out).checkpoints()[-1]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out, checkpoint = copy_of(finished, tmp_path)
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-20])
    if name != "optimizer.pt":  # which sampling does not read
        assert f"{path} is damaged" in fails(capsys, sample.main, [str(out)])
    content = (finished / checkpoint.relative_to(out) / name).read_bytes()
    path.write_bytes(content[:-5] + b"\xff" + content[-4:])
    opened = runs.open_run(out)
    before = runs.set_damaged_aside(opened)
    assert before is not None and (before.stage, before.step) == ("priors", 2)
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    line = capsys.readouterr().out
    assert line.startswith(f"checkpoint: {path} is damaged (")
    assert line.endswith(f"{aside}, the one before it is used\n")
    assert (aside / name).read_bytes() == content[:-5] + b"\xff" + content[-4:]
    assert [p.name for p in opened.checkpoints()] == ["step-00000006"]
    (out / "checkpoints" / "step-00000006" / "state.json").unlink()
    with pytest.raises(ValueError, match="there is none before it: remove it to begin anew"):
        runs.set_damaged_aside(opened)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(finished: Path, tmp_path: Path) -> None:
    out, checkpoint = copy_of(finished, tmp_path)
    (checkpoint / "model.safetensors").write_bytes(b"")
    run(out)
    expected, got = weights(finished), weights(out)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_checkpoint_runs_no_code(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where size and checksum have been made to fit."""
    out, checkpoint = copy_of(finished, tmp_path)
    torch.save({"state": Touch(tmp_path / "owned")}, checkpoint / "optimizer.pt")
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"]["optimizer.pt"] = fingerprint(checkpoint / "optimizer.pt")
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="optimizer.pt is damaged"):
        runs.load_checkpoint(runs.open_run(out))
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "full"
    real = Path.write_bytes
    calls = 0

    def full(path: Path, content: bytes) -> int:
        nonlocal calls
        calls += "safetensors" in path.name
        if calls > 1:
            real(path, b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "no space left on the disk" in fails(capsys, run, out)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    run(out)
    assert (out / "figures.json").exists()


def write_clouds(root: Path, count: int = 4, points: int = 150) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = root / "chair" / split
        folder.mkdir(parents=True)
        for i in range(count):
            np.save(folder / f"{i}.npy", rng.normal(size=(points, 3)).astype(np.float32))
    return root


def test_bad_data_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "clouds", tmp_path / "out"
    given = ["--data.source", str(source)]
    assert "error: data.source: " in fails(capsys, run, out, *given)
    source.mkdir()
    assert "error: data.source: " in fails(capsys, run, out, *given)
    write_clouds(source)
    bad = source / "chair" / "train" / "2.npy"
    cloud = np.load(bad)
    cloud[7, 1] = np.nan
    np.save(bad, cloud)
    line = fails(capsys, run, out, *given)
    assert f"{bad}: point 7 is not finite" in line
    assert not out.exists()
    # Box normalisation needs no statistics, but a bad cloud must not wait for its turn in training either.
    line = fails(capsys, run, out, *given, "--data.normalization", "box")
    assert f"{bad}: point 7 is not finite" in line
    assert not out.exists()


@pytest.mark.parametrize(
    "option",
    [
        "--vae.steps 0",
        "--vae.batch-size 0",
        "--priors.batch-size -3",
        "--priors.cached-draws -1",
        "--priors.shape-draws 0",
        "--log-every 0",
        "--checkpoint-every 0",
        "--picture-every 0",
        "--validate-every -1",
        "--patience 0",
        "--patience 3",
        "--seed -1",
        "--data.workers -1",
        "--data.num-points 63",
        "--data.num-shapes 0",
        "--vae.learning-rate 0",
        "--vae.reconstruction.l1 0",
        "--sampling.steps 1001",
        "--sampling.eta 2",
        "--sampling.clip-x0 0",
        "--sampling.sampler ode",
        "--data.categories chair",
        "--stage priors",
    ],
)
def test_options_that_cannot_work_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    line = fails(capsys, run, tmp_path / "out", *option.split())
    name = option.split()[0].removeprefix("--").removeprefix("data.")
    assert line.startswith((f"error: {name}:", f"error: data.{name}:", "error: vae.reconstruction:"))
    assert not (tmp_path / "out").exists()


def test_logging_may_change_when_a_run_is_continued(finished: Path, tmp_path: Path) -> None:
    out, _ = copy_of(finished, tmp_path)
    run(out, "--log-every", "2", "--data.workers", "1")


def test_a_folder_without_held_out_shapes_holds_some_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_clouds(tmp_path / "clouds")
    shutil.rmtree(source / "chair" / "val")
    run(tmp_path / "out", "--data.source", str(source), "--stage", "vae")
    assert "every tenth training shape is held out" in capsys.readouterr().out


def test_short_clouds_are_said_once_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_clouds(tmp_path / "clouds", points=120)
    given = ["--data.source", str(source)]
    line = fails(capsys, run, tmp_path / "out", *given, "--strict")
    assert "4 of 4 clouds have fewer than 130 points" in line
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    run(tmp_path / "out", *given)
    assert "4 of 4 clouds have fewer than 130 points: points repeat" in capsys.readouterr().out
    assert runs.open_run(tmp_path / "out").config.model.shape_prior.num_classes == 1


def test_the_quickstart_is_a_small_real_lion() -> None:
    model = quickstart().model
    for unet in (model.vae.point_encoder, model.vae.decoder, model.point_prior.network):
        assert unet.down[0].convolutions.blocks  # type: ignore[union-attr]
