"""Invertible maps with log-determinants; every flow is a base density and one of these."""

from __future__ import annotations

from cnf.transforms.autoregressive import MaskedAutoregressive
from cnf.transforms.base import Choices, Compose, Inverse, Transform
from cnf.transforms.conditioners import MLP, ConvNet
from cnf.transforms.continuous import CNF
from cnf.transforms.coupling import Coupling
from cnf.transforms.dequantization import UniformDequantization, VariationalDequantization
from cnf.transforms.discrete import DiscreteTransform
from cnf.transforms.elementwise import Additive, Affine, Elementwise
from cnf.transforms.interval import Interval
from cnf.transforms.linear import Conv1x1, Diagonal, Linear, LULinear, QRLinear
from cnf.transforms.made import MADE
from cnf.transforms.masks import make_mask
from cnf.transforms.multiscale import Multiscale, Split, Squeeze
from cnf.transforms.normalization import ActNorm, BatchNorm
from cnf.transforms.permutation import Permutation
from cnf.transforms.planar import Planar
from cnf.transforms.radial import Radial
from cnf.transforms.recursive import RecursiveCoupling
from cnf.transforms.sigmoid import Sigmoid
from cnf.transforms.spline import RationalQuadraticSpline
from cnf.transforms.sylvester import Sylvester

__all__ = [
    "CNF",
    "MADE",
    "MLP",
    "ActNorm",
    "Additive",
    "Affine",
    "BatchNorm",
    "Choices",
    "Compose",
    "Conv1x1",
    "ConvNet",
    "Coupling",
    "Diagonal",
    "DiscreteTransform",
    "Elementwise",
    "Interval",
    "Inverse",
    "LULinear",
    "Linear",
    "MaskedAutoregressive",
    "Multiscale",
    "Permutation",
    "Planar",
    "QRLinear",
    "Radial",
    "RationalQuadraticSpline",
    "RecursiveCoupling",
    "Sigmoid",
    "Split",
    "Squeeze",
    "Sylvester",
    "Transform",
    "UniformDequantization",
    "VariationalDequantization",
    "make_mask",
]
