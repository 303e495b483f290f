"""Files of tensors: what is written reads back, here and with safetensors' own reader."""

import pytest
import torch
from safetensors.torch import load_file

from visiontrain.core.durable import digest_of
from visiontrain.core.errors import CheckpointError
from visiontrain.engine.tensor_file import TYPES, open_tensors, write_tensors

TENSORS = {
    **{str(t): torch.arange(5).to(t) for t in TYPES},
    "number": torch.tensor(0.1),
    "none": torch.empty(0, 3),
    "view": torch.arange(12.0).view(3, 4).T[1:],
    "ü": torch.rand(2, 3, 4),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    assert write_tensors(path, TENSORS, {"format": "pt"}) == digest_of(path)
    return path


def equal(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


def test_every_type_and_shape_reads_back_in_both_readers(file):
    for got in (load_file(file), open_tensors(file)):
        assert got.keys() == TENSORS.keys()
        assert all(equal(got[name], tensor) for name, tensor in TENSORS.items())


def test_equal_tensors_make_equal_files_in_any_order(file, tmp_path):
    other = tmp_path / "b.safetensors"
    write_tensors(other, dict(reversed(TENSORS.items())), {"format": "pt"})
    assert other.read_bytes() == file.read_bytes()


def test_every_value_lies_at_a_multiple_of_its_size(file):
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert header % 8 == 0


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 3), (4, 5), (2, 2), (5, 5)])
def test_rows_are_read_alone(file, start, stop):
    for dtype in TYPES:
        got = open_tensors(file).rows(str(dtype), start, stop)
        assert equal(got, TENSORS[str(dtype)][start:stop])


@pytest.mark.parametrize("data", [b"", b"nothing of the kind", b"\xff" * 100])
def test_another_file_is_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no file of tensors"):
        open_tensors(path)
