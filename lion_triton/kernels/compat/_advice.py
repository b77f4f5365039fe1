"""Which imports of a project a drop-in module replaces, read from its source text; nothing of it is run.

A module is known by the end of its dotted name (``metrics.PyTorchEMD.emd`` by ``emd``) and, where its file is in the
project, by what that defines. Where copies of one package differ, the file is asked: whether its
``earth_mover_distance`` divides by the number of points, and the default threshold of its ``fscore``.
"""

from __future__ import annotations

import ast
import io
import os
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path

COMPAT = "lion_triton.kernels.compat"
Progress = Callable[[list[Path]], Iterable[Path]]
_IGNORED = {"__pycache__", "build", "dist", "node_modules", "site-packages", "venv", "env"}
# Packages of which every import counts, with a replacement or without.
_PACKAGES = ("pointnet2_ops", "pytorch3d", "knn_cuda", "torch_cluster")


@dataclass(frozen=True)
class Rule:
    """A drop-in module, and what the modules that it replaces are called.

    paths: ends of dotted names. known_by: names of which a file of the project must define one. sure: whether the path
    alone says enough where the file is not in the project.
    """

    module: str
    paths: tuple[str, ...]
    known_by: frozenset[str] = frozenset()
    sure: bool = True

    @cached_property
    def offered(self) -> frozenset[str]:
        return frozenset(import_module(f"{COMPAT}.{self.module}").__all__)

    def matches(self, path: str) -> bool:
        return any(path == end or path.endswith(f".{end}") for end in self.paths)


_PVCNN_FILES = ("ball_query", "devoxelization", "grouping", "interpolatation", "loss", "sampling", "voxelization")
RULES = (
    Rule(
        "pvcnn",
        ("functional", *(f"functional.{name}" for name in _PVCNN_FILES)),
        frozenset({"avg_voxelize", "trilinear_devoxelize", "nearest_neighbor_interpolate", "grouping", "logits_mask"}),
        sure=False,
    ),
    Rule("chamfer3d", ("dist_chamfer_3D",), frozenset({"chamfer_3DDist", "chamfer_3DFunction"})),
    Rule("chamfer3d", ("fscore",), frozenset({"fscore"}), sure=False),
    Rule(
        "emd",
        ("emd", "emd_nograd", "PyTorchEMD"),
        frozenset({"earth_mover_distance", "earth_mover_distance_nograd"}),
        sure=False,
    ),
    Rule("emd_auction", ("emd_module", "emd"), frozenset({"emdModule", "emdFunction"}), sure=False),
    Rule("emd_auction", ("expansion_penalty_module",), frozenset({"expansionPenaltyModule"})),
    Rule("emd_auction", ("MDS_module",), frozenset({"minimum_density_sample"})),
    Rule("chamfer_dist", ("chamfer_dist",), frozenset({"ChamferFunction", "ChamferDistanceL1", "ChamferDistanceL2"})),
    Rule(
        "structural_losses",
        ("structural_losses", "StructuralLosses", "StructuralLosses.match_cost", "StructuralLosses.nn_distance"),
        frozenset({"match_cost", "nn_distance"}),
        sure=False,
    ),
    Rule("knn_cuda", ("knn_cuda",), frozenset({"KNN"})),
    Rule("pointops", ("pointops", "pointops.functions"), frozenset({"furthestsampling", "knnquery"}), sure=False),
    Rule("torch_cluster", ("torch_cluster",)),
    Rule(
        "pointnet2",
        ("pointnet2_utils", "pointnet2_ops"),
        frozenset({"gather_operation", "grouping_operation", "three_interpolate"}),
    ),
    Rule("pointnet2", ("pointnet2_modules",), frozenset({"PointnetSAModuleMSG", "PointnetSAModuleVotes"})),
    Rule("pointnet2", ("pointnet2_cuda",)),
    Rule(
        "pytorch3d",
        (
            *("pytorch3d.ops", "pytorch3d.ops.knn", "pytorch3d.ops.ball_query", "pytorch3d.ops.sample_farthest_points"),
            *("pytorch3d.ops.utils", "pytorch3d.ops.points_normals", "pytorch3d.ops.points_alignment"),
            *("pytorch3d.loss", "pytorch3d.loss.chamfer"),
        ),
    ),
)


@dataclass(frozen=True)
class Target:
    """What to write for a name: ``name`` of the drop-in ``module``."""

    module: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Edit:
    """Text to put in place of a piece of source: lines from 1, columns in bytes of UTF-8."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


@dataclass(frozen=True)
class Finding:
    """An import, or the use of a module by its dotted name: what stands there, what to write, and what to know."""

    file: str
    line: int
    old: str
    new: str | None
    notes: tuple[str, ...] = ()


@dataclass
class Advice:
    """All about a project.

    cuda: lines that ask for a GPU. functional: copies of PVCNN's package. texts: the changed files, as they are and as
    they would be.
    """

    findings: list[Finding] = field(default_factory=list)
    cuda: dict[str, list[int]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    functional: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    path: str  # within the project, with slashes
    text: str
    tree: ast.Module


class Project:
    """The Python files of a folder."""

    def __init__(self, root: Path, progress: Progress) -> None:
        self.sources: dict[str, Source] = {}
        self.unread: list[str] = []
        for path in progress(list(_python_files(root))):
            name = path.relative_to(root).as_posix()
            try:
                data = path.read_bytes()
                encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
                text = data.decode(encoding)
                self.sources[name] = Source(name, text, ast.parse(text))
            except (SyntaxError, UnicodeDecodeError, ValueError) as error:
                line = getattr(error, "lineno", None)
                self.unread.append(f"{name}{f':{line}' if line else ''}: not Python 3: {error.args[0]}")

    def find(self, path: str, importer: str, level: int = 0) -> str | None:
        """The file of a module, if it is here: beside the importer, at the top, or (``sys.path``) the nearest one."""
        tail = path.replace(".", "/")
        folder = importer.rpartition("/")[0]
        for _ in range(level - 1):
            folder = folder.rpartition("/")[0]
        folders = [folder] if level else [folder, ""]
        ends = [f"{tail}.py", f"{tail}/__init__.py"] if tail else ["__init__.py"]
        for candidate in (f"{place}/{end}".lstrip("/") for place in folders for end in ends):
            if candidate in self.sources:
                return candidate
        if level:
            return None
        anywhere = [name for name in self.sources if any(f"/{name}".endswith(f"/{end}") for end in ends)]
        return max(anywhere, key=lambda name: len(os.path.commonpath([name, importer])), default=None)

    def defined(self, file: str, imports: bool = True) -> set[str]:
        """Names that a file defines, and those it imports; of a package, of its files too."""
        folder = file.removesuffix("__init__.py")
        package = [name for name in self.sources if name.startswith(folder) and "/" not in name[len(folder) :]]
        names: set[str] = set()
        for name in package if file.endswith("__init__.py") else [file]:
            for node in self.sources[name].tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    names.add(node.name)
                elif isinstance(node, ast.Assign):
                    names.update(target.id for target in node.targets if isinstance(target, ast.Name))
                elif isinstance(node, ast.ImportFrom) and imports:
                    names.update(alias.asname or alias.name for alias in node.names)
        return names

    def copies(self) -> set[str]:
        """Files that are a package's own copy: nothing there needs changing, as nobody imports it any more."""
        found = set()
        for name in self.sources:
            path = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            rules = [rule for rule in RULES if rule.matches(path)]
            if any(rule.known_by & self.defined(name, imports=False) for rule in rules):
                found.add(name)
        folders = {name.removesuffix("__init__.py") for name in found if name.endswith("/__init__.py")}
        return found | {name for name in self.sources if any(name.startswith(folder) for folder in folders)}

    def definition(self, file: str, name: str) -> ast.FunctionDef | ast.ClassDef | None:
        """Of a function or class, in a file or what that imports it from."""
        for node in self.sources[file].tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return node
        for node in self.sources[file].tree.body:
            if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
                other = self.find(node.module or "", file, node.level)
                return self.definition(other, name) if other and other != file else None
        return None


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _IGNORED and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def advise(root: Path, progress: Progress = iter) -> Advice:
    """Read a project. progress: goes through the files, as ``tqdm`` does."""
    project = Project(root, progress)
    advice = Advice(unread=project.unread)
    copies = project.copies()
    advice.functional = sorted(name for name in copies if name.endswith("functional/__init__.py"))
    for path, source in project.sources.items():
        if path in copies or _builds_cuda(project, path):
            continue
        reader = _Reader(project, source)
        reader.read()
        advice.findings += sorted(reader.findings, key=lambda finding: finding.line)
        if lines := sorted(set(_cuda_lines(reader.source.tree))):
            advice.cuda[path] = lines
        if reader.edits:
            advice.texts[path] = reader.source.text, _edited(reader.source.text, reader.edits)
    return advice


def _builds_cuda(project: Project, path: str) -> bool:
    """Whether a file lies beside or below the ``setup.py`` of a CUDA extension, but not of the whole project."""
    folder = path
    while folder := folder.rpartition("/")[0]:
        setup = project.sources.get(f"{folder}/setup.py")
        if setup and "CUDAExtension" in setup.text:
            return True
    return False


def _cuda_lines(tree: ast.Module) -> Iterator[int]:
    """Of calls that ask for a GPU: ``x.cuda()``, and any with "cuda" or "cuda:0" as an argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            named = any(isinstance(v, ast.Constant) and str(v.value).split(":")[0] == "cuda" for v in values)
            if named or (isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"):
                yield node.lineno


class _Reader:
    """The findings of one file, and the edits that follow."""

    def __init__(self, project: Project, source: Source) -> None:
        self.project, self.source = project, source
        self.findings: list[Finding] = []
        self.edits: list[Edit] = []

    def read(self) -> None:
        for node in ast.walk(self.source.tree):
            if isinstance(node, ast.Import):
                self._import(node)
            elif isinstance(node, ast.ImportFrom):
                self._import_from(node)

    def _rules(self, path: str, level: int = 0) -> list[tuple[Rule, str | None]]:
        """The rules for a module, each with its file where that is in the project."""
        if level == 0 and path.startswith((COMPAT, "torch.", "torchvision.")):
            return []
        rules = [rule for rule in RULES if rule.matches(path)]
        file = self.project.find(path, self.source.path, level) if rules else None
        defined = self.project.defined(file) if file else set()
        return [(rule, file) for rule in rules if not file or not rule.known_by or rule.known_by & defined]

    def _target(self, rules: list[tuple[Rule, str | None]], path: str, name: str) -> Target | str | None:
        """What to write for a name; or why there is nothing; None if it is none of ours."""
        for rule, file in rules:
            if name in rule.offered or (rule.module == "emd" and "earth_mover" in name):
                return self._copy(rule, file, path, name)
        return "has no replacement" if any(rule.sure for rule, _ in rules) else None

    def _copy(self, rule: Rule, file: str | None, path: str, name: str) -> Target | str:
        """Where copies differ: what this one does."""
        if name in ("earth_mover_distance", "earth_mover_distance_nograd"):
            return _emd(self.project, file, path, name)
        if name == "fscore":
            return _fscore(self.project, file)
        note = ""
        if rule.module == "pointnet2" and name == "furthest_point_sample" and file:
            note = f"passes over points within 0.0316 of the origin, as pointnet2_ops does: does {file}?"
        return Target(rule.module, name, note)

    def _import_from(self, node: ast.ImportFrom) -> None:
        path = node.module or ""
        rules = self._rules(path, node.level)
        stay: list[str] = []
        new: dict[str, list[str]] = {}
        notes: list[str] = []
        for alias in node.names:
            bound = alias.asname or alias.name
            as_written = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            if alias.name == "*":
                if rules and all(rule.sure or file for rule, file in rules):
                    notes.append("* has no one line instead of it: name what is used")
                stay.append("*")
                continue
            target = self._target(rules, path, alias.name)
            if not isinstance(target, Target):
                module = self._module(f"{path}.{alias.name}".lstrip("."), node.level, bound)
                if module is not None:
                    lines, module_notes = module
                    new.setdefault("", []).extend(lines)
                    notes += module_notes
                    if not lines:
                        stay.append(as_written)
                    continue
                root = path.split(".")[0]
                if isinstance(target, str) or (node.level == 0 and root in _PACKAGES):
                    notes.append(f"{alias.name} {target or 'has no replacement'}")
                stay.append(as_written)
                continue
            if target.note:
                notes.append(target.note)
            new.setdefault(target.module, []).append(
                target.name if target.name == bound else f"{target.name} as {bound}"
            )
        lines = [
            line
            for module, names in new.items()
            for line in (names if not module else [f"from {COMPAT}.{module} import {', '.join(names)}"])
        ]
        if not lines and not notes:
            return
        if stay and lines:
            lines.insert(0, f"from {'.' * node.level}{path} import {', '.join(stay)}")
        self._report(node, lines, notes)

    def _import(self, node: ast.Import) -> None:
        stay: list[str] = []
        lines: list[str] = []
        notes: list[str] = []
        for alias in node.names:
            as_written = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            module = self._module(alias.name, 0, alias.asname or alias.name, plain=True)
            if module is not None:
                lines += module[0]
                notes += module[1]
            elif alias.name.split(".")[0] in _PACKAGES and alias.name not in _PACKAGES:
                notes.append(f"{alias.name} has no replacement")
            if module is None or not module[0]:
                stay.append(as_written)
        if not lines and not notes:
            return
        if stay and lines:
            lines.insert(0, f"import {', '.join(stay)}")
        self._report(node, lines, notes)

    def _module(self, path: str, level: int, bound: str, plain: bool = False) -> tuple[list[str], list[str]] | None:
        """The lines for a module that is bound to a name, and notes; None if it is none of ours."""
        rules = self._rules(path, level)
        if not rules:
            return None
        uses = list(self._uses(bound))
        targets = {name: self._target(rules, path, name) for _, name in uses}
        ours = {name: target for name, target in targets.items() if isinstance(target, Target)}
        others = sorted(name for name in targets if name not in ours and name != path.rpartition(".")[2])
        sure = any(rule.sure or file for rule, file in rules)
        if not ours and (uses or not sure):
            return ([], [f"{bound}.{name} has no replacement" for name in others]) if sure and others else None
        notes = [f"{bound}.{name} has no replacement" for name in others]
        notes += sorted({target.note for target in ours.values() if target.note})
        modules = {target.module for target in ours.values()} or {rules[0][0].module}
        same = all(name == target.name for name, target in ours.items())
        if not others and len(modules) == 1 and same and "." not in bound:
            (module,) = modules
            if plain:
                return [f"import {COMPAT}.{module} as {bound}"], notes
            tail = module if module == bound else f"{module} as {bound}"
            return [f"from {COMPAT} import {tail}"], notes
        for node, name in uses:
            if name in ours:
                self._use(node, f"{COMPAT}.{ours[name].module}.{ours[name].name}")
        lines = [f"import {COMPAT}.{module}" for module in sorted(modules)]
        if others or ("." in bound and self._other_uses(bound)):  # the import itself is still needed
            lines.insert(0, self._as_it_was(path, level, bound, plain))
        return lines, notes

    def _as_it_was(self, path: str, level: int, bound: str, plain: bool) -> str:
        package, _, name = path.rpartition(".")
        alias = f"{name} as {bound}" if name != bound else name
        if plain:
            return f"import {path} as {bound}" if path != bound else f"import {path}"
        return f"from {'.' * level}{package} import {alias}"

    def _uses(self, bound: str) -> Iterator[tuple[ast.Attribute, str]]:
        """Every ``bound.name``."""
        for node in ast.walk(self.source.tree):
            if isinstance(node, ast.Attribute) and _dotted(node.value) == bound:
                yield node, node.attr

    def _other_uses(self, bound: str) -> bool:
        """Whether what ``import a.b`` binds, a, is used for anything but a.b."""
        root = bound.split(".")[0]
        return any(
            isinstance(node, ast.Attribute)
            and (name := _dotted(node)) is not None
            and name.split(".")[0] == root
            and not f"{name}.".startswith(f"{bound}.")
            and not f"{bound}.".startswith(f"{name}.")
            for node in ast.walk(self.source.tree)
        )

    def _use(self, node: ast.Attribute, text: str) -> None:
        old = ast.get_source_segment(self.source.text, node) or ""
        self.findings.append(Finding(self.source.path, node.lineno, old, text))
        self.edits.append(_edit(node, text))

    def _report(self, node: ast.Import | ast.ImportFrom, lines: list[str], notes: list[str]) -> None:
        old = " ".join((ast.get_source_segment(self.source.text, node) or "").split())
        new = "; ".join(lines) if lines else None
        self.findings.append(Finding(self.source.path, node.lineno, old, new, tuple(dict.fromkeys(notes))))
        if lines:
            line = self.source.text.split("\n")[node.lineno - 1]
            alone = not line[: node.col_offset].strip() and ";" not in line
            between = "\n" + line[: node.col_offset] if alone else "; "
            self.edits.append(_edit(node, between.join(lines)))


def _dotted(node: ast.AST) -> str | None:
    """``a.b.c`` of a name or of attributes of one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = _dotted(node.value)
        return None if value is None else f"{value}.{node.attr}"
    return None


def _emd(project: Project, file: str | None, path: str, name: str) -> Target | str:
    if name == "earth_mover_distance_nograd":
        return Target("emd_mean", name)
    if file is None:
        if path == "emd":
            return Target("emd", name, "taken for PyTorchEMD itself, which sums over the points")
        return f"may sum or divide by the number of points: its file is not here. {COMPAT}.emd sums, .emd_mean divides"
    definition = project.definition(file, name)
    if definition is None:
        return f"may sum or divide by the number of points: {file} does not tell. {COMPAT}.emd sums, .emd_mean divides"
    operators = [node.op for node in ast.walk(definition) if isinstance(node, (ast.BinOp, ast.AugAssign))]
    divides = any(isinstance(operator, ast.Div) for operator in operators)
    if isinstance(definition, ast.FunctionDef):
        if divides:
            return Target("emd_mean", name, f"{file} divides by the number of points")
        return Target("emd", name, f"{file} sums over the points")
    means = any(isinstance(node, ast.Attribute) and node.attr == "mean" for node in ast.walk(definition))
    if divides and means:
        return Target("emd_mean", "EarthMoverDistance", f"{file} is a module: the mean over points and clouds")
    what = "divides by the number of points" if divides else "sums over the points"
    module = "emd_mean" if divides else "emd"
    return f"is a module that {what}, of each cloud: call {COMPAT}.{module}.earth_mover_distance(..., transpose=False)"


def _fscore(project: Project, file: str | None) -> Target | str:
    definition = project.definition(file, "fscore") if file else None
    if not isinstance(definition, ast.FunctionDef) or not definition.args.defaults:
        return Target("chamfer3d", "fscore", "the default threshold is 0.001 here: compare yours")
    default = definition.args.defaults[-1]
    value = default.value if isinstance(default, ast.Constant) else None
    note = f"the default threshold of {file} is {ast.unparse(default)}"
    if value == 0.001:
        return Target("chamfer3d", "fscore", note)
    if value == 0.0001:
        return Target("chamfer3d", "fscore_1e4", note)
    return f"has no replacement: {note}; {COMPAT}.chamfer3d.fscore takes a threshold"


def _edit(node: ast.stmt | ast.expr, text: str) -> Edit:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return Edit((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset), text)


def _edited(text: str, edits: list[Edit]) -> str:
    lines = [line.encode() for line in text.split("\n")]
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        (first, column), (last, end) = edit.start, edit.end
        changed = lines[first - 1][:column] + edit.text.encode() + lines[last - 1][end:]
        lines[first - 1 : last] = changed.split(b"\n")
    return b"\n".join(lines).decode()
