"""The wheel: what it holds, and that it trains where there is no checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PREFIX = "visiontrain/_shipped/"
SHIPPED = ("cfg", "datasets", "weights")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=TOP, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_presets_data_sets_weights_help_and_licence(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for kind in SHIPPED:
        files = {path.relative_to(TOP).as_posix() for path in (TOP / kind).rglob("*.*")}
        assert {PREFIX + name for name in files} <= names
    package = (path for path in (TOP / "visiontrain").rglob("*") if path.is_file())
    ours = {path.relative_to(TOP).as_posix() for path in package if "__pycache__" not in path.parts}
    assert ours == {name for name in names if ".dist-info/" not in name} - {
        name for name in names if name.startswith(PREFIX)
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_it_trains_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install"]
    words = [*pip, "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(words, check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def program(*words):
        return subprocess.run(
            [sys.executable, *words],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    where = program("-c", "import visiontrain; print(visiontrain.__file__)").stdout
    assert where.startswith(str(site))
    done = program(str(site / "bin" / "visiontrain"), "train", "data=tiny", "epochs=1")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((empty / "runs" / "detect" / "train" / "metrics.json").read_text())
    assert (metrics["epochs"], metrics["images"]) == (1, 8)
    assert (empty / "runs" / "detect" / "train" / "report.html").is_file()
