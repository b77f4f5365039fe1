"""The whole model, captured and not, compiled and not: ``python -m bench.models``

On a GPU at the published sizes in bf16, elsewhere at toy sizes, to see that it runs. A row has a number or a reason
why it has none, never both; every section is written before the next begins:

    {"what", "B", "way", "seconds", "clouds", "launches", "busy", "costs", "peak_bytes", "operations", "reason"}

``seconds``: median of rounds of calls back to back, host and all, as it runs in use. ``launches``, ``busy`` (seconds
that the GPU works) and ``costs`` ([kernel, seconds, launches] of the three largest) are of one profiled, uncaptured
call. ``operations``: of matrix products and convolutions, counted by PyTorch, whose least time is that of bf16 matrix
products as measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import clock, driver, guards, machine
from lion_triton import config as presets
from lion_triton.capture import WARM_UPS, Captured
from lion_triton.data.clouds import Normalization
from lion_triton.devices import autocast, resolve_precision
from lion_triton.models import LION, sampling
from lion_triton.models.lion import posterior
from lion_triton.models.plan import plan_points
from lion_triton.models.unet import UNet
from lion_triton.runs import Run
from lion_triton.training.compiling import compile_blocks
from lion_triton.training.context import Context
from lion_triton.training.objectives import PriorObjective, VAEObjective
from lion_triton.training.step import Average, Step

Row = dict[str, Any]
Call = Callable[[], Any]
Section = Callable[["Bench"], Iterator[tuple[str, int, str, Call]]]
ROUNDS, SECONDS = 3, 0.3  # per row: so many rounds of calls that take about so long


class Bench:
    """A LION with inputs for it on one device, and the rows measured so far."""

    def __init__(self, device: torch.device, save: Callable[[list[Row]], None] = lambda rows: None) -> None:
        self.device, self.save, self.gpu = device, save, device.type == "cuda"
        self.rows: list[Row] = []
        config = presets.lion() if self.gpu else presets.quickstart()
        self.config = config if self.gpu else replace(config, data=replace(config.data, num_points=64))
        self.points = self.config.data.num_points
        self.precision = resolve_precision("auto", device)
        self.batches = (1, 32, 128) if self.gpu else (1,)
        torch.manual_seed(0)
        self.lion = LION(self.config.model).to(device)

    def clouds(self, size: int) -> Tensor:
        """On an ellipsoid, as the neighbourhoods of a shape's surface are."""
        x = nn.functional.normalize(torch.randn(size, self.points, 3, device=self.device), dim=-1)
        return x * torch.tensor([1.0, 0.6, 0.8], device=self.device)

    def latents(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """h, t, z and labels of a batch."""
        vae = self.config.model.vae
        features = torch.randn(size, self.points, vae.feature_dim, device=self.device)
        t = torch.randint(1, 1001, (size,), device=self.device)
        z = torch.randn(size, vae.shape_dim, device=self.device)
        return torch.cat([self.clouds(size), features], -1), t, z, self.labels(size)

    def labels(self, size: int) -> Tensor | None:
        conditional = self.config.model.shape_prior.num_classes > 0
        return torch.zeros(size, dtype=torch.int64, device=self.device) if conditional else None

    def run(self, section: Section) -> None:
        """Measure a section's calls, in each way that it names."""
        try:
            for what, size, way, call in section(self):
                row = self.measure(what, size, way, call)
                self.rows.append(row)
                print(line(row), flush=True)
        except Exception as error:  # a section that fails does not stop the next
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            self.rows.append({"what": section.__name__, "B": 0, "way": "", "reason": reason})
            print(line(self.rows[-1]), flush=True)
        self.save(self.rows)
        if self.gpu:
            torch.cuda.empty_cache()

    def measure(self, what: str, size: int, way: str, call: Call) -> Row:
        row: Row = {"what": what, "B": size, "way": way, "reason": ""}
        try:
            start = time.perf_counter()
            call()
            self.wait()
            row["first"] = time.perf_counter() - start  # compiles what is to be compiled
            for _ in range(WARM_UPS):
                call()
            once = self.seconds(call, 1)
            samples = [self.seconds(call, max(1, int(SECONDS / once))) for _ in range(ROUNDS)]
            row |= {"seconds": statistics.median(samples), "clouds": size / statistics.median(samples)}
            if self.gpu:
                row["peak_bytes"] = driver.peak_bytes(lambda: None, lambda _: call())
            if way == "launched" and "sampling" not in what:
                row |= profiled(call, self.gpu)
        except torch.OutOfMemoryError:
            row["reason"] = "out of memory"
        return row

    def seconds(self, call: Call, count: int) -> float:
        """Of each of so many calls back to back."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return (time.perf_counter() - start) / count

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


class Operations(TorchDispatchMode):
    """Counts those of matrix products and convolutions by PyTorch's own formulas. Its FlopCounterMode also follows
    modules, which fails where these run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def profiled(call: Call, gpu: bool) -> Row:
    """Launches, the GPU's time, its three largest costs, and operations of one call."""
    with Operations() as operations:
        call()
    row: Row = {"operations": operations.total}
    if not gpu:
        return row
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [(e.key, e.self_device_time_total / 1e6, e.count) for e in profiler.key_averages()]
    kernels = sorted((k for k in kernels if k[1] > 0), key=lambda kernel: -kernel[1])
    return row | {
        "launches": sum(count for *_, count in kernels),
        "busy": sum(seconds for _, seconds, _ in kernels),
        "costs": kernels[:3],
    }


def ways(bench: Bench, what: str, size: int, call: Call) -> Iterator[tuple[str, int, str, Call]]:
    """A call launched by the host, and on a GPU as a graph."""
    yield what, size, "launched", call
    if bench.gpu:
        captured = Captured(call, what, True)
        yield what, size, "captured", captured


def networks(bench: Bench) -> Iterator[tuple[str, int, str, Call]]:
    """Each network alone: forward without gradients, and forward with backward."""
    vae, point_prior = bench.lion.vae, bench.lion.point_prior
    bench.lion.eval()
    for size in bench.batches:
        h, t, z, labels = bench.latents(size)
        points = bench.clouds(size)

        def plan(h: Tensor = h) -> None:
            assert isinstance(point_prior.network, UNet)
            plan_points(h[..., :3], point_prior.network.config.geometry)

        yield from ways(bench, "plan of the point prior", size, plan)
        calls: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
            "point prior": (point_prior, lambda h=h, t=t, z=z, c=labels: point_prior(h, t, z, None, c)),
            "shape prior": (
                bench.lion.shape_prior,
                lambda t=t, z=z, c=labels: bench.lion.shape_prior(z, t, None, c),
            ),
            "shape encoder": (vae, lambda x=points: vae.encode_shape(x)[0]),
            "point encoder": (vae, lambda x=points, z=z: vae.encode_points(x, z)[0]),
            "decoder": (vae, lambda h=h, z=z: vae.decode(h, z)),
        }
        for name, (network, call) in calls.items():

            def forward(call: Call = call) -> Any:
                with torch.no_grad(), autocast(bench.precision, bench.device):
                    return call()

            def both(call: Call = call, network: nn.Module = network) -> None:
                network.zero_grad()
                with autocast(bench.precision, bench.device):
                    loss = call().square().mean()
                loss.backward()

            yield from ways(bench, f"{name}, forward", size, forward)
            if name == "point prior" or size == 32:
                yield from ways(bench, f"{name}, forward and backward", size, both)
            network.zero_grad()


def training(bench: Bench) -> Iterator[tuple[str, int, str, Call]]:
    """Both stages' steps, as ``lion_triton.train`` takes them."""
    size, lion, config = (32 if bench.gpu else 1), bench.lion, bench.config
    lion.train().vae.requires_grad_(True)
    accelerator = Accelerator(mixed_precision=bench.precision, cpu=not bench.gpu)
    run = Run(Path(), config, (), Normalization("box"))
    context = Context(run, None, accelerator, lion)  # type: ignore[arg-type]  # of data nothing is asked
    labels = bench.labels(size)

    def step(stage: Any) -> Step:
        if stage == "vae":
            made = Step(context, stage, VAEObjective(lion, config.vae), config.vae)
            made.load({"points": bench.clouds(size)})
            return made
        lion.vae.requires_grad_(False).eval()
        objective = PriorObjective(lion, config.priors)
        made = Step(context, stage, objective, config.priors, Average(objective, config.priors.ema_decay))
        batch = {"points": bench.clouds(size)}
        if stage == "priors" and config.priors.cached_draws:
            latents = posterior(lion.vae, batch["points"], context.key(stage, len(batch["points"])))
            batch = {"z": latents.z, "h_mu": latents.h_mu, "h_log_sigma": latents.h_log_sigma}
        made.load(batch | ({} if labels is None else {"labels": labels}))
        return made

    for stage, name in (("vae", "VAE"), ("priors", "priors")):
        yield from ways(bench, f"training step, {name}", size, step(stage))
        lion.zero_grad()


def sample(bench: Bench) -> Iterator[tuple[str, int, str, Call]]:
    """25 DDIM steps and, for 32 clouds, 1000 of DDPM."""
    bench.lion.eval()
    cases = (
        [("ddim", 25, 1), ("ddim", 25, 32), ("ddim", 25, 256), ("ddpm", 1000, 32)] if bench.gpu else [("ddim", 2, 1)]
    )
    for sampler, steps, size in cases:

        def call(sampler: Any = sampler, steps: int = steps, size: int = size) -> None:
            generator = torch.Generator().manual_seed(0)
            with autocast(bench.precision, bench.device):
                bench.lion.sample(
                    size,
                    sampler=sampler,
                    steps=steps,
                    num_points=bench.points,
                    labels=bench.labels(size),
                    generator=generator,
                )

        for way in ("captured", "launched") if bench.gpu else ("launched",):
            if steps == 1000 and way == "launched":
                continue  # forty times the row before
            with _uncaptured() if way == "launched" else nullcontext():
                yield f"sampling, {steps} {sampler} steps", size, way, call


@contextmanager
def _uncaptured() -> Iterator[None]:
    with patch.object(sampling, "why_uncaptured", lambda *_: "as the benchmark asks"):
        yield


def compiled(section: Section) -> Section:
    """The same with compiled blocks."""

    def rows(bench: Bench) -> Iterator[tuple[str, int, str, Call]]:
        compile_blocks(bench.lion)
        for what, size, way, call in section(bench):
            yield what, size, f"compiled, {way}", call

    rows.__name__ = f"{section.__name__}, compiled"
    return rows


SECTIONS: tuple[Section, ...] = (sample, training, networks)  # the most informative first
COMPILED: tuple[Section, ...] = (compiled(training), compiled(sample))


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a bf16 matrix product on a GPU, a float32 one elsewhere."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds = statistics.median(clock.repeat(lambda: None, lambda _: x @ x, 10))
    return 2 * n**3 / seconds


def line(row: Row) -> str:
    """One row in words."""
    start = f"{row['what']} | B={row['B']} | {row['way']}: "
    if row["reason"]:
        return start + row["reason"]
    return f"{start}{1e3 * row['seconds']:.2f} ms, {row['clouds']:.1f} clouds/s, first call {row['first']:.1f} s"


def bound(row: Row) -> str:
    """What holds a row up: the host where the GPU rests a fifth of the time, else its three largest kernels."""
    if "busy" not in row:
        return "-"
    if row["busy"] < 0.8 * row["seconds"]:
        return f"the host: the GPU works {row['busy'] / row['seconds']:.0%} of the time"
    matrix = ("gemm", "conv", "cutlass", "cudnn", "xmma", "wgrad", "dgrad", "implicit")
    return "; ".join(
        f"{name[:40]} {1e3 * seconds:.2f} ms in {count} "
        f"({'arithmetic' if any(word in name.lower() for word in matrix) else 'memory'})"
        for name, seconds, count in row["costs"]
    )


def markdown(document: dict[str, Any]) -> str:
    """Heading and table."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    rate = document["matrix_rate"]
    lines = [
        f"{document['device']}, commit {document['commit']}; {versions}. Matrix products: {rate / 1e12:.0f} TFLOP/s.",
        "",
        "| what | B | way | ms | clouds/s | first call, s | launches | GPU works, ms | least time of the arithmetic "
        "| peak memory, MB | what bounds it |",
        "| --- " * 11 + "|",
    ]
    for row in document["rows"]:
        head = [row["what"], row["B"] or "-", row["way"] or "-"]
        if row["reason"]:
            cells = [*head, f"none: {row['reason']}", *["-"] * 7]
        else:
            least = row.get("operations", 0) / rate
            cells = [
                *head,
                f"{1e3 * row['seconds']:.2f}",
                f"{row['clouds']:.1f}",
                f"{row['first']:.1f}",
                row.get("launches", "-"),
                f"{1e3 * row['busy']:.2f}" if "busy" in row else "-",
                f"{1e3 * least:.2f} ms ({least / row['seconds']:.0%})" if least else "-",
                f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "-",
                bound(row),
            ]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the whole model on this machine's GPU, or its CPU.")
    parser.add_argument("--out", type=Path, default=guards.ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no section after so long")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled rows")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    device = driver.device()
    about = machine.describe(device, args.commit) | {"matrix_rate": matrix_rate(device)}

    def save(rows: list[Row]) -> None:
        document = {**about, "rows": rows}
        args.out.mkdir(parents=True, exist_ok=True)
        driver.write_both(args.out / f"models-{driver.name(about)}", document, markdown(document))

    bench = Bench(device, save)
    for section in SECTIONS + (() if args.no_compile else COMPILED):
        if time.monotonic() > end:
            print(f"time was up before {section.__name__}")
            continue
        bench.run(section)
    print(markdown({**about, "rows": bench.rows}))
    failed = [row for row in bench.rows if row["reason"]]
    if failed:
        raise SystemExit(f"without a number: {', '.join(sorted({row['what'] for row in failed}))}")


if __name__ == "__main__":
    main()
