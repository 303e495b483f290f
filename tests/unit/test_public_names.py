"""The names that `import visiontrain` offers."""

import subprocess
import sys

import pytest

import visiontrain


@pytest.mark.parametrize("name", visiontrain.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(visiontrain, name)
    assert isinstance(value, str) or value.__doc__
    assert getattr(visiontrain, name) is value  # a submodule of that name would shadow it


def test_public_names_are_all_there_are():
    assert sorted(visiontrain.__all__) == dir(visiontrain)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        visiontrain.Trainer  # noqa: B018


def test_import_is_light():
    code = "import sys, visiontrain; print({'torch', 'numpy', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
