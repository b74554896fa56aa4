"""Which parts of a composition get context, and which shapes may be neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.transforms import (
    Diagonal,
    DiscreteTransform,
    Multiscale,
    Planar,
    Radial,
    Split,
    Squeeze,
    Sylvester,
)

DIRECTIONS = ("forward", "inverse")
TIGHT = cnf.Solver(rtol=1e-9, atol=1e-9)


class Reverse(DiscreteTransform):
    """The dimensions in reverse order: no context, no parameters."""

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        assert context is None
        return z.flip(-1), z.new_zeros(len(z))

    to_base = to_data


class Shift(DiscreteTransform):
    """x = z + W c."""

    def __init__(self, features: int, context: int) -> None:
        super().__init__(features, context)
        self.weight = nn.Parameter(torch.randn(features, context))

    def to_data(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return z + context @ self.weight.T, z.new_zeros(len(z))

    def to_base(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return x - context @ self.weight.T, x.new_zeros(len(x))


class Fold(DiscreteTransform):
    """Rows of four numbers as pictures (2, 2), each number doubled."""

    def __init__(self) -> None:
        super().__init__((2, 2), base_shape=(4,))

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return 2 * z.reshape(-1, 2, 2), z.new_full((len(z),), 4.0).log() * 2

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, 4) / 2, x.new_full((len(x),), 4.0).log() * -2


class AnyShape(cnf.Transform):
    """Knows no shape, and takes context without use for it."""

    def forward_and_log_det(self, z, context=None, **choices):
        return z, z.new_zeros(z.shape[:-1])

    inverse_and_log_det = forward_and_log_det


def calls(transform: cnf.Transform) -> list:
    """All its calls: both directions, joint and of values alone."""
    names = [f"{direction}{end}" for direction in DIRECTIONS for end in ("", "_and_log_det")]
    return [getattr(transform, name) for name in names]


def test_context_goes_to_those_that_take_it_alone() -> None:
    shift = Shift(3, 2)
    flow = cnf.Compose(Reverse(3), shift, cnf.Inverse(Reverse(3)))
    z, context = torch.randn(5, 3), torch.randn(5, 2)
    x, log_det = flow.forward_and_log_det(z, context)
    expected = (z.flip(-1) + context @ shift.weight.T).flip(-1)
    assert torch.allclose(x, expected)
    assert torch.equal(flow.forward(z, context), x)
    assert torch.equal(log_det, torch.zeros(5))
    returned, _ = flow.inverse_and_log_det(x, context)
    assert torch.allclose(returned, z, atol=1e-6)
    assert torch.equal(flow.inverse(x, context), returned)


def test_context_goes_through_nested_compositions_and_inverses() -> None:
    shift = Shift(3, 2)
    inner = cnf.Compose(Reverse(3), cnf.Inverse(cnf.Compose(Reverse(3), shift)))
    flow = cnf.Compose(cnf.Compose(Reverse(3), Reverse(3)), cnf.Inverse(inner))
    assert flow.takes_context
    assert not flow.transforms[0].takes_context
    z, context = torch.randn(5, 3), torch.randn(2)
    assert torch.allclose(
        flow.forward(z, context), z + (shift.weight @ context).flip(-1), atol=1e-6
    )
    assert torch.allclose(
        flow.inverse(z, context), z - (shift.weight @ context).flip(-1), atol=1e-6
    )


def test_context_that_none_takes_is_refused() -> None:
    parts = [Reverse(3), cnf.Inverse(Reverse(3))]
    nested = cnf.Compose(cnf.Compose(*parts), *parts)
    for flow in (cnf.Compose(*parts), nested):
        assert not flow.takes_context
        for call in calls(flow):
            with pytest.raises(ValueError, match=rf"none of the {len(flow)} transforms takes one"):
                call(torch.randn(5, 3), torch.randn(5, 2))


def test_context_that_is_missing_is_asked_for() -> None:
    for call in calls(cnf.Compose(Reverse(3), Shift(3, 2))):
        with pytest.raises(ValueError, match=r"context is missing.*Shift.*context=2"):
            call(torch.randn(5, 3))


def test_parts_share_one_context() -> None:
    """Parts built with other numbers of context features cannot be given the same context."""
    flow = cnf.Compose(Shift(3, 2), Reverse(3), Shift(3, 1))
    for call in calls(flow):
        with pytest.raises(ValueError, match=r"context has \d features, expected context=\d"):
            call(torch.randn(5, 3), torch.randn(5, 2))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_a_cnf_with_context_beside_transforms_without(batch: tuple) -> None:
    field = cnf.MLPField(3, (8,), context=2)
    flow = cnf.Compose(Reverse(3), cnf.CNF(field, "exact", TIGHT), Reverse(3)).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.7)
    z, context = torch.randn(*batch, 3).double(), torch.randn(*batch, 2).double()
    x, log_det = flow.forward_and_log_det(z, context)
    alone, expected = cnf.CNF(field, "exact", TIGHT).forward_and_log_det(z.flip(-1), context)
    assert torch.equal(x, alone.flip(-1))
    assert torch.equal(log_det, expected)
    returned, negative = flow.inverse_and_log_det(x, context, solver=TIGHT)
    assert torch.allclose(returned, z, atol=1e-6)
    assert torch.allclose(negative, -log_det, atol=1e-6)
    assert (flow.forward(z, context + 1) - x).abs().max() > 1e-3


def test_a_cnf_without_context_refuses_it_beside_transforms_without() -> None:
    flow = cnf.Compose(Reverse(3), cnf.CNF(cnf.MLPField(3, (8,))), Reverse(3))
    assert not flow.takes_context
    with pytest.raises(ValueError, match="none of the 3 transforms takes one"):
        flow.forward(torch.randn(5, 3), torch.randn(5, 2))


def test_a_flow_of_mixed_parts_is_a_density_given_context() -> None:
    """log p(x | c) = log p_0(z) + log |det dz/dx|, and other contexts, other densities."""
    shift = Shift(4, 2)
    flow = cnf.Flow(cnf.StandardNormal(4), cnf.Compose(Reverse(4), shift, Fold()))
    x, context = torch.randn(5, 2, 2), torch.randn(5, 2)
    z = (x.reshape(5, 4) / 2 - context @ shift.weight.T).flip(-1)
    expected = cnf.StandardNormal(4).log_prob(z) - 4 * torch.tensor(2.0).log()
    assert torch.allclose(flow.log_prob(x, context), expected, atol=1e-5)
    assert flow.event_shape == (2, 2)
    sample, log_prob = flow.sample_and_log_prob((), context)
    assert sample.shape == (5, 2, 2)
    assert torch.allclose(flow.log_prob(sample, context), log_prob, atol=1e-5)


def test_choices_reach_the_cnfs_beside_discrete_transforms() -> None:
    flow = cnf.Compose(Reverse(3), cnf.CNF(cnf.MLPField(3, (8,))), cnf.Inverse(Reverse(3)))
    z = torch.randn(5, 3)
    with cnf.record_solves() as solves:
        x, _ = flow.forward_and_log_det(z, solver=cnf.Solver("rk4", steps=3), divergence="exact")
        flow.inverse(x, solver=cnf.Solver("euler", steps=2))
    assert [(solve.method, solve.accepted) for solve in solves] == [("rk4", 3), ("euler", 2)]


def test_shapes_go_from_the_base_of_the_first_to_the_data_of_the_last() -> None:
    flow = cnf.Compose(Reverse(4), Fold(), cnf.Inverse(Fold()), Reverse(4), Fold())
    assert (flow.base_shape, flow.event_shape) == ((4,), (2, 2))
    inverse = cnf.Inverse(flow)
    assert (inverse.base_shape, inverse.event_shape) == ((2, 2), (4,))
    x, log_det = flow.forward_and_log_det(torch.randn(5, 4))
    assert x.shape == (5, 2, 2)
    assert torch.allclose(log_det, 4 * torch.tensor(2.0).log().expand(5))
    z, negative = inverse.forward_and_log_det(x)
    assert z.shape == (5, 4)
    assert torch.equal(negative, -log_det)


def test_shapes_that_no_part_knows_are_none() -> None:
    flow = cnf.Compose(AnyShape(), AnyShape())
    assert flow.base_shape is None
    assert flow.event_shape is None
    assert cnf.Inverse(flow).event_shape is None
    assert flow.forward(torch.randn(5, 7)).shape == (5, 7)


def test_shapes_are_known_beside_parts_that_know_none() -> None:
    flow = cnf.Compose(AnyShape(), Reverse(3), AnyShape())
    assert flow.event_shape == (3,)
    field = cnf.CNF(lambda t, x: -x)
    assert cnf.Compose(Reverse(3), field).event_shape == (3,)


@pytest.mark.parametrize(
    ("make", "reads", "gives", "position"),
    [
        (lambda: cnf.Compose(Reverse(3), Reverse(4)), (4,), (3,), 1),
        (lambda: cnf.Compose(Reverse(4), Fold(), Fold()), (4,), (2, 2), 2),
        (lambda: cnf.Compose(cnf.Inverse(Fold()), Reverse(4), Reverse(2)), (2,), (4,), 2),
        (lambda: cnf.Compose(cnf.CNF(cnf.MLPField(3)), Reverse(4)), (4,), (3,), 1),
        (lambda: cnf.Compose(cnf.Compose(Reverse(3)), cnf.Compose(Reverse(4))), (4,), (3,), 1),
        (lambda: cnf.Compose(Reverse(3), AnyShape(), Reverse(4)), (4,), (3,), 2),
    ],
)
def test_neighbours_of_different_shapes_are_refused(make, reads, gives, position) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert f"transforms[{position}]" in message
    assert str(reads) in message
    assert str(gives) in message


def test_a_base_of_another_shape_than_the_first_reads_is_refused() -> None:
    transform = cnf.Compose(Reverse(4), Fold())
    assert cnf.Flow(cnf.StandardNormal(4), transform).sample((3,)).shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(4,\)|\(4,\).*\(2, 2\)"):
        cnf.Flow(cnf.StandardNormal(2, 2), transform)


def test_neighbours_of_another_rank_are_refused() -> None:
    """A CNF of a plain function has no shape, but a number of event dimensions."""
    line = cnf.CNF(lambda t, x: -x.sin(), "exact")
    for make in (
        lambda: cnf.Compose(line, Diagonal((2, 2))),
        lambda: cnf.Compose(Diagonal((2, 2)), line),
        lambda: cnf.Compose(cnf.Inverse(line), cnf.Compose(Diagonal((2, 2)))),
        lambda: Split(line, (4, 2)),
        lambda: Multiscale(line, Diagonal((4, 2))),
    ):
        with pytest.raises(ValueError, match=r"event_dims=1, but samples .*event_dims=2"):
            make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_discrete_flows_compute_as_without(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    flows = [
        cnf.RealNVP(4, 2, (8,), mixing="lu"),
        cnf.NeuralSpline(4, 2, (8,)),
        cnf.MAF(4, 2, (8,)),
        cnf.SylvesterFlow(4, 2),
        cnf.HINT(4, 2, (8,)),
    ]
    x = torch.randn(5, 4)
    for flow in flows:
        for p in flow.parameters():
            torch.nn.init.normal_(p, 0.0, 0.5)
        expected = flow.log_prob(x)
        with torch.autocast("cpu", dtype):
            assert torch.equal(flow.log_prob(x), expected)
            assert flow.sample((3,)).dtype == torch.float32


def cooling(event_dims: int) -> cnf.CNF:
    """The flow of a plain function, which knows no shape: x = z / e."""
    return cnf.CNF(lambda t, x: -x, "exact", event_dims=event_dims)


def test_the_base_shape_is_that_of_the_first_part_that_has_one() -> None:
    for parts in (
        (cooling(3), Squeeze((1, 4, 4))),
        (cooling(3), cooling(3), Diagonal((4, 2, 2)), Squeeze((1, 4, 4))),
        (cnf.Inverse(cooling(3)), Squeeze((1, 4, 4)), cooling(3)),
        (cnf.Compose(cooling(3), cnf.Compose(cooling(3), Squeeze((1, 4, 4)))), cooling(3)),
    ):
        transform = cnf.Compose(*parts)
        assert (transform.base_shape, transform.event_shape) == ((4, 2, 2), (1, 4, 4))
        inverse = cnf.Inverse(transform)
        assert (inverse.base_shape, inverse.event_shape) == ((1, 4, 4), (4, 2, 2))
    diagonal = cnf.Compose(cooling(1), Diagonal(3))
    assert diagonal.base_shape == diagonal.event_shape == (3,)


def test_the_event_shape_is_that_of_the_last_part_that_has_one() -> None:
    for parts in (
        (cnf.Inverse(Squeeze((1, 4, 4))), cooling(3)),
        (cnf.Inverse(Squeeze((1, 4, 4))), Diagonal((4, 2, 2)), cooling(3), cooling(3)),
        (cnf.Compose(cooling(3), cnf.Inverse(Squeeze((1, 4, 4)))), cooling(3)),
    ):
        transform = cnf.Compose(*parts)
        assert (transform.base_shape, transform.event_shape) == ((1, 4, 4), (4, 2, 2))


def test_a_flow_whose_first_part_knows_no_shape() -> None:
    """It draws base samples of the shape that the parts behind the first one read."""
    flow = cnf.Flow(cnf.StandardNormal(4, 2, 2), cnf.Compose(cooling(3), Squeeze((1, 4, 4))))
    assert flow.event_shape == (1, 4, 4)
    x, log_prob = flow.sample_and_log_prob((5,))
    assert x.shape == (5, 1, 4, 4)
    expected = cnf.StandardNormal(1, 4, 4).log_prob(torch.e * x) + 16
    assert torch.allclose(log_prob, expected, atol=1e-4)
    assert torch.allclose(flow.log_prob(x), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(4, 2, 2\)"):
        cnf.Flow(cnf.StandardNormal(1, 4, 4), flow.transform)


LAYERS = {
    "planar": Planar,
    "radial": Radial,
    "diagonal": Diagonal,
    "sylvester": Sylvester,
    "householder": lambda *args, **options: Sylvester(*args, kind="householder", **options),
    "triangular": lambda *args, **options: Sylvester(*args, kind="triangular", **options),
}


@pytest.mark.parametrize("context", [1, 3, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_whose_parameters_context_gives_start_near_the_identity(name, context) -> None:
    z, c = torch.randn(200, 4), torch.randn(200, context)
    x, log_det = LAYERS[name](4, context=context).forward_and_log_det(z, c)
    assert log_det.abs().mean() < 0.5
    assert (x - z).square().mean().sqrt() < 0.25
    assert log_det.std() > 1e-4, "context counts from the start"
