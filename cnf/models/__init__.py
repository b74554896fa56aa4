"""Models: constructors that only compose bases, transforms and networks; every one is a `Flow`."""

from __future__ import annotations

from cnf.models.autoregressive import IAF, MAF
from cnf.models.coupling import HINT, NICE, RealNVP
from cnf.models.ffjord import FFJORD
from cnf.models.glow import Glow
from cnf.models.multiscale_ffjord import MultiscaleFFJORD
from cnf.models.planar import PlanarFlow, RadialFlow, SylvesterFlow
from cnf.models.spline import NeuralSpline

__all__ = [
    "FFJORD",
    "HINT",
    "IAF",
    "MAF",
    "NICE",
    "Glow",
    "MultiscaleFFJORD",
    "NeuralSpline",
    "PlanarFlow",
    "RadialFlow",
    "RealNVP",
    "SylvesterFlow",
]
