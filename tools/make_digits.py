"""Write visiontrain/data/assets/digits.{png,json} from scikit-learn's copy of the digits.

Run once, by hand, where scikit-learn is installed: `python tools/make_digits.py`.
The result is in the repository; scikit-learn is not a dependency.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits

COLUMNS = 43
ASSETS = Path(__file__).parents[1] / "visiontrain" / "data" / "assets"
ABOUT = {
    "what": "1,797 handwritten digits, 8x8, ink 0 to 16 stored as 0 to 240, row by row in a grid",
    "source": "Optical Recognition of Handwritten Digits, test part (optdigits.tes), as "
    "redistributed with scikit-learn (sklearn.datasets.load_digits)",
    "url": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    "doi": "10.24432/C50P49",
    "creators": "E. Alpaydin, C. Kaynak (1998); bitmaps extracted with NIST's programs",
    "licence": "CC BY 4.0, as the UCI repository lists it; scikit-learn, whose copy this is, is "
    "BSD-3-Clause and names no other licence for these files",
    "changes": "values multiplied by 15 and laid out as one PNG; nothing else",
    "writers": "13 persons; the files do not say who wrote what, so the splits share writers "
    "but never a digit",
}


def main() -> None:
    """Write both files."""
    data = load_digits()
    rows = -(-len(data.images) // COLUMNS)
    cells = np.zeros((rows * COLUMNS, 8, 8), np.uint8)
    cells[: len(data.images)] = data.images.astype(np.uint8) * 15
    grid = cells.reshape(rows, COLUMNS, 8, 8).swapaxes(1, 2).reshape(rows * 8, COLUMNS * 8)
    ASSETS.mkdir(exist_ok=True)
    done, png = cv2.imencode(".png", grid, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done
    (ASSETS / "digits.png").write_bytes(png.tobytes())
    about = ABOUT | {"labels": "".join(map(str, data.target))}
    (ASSETS / "digits.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
