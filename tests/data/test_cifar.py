"""CIFAR-10's binary version, from files written here: a folder, an archive, and damage."""

from __future__ import annotations

import hashlib
import io
import tarfile
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
    elsewhere = {f"../{FOLDER}/{NAMES[0]}": b"evil", NAMES[1]: b"evil", f"{FOLDER}/readme": b"hi"}
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
