"""Modules of users: what they write, draw or mix is harmless or refused, wherever they stand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnf
from cnf.transforms import Coupling, MaskedAutoregressive, RecursiveCoupling, make_mask
from cnf.variational import posterior

from .table import Case, Sample, standard_normal

EAGER_AND_FUNC = ("eager", "torch.func")
EVERY = (*EAGER_AND_FUNC, "torch.compile")

# ---------------------------------------------------------------- conditioners that write


class Writing(nn.Module):
    """The shift elu(x), or 2 elu(x) + 3 sum(c) with context, each step of it in-place."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], context: int) -> None:
        super().__init__()
        self.elu = nn.ELU(inplace=True)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = self.elu(x)
        if context is None:
            return x
        context *= 3
        return x.mul_(2).add_(context.sum(-1).reshape(-1, *[1] * (x.ndim - 1)))


def shifted(mask: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
    """log p of an additive coupling with that shift: x_b - shift(x_a) is standard normal."""
    kept = torch.where(mask, x, 0.0)
    if mask.ndim == 1:  # each dimension is moved by its own neighbor
        kept = torch.where(mask, 0.0, x.index_copy(1, (~mask).nonzero()[:, 0], x[:, mask]))
    shift = F.elu(kept)
    if context is not None:
        shift = 2 * shift + 3 * context.sum(-1).reshape(-1, *[1] * (x.ndim - 1))
    return standard_normal(torch.where(mask, x, x - shift))


def writing(mask: Tensor, context: int) -> Sample:
    torch.manual_seed(0)
    layer = Coupling(tuple(mask.shape), mask, "additive", context=context, conditioner=Writing)
    x = torch.randn(5, *mask.shape)
    flow = cnf.Flow(cnf.StandardNormal(*mask.shape), layer)
    return Sample(flow, x, torch.randn(5, context) if context else None)


MASKS = {
    "halves": make_mask("halves", 4),
    "other halves": ~make_mask("halves", 4),
    "alternating": make_mask("alternating", 4),
    "checkerboard": make_mask("checkerboard", (1, 2, 2)),
}
CONDITIONERS = [
    Case(
        f"a conditioner writes, {name}, context={context}",
        partial(writing, mask, context),
        partial(shifted, mask),
        modes=EVERY if context else EAGER_AND_FUNC,
    )
    for name, mask in MASKS.items()
    for context in (0, 2)
]


class WritingShift(cnf.transforms.Elementwise):
    """x = z + p + 1, in-place."""

    parameters = 1

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return z.add_(1 + parameters[:, 0]), torch.zeros_like(z)

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x.sub_(1 + parameters[:, 0]), torch.zeros_like(x)


class WritingLayer(cnf.transforms.DiscreteTransform):
    """x = z + 1, in-place."""

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.add_(1), z.new_zeros(len(z))

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.sub_(1), x.new_zeros(len(x))


def of_layer(layer: cnf.Transform, dims: int = 2) -> Sample:
    torch.manual_seed(0)
    return Sample(cnf.Flow(cnf.StandardNormal(dims), layer), torch.randn(5, dims))


LAYERS = [
    Case(
        "a layer of one's own writes",
        lambda: of_layer(WritingLayer(2)),
        lambda x, c: standard_normal(x - 1),
        modes=EVERY,
    ),
    Case(
        "an elementwise map of one's own writes",
        lambda: of_layer(Coupling(2, "halves", WritingShift())),
        lambda x, c: standard_normal(x - torch.tensor([0.0, 1.0])),
        modes=EVERY,
    ),
]

# ---------------------------------------------------------------- fields that write


class Decay(nn.Module):
    """f = -x + c / 2; what it reads may be written before."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.write = write

    def forward(self, t: Tensor, x: Tensor, context: Tensor) -> Tensor:
        dx = -x + context / 2
        self.write(t, x, context)
        return dx

    def with_divergence(self, t: Tensor, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, x, context), x.new_full((len(x),), -2.0)


def decayed(x: Tensor, context: Tensor | None) -> Tensor:
    """x = e^-1 z + (1 - e^-1) c / 2."""
    assert context is not None
    return standard_normal(math.e * x - (math.e - 1) * context / 2) + 2


def decaying(write: Callable[[Tensor, Tensor, Tensor], None], **choices: Any) -> Sample:
    torch.manual_seed(0)
    solver = cnf.Solver("rk4", steps=20, **choices)
    transform = cnf.CNF(Decay(write), "exact", solver)
    return Sample(cnf.Flow(cnf.StandardNormal(2), transform), torch.randn(5, 2), torch.randn(5, 2))


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "t": lambda t, x, c: t.add_(1),
    "x": lambda t, x, c: x.mul_(2),
    "context": lambda t, x, c: c.mul_(0.5),
}
IN_PLACE = (RuntimeError, "in-place.*out-of-place")


def write_all(t: Tensor, x: Tensor, context: Tensor) -> None:
    for write in WRITES.values():
        write(t, x, context)


FIELDS = [
    Case(
        "a field writes all",
        partial(decaying, write_all),
        decayed,
        IN_PLACE,
        modes=EVERY,
    ),
    *(
        Case(
            f"a field writes {name}, {gradient}",
            partial(decaying, write, gradient=gradient),
            refused=IN_PLACE,
            modes=("eager",),
        )
        for name, write in WRITES.items()
        for gradient in ("backprop", "checkpoint", "adjoint")
    ),
]

# ---------------------------------------------------------------- random and mixing modules


class Holding(nn.Module):
    """A conditioner with one more module in it: linear in it, not zero at first."""

    def __init__(
        self,
        part: Callable[[], nn.Module],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        context: int,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs[0] + context, 4)
        self.part = part()
        self.last = nn.Linear(4, outputs[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x if context is None else torch.cat((x, context), 1)
        return self.last(self.part(self.first(x)))


class Drawing(nn.Module):
    """Dropout as a function, which no list of modules knows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Attending(nn.MultiheadAttention):
    """Self-attention over numbers, with dropout."""

    def __init__(self) -> None:
        super().__init__(1, 1, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.unsqueeze(-1)
        return super().forward(x, x, x, need_weights=False)[0].squeeze(-1)


class Recurrent(nn.GRU):
    """Two recurrent layers over numbers, with dropout between them."""

    def __init__(self) -> None:
        super().__init__(1, 1, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.unsqueeze(-1))[0].squeeze(-1)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm without statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
    "rrelu": nn.RReLU,
    "attention": Attending,
    "gru": Recurrent,
}


def holding(part: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return partial(Holding, part)


def in_coupling(part: Callable[[], nn.Module]) -> Sample:
    return of_layer(Coupling(2, "halves", conditioner=holding(part)))


def in_recursion(part: Callable[[], nn.Module]) -> Sample:
    return of_layer(RecursiveCoupling(4, conditioner=holding(part)), 4)


def in_network(part: Callable[[], nn.Module]) -> Sample:
    return of_layer(MaskedAutoregressive(2, hidden=(4,), activation=part()))


def in_model(part: Callable[[], nn.Module]) -> Sample:
    flow = cnf.RealNVP(4, 2, conditioner=holding(part))
    return Sample(cnf.Flow(flow.base, cnf.Inverse(flow.transform)), torch.randn(5, 4))


def in_posterior(part: Callable[[], nn.Module]) -> Sample:
    q = posterior("coupling", 2, 3, layers=2, conditioner=holding(part))
    return Sample(q, torch.randn(5, 2), torch.randn(5, 3))


def in_amortized(part: Callable[[], nn.Module]) -> Sample:
    flow = cnf.PlanarFlow(2, 1, context=4)
    free = flow.transform[0].free
    free.predict = nn.Sequential(part(), free.predict)
    return Sample(
        cnf.Flow(flow.base, cnf.Inverse(flow.transform)), torch.randn(5, 2), torch.randn(5, 4)
    )


def in_noise(part: Callable[[], nn.Module]) -> Sample:
    q = cnf.RealNVP(2, 2, context=2, conditioner=holding(part))
    ends = cnf.Sigmoid(), cnf.VariationalDequantization(q, levels=4)
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(*ends))
    return Sample(flow, torch.randint(4, (5, 2)))


class Encoding(cnf.Flow):
    """A flow with an encoder of its context."""

    def __init__(self, part: Callable[[], nn.Module]) -> None:
        flow = cnf.RealNVP(2, 2, hidden=(4,), context=4)
        super().__init__(flow.base, flow.transform)
        self.encoder = part()

    def log_prob(self, x: Tensor, context: Tensor | None = None, **choices: Any) -> Any:
        return super().log_prob(x, self.encoder(context), **choices)


def in_encoder(part: Callable[[], nn.Module]) -> Sample:
    return Sample(Encoding(part), torch.randn(5, 2), torch.randn(5, 4))


class Field(nn.Module):
    """A field with one more module in it, and a closed form of its divergence, not its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.part(x)

    def with_divergence(self, t: Tensor, x: Tensor, context: None) -> tuple[Tensor, Tensor]:
        return self(t, x), x.sum(1)


def in_field(part: Callable[[], nn.Module]) -> Sample:
    transform = cnf.CNF(Field(part()), "exact", cnf.Solver("rk4", steps=2))
    return Sample(cnf.Flow(cnf.StandardNormal(4), transform), torch.randn(5, 4))


MAIN = ("dropout", "batch norm")
PLACES = {
    "coupling": in_coupling,
    "recursion": in_recursion,
    "masked network": in_network,
    "model": in_model,
    "posterior": in_posterior,
    "amortized": in_amortized,
    "noise of a dequantization": in_noise,
    "field": in_field,
}
REFUSED = [
    Case(
        f"{name} in a {place}",
        partial(make, part),
        refused=(ValueError, "module '.*(drops at random|mixes samples|is random).*eval"),
        modes=EVERY if place == "coupling" and name in MAIN else EAGER_AND_FUNC,
    )
    for place, make in PLACES.items()
    for name, part in PARTS.items()
    if name in MAIN or place in ("coupling", "field")
]
ENCODER = Case(
    "dropout in an encoder",
    partial(in_encoder, PARTS["dropout"]),
    refused=(ValueError, "module 'encoder'.*drops at random.*eval"),
    modes=EAGER_AND_FUNC,
)
DRAWN = [
    Case(
        f"random numbers drawn in a {place}",
        partial(make, Drawing),
        refused=(ValueError, "drew random numbers.*eval"),
        modes=("eager", "torch.func"),  # a compiled program draws its own
    )
    for place, make in PLACES.items()
    if place != "amortized"
]

# ---------------------------------------------------------------- what is allowed


class Normalized(nn.Module):
    """The shift x / sqrt(4), by a batch norm with statistics of its own."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], context: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs[0], eps=0.0, affine=False)
        self.norm.running_var.fill_(4.0)  # type: ignore[union-attr]
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.dropout(self.norm(x))


def evaluated() -> Sample:
    flow, *rest = of_layer(Coupling(2, "halves", "additive", conditioner=Normalized))
    return Sample(flow.eval(), *rest)


ALLOWED = [
    Case(
        "batch norm and dropout in eval()",
        evaluated,
        lambda x, c: standard_normal(torch.stack((x[:, 0], x[:, 1] - x[:, 0] / 2), 1)),
        modes=EVERY,
    )
]

CASES = [*CONDITIONERS, *LAYERS, *FIELDS, *REFUSED, ENCODER, *DRAWN, *ALLOWED]
