"""Images that cannot be read: what is remembered, what is asked for again, and what ends a run."""

import errno

import numpy as np
import pytest
from memory import MemoryImages, memory_table

from visiontrain.core.errors import DataError, FetchError
from visiontrain.data import reader
from visiontrain.data.header import ImageError
from visiontrain.data.reader import Reader
from visiontrain.data.views import squares

PICTURES = [np.full((4, 4, 3), k, np.uint8) for k in range(8)]


class Failing(MemoryImages):
    """The system gives no image as often as `left` says."""

    left, code, only = 0, errno.EIO, None  # times, why, and of which row; None: of any

    def read(self, row):
        if self.left and self.only in (None, row):
            self.left -= 1
            cause = OSError(self.code, "of the system")
            raise ImageError(f"picture {row}", "corrupt-image", "cannot be read") from cause
        return super().read(row)


@pytest.fixture
def images(monkeypatch):
    """Return a reader, what it reads from, and how long it has waited."""
    waited = []
    monkeypatch.setattr(reader.time, "sleep", waited.append)
    table = memory_table(PICTURES)
    object.__setattr__(table, "images", Failing(PICTURES))
    return Reader(table), table.images, waited


def test_what_the_system_does_not_give_for_a_moment_is_read_all_the_same(images):
    found, source, waited = images
    source.left = 2
    row, pixels = found.readable(3)
    assert (row, pixels[0, 0, 0], waited, found.bad) == (3, 3, [1.0, 4.0], set())


def test_one_that_stays_away_is_passed_over_this_time_alone(images):
    found, source, _ = images
    source.left = 4
    assert found.readable(3)[0] == 4
    assert found.readable(3)[0] == 3
    source.left = 4  # two after each other, but others between
    assert found.read(5) is None
    assert found.refused == 1


def test_a_bad_sector_is_waited_for_twice_and_then_remembered(images):
    found, source, waited = images
    for _ in range(2):
        assert found.read(2) is not None
        source.left = 4
        assert found.read(5) is None
    assert found.bad == {5}
    assert len(waited) == 6
    assert found.read(5) is None
    assert len(waited) == 6


def test_a_picture_that_is_withheld_at_first_is_no_grey_one(images):
    _, source, _ = images
    table = memory_table(PICTURES)
    object.__setattr__(table, "images", source)
    source.left, source.only = 4, 3
    pixels, rows = squares(table, 4)
    assert source.left == 0
    assert rows.tolist() == list(range(8))
    assert pixels[:, 0, 0, 0].tolist() == list(range(8))


def test_many_in_a_row_end_the_run_instead_of_being_replaced(images):
    found, source, _ = images
    source.left = 100
    with pytest.raises(FetchError, match=r"picture 5: .*; so are 3 images in a row after 20 s"):
        found.readable(3)
    source.left = 0
    assert found.readable(3)[0] == 3


def test_a_file_that_is_damaged_or_gone_is_remembered_and_not_waited_for(images):
    found, source, waited = images
    source.left, source.code = 1, errno.ENOENT
    assert found.readable(3)[0] == 4
    assert (found.bad, waited) == ({3}, [])
    source.broken = set(range(8))
    with pytest.raises(DataError, match=r"no image can be read; of the last: picture 2: broken"):
        found.readable(3)
