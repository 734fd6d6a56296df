"""Make the data files of the built-in recipes from three Debian packages.

    apt-get download dataset-fashion-mnist r-cran-janeaustenr r-cran-ggplot2
    python scripts/make_data.py --packages . --output src/narrowcast/recipes/data

Nothing is installed; the packages are only unpacked (``dpkg-deb``). The digests that it prints are
those in SOURCES.md beside the files, where licences and sources are noted too.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import lzma
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from read_rdata import read_rdata

Arrays = dict[str, NDArray[Any]]

TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 300
# In the order of publication; the last one is what the recipe holds out.
NOVELS = (
    "sensesensibility",
    "prideprejudice",
    "mansfieldpark",
    "emma",
    "northangerabbey",
    "persuasion",
)
NOVEL_END = "\f"
GRADES = ("cut", "color", "clarity")
MEASURES = ("carat", "depth", "table", "x", "y", "z")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="where the .deb files are")
    parser.add_argument("--output", type=Path, required=True, help="where the data files go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for package in ("dataset-fashion-mnist", "r-cran-janeaustenr", "r-cran-ggplot2"):
            (archive,) = arguments.packages.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
        r_library = root / "usr/lib/R/site-library"
        files = {
            "fashion.npz": npz(fashion(root / "usr/share/datasets/fashion-mnist")),
            "austen.txt.xz": lzma.compress(austen(r_library / "janeaustenr/data"), preset=9),
            "diamonds.npz": npz(diamonds(r_library / "ggplot2/data")),
        }
    for name, content in files.items():
        (arguments.output / name).write_bytes(content)
        print(f"{name}  {len(content):,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")


def fashion(directory: Path) -> Arrays:
    """The first images of each class, in the order of the original files.

    Images are uint8 of shape (N, 28, 28), labels uint8 of shape (N,).
    """
    parts = {"train": ("train", TRAIN_PER_CLASS), "test": ("t10k", TEST_PER_CLASS)}
    arrays: Arrays = {}
    for part, (prefix, per_class) in parts.items():
        # IDX format: a header of 16 bytes before images and of 8 bytes before labels.
        pixels = gzip.decompress((directory / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        classes = gzip.decompress((directory / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(classes, np.uint8, offset=8)
        chosen = np.sort(
            np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)])
        )
        arrays |= {f"{part}_images": images[chosen], f"{part}_labels": labels[chosen]}
    return arrays


def austen(directory: Path) -> bytes:
    """Six novels in UTF-8, one line of print a line, a form feed between two of them."""
    lines = read_rdata(directory)
    return NOVEL_END.join("\n".join(lines[name].value) + "\n" for name in NOVELS).encode()


def diamonds(directory: Path) -> Arrays:
    """All rows in the original order: prices in dollars, grades from 1, measures in hundredths."""
    columns = read_rdata(directory)["diamonds"].columns()
    arrays: Arrays = {"price": columns["price"].value.astype("<u2")}
    arrays |= {name: columns[name].value.astype("u1") for name in GRADES}
    for name in MEASURES:
        hundredths = np.round(columns[name].value * 100)
        if not np.allclose(hundredths / 100, columns[name].value, rtol=0, atol=1e-12):
            raise ValueError(f"column {name} has more than two decimals")
        arrays[name] = hundredths.astype("<u2")
    return arrays


def npz(arrays: Arrays) -> bytes:
    """Like numpy.savez_compressed, but at the highest level and with a fixed date."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content.getvalue(), compresslevel=9)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
