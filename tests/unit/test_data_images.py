"""Headers and decoding: every trap of image files, with Pillow as the oracle."""

import io
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from visiontrain.data.header import ImageError, read_header
from visiontrain.data.images import FileImages, Paths, decode, is_hollow, lacks_only_end

LIMIT = 10**6
COLOUR = cv2.resize(np.random.default_rng(0).integers(0, 255, (5, 5, 3), np.uint8), (60, 40))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(**options):
    return encoded(Image.fromarray(COLOUR), "JPEG", quality=95, **options)


def size_of(data):
    return read_header(io.BytesIO(data), "x", LIMIT).size


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_come_upright(kind, orientation):
    options = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
    }.get(kind, {})
    options |= (
        {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
    )
    data = encoded(Image.fromarray(COLOUR), kind, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert size_of(data) == upright.shape[1::-1]
    image = decode(data, "x", LIMIT)
    assert image.flags.c_contiguous
    np.testing.assert_allclose(image, upright, atol=0 if kind != "JPEG" else 2)


MODES = {
    "JPEG": ["RGB", "L", "1", "CMYK"],
    "PNG": ["RGB", "L", "1", "P", "RGBA", "LA"],
    "BMP": ["RGB", "L", "1", "P", "RGBA"],
    "TIFF": ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_modes_become_rgb(mode, kind):
    picture = Image.fromarray(COLOUR).convert(mode)
    data = encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert size_of(data) == picture.size
    opaque = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    tolerance = 8 if mode == "CMYK" or kind == "JPEG" else 1
    np.testing.assert_allclose(decode(data, "x", LIMIT), opaque, atol=tolerance)


def test_the_alpha_of_other_formats_than_tiff_is_dropped():
    see_through = np.dstack([COLOUR, np.full((40, 60), 7, np.uint8)])
    for kind in ("PNG", "BMP"):
        data = encoded(Image.fromarray(see_through), kind)
        np.testing.assert_array_equal(decode(data, "x", LIMIT), COLOUR)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_are_divided_by_257(suffix, channels):
    deep = np.random.default_rng(1).integers(0, 2**16, (12, 12, channels), np.uint16)
    data = cv2.imencode(suffix, deep)[1].tobytes()
    expected = np.broadcast_to(np.round(deep[..., ::-1] / 257), (12, 12, 3))
    np.testing.assert_array_equal(decode(data, "x", LIMIT), expected)


def test_floating_point_images_are_refused():
    data = encoded(Image.fromarray(np.ones((12, 12), np.float32)), "TIFF")
    with pytest.raises(ImageError, match="float32 samples; convert it"):
        decode(data, "x", LIMIT)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_missing_end_is_harmless_and_a_missing_part_is_not(progressive):
    whole = jpeg(progressive=progressive)
    expected = decode(whole, "x", LIMIT)
    np.testing.assert_array_equal(decode(whole[:-2], "x", LIMIT), expected)
    np.testing.assert_array_equal(decode(whole[:-1], "x", LIMIT), expected)
    np.testing.assert_array_equal(decode(whole + b"trailer of a phone", "x", LIMIT), expected)
    assert not is_hollow(whole)
    for share in (0.5, 0.7, 0.9, 0.97):
        cut = whole[: int(len(whole) * share)]
        with pytest.raises(ImageError, match="x: a jpeg that is truncated"):
            decode(cut, "x", LIMIT)
        assert not lacks_only_end(cut)
        assert is_hollow(cut + b"\xff\xd9")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_other_formats_refuse_a_missing_part(kind):
    whole = encoded(Image.fromarray(COLOUR), kind)
    with pytest.raises(ImageError):
        decode(whole[: len(whole) // 2], "x", LIMIT)


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 500_000
    monkeypatch.setattr(cv2, "imdecode", never)
    with pytest.raises(ImageError, match=r"20000 x 20000 is more than max_pixels=64000000"):
        decode(bomb, "x", 64_000_000)


@pytest.mark.parametrize("first", [3, 16])  # SHORT; LONG8, which libtiff reads and we do not
def test_a_tiff_cannot_hide_its_size_behind_a_second_one(first, monkeypatch):
    """libtiff decodes by the first of two equal tags."""

    def never(*_):
        raise AssertionError("decoded")

    data = bytearray(encoded(Image.new("L", (2000, 2000)), "TIFF", compression="tiff_lzw"))
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = [bytes(data[start + 2 + 12 * i : start + 14 + 12 * i]) for i in range(count)]
    doubled = []
    for entry in entries:
        tag, kind = struct.unpack_from("<HH", entry)
        is_size = tag in (256, 257)
        doubled.append(struct.pack("<HH", tag, first if is_size else kind) + entry[4:])
        doubled += [struct.pack("<HHIHH", tag, 3, 1, 20, 0)] * is_size
    struct.pack_into("<I", data, 4, len(data))
    data += struct.pack("<H", len(doubled)) + b"".join(doubled) + bytes(4)
    monkeypatch.setattr(cv2, "imdecode", never)
    with pytest.raises(ImageError) as caught:
        decode(bytes(data), "x", LIMIT)
    assert caught.value.kind == ("huge-image" if first == 3 else "corrupt-image")


def test_a_chunk_that_claims_gigabytes_is_refused_unread(monkeypatch):
    def never(*_):
        raise AssertionError("decoded: OpenCV allocates what the chunk claims")

    data = bytearray(encoded(Image.fromarray(COLOUR), "PNG"))
    place = data.index(b"IDAT") - 4
    data[place : place + 4] = (3 * 10**9).to_bytes(4, "big")
    monkeypatch.setattr(cv2, "imdecode", never)
    with pytest.raises(ImageError) as caught:
        decode(bytes(data), "x", LIMIT)
    assert caught.value.kind == "truncated-image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@settings(max_examples=60)
@given(place=st.floats(0, 1), new=st.binary(min_size=1, max_size=8), cut=st.floats(0, 1))
def test_damaged_files_give_an_image_or_an_image_error(kind, place, new, cut):
    data = bytearray(encoded(Image.fromarray(COLOUR), kind))
    start = int(place * len(data) * (0.2 if cut < 0.5 else 1))  # headers break in more ways
    data[start : start + len(new)] = new
    if cut > 0.7:
        data = data[: int(cut * len(data))]
    try:
        image = decode(bytes(data), "x", LIMIT)
    except ImageError as error:
        assert str(error).startswith("x: ")
    else:
        assert image.dtype == np.uint8
        assert image.ndim == 3


def test_paths_are_kept_as_one_blob(tmp_path):
    names = ["a.jpg", "wörter/b.jpg", "", "tail\udcff.png"]
    paths = Paths(names)
    assert list(paths) == names
    assert list(paths.select(np.array([3, 0]))) == [names[3], names[0]]
    assert {type(value) for value in vars(paths).values()} == {np.ndarray}
    with pytest.raises(ImageError, match=r"a\.jpg: no such file"):
        FileImages(Paths([tmp_path / "a.jpg"]), LIMIT).read(0)
    with pytest.raises(ImageError, match="cannot be read"):
        FileImages(Paths([tmp_path]), LIMIT).read(0)
