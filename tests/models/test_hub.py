"""A LION in a folder and on a hub: the same bits, no code, and a card that says what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lion_triton import evaluate, interpolate, sample, vary
from lion_triton.models import LION
from lion_triton.models import hub as hub_module
from tests import fresh
from tests.test_train import fails
from tests.tiny import POINTS, tiny_config, tiny_lion, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run(tmp_path_factory.mktemp("runs") / "tiny").folder
    figures = {"held_out_shapes": 5, "points": POINTS, "reconstruction_chamfer": 0.00123, "1nna_cd_generated": 0.75}
    (folder / "figures.json").write_text(json.dumps(figures))
    (folder / "samples").mkdir()
    (folder / "samples" / "overview.png").write_bytes(b"a picture")
    return folder


@pytest.fixture(scope="module")
def saved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "saved"
    LION.from_pretrained(run).save_pretrained(folder)
    return folder


def clouds(lion: LION) -> torch.Tensor:
    options: dict[str, Any] = {"sampler": "ddim", "steps": 3, "num_points": 20, "labels": torch.tensor([0, 3])}
    return lion.sample(2, generator=torch.Generator().manual_seed(0), **options)


def test_the_folder_holds_all_and_nothing_else(saved: Path, run: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors", "picture.png", "README.md"}
    assert len({p.stat().st_mode for p in saved.iterdir()}) == 1  # the weights are no secret
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (saved, run))
    assert {key: ours[key] for key in theirs} == theirs
    assert ours["figures"]["1nna_cd_generated"] == 0.75
    checkpoint = next((run / "checkpoints").iterdir())
    expected = load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "ema.safetensors")
    found = load_file(saved / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)  # the priors' averaged


def test_a_fresh_process_without_a_network_samples_the_same_bits(run: Path, saved: Path, tmp_path: Path) -> None:
    program = f"""
import socket, torch
def no(*_, **__): raise AssertionError("a network was asked for")
socket.socket.connect = socket.getaddrinfo = no
from lion_triton.models import LION
options = dict(sampler="ddim", steps=3, num_points=20, labels=torch.tensor([0, 3]))
lion = LION.from_pretrained({str(saved)!r})
torch.save(lion.sample(2, generator=torch.Generator().manual_seed(0), **options), {str(tmp_path / "clouds.pt")!r})
"""
    result = fresh.python("-c", program)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "clouds.pt"), clouds(LION.from_pretrained(run)))


def test_saved_again_it_is_the_same(saved: Path, tmp_path: Path) -> None:
    lion = LION.from_pretrained(saved)
    assert not lion.training
    lion.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "picture.png", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_weights_in_half_the_bytes(saved: Path, tmp_path: Path) -> None:
    lion = LION.from_pretrained(saved)
    lion.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    lion.save_pretrained(tmp_path / "whole")  # what was asked for once does not stick
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    parameters = {name for name, _ in lion.named_parameters()}
    for name, value in whole.items():
        assert half[name].dtype == (torch.bfloat16 if name in parameters else value.dtype), name
        torch.testing.assert_close(half[name].to(value.dtype), value, rtol=2**-8, atol=1e-30)
    again = LION.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(clouds(again), clouds(lion), rtol=0.1, atol=0.1)


def test_every_command_takes_the_folder(saved: Path, run: Path, tmp_path: Path) -> None:
    for folder in (saved, run):
        out = tmp_path / folder.name
        sample.main([str(folder), "--num-samples", "2", "--out", str(out / "sample")])
        interpolate.main([str(folder), "1", "2", "--frames", "2", "--out", str(out / "interpolate")])
        vary.main([str(folder), "procedural:1", "--num-samples", "1", "--out", str(out / "vary")])
    for name in ("sample", "interpolate", "vary"):
        ours, theirs = (np.load(tmp_path / folder / name / "clouds.npz")["points"] for folder in ("saved", "tiny"))
        assert np.array_equal(ours, theirs)


def test_it_can_be_evaluated_and_the_card_then_says_so(run: Path, tmp_path: Path) -> None:
    LION.from_pretrained(run).save_pretrained(tmp_path / "model")
    evaluate.main([str(tmp_path / "model"), "--emd", "none"])
    record = json.loads((tmp_path / "model" / "evaluation" / "evaluation.json").read_text())
    assert set(record["samples"]["sampling"]["weights_sha256"]) == {"model.safetensors"}
    assert "--checkpoint" not in record["command"]
    LION.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"| 1-NNA, Chamfer distance | {record['figures']['1nna_cd']:.4g} |" in card
    assert f"5 samples of {POINTS} points against 5 of {POINTS}" in card
    assert record["command"] in card


def test_the_card_says_what_the_run_says(saved: Path) -> None:
    card = ModelCard.load(saved / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "lion-triton"
    for words in (
        "![Held-out shapes, reconstructions and generated shapes](picture.png)",
        "| classes | chair, table, sofa, lamp, shelf |",
        "| licence of the data | Apache-2.0, as lion-triton |",
        "| steps | 300 | 1600 |",
        "On 5 held-out shapes of 48 points, as training ended",
        "| reconstruction, Chamfer distance | 0.00123 |",
        "| 1-NNA of generated shapes, Chamfer distance | 0.75 |",
        "data units are clouds * 0.25 + (0, 0.01, -0.01)",
    ):
        assert words in card.text, words


def test_the_code_on_the_card_works(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0].replace("FOLDER_OR_ID", str(saved))
    assert len(code.splitlines()) <= 4  # three, and torch for labels
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["clouds"].shape == (4, POINTS, 3)


def test_the_licence_of_the_data_is_the_one_given(run: Path, tmp_path: Path) -> None:
    LION.from_pretrained(run).save_pretrained(tmp_path / "a", model_card_kwargs={"data_licence": "CC0"})
    assert "| licence of the data | CC0 |" in (tmp_path / "a" / "README.md").read_text()
    data = tmp_path / "data"
    data.mkdir()
    objects = [{"licence": "CC-BY 3.0"}, {"licence": "CC-BY 3.0"}, {"licence": "Free Art"}, {}]
    (data / "index.json").write_text(json.dumps({"objects": objects}))
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"]["source"] = str(data)
    config["config"]["init_from"] = "runs/first"
    LION.from_pretrained(run).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    LION.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    card = (tmp_path / "c" / "README.md").read_text()
    assert "| licence of the data | CC-BY 3.0, Free Art |" in card
    assert "Started from the weights of `first`. Diffusion: " in card


def test_a_model_without_a_run_is_saved_in_its_own_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lion = tiny_lion(tiny_config())
    lion.save_pretrained(tmp_path / "made")
    assert torch.equal(clouds(LION.from_pretrained(tmp_path / "made")), clouds(lion))
    card = (tmp_path / "made" / "README.md").read_text()
    assert "| source | not recorded |" in card
    assert "Recipe" not in card
    options = ["--sampler", "ddim", "--steps", "3", "--num-samples", "2", "--num-points", "20"]
    sample.main([str(tmp_path / "made"), *options, "--out", str(tmp_path / "out")])
    expected = lion.sample(
        2,
        generator=torch.Generator().manual_seed(0),
        sampler="ddim",
        steps=3,
        num_points=20,
        labels=torch.tensor([0, 1]),
    )
    np.testing.assert_allclose(np.load(tmp_path / "out" / "clouds.npz")["points"], expected, atol=0.05)
    line = fails(capsys, evaluate.main, [str(tmp_path / "made")])
    assert "the run's own data cannot be read" in line


def test_pushing_uploads_the_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, bytes] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **_: object) -> str:
            uploaded.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
            return f"pushed to {repo_id}"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    assert LION.from_pretrained(saved).push_to_hub("somebody/chairs") == "pushed to somebody/chairs"
    assert uploaded == {path.name: path.read_bytes() for path in saved.iterdir()}


def test_an_id_is_downloaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(hub_module, "snapshot_download", download)
    lion = LION.from_pretrained("somebody/chairs", revision="v1")
    files = ["config.json", "model.safetensors", "picture.png", "embeddings.npz", "surface/*", "encoders/*"]
    assert asked == [("somebody/chairs", {"allow_patterns": files, "revision": "v1"})]
    assert torch.equal(clouds(lion), clouds(LION.from_pretrained(saved)))


def damaged(saved: Path, folder: Path, name: str, content: bytes | None) -> Path:
    folder.mkdir()
    for path in saved.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"[]", "config.json is damaged"),
        ("config.json", b"{}", "damaged or of another architecture or version"),
        ("config.json", b'{"config": {"model": {"vae": 3}}}', "damaged or of another architecture or version"),
        ("model.safetensors", None, "has no trained priors yet"),
        ("model.safetensors", b"\x80\x04cos\nsystem\n", "model.safetensors is damaged"),  # a pickle
    ],
)
def test_a_damaged_folder_is_named(saved: Path, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    folder = damaged(saved, tmp_path / "bad", name, content)
    with pytest.raises(ValueError, match=r"^folder_or_id: ") as error:
        LION.from_pretrained(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_one_changed_byte_of_the_weights_is_seen(saved: Path, tmp_path: Path) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-5] ^= 1
    folder = damaged(saved, tmp_path / "bad", "model.safetensors", bytes(content))
    with pytest.raises(ValueError, match=r"^folder_or_id: .*model.safetensors is damaged, or of another model"):
        LION.from_pretrained(folder)
    config = json.loads((saved / "config.json").read_text())
    del config["weights"]  # as saved before
    (folder / "config.json").write_text(json.dumps(config))
    LION.from_pretrained(folder)


def test_weights_of_another_architecture_are_refused(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["config"]["model"]["vae"]["shape_dim"] = 4
    folder = damaged(saved, tmp_path / "bad", "config.json", json.dumps(config).encode())
    with pytest.raises(ValueError, match=r"of another architecture .*size mismatch"):
        LION.from_pretrained(folder)


def test_what_is_neither_folder_nor_id_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("nowhere", "/nowhere/at/all", "a b/c"):
        with pytest.raises(ValueError, match=r"folder_or_id: expected a run folder, .*, got "):
            LION.from_pretrained(name)
    vae = tiny_run(tmp_path / "vae", stage="vae").folder
    with pytest.raises(ValueError, match=r"has no trained priors yet"):
        LION.from_pretrained(vae)
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"save_directory: .* is a run folder"):
        LION.from_pretrained(run).save_pretrained(run)
    assert (run / "config.json").read_bytes() == before
