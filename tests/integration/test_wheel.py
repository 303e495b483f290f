"""The wheel: what it holds, and that it trains where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PREFIX = "visiontrain/_shipped/"
SHIPPED = ("cfg", "datasets", "weights")
SHOWN = (".yaml", ".md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build it where a user has data of their own."""
    folder, here = (tmp_path_factory.mktemp(name) for name in ("wheel", "checkout"))
    for kind in (*SHIPPED, "visiontrain"):
        shutil.copytree(TOP / kind, here / kind, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, here)
    (here / "datasets" / "mine").mkdir()
    (here / "datasets" / "mine" / "patient.jpg").write_bytes(b"private")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=here, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_presets_data_sets_weights_help_and_licence(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for kind in SHIPPED:
        files = {path.relative_to(TOP).as_posix() for path in (TOP / kind).rglob("*.*")}
        shown = {name.removeprefix(PREFIX) for name in names if name.startswith(f"{PREFIX}{kind}/")}
        assert shown <= files  # and not what users keep there
        assert {name for name in files if Path(name).suffix in SHOWN or "cluster" in name} <= shown
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
