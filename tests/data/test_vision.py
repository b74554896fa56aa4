"""torchvision's data sets, by a small module in its place."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from cnf.data import image_data, torchvision_images, vision

Image = pytest.importorskip("PIL.Image")


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


class Base(Dataset):
    """Pictures (N, H, W) or (N, H, W, 3) as items with labels; `asked` counts these."""

    def __init__(self, root, pictures, transform=None, download=False):
        if root == "empty" and not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.pictures, self.transform, self.asked = pictures, transform, []

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        self.asked.append(i)
        image = Image.fromarray(self.pictures[i])
        return (self.transform(image) if self.transform else image), 7


GREY = {True: numbers(6, 4, 5), False: numbers(3, 4, 5, seed=1)}
COLOUR = {"train": numbers(6, 4, 3, 3), "test": numbers(2, 4, 3, 3, seed=1)}
CUBE = numbers(5, 3, 3, 3)  # its layout is seen from the values alone
made: list[Base] = []


class FashionMNIST(Base):
    def __init__(self, root, train=True, transform=None, download=False):
        super().__init__(root, GREY[train], transform, download)
        self.data = torch.from_numpy(GREY[train])
        made.append(self)


class Joint(FashionMNIST):  # transforms of picture and label
    def __init__(self, root, train=True, transforms=None):
        super().__init__(root, train)
        self.transforms = transforms

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return self.transforms(*item) if self.transforms else item


class CIFAR10(Base):  # channels last
    def __init__(self, root, train=True):
        super().__init__(root, COLOUR["train" if train else "test"])
        self.data = self.pictures.copy()
        self.data.flags.writeable = False
        made.append(self)


class SVHN(Base):  # channels first
    def __init__(self, root, split="train"):
        super().__init__(root, COLOUR[split])
        self.data = np.transpose(self.pictures, (0, 3, 1, 2))
        self.data.flags.writeable = False
        made.append(self)


class Listed(Base):  # no array
    def __init__(self, root, split="train"):
        super().__init__(root, COLOUR[split])


class Other(Base):  # an array of something else
    def __init__(self, root, split="train"):
        super().__init__(root, COLOUR[split])
        self.data = 255 - self.pictures


class Short(Base):  # an array of more than the items
    def __init__(self, root, train=True):
        super().__init__(root, GREY[train][:2])
        self.data = torch.from_numpy(GREY[train][[0, 2, 1]])


class Reordered(Base):  # an array that agrees at one end alone
    def __init__(self, root, train=True):
        super().__init__(root, GREY[train])
        self.data = GREY[train].copy()
        self.data[-1 if train else 0] += 1


class Objects(Base):  # an array of no pixels
    def __init__(self, root, train=True):
        super().__init__(root, GREY[train])
        self.data = np.array([None] * len(self))


class Flat(Base):  # pixels in rows
    def __init__(self, root, train=True):
        super().__init__(root, GREY[train])
        self.data = self.pictures.reshape(len(self), -1)


class CubeFirst(Base):
    def __init__(self, root, train=True):
        super().__init__(root, CUBE)
        self.data = CUBE.transpose(0, 3, 1, 2)


class CubeLast(Base):
    def __init__(self, root, train=True):
        super().__init__(root, CUBE)
        self.data = CUBE


class EMNIST(FashionMNIST):
    def __init__(self, root, split, **options):
        super().__init__(root, **options)


class Uneven(Base):
    def __init__(self, root, split="train"):
        super().__init__(root, [numbers(4, 4, 3), numbers(4, 4)])


class Deep(Base):
    def __init__(self, root, split="train"):
        super().__init__(root, [numbers(4, 4).astype(np.int32)])


class Empty(Base):
    def __init__(self, root, train=True):
        super().__init__(root, [])


class Whole(Base):
    def __init__(self, root):
        super().__init__(root, [numbers(4, 4)])


@pytest.fixture(autouse=True)
def _torchvision(monkeypatch):
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    for kind in (FashionMNIST, CIFAR10, SVHN, Listed, Other, Short, CubeFirst, CubeLast, EMNIST):
        setattr(datasets, kind.__name__, kind)
    for kind in (Joint, Reordered, Objects, Flat, Uneven, Deep, Empty, Whole):
        setattr(datasets, kind.__name__, kind)
    datasets.helper, datasets.np = str, np
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    made.clear()


def first_channels(pictures: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(pictures)
    return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("FashionMNIST", GREY[True], GREY[False]),
        ("CIFAR10", COLOUR["train"], COLOUR["test"]),
        ("SVHN", COLOUR["train"], COLOUR["test"]),
        ("Listed", COLOUR["train"], COLOUR["test"]),
        ("Other", COLOUR["train"], COLOUR["test"]),
        ("Short", GREY[True][:2], GREY[False][:2]),
        ("Reordered", GREY[True], GREY[False]),
        ("Objects", GREY[True], GREY[False]),
        ("Flat", GREY[True], GREY[False]),
        ("CubeFirst", CUBE, CUBE),
        ("CubeLast", CUBE, CUBE),
    ],
)
def test_images_are_what_the_items_show(tmp_path, name, train, test):
    for split, truth in (("train", train), ("test", test)):
        images = torchvision_images(name, tmp_path, split=split)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert torch.equal(images, first_channels(truth))
    data = image_data(name, tmp_path, val=1)
    assert torch.equal(torch.cat([data.train, data.val]), first_channels(train))
    assert (len(data.val), data.levels, data.name) == (1, 256, name)
    assert torch.equal(data.test, first_channels(test))


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10", "SVHN"])
def test_the_array_spares_asking_for_each(name):
    torchvision_images(name, "root")
    assert made[0].asked == [0, 5]


def test_options_go_to_the_class():
    half = torchvision_images("FashionMNIST", "x", transform=lambda image: image.resize((2, 2)))
    assert half.shape == (6, 1, 2, 2)
    palette = torchvision_images("FashionMNIST", "x", transform=lambda i: i.convert("P"))
    assert torch.equal(palette, first_channels(GREY[True]).expand(-1, 3, -1, -1))
    tensors = torchvision_images(
        "FashionMNIST", "x", transform=lambda i: 255 - torch.from_numpy(np.array(i))[None]
    )
    assert torch.equal(tensors, 255 - first_channels(GREY[True]))
    test = torchvision_images("FashionMNIST", "x", train=False)
    assert torch.equal(test, first_channels(GREY[False]))
    letters = torchvision_images("EMNIST", "x", split="letters", train=False)
    assert torch.equal(letters, first_channels(GREY[False]))
    assert len(torchvision_images("FashionMNIST", "empty", download=True)) == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SVNH", {}, "name='SVNH' is not known; expected one of CIFAR10, .*Did you mean 'SVHN'"),
        ("helper", {}, "name='helper' is not known"),
        ("np", {}, "name='np' is not known"),
        ("CIFAR10", {"split": "val"}, "split='val' is not known; expected one of train, test"),
        ("Whole", {}, "neither `train` nor `split`"),
        ("Empty", {}, "Empty in 'x' is empty"),
        ("Uneven", {}, r"image 1 is \(1, 4, 4\), but image 0 is \(3, 4, 4\).*Resize"),
        ("Deep", {}, "image 0 is .*mode=I .*expected a picture of mode 1, L, P, RGB or a uint8"),
        (
            "FashionMNIST",
            {"transform": lambda image: torch.zeros(1, 4, 5)},
            r"image 0 is torch.float32 \(1, 4, 5\), expected .*transform=",
        ),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        torchvision_images(name, "x", **options)


def test_a_transform_of_some_images_is_applied():
    """Even where it leaves the first and the last image as they are in the data set's array."""
    third = GREY[True][2]

    def transform(image):
        image = np.array(image)
        return Image.fromarray(image[:, ::-1] if (image == third).all() else image)

    truth = first_channels(GREY[True]).clone()
    truth[2] = truth[2].flip(-1)
    assert torch.equal(torchvision_images("FashionMNIST", "x", transform=transform), truth)


def test_a_joint_transform_is_applied():
    """transforms=, of picture and label, even where the first and the last picture are spared."""
    ends = GREY[True][[0, -1]]

    def transforms(image, label):
        image = np.array(image)
        return Image.fromarray(image if (image == ends).all((1, 2)).any() else 255 - image), label

    truth = first_channels(GREY[True]).clone()
    truth[1:-1] = 255 - truth[1:-1]
    assert torch.equal(torchvision_images("Joint", "x", transforms=transforms), truth)
    assert torch.equal(torchvision_images("Joint", "x"), first_channels(GREY[True]))


def test_missing_files():
    message = r"cannot load FashionMNIST \(train\) from folder 'empty': .*download=True\) fetches"
    with pytest.raises(FileNotFoundError, match=message):
        torchvision_images("FashionMNIST", "empty")


def test_torchvision_missing_or_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    for read in (torchvision_images, image_data):
        with pytest.raises(
            ImportError, match=r"'MNIST' is read by torchvision.*pip install torchv"
        ):
            read("MNIST", "folder")

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(vision, "import_module", broken)
    with pytest.raises(ImportError, match=r"nms does not exist\); pip install torchvision"):
        torchvision_images("MNIST", "folder")
