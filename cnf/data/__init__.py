"""Data to fit: toy densities on the plane, pictures as densities, tables of numbers, and images.

`toy(name)` and `ImageDensity` give samples and the true log-density, so that a flow can be scored
against the truth; a `Simulator`, such as `TwoMoons`, pairs of parameters and observations, and the
true posterior. `image_patches` cuts squares out of photographs. `read_table` and `split_table`
turn a file into standardised tensors, and refuse what would spoil a likelihood. `image_data(name)`
gives images in whole grey levels, split for training, validation and test, from files that are here
(`read_idx`, `read_mnist`, `read_cifar10`, `torchvision_images`); `reduce_bits` takes grey levels
away, `random_horizontal_flip` mirrors a batch, `random_binarization` makes it black and white. Only
torch and numpy are needed; what asks for more says so when called.
"""

from __future__ import annotations

from cnf.data.cifar import read_cifar10
from cnf.data.density import PlaneDensity
from cnf.data.gaussian import gaussian_log_prob
from cnf.data.idx import read_idx
from cnf.data.image import ImageDensity
from cnf.data.images import ImageData, image_data
from cnf.data.linear_gaussian import LinearGaussian
from cnf.data.mnist import read_mnist
from cnf.data.patches import image_patches, read_pictures, remove_mean
from cnf.data.pixels import random_binarization, random_horizontal_flip, reduce_bits
from cnf.data.potentials import POTENTIALS, Potential, potential
from cnf.data.read import read_table
from cnf.data.simulator import Simulator
from cnf.data.tabular import Table, sklearn_table, split_table
from cnf.data.toy import TOY_NAMES, toy
from cnf.data.two_moons import TwoMoons
from cnf.data.vision import torchvision_images

__all__ = [
    "POTENTIALS",
    "TOY_NAMES",
    "ImageData",
    "ImageDensity",
    "LinearGaussian",
    "PlaneDensity",
    "Potential",
    "Simulator",
    "Table",
    "TwoMoons",
    "gaussian_log_prob",
    "image_data",
    "image_patches",
    "potential",
    "random_binarization",
    "random_horizontal_flip",
    "read_cifar10",
    "read_idx",
    "read_mnist",
    "read_pictures",
    "read_table",
    "reduce_bits",
    "remove_mean",
    "sklearn_table",
    "split_table",
    "torchvision_images",
    "toy",
]
