"""The model card of a LION: what its run's records say, in words and tables, with how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

NAMES = {
    "reconstruction_chamfer": "reconstruction, Chamfer distance",
    "reconstruction_cd": "reconstruction, Chamfer distance",
    "kl_z_nats": "KL of the shape latent z0, nats",
    "1nna_cd_generated": "1-NNA of generated shapes, Chamfer distance",
    "1nna_cd_fresh": "1-NNA of fresh shapes of the data's own generator",
    "1nna_cd_gaussian": "1-NNA of Gaussian clouds",
    "1nna_cd": "1-NNA, Chamfer distance",
    "1nna_emd": "1-NNA, EMD",
    "mmd_cd": "MMD, Chamfer distance",
    "mmd_emd": "MMD, EMD",
    "cov_cd": "COV, Chamfer distance",
    "cov_emd": "COV, EMD",
    "jsd": "JSD",
    "thickness": "thickness of surfaces, of samples over references",
    "thickness_generated": "thickness of surfaces, of generated over held-out shapes",
    "thickness_fresh": "thickness of surfaces, of fresh shapes over held-out ones",
    "unevenness": "unevenness of points, of samples over references",
    "unevenness_generated": "unevenness of points, of generated over held-out shapes",
    "unevenness_fresh": "unevenness of points, of fresh shapes over held-out ones",
}

MESH_NAMES = ("watertight", "chamfer", "normal_consistency")
ENCODER_INPUTS = {"voxels": "coarse voxels", "noisy": "noisy clouds", "partial": "parts of shapes"}


def model_card(about: dict[str, Any], picture: bool, data_licence: str | None) -> ModelCard:
    """The card of the model of which ``config.json`` says ``about``; a section for everything that it does say."""
    config = about["config"]
    tags = ["3d", "diffusion", "point-cloud", "shape-generation", *(["text-to-3d"] if _clip(config) else [])]
    header = ModelCardData(library_name="lion-triton", tags=tags)
    name = f"LION, {config['preset']}" if config["preset"] else "LION"
    sections = [
        f"# {name}",
        "A hierarchical latent point diffusion model of 3D shapes "
        "([Zeng et al. 2022](https://arxiv.org/abs/2210.06978)), made with lion-triton."
        + (f" {_conditioned(about)}" if _clip(config) else ""),
        *(["![Held-out shapes, reconstructions and generated shapes](picture.png)"] if picture else []),
        f"## How to use it\n\n{_use(about)}",
        f"## Data\n\n{_data(about, data_licence)}",
        *([f"## Recipe\n\n{_recipe(config)}"] if config["vae"] else []),
        *([f"## Figures\n\n{_figures(about)}"] if "figures" in about or "evaluation" in about else []),
        *([f"## Further networks\n\n{_parts(about['parts'])}"] if "parts" in about else []),
    ]
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _clip(config: dict[str, Any]) -> bool:
    """Whether it is conditioned on CLIP."""
    return bool(config["model"]["shape_prior"].get("clip"))


def _conditioned(about: dict[str, Any]) -> str:
    clip = about.get("clip")
    name = f"`{clip}`" if clip else "a CLIP ViT-B/32 that is not recorded"
    return f"It is conditioned on CLIP embeddings, of texts or pictures, by {name}."


def _use(about: dict[str, Any]) -> str:
    config = about["config"]
    sampling = config.get("sampling") or {}
    options = {"sampler": sampling.get("sampler"), "steps": sampling.get("steps"), "clip_x0": sampling.get("clip_x0")}
    given = {k: v for k, v in options.items() if v is not None} | {"num_points": config["data"].get("num_points", 2048)}
    classes = config["model"]["shape_prior"]["num_classes"]
    words = [f"{k}={v!r}" for k, v in given.items()]
    words += [f"labels=torch.arange(4) % {classes}"] if classes else []
    text, named = _clip(config), about.get("clip") or "FOLDER_OR_ID_OF_CLIP"
    words += ["clip=clip.expand(4, -1)"] if text else []
    code = [
        *(["import torch"] if classes else []),
        *(["from lion_triton.clip import CLIP"] if text else []),
        "from lion_triton.models import LION",
        'lion = LION.from_pretrained("FOLDER_OR_ID")',
        *([f'clip = CLIP("{named}").texts(["a chair"])'] if text else []),
        f"clouds = lion.sample(4, {', '.join(words)})",
    ]
    norm = about["normalization"]
    if norm["kind"] == "global":
        mean = ", ".join(f"{x:.4g}" for x in norm["mean"])
        units = f"data units are clouds * {norm['scale']:.4g} + ({mean})"
    else:
        units = f"clouds are in units of each shape's {norm['kind']}"
    command = "python -m lion_triton.sample FOLDER --num-samples 16" + (' --text "a chair"' if text else "")
    few = ""
    if "distilled" in about:
        counts = ", ".join(map(str, about["distilled"]["steps"]))
        few = f"\n\nDistilled priors sample in few steps: `sampler='ddim'` with `steps` {counts}, or `--steps`."
    return f"```python\n{chr(10).join(code)}\n```\n\nThere {units}. The same from a command line: `{command}`.{few}"


def _data(about: dict[str, Any], licence: str | None) -> str:
    data, classes = about["config"]["data"], [name for name in about["classes"] if name]
    known = {"procedural": "procedural furniture embedded in lion-triton", "unknown": "not recorded"}
    rows = [("source", known.get(data["source"], data["source"]))]
    rows += [("categories", ", ".join(data["categories"]))] if data.get("categories") else []
    rows += [("classes", ", ".join(classes))] if classes else []
    rows += [("training shapes", data["num_shapes"])] if data["source"] == "procedural" else []
    rows += [("points per cloud", data["num_points"])] if "num_points" in data else []
    rows += [("normalisation", about["normalization"]["kind"])]
    found = licence or ", ".join(about.get("data_licences", ()))
    own = "Apache-2.0, as lion-triton" if data["source"] == "procedural" else "not recorded"
    return _table(("", ""), [*rows, ("licence of the data", found or own)])


def _recipe(config: dict[str, Any]) -> str:
    keys = ("steps", "batch_size", "learning_rate", "learning_rate_decay")
    rows = [(key.replace("_", " "), config["vae"][key], config["priors"][key]) for key in keys]
    diffusion = config["model"]["diffusion"]
    sentences = [
        f"Diffusion: {diffusion['schedule']} schedule of {diffusion['num_train_timesteps']} steps",
        f"prediction of {diffusion['prediction']}, EMA {config['priors']['ema_decay']:g} of the priors' weights",
        f"seed {config['seed']}. The whole configuration is in `config.json`.",
    ]
    start = config.get("init_from")
    before = "" if start is None else f"Started from the weights of `{Path(start).name}`. "
    return f"{_table(('', 'VAE', 'priors'), rows)}\n\n{before}{', '.join(sentences)}"


def _figures(about: dict[str, Any]) -> str:
    parts = []
    if "figures" in about:
        found = about["figures"]
        protocol = f"On {found['held_out_shapes']} held-out shapes of {found['points']} points, as training ended"
        parts.append(f"{protocol}:\n\n{_named(found)}")
    if "evaluation" in about:
        found = about["evaluation"]
        ours, theirs = found["samples"], found["references"]
        sizes = f"{ours['clouds']} samples of {ours['points']} points against {theirs['clouds']} of {theirs['points']}"
        protocol = f"{sizes} ({theirs['source']}), {found['normalization']}, {found['split']}, EMD {found['emd']}"
        parts.append(f"`{found['command']}`, {protocol}:\n\n{_named(found['figures'])}")
    parts.append("Chamfer distances are of squared distances. 1-NNA: 0.5 is best, 1 is worst.")
    return "\n\n".join(parts)


def _parts(parts: dict[str, Any]) -> str:
    """Networks beside the model: what each is for, and how well it does."""
    rows: list[Sequence[object]] = []
    for name, part in parts.items():
        figures = part["figures"]
        if name == "surface":
            used = "`python -m lion_triton.mesh FOLDER`: meshes"
            words = [f"{key.replace('_', ' ')} {figures[key]:.4g}" for key in MESH_NAMES if key in figures]
        else:
            kind = part["training"]["input"]
            used = f"`python -m lion_triton.vary FOLDER FILE --input {kind}`: shapes of {ENCODER_INPUTS[kind]}"
            tuned, untuned = (figures.get(f"{which}_rebuilt", {}).get("chamfer") for which in ("tuned", "untuned"))
            words = [] if tuned is None else [f"Chamfer distance {tuned:.4g} rebuilt, {untuned:.4g} without it"]
        rows.append((f"`{name}/`", used, ", ".join(words)))
    return _table(("", "for", "on held-out shapes"), rows)


def _named(figures: dict[str, Any]) -> str:
    return _table(("", ""), [(NAMES[k], f"{v:.4g}") for k, v in figures.items() if k in NAMES and v is not None])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
