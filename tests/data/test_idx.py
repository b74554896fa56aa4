"""The idx format: what is written comes back, and damage is named; MNIST is the published one."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from cnf.data import read_idx, read_mnist
from cnf.data.mnist import MNIST_MD5

MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "MNIST"
here = pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not here")


def idx(shape: tuple[int, ...], seed: int = 0, kind: int = 8) -> tuple[bytes, torch.Tensor]:
    """The bytes of a file of random pixels, and the pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (math.prod(shape),), generator=generator, dtype=torch.uint8)
    head = struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape)
    return head + bytes(pixels.tolist()), pixels.reshape(shape)


def header(*shape: int) -> bytes:
    """How a file of this shape begins."""
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 300, 5), (2, 3, 4, 5), (0, 28, 28), (3, 0, 2)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["some-ubyte", "some.gz"])
def test_what_is_written_comes_back(tmp_path, shape, pack, name):
    data, pixels = idx(shape)
    read = read_idx(write(tmp_path / name, pack(data)), md5=hashlib.md5(data).hexdigest().upper())
    assert read.dtype == torch.uint8
    assert torch.equal(read, pixels)
    read.zero_()  # it may be written to: a warning would be an error


def test_the_bytes_of_a_file_made_by_hand(tmp_path):
    data = b"\0\0\x08\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + b"\x01\x02\x03\xfd\xfe\xff"
    assert read_idx(str(write(tmp_path / "x", data))).tolist() == [[1, 2, 3], [253, 254, 255]]


GOOD, _ = idx((2, 3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is no idx file: it begins with the bytes \[\], expected \[00 00 08 dd\]"),
        (b"\0\0\x08", r"begins with the bytes \[00 00 08\]"),
        (b"\x89PNG\r\n", r"begins with the bytes \[89 50 4e 47\]"),
        (b"\0\0\x08\0\x01", r"expected \[00 00 08 dd\] with dd dimensions, one or more"),
        (idx((2,), kind=0xD)[0], r"elements of type 13 \(float32\), expected 8, unsigned bytes"),
        (idx((2,), kind=7)[0], r"elements of type 7 \(which idx lacks\), expected 8"),
        (GOOD[:8], "cut off: 8 bytes, but the header alone, of 2 dimensions, has 12"),
        (GOOD[:-1], r"cut off: 17 bytes, expected 18 for the shape \(2, 3\)"),
        (GOOD[:12], "cut off: 12 bytes, expected 18"),
        (GOOD + b"\0", r"too long: more bytes, expected 18 for the shape \(2, 3\)"),
        (gzip.compress(GOOD + b"\0" * 99, mtime=0), "too long: more bytes, expected 18"),
        (idx((1,) * 5)[0], r"has 5 dimensions, expected 1 to 4: .*labels \(N,\)"),
        (b"\0\0\x08\xff" + b"\xff" * 1020, "has 255 dimensions, expected 1 to 4"),
        (header(*[2**32 - 1] * 4), r"the shape \(4294967295, .*, larger than a tensor can be"),
        # Empty, but with strides
        (header(0, 2**32 - 1, 2**32 - 1), r"the shape \(0, 4294967295, .*, larger than a tensor"),
        (b"\x1f\x8b", "is gzipped, but damaged: .*; fetch it again"),
        (gzip.compress(GOOD, mtime=0)[:-3], "is gzipped, but damaged"),
        (gzip.compress(GOOD, mtime=0) + b"more", "is gzipped, but damaged"),
        (gzip.compress(GOOD[:-1], mtime=0), "cut off: 17 bytes, expected 18"),
    ],
)
def test_damage_is_named(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as error:
        read_idx(write(tmp_path / "file", data))
    assert str(tmp_path / "file") in str(error.value)


def peak(read, *arguments, message: str, **options) -> int:
    """The most memory that a refused reading takes, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            read(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_false_claim_of_size_takes_no_memory(tmp_path, pack):
    path = write(tmp_path / "file", pack(header(2**30, 2, 2) + b"few"))
    message = rf"cut off: 19 bytes, expected {2**32 + 16} "
    assert peak(read_idx, path, message=message) < 2**23


@pytest.mark.parametrize("members", [1, 4])
def test_a_small_gzip_of_much_is_not_unpacked(tmp_path, members):
    zeros = bytes(2**26 // members)
    more = gzip.compress(zeros, 1) * members
    for first, message in (
        (b"\0\0", r"no idx file: it begins with the bytes \[00 00 00 00\]"),
        (header(3, 100, 100), "too long: more bytes, expected 30016"),
    ):
        packed = gzip.compress(first) + more
        assert peak(read_idx, write(tmp_path / "x", packed), message=message) < 2**23
        write(tmp_path / "train-images-idx3-ubyte.gz", packed)
        write(tmp_path / "t10k-images-idx3-ubyte.gz", packed)
        for checksum in (True, False):
            assert peak(read_mnist, tmp_path, checksum=checksum, message=message) < 2**23


def test_a_file_of_several_gzip_members(tmp_path):
    """Which is a gzip file like others."""
    data, pixels = idx((20, 30))
    packed = b"".join(gzip.compress(part) for part in (data[:3], data[3:100], b"", data[100:]))
    read = read_idx(write(tmp_path / "x.gz", packed), md5=hashlib.md5(data).hexdigest())
    assert torch.equal(read, pixels)


def test_every_flipped_bit_of_a_gzip_is_found_or_harmless(tmp_path):
    data, pixels = idx((4, 5))
    packed = gzip.compress(data, mtime=0)
    found = 0
    for i in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[i // 8] ^= 1 << i % 8
        path = write(tmp_path / "x.gz", bytes(flipped))
        try:
            assert torch.equal(read_idx(path), pixels)  # in the time stamp and the like
        except ValueError:
            found += 1
    assert found > 8 * (len(packed) - 10)


def test_other_checksum_and_no_file(tmp_path):
    path = write(tmp_path / "file", GOOD)
    other = "0" * 32
    message = f"MD5 sum {hashlib.md5(GOOD).hexdigest()}, expected {other}; .* leave md5 out"
    with pytest.raises(ValueError, match=message):
        read_idx(path, md5=other)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"path '{missing}' is not a file"):
            read_idx(missing)


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("end", ["-idx3-ubyte", "-idx3-ubyte.gz", ".idx3-ubyte"])
def test_mnist_is_found_where_it_may_lie(tmp_path, place, end):
    (first, train), (second, test) = idx((3, 28, 28)), idx((2, 28, 28), seed=1)
    pack = gzip.compress if end.endswith("gz") else bytes
    write(tmp_path / place / f"train-images{end}", pack(first))
    with pytest.raises(FileNotFoundError, match=r"no file t10k-images-idx3-ubyte .*; get https://"):
        read_mnist(tmp_path, checksum=False)
    write(tmp_path / place / f"t10k-images{end}", pack(second))
    read = read_mnist(str(tmp_path), checksum=False)
    assert torch.equal(read[0], train.unsqueeze(1))
    assert torch.equal(read[1], test.unsqueeze(1))
    with pytest.raises(ValueError, match=r"train-images.* expected 6bbc9ace.*checksum=False"):
        read_mnist(tmp_path)


def test_labels_in_place_of_images(tmp_path):
    write(tmp_path / "train-images-idx3-ubyte", idx((7,))[0])
    write(tmp_path / "t10k-images-idx3-ubyte", idx((7,))[0])
    with pytest.raises(ValueError, match=r"has the shape \(7,\), expected images .*labels\?"):
        read_mnist(tmp_path, checksum=False)


@here
def test_all_files_of_mnist_are_the_published_ones():
    for name, md5 in MNIST_MD5.items():
        read_idx(MNIST / f"{name}.gz", md5=md5)


@here
def test_mnist_is_as_described():
    train, test = read_mnist(MNIST)
    assert (train.shape, test.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    # LeCun et al.'s files as others describe them: grey levels of mean 0.1307, deviation 0.3081
    scaled = train.float() / 255
    assert float(scaled.mean()) == pytest.approx(0.1307, abs=5e-5)
    assert float(scaled.std()) == pytest.approx(0.3081, abs=5e-5)
    labels = read_idx(MNIST / "train-labels-idx1-ubyte.gz")
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels.bincount().tolist()[:2] == [5923, 6742]


@here
def test_one_changed_pixel_of_mnist_is_found(tmp_path):
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        data = bytearray(gzip.decompress((MNIST / f"{name}.gz").read_bytes()))
        data[-1] ^= name.startswith("t10k")
        write(tmp_path / name, bytes(data))
    with pytest.raises(
        ValueError, match=r"t10k-images.* expected 2646ac647ad5339dbf082846283269ea"
    ):
        read_mnist(tmp_path)
    assert int(read_mnist(tmp_path, checksum=False)[1][-1, 0, -1, -1]) == 1
