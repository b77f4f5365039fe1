"""Damaged files of every format: each is read or refused, within bounds of time and memory, and nothing else happens.

    python -m tests.soak.hostile_files --count 1000

prints, for each format, how many were read and refused, and how often each kind of failure occurred; it ends with exit
code 1 if any did. The files are good ones with parts cut off, repeated or exchanged, bits flipped and numbers replaced,
determined by format and number. `prepare` reads them, in a child process that the parent ends when it takes too long.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from lion_triton.prepare import PrepareConfig, prepare
from tests.data_sets import samples

BATCH = 10  # files at once: few enough that `prepare` starts no workers
SECONDS, BYTES = 10, 2**30
FAILURES = ("crash", "traceback", "hang", "memory", "stray write", "lost")


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def hdf5(**options: object) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("data", data=CLOUDS, **options)
        file.create_dataset("label", data=np.arange(len(CLOUDS), dtype=np.uint8)[:, None])
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


CLOUDS = np.random.default_rng(0).normal(size=(5, 16, 3)).astype(np.float32)
ROWS = "".join(f"{x:.4f} {y:.4f} {z:.4f}\n" for x, y, z in CLOUDS[0])
CATALOGUE = b"id#1=a\nname#1=A\ncategory#1=Lamp\nmodel#1=/a.obj\nwidth#1=10\ndepth#1=20\nheight#1=30\n"
PCD = "FIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 16\nHEIGHT 1\nPOINTS 16\nDATA {}\n"


def good_files() -> dict[str, list[bytes]]:
    """Good files by suffix."""
    rgb = np.zeros((16, 1), dtype=np.float32)
    return {
        "obj": [samples.obj(), samples.obj().decode().encode("utf-16")],
        "off": [samples.off(), samples.off(b"COFF")],
        "ply": [samples.ply(form) for form in ("ascii", "binary_little_endian", "binary_big_endian")]
        + [samples.ply_strips()],
        "stl": [samples.stl_text(), samples.stl_binary()],
        "gltf": [samples.gltf()],
        "glb": [samples.glb()],
        "xyz": [ROWS.encode(), b"16\n" + ROWS.encode()],
        "txt": [b"//X Y Z\n" + ROWS.encode(), ROWS.encode("utf-16")],
        "csv": [b'"x","y","z"\n' + ROWS.replace(" ", ",").encode()],
        "pts": [b"16\n" + ROWS.replace("\n", " 1 2 3 4\n").encode()],
        "pcd": [
            (PCD.format("ascii") + ROWS.replace("\n", " 7\n")).encode(),
            PCD.format("binary").encode() + np.hstack([CLOUDS[0], rgb]).tobytes(),
        ],
        "npy": [npy(CLOUDS), npy(CLOUDS[0])],
        "npz": [npz(points=CLOUDS[0], normals=CLOUDS[1]), npz(pc=CLOUDS)],
        "h5": [hdf5(), hdf5(compression="gzip", shuffle=True, chunks=(2, 8, 3))],
        "zip": [
            zipped(
                {
                    "chair/a.obj": samples.obj(),
                    "chair/b.ply": samples.ply("ascii"),
                    "c.zip": zipped({"d.xyz": ROWS.encode()}),
                }
            )
        ],
        "sh3f": [zipped({"PluginFurnitureCatalog.properties": CATALOGUE, "a.obj": samples.obj()})],
    }


def damaged(suffix: str, number: int) -> bytes:
    """The file `number` of a format; the first ones of each are the good ones, undamaged."""
    good = good_files()[suffix]
    if number < len(good):
        return good[number]
    rng = np.random.default_rng([int.from_bytes(hashlib.sha256(suffix.encode()).digest()[:4], "big"), number])
    data = bytearray(good[number % len(good)])
    for _ in range(rng.integers(1, 4)):
        if data:
            DAMAGES[rng.integers(len(DAMAGES))](data, rng)
    return bytes(data)


def _span(data: bytearray, rng: np.random.Generator) -> slice:
    start = int(rng.integers(len(data)))
    return slice(start, start + int(rng.integers(1, 1 + min(300, len(data) - start))))


def cut(data: bytearray, rng: np.random.Generator) -> None:
    span = _span(data, rng)
    del data[span.start : None if rng.random() < 0.5 else span.stop]


def flip_bits(data: bytearray, rng: np.random.Generator) -> None:
    for at in rng.integers(len(data), size=rng.integers(1, 20)):
        data[at] ^= 1 << rng.integers(8)


def repeat(data: bytearray, rng: np.random.Generator) -> None:
    span, at = _span(data, rng), int(rng.integers(len(data)))
    data[at:at] = data[span] * int(rng.integers(1, 50))


def exchange(data: bytearray, rng: np.random.Generator) -> None:
    one, other = sorted((_span(data, rng), _span(data, rng)), key=lambda span: span.start)
    if one.stop <= other.start:
        data[:] = data[: one.start] + data[other] + data[one.stop : other.start] + data[one] + data[other.stop :]


def replace_number(data: bytearray, rng: np.random.Generator) -> None:
    """A number that text or bytes may hold becomes one that no file can keep its word on."""
    at = int(rng.integers(len(data)))
    words = [b"2147483648", b"-1", b"1e999", b"nan", b"99999999999999999999", b"0", b"\0\0\0\x80", b"\xff\xff\xff\xff"]
    word = words[rng.integers(len(words))]
    digits = [i for i in range(at, min(at + 200, len(data))) if chr(data[i]).isdigit()]
    if digits:
        end = next((i for i in range(digits[0], len(data)) if not chr(data[i]).isdigit()), len(data))
        data[digits[0] : end] = word
    else:
        data[at : at + len(word)] = word


DAMAGES: list[Callable[[bytearray, np.random.Generator], None]] = [cut, flip_bits, repeat, exchange, replace_number]


def _child(pipe: Connection, suffix: str, numbers: range) -> None:
    """Prepare the files in batches; after each, send what became of them."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    for start in numbers[::BATCH]:
        pipe.send(_batch(suffix, range(start, min(start + BATCH, numbers.stop))))


def _batch(suffix: str, numbers: range) -> Counter[str]:
    counts: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        folder = Path(name)
        (folder / "in").mkdir()
        (folder / "in" / "good.xyz").write_text(ROWS)
        files = {f"{number}.{suffix}": damaged(suffix, number) for number in numbers}
        for file, data in files.items():
            (folder / "in" / file).write_bytes(data)
        before = set(folder.rglob("*"))
        try:
            prepare(PrepareConfig(folder / "in", folder / "out", points=8))
        except Exception:
            return Counter({"traceback": 1})
        index = json.loads((folder / "out" / "index.json").read_text())
        read = [row["path"] for row in index["objects"]]
        refused = {row["path"]: row["reason"] for row in index["failures"]}
        for file, data in files.items():
            own = [path for path in (*read, *refused) if path == file or path.startswith((f"{file}/", f"{file}["))]
            counts["read" if set(own) & set(read) else "refused"] += 1
            # A damaged archive may well be one that holds no shapes any more.
            counts["lost"] += not own and not _is_archive_without_shapes(data)
        counts["memory"] += sum(reason.startswith("MemoryError") for reason in refused.values())
        counts["traceback"] += sum("\n" in reason or len(reason) > 400 for reason in refused.values())
        made = {path for path in set(folder.rglob("*")) - before if path.is_file()}
        wanted = {folder / "out" / row["category"] / row["split"] / f"{row['id']}.npy" for row in index["objects"]}
        counts["stray write"] += len(made - wanted - {folder / "out" / "index.json"})
        counts["lost"] += len(wanted - made)
    return counts


def _is_archive_without_shapes(data: bytes) -> bool:
    try:
        return zipfile.ZipFile(io.BytesIO(data)) is not None
    except Exception:
        return False


def tried(suffix: str, count: int) -> Iterator[Counter[str]]:
    """What became of `count` files of a format, batch by batch; a batch that does not end is a hang or a crash."""
    context, start = multiprocessing.get_context("spawn"), 0
    while start < count:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, suffix, range(start, count)), daemon=True)
        child.start()
        theirs.close()
        wait = 60  # for Python and its modules to start
        while start < count:
            try:
                answer = ours.recv() if ours.poll(wait) else Counter(hang=1)
            except EOFError:
                answer = Counter(crash=1)
            start, wait = start + BATCH, SECONDS
            if answer["traceback"] or answer["hang"] or answer["crash"]:
                print(f"{suffix}: files {start - BATCH} to {start - 1}: {dict(answer)}", file=sys.stderr)
            yield answer
            if answer["hang"] or answer["crash"]:
                break
        child.kill()
        child.join()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="files of each format")
    parser.add_argument("--formats", nargs="+", default=list(good_files()), help="suffixes without the dot")
    args = parser.parse_args(arguments)
    head = ("format", "tried", "read", "refused", *FAILURES)
    print("".join(f"{name:>12}" for name in head))
    failures = 0
    for suffix in args.formats:
        counts: Counter[str] = Counter()
        bar = tqdm(total=args.count, desc=suffix, unit="file", leave=False, disable=None)
        for answer in tried(suffix, args.count):
            counts += answer
            bar.update(BATCH)
        bar.close()
        print(f"{suffix:>12}{args.count:12}" + "".join(f"{counts[name]:12}" for name in head[2:]), flush=True)
        failures += sum(counts[name] for name in FAILURES)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
