"""The advisor, on small trees that import as ten public projects do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lion_triton.kernels.compat import __main__ as command
from lion_triton.kernels.compat._advice import advise
from tests import fresh

COMPAT = "lion_triton.kernels.compat"
Tree = dict[str, str]

SUMS = "def earth_mover_distance(xyz1, xyz2, transpose=True):\n    return approx(xyz1, xyz2)\n"
DIVIDES = "def earth_mover_distance(xyz1, xyz2, transpose=True):\n    return approx(xyz1, xyz2) / xyz1.shape[1]\n"
MODULE = (
    "class earth_mover_distance(torch.nn.Module):\n    def forward(self, xyz1, xyz2, transpose=False):\n"
    "        cost = approx(xyz1, xyz2)\n        cost = cost / xyz1.size(1)\n        return cost.mean()\n"
)
FSCORE = "def fscore(dist1, dist2, threshold={}):\n    return dist1\n"
CHAMFER = "class chamfer_3DDist:\n    pass\n"
FUNCTIONAL = {
    "modules/functional/__init__.py": (
        "from modules.functional.ball_query import ball_query\n"
        "from modules.functional.voxelization import avg_voxelize\n"
    ),
    "modules/functional/ball_query.py": "from modules.functional.backend import _backend\nball_query = B.apply\n",
    "modules/functional/voxelization.py": "avg_voxelize = AvgVoxelization.apply\n",
    "modules/functional/backend.py": "_backend = load()\n",
}

TREES: dict[str, tuple[Tree, list[tuple[str, int, str | None]]]] = {
    "PVD": (
        {
            **FUNCTIONAL,
            "modules/pvconv.py": "import torch.nn.functional as T\nimport modules.functional as F\nF.avg_voxelize()\n",
            "metrics/PyTorchEMD/emd.py": DIVIDES,
            "metrics/PyTorchEMD/setup.py": "CUDAExtension('emd')\n",
            "metrics/PyTorchEMD/test_emd_loss.py": "from emd import earth_mover_distance\n",
            "metrics/ChamferDistancePytorch/chamfer3D/dist_chamfer_3D.py": CHAMFER,
            "metrics/ChamferDistancePytorch/fscore.py": FSCORE.format(0.001),
            "metrics/evaluation_metrics.py": (
                "from metrics.PyTorchEMD.emd import earth_mover_distance as EMD\n"
                "from metrics.ChamferDistancePytorch.chamfer3D.dist_chamfer_3D import chamfer_3DDist\n"
                "from metrics.ChamferDistancePytorch.fscore import fscore\n"
                "EMD(a.cuda(), b, transpose=False)\n"
            ),
        },
        [
            ("metrics/evaluation_metrics.py", 1, f"from {COMPAT}.emd_mean import earth_mover_distance as EMD"),
            ("metrics/evaluation_metrics.py", 2, f"from {COMPAT}.chamfer3d import chamfer_3DDist"),
            ("metrics/evaluation_metrics.py", 3, f"from {COMPAT}.chamfer3d import fscore"),
            ("modules/pvconv.py", 2, f"import {COMPAT}.pvcnn as F"),
        ],
    ),
    "LION": (
        {
            "third_party/pvcnn/functional/__init__.py": "from .grouping import grouping\n",
            "third_party/pvcnn/functional/grouping.py": "def grouping(a, b):\n    pass\n",
            "third_party/PyTorchEMD/emd.py": DIVIDES,
            "third_party/PyTorchEMD/emd_nograd.py": DIVIDES.replace("distance(", "distance_nograd("),
            "third_party/ChamferDistancePytorch/chamfer3D/dist_chamfer_3D.py": CHAMFER,
            "models/pvcnn2_ada.py": "import third_party.pvcnn.functional as F\nx = F.grouping(a, b)\n",
            "utils/evaluation_metrics_fast.py": (
                "def metrics():\n"
                "    from third_party.PyTorchEMD.emd_nograd import earth_mover_distance_nograd\n"
                "    from third_party.PyTorchEMD.emd import earth_mover_distance\n"
                "    from third_party.ChamferDistancePytorch.chamfer3D.dist_chamfer_3D import "
                "chamfer_3DDist_nograd, chamfer_3DDist\n"
            ),
        },
        [
            ("models/pvcnn2_ada.py", 1, f"import {COMPAT}.pvcnn as F"),
            ("utils/evaluation_metrics_fast.py", 2, f"from {COMPAT}.emd_mean import earth_mover_distance_nograd"),
            ("utils/evaluation_metrics_fast.py", 3, f"from {COMPAT}.emd_mean import earth_mover_distance"),
            (
                "utils/evaluation_metrics_fast.py",
                4,
                f"from {COMPAT}.chamfer3d import chamfer_3DDist_nograd, chamfer_3DDist",
            ),
        ],
    ),
    "DiT-3D": (
        {
            **FUNCTIONAL,
            "modules/voxelization.py": "from . import functional as F\nv = F.avg_voxelize(1, 2, 3)\n",
            "metrics/PyTorchEMD/emd.py": DIVIDES.replace("return", "cost =") + "    cost /= 5\n    return cost\n",
            "metrics/evaluation_metrics.py": (
                "import torch\ntry:\n    from . PyTorchEMD.emd import earth_mover_distance as EMD\n"
                "    EMD_AVAILABLE = True\nexcept ImportError:\n    pass\n"
            ),
        },
        [
            ("metrics/evaluation_metrics.py", 3, f"from {COMPAT}.emd_mean import earth_mover_distance as EMD"),
            ("modules/voxelization.py", 1, f"from {COMPAT} import pvcnn as F"),
        ],
    ),
    "SnowflakeNet": (
        {
            "loss_functions/__init__.py": (
                "from loss_functions.Chamfer3D.dist_chamfer_3D import chamfer_3DDist\n"
                "from loss_functions.emd.emd_module import emdModule\n"
            ),
            "loss_functions/Chamfer3D/dist_chamfer_3D.py": CHAMFER,
            "loss_functions/emd/emd_module.py": "class emdModule:\n    pass\n",
            "models/utils.py": (
                "from pointnet2_ops.pointnet2_utils import furthest_point_sample, \\\n  gather_operation, ball_query\n"
                "from models.skip import three_nn\n"
            ),
            "models/skip.py": "def three_nn():\n    pass\n",
        },
        [
            ("loss_functions/__init__.py", 1, f"from {COMPAT}.chamfer3d import chamfer_3DDist"),
            ("loss_functions/__init__.py", 2, f"from {COMPAT}.emd_auction import emdModule"),
            (
                "models/utils.py",
                1,
                f"from {COMPAT}.pointnet2 import furthest_point_sample, gather_operation, ball_query",
            ),
        ],
    ),
    "Point-MAE": (
        {
            "extensions/chamfer_dist/__init__.py": "class ChamferDistanceL1: ...\nclass ChamferDistanceL2: ...\n",
            "extensions/emd/emd.py": MODULE,
            "extensions/emd/__init__.py": "from .emd import earth_mover_distance as emd\n",
            "models/Point_MAE.py": (
                "from knn_cuda import KNN\n"
                "from extensions.chamfer_dist import ChamferDistanceL1, ChamferDistanceL2\n"
                "from utils.misc import fps\n"
                "from extensions.emd.emd import earth_mover_distance\n"
            ),
            "utils/misc.py": "from pointnet2_ops import pointnet2_utils\npointnet2_utils.furthest_point_sample(x, 4)\n",
            # Plain PyTorch of another family, with the same file name.
            "segmentation/models/pointnet2_utils.py": "class PointNetFeaturePropagation:\n    pass\n",
            "segmentation/models/pt.py": "from .pointnet2_utils import PointNetFeaturePropagation\n",
        },
        [
            ("models/Point_MAE.py", 1, f"from {COMPAT}.knn_cuda import KNN"),
            ("models/Point_MAE.py", 2, f"from {COMPAT}.chamfer_dist import ChamferDistanceL1, ChamferDistanceL2"),
            ("models/Point_MAE.py", 4, f"from {COMPAT}.emd_mean import EarthMoverDistance as earth_mover_distance"),
            ("utils/misc.py", 1, f"from {COMPAT} import pointnet2 as pointnet2_utils"),
        ],
    ),
    "AtlasNet": (
        {
            "auxiliary/ChamferDistancePytorch/chamfer3D/dist_chamfer_3D.py": CHAMFER,
            "auxiliary/ChamferDistancePytorch/fscore.py": FSCORE.format(0.001),
            "training/loss.py": (
                "import auxiliary.ChamferDistancePytorch.chamfer3D.dist_chamfer_3D as dist_chamfer_3D\n"
                "from auxiliary.ChamferDistancePytorch.fscore import fscore\n"
                "dist = dist_chamfer_3D.chamfer_3DDist()\n"
            ),
        },
        [
            ("training/loss.py", 1, f"import {COMPAT}.chamfer3d as dist_chamfer_3D"),
            ("training/loss.py", 2, f"from {COMPAT}.chamfer3d import fscore"),
        ],
    ),
    "DP3": (
        {
            "policy/model_util.py": (
                "import pytorch3d.ops as torch3d_ops\nimport functional\n\n\ndef fps(points, n):\n"
                "    return torch3d_ops.sample_farthest_points(points=points, K=n)[1]\n"
            ),
            "policy/mesh.py": ("import pytorch3d.ops as ops\nops.sample_points_from_meshes(m)\nops.knn_points(a, b)\n"),
        },
        [
            ("policy/mesh.py", 1, f"import pytorch3d.ops as ops; import {COMPAT}.pytorch3d"),
            ("policy/mesh.py", 3, f"{COMPAT}.pytorch3d.knn_points"),
            ("policy/model_util.py", 1, f"import {COMPAT}.pytorch3d as torch3d_ops"),
        ],
    ),
    "score-denoise": (
        {
            "utils/evaluate.py": (
                "import torch, pytorch3d.loss\n"
                "import pytorch3d.structures\n"
                "from pytorch3d.loss.point_mesh_distance import point_face_distance\n"
                "from torch_cluster import fps\n"
                "def chamfer(x, y):\n    return pytorch3d.loss.chamfer_distance(x, y)[0]\n"
            ),
            "models/denoise.py": (
                "import pytorch3d.ops\n_, idx, nn = pytorch3d.ops.knn_points(a, b, K=4, return_nn=True)\n"
            ),
        },
        [
            ("models/denoise.py", 1, f"import {COMPAT}.pytorch3d"),
            ("models/denoise.py", 2, f"{COMPAT}.pytorch3d.knn_points"),
            ("utils/evaluate.py", 1, f"import torch; import {COMPAT}.pytorch3d"),
            ("utils/evaluate.py", 2, None),
            ("utils/evaluate.py", 3, None),
            ("utils/evaluate.py", 4, f"from {COMPAT}.torch_cluster import fps"),
            ("utils/evaluate.py", 6, f"{COMPAT}.pytorch3d.chamfer_distance"),
        ],
    ),
    "PoinTr": (
        {
            "extensions/chamfer_dist/__init__.py": "class ChamferFunction: ...\nclass ChamferDistanceL1: ...\n",
            "extensions/chamfer_dist/setup.py": "CUDAExtension('chamfer')\n",
            "extensions/chamfer_dist/test.py": "from extensions.chamfer_dist import ChamferFunction\n",
            "models/PoinTr.py": (
                "from pointnet2_ops import pointnet2_utils\n"
                "from extensions.chamfer_dist import ChamferDistanceL1, ChamferDistanceL3\n"
                "from .Transformer import PCTransformer\n"
                "pointnet2_utils.gather_operation(pointnet2_utils.FurthestPointSampling.apply(x, 2), 3)\n"
            ),
        },
        [
            ("models/PoinTr.py", 1, f"from pointnet2_ops import pointnet2_utils; import {COMPAT}.pointnet2"),
            (
                *("models/PoinTr.py", 2),
                "from extensions.chamfer_dist import ChamferDistanceL3; "
                f"from {COMPAT}.chamfer_dist import ChamferDistanceL1",
            ),
            ("models/PoinTr.py", 4, f"{COMPAT}.pointnet2.gather_operation"),
        ],
    ),
    "VRCNet": (
        {
            "utils/ChamferDistancePytorch/fscore.py": FSCORE.format(0.0001),
            "utils/ChamferDistancePytorch/chamfer3D/dist_chamfer_3D.py": CHAMFER,
            "utils/emd/emd_module.py": "class emdModule:\n    pass\n",
            "utils/expansion_penalty/expansion_penalty_module.py": "class expansionPenaltyModule:\n    pass\n",
            "utils/Pointnet2.PyTorch/pointnet2/pointnet2_utils.py": (
                "import pointnet2_cuda as pointnet2\ngather_operation = GatherOperation.apply\n"
                "furthest_point_sample = F.apply\npointnet2.gather_points_wrapper(1)\n"
            ),
            "utils/model_utils.py": (
                "import sys\nsys.path.append('utils/Pointnet2.PyTorch/pointnet2')\n"
                "import pointnet2_utils as pn2\nfrom chamfer3D import dist_chamfer_3D\nfrom fscore import fscore\n"
                "import emd_module as emd\nimport expansion_penalty_module as expansion\n"
                "cham_loss = dist_chamfer_3D.chamfer_3DDist()\nemd.emdModule()\nexpansion.expansionPenaltyModule()\n"
                "pn2.furthest_point_sample(x.cuda(), 3)\n"
            ),
        },
        [
            ("utils/model_utils.py", 3, f"import {COMPAT}.pointnet2 as pn2"),
            ("utils/model_utils.py", 4, f"from {COMPAT} import chamfer3d as dist_chamfer_3D"),
            ("utils/model_utils.py", 5, f"from {COMPAT}.chamfer3d import fscore_1e4 as fscore"),
            ("utils/model_utils.py", 6, f"import {COMPAT}.emd_auction as emd"),
            ("utils/model_utils.py", 7, f"import {COMPAT}.emd_auction as expansion"),
        ],
    ),
}


def plant(root: Path, tree: Tree) -> Path:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "-C", str(root), *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("name", TREES)
def test_finds_every_import_and_invents_none(name: str, tmp_path: Path) -> None:
    tree, expected = TREES[name]
    advice = advise(plant(tmp_path, tree))
    assert [(f.file, f.line, f.new) for f in sorted(advice.findings, key=lambda f: (f.file, f.line))] == expected
    # What it would write is Python, and leaves nothing more to find but what has no replacement.
    again = advise(plant(tmp_path, {file: new for file, (_, new) in advice.texts.items()}))
    assert not again.unread
    assert all(f.new is None or "import" in f.new for f in again.findings)
    assert not again.texts or set(again.texts) <= {"models/PoinTr.py", "policy/mesh.py"}


def notes(root: Path) -> list[str]:
    return [note for finding in advise(root).findings for note in finding.notes]


@pytest.mark.parametrize(
    ("emd", "module", "note"),
    [
        (SUMS, "emd", "copy/emd.py sums over the points"),
        (DIVIDES, "emd_mean", "copy/emd.py divides by the number of points"),
        (MODULE.replace("        cost = cost / xyz1.size(1)\n", ""), None, "is a module that sums over the points"),
        (MODULE.replace(".mean()", ""), None, "is a module that divides by the number of points"),
        ("from .other import earth_mover_distance\n", None, "copy/emd.py does not tell"),
    ],
)
def test_whether_an_emd_sums_or_divides(emd: str, module: str | None, note: str, tmp_path: Path) -> None:
    plant(tmp_path, {"copy/emd.py": emd, "a.py": "from copy.emd import earth_mover_distance\n"})
    (finding,) = advise(tmp_path).findings
    assert finding.new == (None if module is None else f"from {COMPAT}.{module} import earth_mover_distance")
    assert note in finding.notes[0]


def test_an_emd_that_is_not_here(tmp_path: Path) -> None:
    plant(tmp_path, {"a.py": "from emd import earth_mover_distance\nfrom third.emd import earth_mover_distance as e\n"})
    installed, elsewhere = advise(tmp_path).findings
    assert installed.new == f"from {COMPAT}.emd import earth_mover_distance"
    assert elsewhere.new is None and "its file is not here" in elsewhere.notes[0]


def test_notes(tmp_path: Path) -> None:
    plant(tmp_path, TREES["VRCNet"][0])
    plant(tmp_path, {"own/b.py": "from fscore import fscore\n", "own/fscore.py": FSCORE.format(0.01)})
    assert any("default threshold of utils/ChamferDistancePytorch/fscore.py is 0.0001" in n for n in notes(tmp_path))
    assert any(n.startswith("passes over points within 0.0316") for n in notes(tmp_path))
    assert any(
        "fscore has no replacement: the default threshold of own/fscore.py is 0.01" in n for n in notes(tmp_path)
    )


def test_cuda_calls_and_what_cannot_be_read(tmp_path: Path) -> None:
    plant(tmp_path, {"a.py": "x.cuda()\ny.to('cuda:1')\nz(device='cuda')\nw.cpu()\n", "old.py": "print 'Python 2'\n"})
    plant(tmp_path, {"venv/lib/b.py": "from knn_cuda import KNN\n", ".git/c.py": "from knn_cuda import KNN\n"})
    advice = advise(tmp_path)
    assert advice.cuda == {"a.py": [1, 2, 3]}
    assert advice.findings == []
    assert len(advice.unread) == 1 and advice.unread[0].startswith("old.py:1: not Python 3:")


def test_prints_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(plant(tmp_path, TREES["PVD"][0]))])
    out = capsys.readouterr().out
    assert "modules/pvconv.py:2: import modules.functional as F\n    write: import " in out
    assert f"modules/functional/__init__.py: or, for all of PVCNN's, only this one line" in out  # noqa: F541
    assert "metrics/evaluation_metrics.py:4: keeps the project from a CPU" in out
    assert out.splitlines()[-1] == "4 lines to change, 0 names without a replacement, 1 lines that ask for CUDA"


def test_diff_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "# \u00e9\r\nif True:\r\n    import torch, chamfer3D.dist_chamfer_3D  # here\r\n\r\n" + (
        "    s = '\u00e9', chamfer3D.dist_chamfer_3D.chamfer_3DDist(), 1; from knn_cuda import KNN; t = 1\r\n"
    )
    plant(tmp_path, {"b.py": "x = 1\n"})
    (tmp_path / "a.py").write_bytes(text.encode())
    git(tmp_path, "init", "-q")
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path), "--write"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --write: expected a clean git tree, got 2 changes, of a.py the first\n"
    assert (tmp_path / "a.py").read_bytes() == text.encode()

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    expected = text.replace("import torch, chamfer3D.dist_chamfer_3D", f"import torch\n    import {COMPAT}.chamfer3d")
    expected = expected.replace("chamfer3D.dist_chamfer_3D", f"{COMPAT}.chamfer3d")
    expected = expected.replace("from knn_cuda", f"from {COMPAT}.knn_cuda")
    command.main([str(tmp_path), "--diff"])
    diff = capsys.readouterr().out
    assert (tmp_path / "a.py").read_bytes() == text.encode()
    command.main([str(tmp_path), "--write"])
    assert (tmp_path / "a.py").read_bytes().decode() == expected
    git(tmp_path, "checkout", "a.py")
    subprocess.run(["git", "-C", str(tmp_path), "apply", "-"], input=diff.encode(), check=True)
    assert (tmp_path / "a.py").read_bytes().decode() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "PROJECT: expected a folder, got missing"),
        ([".", "--write"], "--write: expected a git tree, got ."),
        ([".", "--write", "--diff"], "argument --diff: not allowed with argument --write"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_runs_as_a_module(tmp_path: Path) -> None:
    plant(tmp_path, {"a.py": "from knn_cuda import KNN\n"})
    run = fresh.python("-m", COMPAT, str(tmp_path))
    assert run.stdout.startswith(f"a.py:1: from knn_cuda import KNN\n    write: from {COMPAT}.knn_cuda import KNN\n")
