"""How fast batches come out of files: of one .npy, of ten parts, and out of memory.

    python tests/benchmarks/bench_streaming.py --scenes 1000000 --folder /some/disk

Images a second, drawn as training draws them, when the system still has the files in memory and
after it was told to forget them (Linux). Indices, reading and copies are in it, but no step.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air.data.shards import Shards
from air.data.streaming import StreamedImages

PARTS = 10


def forget(folder: Path) -> None:
    """Lets the system drop the files from its memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(images: Any, batch_size: int, batches: int) -> float:  # noqa: ANN401
    """Images a second."""
    streamed = StreamedImages(images, torch.device("cpu"))
    begin = time.perf_counter()
    for _ in range(batches):
        streamed.draw(batch_size)
    return batches * batch_size / (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=int, default=1_000_000, help="of 50 x 50 bytes")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--folder", help="on the disk to measure (default: of temporary files)")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        folder = Path(made)
        part = np.random.default_rng(0).integers(0, 256, (given.scenes // PARTS, 50, 50), np.uint8)
        with (folder / "whole.npy").open("wb") as file:
            head = {"descr": "|u1", "fortran_order": False}
            shape = {"shape": (len(part) * PARTS, 50, 50)}
            np.lib.format.write_array_header_1_0(file, {**head, **shape})
            for k in range(PARTS):
                file.write(part.tobytes())
                np.save(folder / f"part-{k}.npy", part)
        places = {"one file": ["whole"], "ten files": [f"part-{k}" for k in range(PARTS)]}
        print("| batch | images in | images/s, forgotten | images/s, warm |")
        print("|---|---|---|---|")
        for batch_size in given.batch_sizes:
            for place, names in places.items():
                mapped = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
                images = Shards(mapped)
                forget(folder)
                cold = rate(images, batch_size, given.batches)
                np.asarray(images)
                warm = rate(images, batch_size, given.batches)
                print(f"| {batch_size} | {place} | {cold:,.0f} | {warm:,.0f} |", flush=True)
            print(f"| {batch_size} | memory | — | {rate(part, batch_size, given.batches):,.0f} |")


if __name__ == "__main__":
    main()
