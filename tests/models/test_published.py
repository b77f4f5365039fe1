"""The published networks, output for output, and the loading of published checkpoints.

``tests/data/lion_networks.npz`` holds outputs of the authors' networks on weights drawn by the rule of ``draw``.
"""

from __future__ import annotations

import json
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.models import LION, load_published

DATA = Path(__file__).parents[1] / "data"
KEYS: dict[str, dict[str, list[int]]] = json.loads((DATA / "lion_state_dict_keys.json").read_text())


def draw(name: str, shape: list[int]) -> Tensor:
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if r.ndim >= 2:
        return r / (r.numel() / shape[0]) ** 0.5
    return 1 + 0.1 * r if name.endswith("weight") else 0.1 * r


def checkpoint(priors: str) -> dict[str, dict[str, Tensor]]:
    return {
        "vae_state_dict": {k: draw(k, s) for k, s in KEYS["vae_state_dict"].items()},
        "dae_state_dict": {k: draw(k[2:], s) for k, s in KEYS[priors].items()},
    }


def empty_checkpoint(priors: str) -> dict[str, dict[str, Tensor]]:
    """The same names and shapes without the time that drawing 90 million numbers takes."""
    return {
        "vae_state_dict": {k: torch.zeros(1).expand(s) for k, s in KEYS["vae_state_dict"].items()},
        "dae_state_dict": {k: torch.zeros(1).expand(s) for k, s in KEYS[priors].items()},
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(DATA / "lion_networks.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.fixture(scope="module")
def lion() -> LION:
    return load_published(checkpoint("dae_state_dict"))


@pytest.fixture(scope="module")
def lion_clip() -> LION:
    return load_published(checkpoint("dae_state_dict_clip"))


def assert_close(output: Tensor, golden: Tensor) -> None:
    """A relative L2 error of 5e-6 in float32; 1e-7 of noise in the input moves the original by 2e-6."""
    assert output.shape == golden.shape
    assert output.dtype == torch.float32
    assert (output - golden).norm() / golden.norm() < 5e-6


@torch.no_grad()
def test_shape_encoder(lion: LION, golden: dict[str, Tensor]) -> None:
    mu, log_sigma = lion.vae.encode_shape(golden["points"])
    assert_close(mu, golden["style_mu"])
    assert_close(log_sigma, golden["style_logsigma"])


@torch.no_grad()
def test_encoders_share_one_plan(lion: LION, golden: dict[str, Tensor]) -> None:
    plan = lion.vae.plan(golden["points"])
    assert plan.serves(lion.vae.shape_encoder.geometry)
    assert_close(lion.vae.encode_shape(golden["points"], plan)[0], golden["style_mu"])


@torch.no_grad()
def test_point_encoder(lion: LION, golden: dict[str, Tensor]) -> None:
    mu, log_sigma = lion.vae.encode_points(golden["points"], golden["style_mu"])
    assert_close(mu, golden["latent_mu"])
    assert_close(log_sigma + 6.0, golden["latent_logsigma_raw"])
    # The cloud itself is most of the mean: compare what the network adds to it, too.
    xyz = golden["points"]
    assert_close((mu[..., :3] - xyz) * 100, (golden["latent_mu"][..., :3] - xyz) * 100)


@torch.no_grad()
def test_decoder(lion: LION, golden: dict[str, Tensor]) -> None:
    decoded = lion.vae.decode(golden["latent_points"], golden["style_mu"])
    assert_close(decoded, golden["decoded"])
    xyz = golden["latent_points"][..., :3]
    assert_close((decoded - xyz) * 100, (golden["decoded"] - xyz) * 100)


@torch.no_grad()
def test_priors(lion: LION, golden: dict[str, Tensor]) -> None:
    assert_close(lion.shape_prior(golden["z_t"], golden["t"]), golden["eps_global"])
    assert_close(lion.point_prior(golden["h_t"], golden["t"], golden["style_mu"]), golden["eps_local"])


@torch.no_grad()
def test_clip_priors(lion_clip: LION, golden: dict[str, Tensor]) -> None:
    clip = golden["clip_feat"]
    assert_close(lion_clip.shape_prior(golden["z_t"], golden["t"], clip), golden["eps_global_clip"])
    eps = lion_clip.point_prior(golden["h_t"], golden["t"], golden["style_mu"], clip)
    assert_close(eps, golden["eps_local_clip"])


def test_parameter_counts(lion: LION) -> None:
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (lion.vae, lion.shape_prior, lion.point_prior)]
    assert [round(c, 2) for c in count] == [22.40, 77.17, 11.42]


@pytest.mark.parametrize("priors", ["dae_state_dict", "dae_state_dict_clip"])
def test_every_published_tensor_has_its_place(priors: str) -> None:
    lion = load_published(empty_checkpoint(priors))
    published = len(KEYS["vae_state_dict"]) + len(KEYS[priors])
    own = {"z_mean", "z_std", "h_mean", "h_std"}
    assert len(lion.state_dict().keys() - own) == published
    assert lion.config.shape_prior.clip == priors.endswith("clip")


def test_wrong_tensors_are_all_named() -> None:
    content = empty_checkpoint("dae_state_dict")
    del content["vae_state_dict"]["style_encoder.mlp.bias"]
    content["vae_state_dict"]["decoder.more"] = torch.zeros(1)
    content["dae_state_dict"]["0.input_layer.weight"] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*$") as error:
        load_published(content)
    message = str(error.value)
    assert "missing vae.style_encoder.mlp.bias" in message
    assert "extra vae.decoder.more" in message
    assert "misshapen dae.0.input_layer.weight (expected (2048, 128), got (3, 5))" in message


def test_other_dictionaries_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dae_state_dict missing"):
        load_published({"vae_state_dict": {}})
    with pytest.raises(ValueError, match="does not exist"):
        load_published(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        load_published(tmp_path / "text.pt")


class _Touch:
    """Unpickling this runs code: it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"vae_state_dict": _Touch(tmp_path / "owned"), "dae_state_dict": {}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        load_published(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("long", ["short", "a" * 120 + "/" + "b" * 120])
def test_a_foreign_object_is_named_in_a_short_line(tmp_path: Path, long: str) -> None:
    (tmp_path / long).mkdir(parents=True)
    path = tmp_path / long / "lion.pt"
    for foreign, name in ((np.float64(1), "multiarray.scalar"), (Namespace(lr=1), "argparse.Namespace")):
        torch.save({"vae_state_dict": {}, "dae_state_dict": {}, "args": foreign}, path)
        with pytest.raises(ValueError, match=r"\Acheckpoint: [ -~]{1,288}\Z") as error:
            load_published(path)
        assert f"{name}, and only tensors are read" in str(error.value)
    for content, got in (([1], "got list"), ({"vae_state_dict": 1, "dae_state_dict": {}}, "got int")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=got):
            load_published(path)
    with pytest.raises(ValueError, match="expected tensors in vae_state_dict, got str as a"):
        load_published({"vae_state_dict": {"a": "b"}, "dae_state_dict": {}})


def test_names_of_parallel_training(tmp_path: Path) -> None:
    content = empty_checkpoint("dae_state_dict")
    parallel = {part: {f"module.{name}": value for name, value in tensors.items()} for part, tensors in content.items()}
    assert isinstance(load_published(parallel), LION)


def test_a_file_loads_like_its_dictionary(tmp_path: Path) -> None:
    content = empty_checkpoint("dae_state_dict")
    # Only the shapes matter here, and expanded zeros are stored once.
    torch.save(content, tmp_path / "lion.pt")
    assert isinstance(load_published(tmp_path / "lion.pt"), LION)
