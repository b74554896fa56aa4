"""Squeezing, splitting and multi-scale stacks: shapes, orders, and what reaches the parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import cnf
from cnf.transforms import DiscreteTransform
from cnf.transforms.linear import Conv1x1, Diagonal, LULinear
from cnf.transforms.multiscale import Multiscale, Split, Squeeze

ORDERS = ("channel", "checkerboard")
each_order = pytest.mark.parametrize("order", ORDERS)


def drawn(transform: cnf.Transform) -> cnf.Transform:
    """In float64, with every parameter drawn anew."""
    with torch.no_grad():
        for parameter in transform.double().parameters():
            parameter.normal_(0.0, 0.5)
    return transform


def assert_a_bijection(f: cnf.Transform, *context: Tensor, **choices) -> None:
    """Round trips, and log-determinants against the brute-force Jacobian, at three samples."""
    x = torch.randn(3, *f.event_shape, dtype=torch.float64)
    z, log_det = f.inverse_and_log_det(x, *context, **choices)
    returned, negative = f.forward_and_log_det(z, *context, **choices)
    assert z.shape == (3, *f.base_shape)
    assert log_det.abs().min() > 0.01
    assert torch.allclose(returned, x, atol=1e-6)
    assert torch.allclose(negative, -log_det, atol=1e-6)
    assert torch.allclose(f.inverse(x, *context, **choices), z)
    assert torch.allclose(f.forward(z, *context, **choices), returned)
    x.requires_grad_()
    flat = f.inverse(x, *context, **choices).flatten(1)
    rows = [torch.autograd.grad(c.sum(), x, retain_graph=True)[0].flatten(1) for c in flat.T]
    truth = torch.linalg.slogdet(torch.stack(rows, 1)).logabsdet
    assert torch.allclose(log_det, truth, atol=1e-6)


class Fold(DiscreteTransform):
    """A row of numbers as a picture."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, base_shape=(math.prod(shape),))

    def to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z.reshape(len(z), *self.event_shape), z.new_zeros(len(z))

    def to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.reshape(len(x), *self.base_shape), x.new_zeros(len(x))


def test_squeezed_channel_by_channel_as_pixel_unshuffle() -> None:
    f = Squeeze((3, 4, 6))
    x = torch.randn(5, 3, 4, 6)
    z, log_det = f.inverse_and_log_det(x)
    assert f.base_shape == (12, 2, 3)
    assert torch.equal(z, nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(log_det, torch.zeros(5))


def test_squeezed_in_order_of_a_checkerboard() -> None:
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    z = Squeeze((2, 4, 6), "checkerboard").inverse(x)
    at = [(0, 0), (1, 1), (0, 1), (1, 0)]
    expected = torch.cat([x[:, :, i::2, j::2] for i, j in at], 1)
    assert torch.equal(z, expected)
    black = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    first_half = z[:, :4].flatten().sort().values
    assert torch.equal(first_half, x[:, :, black].flatten().sort().values)


@each_order
@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)], ids=str)
def test_squeezes_come_back_bit_for_bit(order: str, batch: tuple) -> None:
    f = Squeeze((3, 4, 6), order)
    x, z = torch.randn(*batch, 3, 4, 6), torch.randn(*batch, 12, 2, 3)
    assert torch.equal(f.forward(f.inverse(x)), x)
    assert torch.equal(f.inverse(f.forward(z)), z)
    assert torch.equal(f.forward_and_log_det(z)[1], torch.zeros(batch))


@each_order
def test_a_squeeze_is_the_same_under_vmap_and_compile(order: str) -> None:
    torch._dynamo.reset()
    f = Squeeze((3, 4, 6), order)
    x = torch.randn(5, 3, 4, 6)
    z = f.inverse(x)
    assert torch.equal(vmap(f.inverse)(x), z)
    assert torch.equal(vmap(f.forward)(z), x)
    assert torch.equal(torch.compile(f.inverse, backend="aot_eager", fullgraph=True)(x), z)


def test_what_cannot_be_squeezed() -> None:
    with pytest.raises(ValueError, match="height 5 not divisible by 2"):
        Squeeze((1, 5, 5))
    with pytest.raises(ValueError, match="width 3 not divisible by 2"):
        Squeeze((1, 4, 3))
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        Squeeze((4, 4))
    with pytest.raises(ValueError, match=r"order='checkers'.*'checkerboard'"):
        Squeeze((1, 4, 4), "checkers")
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 4, 2, 2\)"):
        Squeeze((1, 4, 4)).forward(torch.randn(1, 4, 4))


@pytest.mark.parametrize(("n", "half"), [(2, 1), (4, 2), (5, 3)])
def test_a_split_transforms_the_first_half_alone(n: int, half: int) -> None:
    inner = drawn(LULinear(half))
    f = Split(inner, n)
    z = torch.randn(6, n, dtype=torch.float64)
    x, log_det = f.forward_and_log_det(z)
    expected, expected_log_det = inner.forward_and_log_det(z[:, :half])
    assert torch.equal(x[:, :half], expected)
    assert torch.equal(x[:, half:], z[:, half:])
    assert torch.equal(log_det, expected_log_det)
    assert_a_bijection(f)


def test_a_split_of_channels_and_any_batch() -> None:
    f = Split(drawn(Conv1x1((2, 2, 3))), (3, 2, 3))
    assert_a_bijection(f)
    for batch in ((), (0,), (2, 3)):
        z = torch.randn(*batch, 3, 2, 3, dtype=torch.float64)
        x, log_det = f.forward_and_log_det(z)
        assert x.shape == z.shape
        assert log_det.shape == batch
        assert torch.equal(x[..., 2:, :, :], z[..., 2:, :, :])


@pytest.mark.parametrize("inner", [lambda: Fold((2, 2, 2)), lambda: Squeeze((2, 2, 2))])
def test_a_split_keeps_the_shape_where_its_transform_does_not(inner) -> None:
    f = Split(cnf.Compose(drawn(Diagonal(inner().base_shape)), inner()), (4, 2, 2))
    assert f.base_shape == f.event_shape == (4, 2, 2)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    z = f.inverse(x)
    assert torch.equal(z[:, :2].reshape(3, -1), f.transform.inverse(x[:, :2]).reshape(3, -1))
    assert_a_bijection(f)


def test_what_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) cannot be split"):
        Split(Squeeze((1, 4, 4)), (1, 4, 4))
    with pytest.raises(ValueError, match=r"event shape \(2,\).*has the shape \(3,\)"):
        Split(LULinear(2), 5)
    with pytest.raises(TypeError, match="must be a Transform"):
        Split(nn.Linear(2, 2), 4)
    f = Split(LULinear(2), 4)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., D=4\)"):
        f.forward(torch.randn(3, 2))
    with pytest.raises(TypeError, match="nonsense"):
        f.forward(torch.randn(3, 4), nonsense=1)
    with pytest.raises(ValueError, match="context"):
        f.forward(torch.randn(3, 4), torch.randn(3, 2))


def ode(features, context: int = 0) -> cnf.CNF:
    return cnf.CNF(cnf.MLPField(features, (8,), context=context), "exact")


def test_a_cnf_within_gets_context_and_choices() -> None:
    torch.manual_seed(1)
    context = torch.randn(3, 2, dtype=torch.float64)
    for f in (
        Split(ode(2, context=2), 4),
        Multiscale(ode(2, context=2), LULinear(4)),
        Multiscale(ode((1, 2, 2)), ode((2, 2, 2), context=2)),
    ):
        f = drawn(f)
        assert f.takes_context
        assert_a_bijection(f, context, solver=cnf.Solver("dopri8", rtol=1e-9, atol=1e-9))
        x = torch.randn(3, *f.event_shape, dtype=torch.float64)
        assert (f.inverse(x, context) - f.inverse(x, context + 1)).abs().max() > 1e-3
        with cnf.record_solves() as solves:
            f.inverse_and_log_det(x, context, solver=cnf.Solver("rk4", steps=3))
        assert {stats.accepted for stats in solves} == {3}
        generator = torch.Generator().manual_seed(5)
        estimate = f.inverse_and_log_det(x, context, divergence="hutchinson", generator=generator)
        generator.manual_seed(5)
        again = f.inverse_and_log_det(x, context, divergence="hutchinson", generator=generator)
        assert torch.equal(estimate[1], again[1])
    assert not Split(ode(2), 4).takes_context
    assert not Multiscale(ode(2), LULinear(4)).takes_context


def test_a_field_without_shapes_may_be_split() -> None:
    f = Split(cnf.CNF(lambda t, x: torch.tanh(x), "exact"), 4)
    assert_a_bijection(f, solver=cnf.Solver("dopri8", rtol=1e-9, atol=1e-9))


def test_the_halves_of_a_multiscale_vector() -> None:
    stages = [drawn(LULinear(n)) for n in (2, 3, 6)]
    f = Multiscale(*stages)
    x = torch.randn(4, 6, dtype=torch.float64)
    z, log_det = f.inverse_and_log_det(x)
    h, total = stages[2].inverse_and_log_det(x)
    assert torch.equal(z[:, 3:], h[:, 3:])
    h, more = stages[1].inverse_and_log_det(h[:, :3])
    total = total + more
    assert torch.equal(z[:, 2:3], h[:, 2:])
    h, more = stages[0].inverse_and_log_det(h[:, :2])
    assert torch.equal(z[:, :2], h)
    assert torch.allclose(log_det, total + more)
    assert_a_bijection(f)


def stage(shape: tuple[int, int, int], order: str = "channel") -> cnf.Transform:
    squeeze = Squeeze(shape, order)
    return cnf.Compose(
        Diagonal(squeeze.base_shape), cnf.Inverse(Conv1x1(squeeze.base_shape)), squeeze
    )


@each_order
def test_the_scales_of_an_image(order: str) -> None:
    shapes = [(4, 1, 2), (2, 2, 4), (1, 4, 8)]
    first, *stages = [drawn(stage(shape, order)) for shape in shapes[1:]]
    last = drawn(Diagonal((4, 1, 2)))
    f = Multiscale(last, first, *stages)
    assert f.event_shape == f.base_shape == (1, 4, 8)
    x = torch.randn(3, 1, 4, 8, dtype=torch.float64)
    z = f.inverse(x).flatten(1)
    h = stages[0].inverse(x)
    assert torch.equal(z[:, 16:], h[:, 2:].flatten(1))
    h = first.inverse(h[:, :2])
    assert torch.equal(z[:, 8:16], h[:, 4:].flatten(1))
    assert torch.equal(z[:, :8], last.inverse(h[:, :4]).flatten(1))
    assert_a_bijection(f)
    for batch in ((), (0,), (2, 3)):
        value, log_det = f.forward_and_log_det(torch.randn(*batch, 1, 4, 8, dtype=torch.float64))
        assert value.shape == (*batch, 1, 4, 8)
        assert log_det.shape == batch


def test_one_stage_alone_is_itself_with_z_in_the_shape_of_x() -> None:
    only = drawn(stage((1, 2, 4)))
    f = Multiscale(only)
    x = torch.randn(3, 1, 2, 4, dtype=torch.float64)
    assert torch.equal(f.inverse(x), only.inverse(x).reshape(3, 1, 2, 4))
    assert_a_bijection(f)


def test_a_multiscale_flow_is_a_density() -> None:
    """Its samples have the density that it says: the mean log ratio to a Gaussian fits."""
    torch.manual_seed(1)
    f = drawn(Multiscale(LULinear(1), LULinear(2)))
    flow = cnf.Flow(cnf.StandardNormal(2).double(), f)
    axis = torch.linspace(-40, 40, 1500, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total.item() - 1) < 1e-3


def test_it_is_the_same_under_vmap_and_compile() -> None:
    torch._dynamo.reset()
    f = drawn(Multiscale(Diagonal((2, 2, 2)), stage((1, 4, 4))))
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    z, log_det = f.inverse_and_log_det(x)
    compiled = torch.compile(f.inverse_and_log_det, backend="aot_eager", fullgraph=True)
    for other, other_log_det in (vmap(f.inverse_and_log_det)(x), compiled(x)):
        assert torch.allclose(other, z)
        assert torch.allclose(other_log_det, log_det)


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        Multiscale()
    with pytest.raises(TypeError, match=r"stages\[1\] must be a Transform, got Linear"):
        Multiscale(LULinear(2), nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"stages\[0\] \(a LULinear\) does not fit.*\(3,\).*\(2,\)"
    ):
        Multiscale(LULinear(3), LULinear(4))
    with pytest.raises(ValueError, match=r"stages\[1\] \(a Compose\) does not fit.*stages\[2\]"):
        Multiscale(Diagonal((2, 1, 2)), stage((1, 2, 4)), stage((1, 4, 8)))
    shapeless = cnf.CNF(lambda t, x: x)
    with pytest.raises(ValueError, match=r"stages\[1\] \(a CNF\) has no fixed event shape"):
        Multiscale(LULinear(2), shapeless)
    with pytest.raises(ValueError, match=r"stages\[1\] \(a CNF\) has no fixed base shape"):
        Multiscale(LULinear(2), shapeless, LULinear(8))
    with pytest.raises(ValueError, match=r"cannot be split"):
        Multiscale(LULinear(1), LULinear(1))
    f = Multiscale(LULinear(2), LULinear(4))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., D=4\)"):
        f.inverse(torch.randn(3, 5))
    with pytest.raises(ValueError, match="context was given"):
        f.inverse(torch.randn(3, 4), torch.randn(3, 1))
    with pytest.raises(TypeError, match="nonsense"):
        f.inverse(torch.randn(3, 4), nonsense=1)
