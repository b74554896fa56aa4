"""Data to fit: toy densities on the plane, pictures as densities, and tables of numbers.

`toy(name)` and `ImageDensity` give samples and the true log-density, so that a flow can be scored
against the truth. `image_patches` cuts squares out of photographs. `read_table` and `split_table`
turn a file into standardised tensors, and refuse what would spoil a likelihood. Only torch and
numpy are needed; what asks for more says so when called.
"""

from __future__ import annotations

from cnf.data.density import PlaneDensity
from cnf.data.gaussian import gaussian_log_prob
from cnf.data.image import ImageDensity
from cnf.data.patches import image_patches, read_pictures, remove_mean
from cnf.data.read import read_table
from cnf.data.tabular import Table, sklearn_table, split_table
from cnf.data.toy import TOY_NAMES, toy

__all__ = [
    "TOY_NAMES",
    "ImageDensity",
    "PlaneDensity",
    "Table",
    "gaussian_log_prob",
    "image_patches",
    "read_pictures",
    "read_table",
    "remove_mean",
    "sklearn_table",
    "split_table",
    "toy",
]
