"""CIFAR-10's binary version, from files written here: a folder, an archive, and damage."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import torch

from cnf.data import cifar, read_cifar10

NAMES = [*(f"data_batch_{i}.bin" for i in (1, 2, 3, 4, 5)), "test_batch.bin"]
FOLDER, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"


def batches() -> dict[str, tuple[bytes, torch.Tensor]]:
    """The bytes of each file and its images; file i has i + 1 of them."""
    generator, made = torch.Generator().manual_seed(0), {}
    for i, name in enumerate(NAMES):
        images = torch.randint(256, (i + 1, 3, 32, 32), generator=generator, dtype=torch.uint8)
        records = [bytes([k % 10, *image.flatten().tolist()]) for k, image in enumerate(images, 5)]
        made[name] = (b"".join(records), images)
    return made


def fill(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    made = batches()
    for name, (data, _) in made.items():
        (folder / name).write_bytes(data)
    return {name: images for name, (_, images) in made.items()}


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def check(path: Path, truth: dict[str, torch.Tensor], **options) -> None:
    train, test = read_cifar10(path, **options)
    assert train.dtype == test.dtype == torch.uint8
    assert torch.equal(train, torch.cat([truth[name] for name in NAMES[:5]]))
    assert torch.equal(test, truth["test_batch.bin"])
    train.zero_(), test.zero_()  # may be written to


@pytest.mark.parametrize("place", ["", FOLDER])
def test_a_folder(tmp_path, place):
    truth = fill(tmp_path / place)
    check(tmp_path, truth, checksum=False)
    (tmp_path / place / "data_batch_1").write_text("the pickle beside it is no matter")
    check(tmp_path, truth, checksum=False)


def test_an_archive_of_which_nothing_is_written(tmp_path, monkeypatch):
    made = batches()
    members = {f"{FOLDER}/{name}": data for name, (data, _) in made.items()}
    # What must be passed over: files of the same names elsewhere, and others
    elsewhere = {f"../{FOLDER}/{NAMES[0]}": b"evil", f"x/{NAMES[1]}": b"evil", "readme": b"hi"}
    path = pack(tmp_path / ARCHIVE, members | elsewhere)
    truth = {name: images for name, (_, images) in made.items()}
    for place in (path, tmp_path):
        check(place, truth, checksum=False)
    assert list(tmp_path.rglob("*")) == [path]
    seen = hashlib.md5(path.read_bytes()).hexdigest()
    message = f"MD5 sum {seen}, expected c32a1d4ab5d03f1284b67883e8d87530; .*checksum=False"
    with pytest.raises(ValueError, match=message):
        read_cifar10(path)
    monkeypatch.setattr(cifar, "CIFAR10_MD5", seen)
    with pytest.raises(ValueError, match=r"data_batch_1.bin of .* has 3073 bytes"):
        read_cifar10(path)  # the published archive has more
    check(path, truth, checksum=False)


@pytest.mark.parametrize("place", [f"./{FOLDER}/", "", "./", f"{FOLDER}/"])
def test_an_archive_packed_otherwise(tmp_path, place):
    made = batches()
    path = pack(tmp_path / ARCHIVE, {place + name: data for name, (data, _) in made.items()})
    check(path, {name: images for name, (_, images) in made.items()}, checksum=False)


def refused(path: Path, message: str) -> int:
    """The most memory that is taken until the archive is refused, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            read_cifar10(path, checksum=False)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def tar_header(
    name: str, size: int, kind: bytes = tarfile.REGTYPE, sparse: int = 0, more: bool = False
) -> bytes:
    """The header of a member, with sizes as they are claimed.

    `sparse` is the one with the holes, of which `more` says that the next block goes on.
    """
    member = tarfile.TarInfo(name)
    member.type = kind
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = (size % 256**12).to_bytes(12, "big")
    head[124] |= 0x80
    if sparse:
        head[386:410] = b"%011o\0" % 0 * 2
        head[482:495] = bytes([more, 0x80]) + sparse.to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            tar_header(NAMES[0], 0, tarfile.GNUTYPE_SPARSE, sparse=2**26 // 3073 * 3073),
            r"an archive: data_batch_1.bin is packed as a sparse file; get https://",
        ),
        (tar_header(NAMES[0], 2**33 // 3073 * 3073) + bytes(3073), "unexpected end of data"),
        (tar_header(NAMES[0], 2**90), "cannot be read as an archive"),
        (tar_header("x", 2**33, tarfile.XHDTYPE), "cannot be read as an archive"),
        (1001 * tar_header("x", 0), "it has more than 1000 members"),
        (2 * tar_header(NAMES[3], 0), "it has two files data_batch_4.bin"),
        (tar_header(FOLDER + "/" + NAMES[3], 0) + tar_header(NAMES[3], 0), "it has two files"),
    ],
)
def test_archives_made_to_do_harm(tmp_path, data, message):
    path = tmp_path / ARCHIVE
    path.write_bytes(gzip.compress(data + bytes(1024)))
    assert refused(path, message) < 2**23


def test_an_archive_that_ends_in_a_list_of_holes(tmp_path):
    path = tmp_path / ARCHIVE
    path.write_bytes(gzip.compress(tar_header("x", 0, tarfile.GNUTYPE_SPARSE, 9, more=True)))
    with pytest.raises(ValueError, match="cannot be read as an archive"):
        read_cifar10(path, checksum=False)


def test_an_archive_in_a_circle(tmp_path):
    """The end of the second member is its own beginning; some versions of tarfile stop there."""
    path = tmp_path / ARCHIVE
    path.write_bytes(gzip.compress(tar_header("x", 0) + tar_header("x", -512) + bytes(1024)))
    with pytest.raises((ValueError, FileNotFoundError), match=r"more than 1000 members|lacks"):
        read_cifar10(path, checksum=False)


@pytest.mark.parametrize("members", [1, 4])
def test_no_more_is_unpacked_than_batches_may_hold(tmp_path, monkeypatch, members):
    monkeypatch.setattr(cifar, "MOST", 10)
    path = tmp_path / ARCHIVE
    head = gzip.compress(tar_header("x", 2**26, tarfile.XHDTYPE))
    path.write_bytes(head + gzip.compress(bytes(2**26 // members), 1) * members)
    assert refused(path, r"unpacked, it has more than 1232956 bytes") < 2**23


def test_more_images_than_any_file_may_have(tmp_path, monkeypatch):
    made = batches()
    path = pack(tmp_path / ARCHIVE, {name: data for name, (data, _) in made.items()})
    truth = fill(tmp_path)
    monkeypatch.setattr(cifar, "MOST", 6)
    for place in (path, tmp_path):
        check(place, truth, checksum=False)
    monkeypatch.setattr(cifar, "MOST", 5)
    message = r"test_batch.bin of .* has 18438 bytes, expected a multiple of 3073 up to 5 x 3073 \("
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            read_cifar10(place, checksum=False)
        assert "checksum=False" not in str(error.value)  # it is already


def test_links_in_an_archive_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(batches()[NAMES[0]][0])
    path = tmp_path / ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        for name in NAMES:
            link = tarfile.TarInfo(f"{FOLDER}/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(outside)
            archive.addfile(link)
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_1.bin, .*test_batch.bin; get"):
        read_cifar10(path, checksum=False)


def test_the_published_sizes(tmp_path):
    for name in NAMES:
        with (tmp_path / name).open("wb") as file:
            file.truncate(10_000 * 3073)
    train, test = read_cifar10(tmp_path)
    assert (train.shape, test.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    with (tmp_path / NAMES[4]).open("wb") as file:
        file.truncate(9_999 * 3073)
    message = r"data_batch_5.bin of .* has 30726927 bytes, expected 10000 x 3073 = 30730000"
    with pytest.raises(ValueError, match=message + r".*, or pass checksum=False"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "has 0 bytes, expected a multiple of 3073"),
        (lambda data: data[:-1], "has 9218 bytes, expected a multiple of 3073"),
        (lambda data: data + b"\0", "has 9220 bytes, expected a multiple"),
        (lambda data: data[:3073] + b"\x0a" + data[3074:], "label 10 in record 1, expected 0 to 9"),
    ],
)
def test_damaged_batches(tmp_path, change, message):
    fill(tmp_path)
    file = tmp_path / "data_batch_3.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"data_batch_3.bin of .*{message}"):
        read_cifar10(tmp_path, checksum=False)


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"is neither cifar-10-binary.tar.gz nor .*get"):
            read_cifar10(path)
    fill(tmp_path)
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_2.bin; get https://.*tar\.gz"):
        read_cifar10(tmp_path)


def test_damaged_archives(tmp_path):
    path = pack(tmp_path / ARCHIVE, {f"{FOLDER}/{NAMES[0]}": batches()[NAMES[5]][0]})
    whole = path.read_bytes()
    for data in (b"", b"no archive at all", whole[:-2000], whole[:300] + b"\xff" * 99):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot be read as an archive: .*; get https://"):
            read_cifar10(path, checksum=False)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/", "data_batch_1"])
def test_no_pickle_is_read(tmp_path, name):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
        (path / "data_batch_1").write_bytes(b"\x80\x04N.")
    else:
        path.write_bytes(b"\x80\x04N.")
    for place in (tmp_path, path):
        with pytest.raises(ValueError, match=r"no pickle is read.*cifar-10-binary\.tar\.gz"):
            read_cifar10(place)
