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
from functools import cache
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
    return zipped({f"{name}.npy": npy(np.asarray(array)) for name, array in arrays.items()})


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
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # of no particular day
    return buffer.getvalue()


CLOUDS = np.random.default_rng(0).normal(size=(5, 16, 3)).astype(np.float32)
ROWS = "".join(f"{x:.4f} {y:.4f} {z:.4f}\n" for x, y, z in CLOUDS[0])
CATALOGUE = b"id#1=a\nname#1=A\ncategory#1=Lamp\nmodel#1=/a.obj\nwidth#1=10\ndepth#1=20\nheight#1=30\n"
PCD = "FIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 16\nHEIGHT 1\nPOINTS 16\nDATA {}\n"


@cache
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


Batch = tuple[str, range]  # a format, and the numbers of its files


def _child(pipe: Connection, batches: list[Batch]) -> None:
    """Prepare the files of each batch, and send what became of them."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    for batch in batches:
        pipe.send(_batch(*batch))


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


def tried(batches: list[Batch]) -> Iterator[tuple[Batch, Counter[str]]]:
    """What became of each batch; one that does not end is a hang or a crash, and the rest go on in a new child."""
    context, done = multiprocessing.get_context("spawn"), 0
    while done < len(batches):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, batches[done:]), daemon=True)
        child.start()
        theirs.close()
        wait, ended = 60, False  # for Python and its modules to start
        while done < len(batches) and not ended:
            try:
                answer = ours.recv() if ours.poll(wait) else Counter(hang=1)
            except EOFError:
                answer = Counter(crash=1)
            ended = bool(answer["hang"] or answer["crash"])
            yield batches[done], answer
            done, wait = done + 1, SECONDS
        if ended:
            child.kill()
        child.join()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="files of each format")
    parser.add_argument("--formats", nargs="+", default=list(good_files()), help="suffixes without the dot")
    args = parser.parse_args(arguments)
    head = ("format", "tried", "read", "refused", *FAILURES)
    print("".join(f"{name:>12}" for name in head))
    starts = range(0, args.count, BATCH)
    batches = [(suffix, range(i, min(i + BATCH, args.count))) for suffix in args.formats for i in starts]
    counts = {suffix: Counter[str]() for suffix in args.formats}
    for (suffix, numbers), answer in tqdm(tried(batches), "files", len(batches), unit="batch", disable=None):
        counts[suffix] += answer
        if any(answer[failure] for failure in FAILURES):
            print(f"{suffix}: files {numbers.start} to {numbers.stop - 1}: {dict(answer)}", file=sys.stderr)
        if numbers.stop == args.count:
            columns = (args.count, *(counts[suffix][name] for name in head[2:]))
            print(f"{suffix:>12}" + "".join(f"{column:12}" for column in columns), flush=True)
    return int(any(count[failure] for count in counts.values() for failure in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
