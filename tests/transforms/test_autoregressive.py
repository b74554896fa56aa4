"""Autoregressive transforms: what depends on what, and sampling that computes nothing twice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cnf.transforms import MADE, Inverse, MaskedAutoregressive


def randomised(module: nn.Module, scale: float = 1.5) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, 0.0, scale / math.sqrt(p.shape[-1] if p.ndim > 1 else 4))
    return module.double()


def jacobian(function, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda v: function(v[None])[0], x)


HIDDEN = {"narrow": (3,), "two": (16, 16), "wide": (40, 20, 40)}
ORDERS = {"forward": [0, 1, 2, 3, 4], "reverse": [4, 3, 2, 1, 0], "given": [3, 0, 4, 1, 2]}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("hidden", [(16,), (16, 16), (32, 32, 32)], ids=str)
@pytest.mark.parametrize("name", ORDERS)
def test_each_dimension_depends_on_those_before_it(name: str, hidden, residual: bool) -> None:
    torch.manual_seed(0)
    ordering = ORDERS[name] if name == "given" else name
    f = randomised(
        MaskedAutoregressive(
            5, hidden=hidden, ordering=ordering, residual=residual, activation="tanh"
        )
    )
    matrix = jacobian(f.inverse, torch.randn(5).double())
    matrix = matrix[ORDERS[name]][:, ORDERS[name]]
    assert torch.equal(matrix, matrix.tril())
    assert (matrix[torch.ones(5, 5).tril().bool()] != 0).all()


def test_the_affine_formula() -> None:
    f = randomised(MaskedAutoregressive(3))
    x = torch.randn(4, 3).double()
    z, log_det = f.inverse_and_log_det(x)
    shift, raw = f.conditioner(x).unbind(1)
    log_scale = 3 * torch.tanh(raw / 3)
    assert torch.allclose(z, (x - shift) / log_scale.exp(), atol=1e-12)
    assert torch.allclose(log_det, -log_scale.sum(1), atol=1e-12)


@pytest.mark.filterwarnings("ignore:hidden=")  # narrow layers too
@pytest.mark.parametrize("dims", [1, 2, 5, 9])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("hidden", [(3,), (16, 16), (7, 7, 7)], ids=str)
@pytest.mark.parametrize("elementwise", ["affine", "spline"])
def test_sampling_equals_the_whole_network_once_a_dimension(
    dims: int, context: int, residual: bool, hidden, elementwise: str
) -> None:
    """The usual algorithm: repeat x <- g(z; network(x)) until every dimension is right."""
    torch.manual_seed(0)
    f = randomised(
        MaskedAutoregressive(
            dims, elementwise, hidden=hidden, context=context, residual=residual, ordering="random"
        )
    )
    z = torch.randn(6, dims).double()
    c = torch.randn(6, context).double() if context else None
    order = torch.arange(dims) if f.order is None else f.order
    x = torch.zeros_like(z)
    for _ in range(dims):
        x, log_slope = f.elementwise.forward(z[:, order], f.conditioner(x, c))
    back = order.argsort()
    value, log_det = f.forward_and_log_det(z, c)
    assert torch.allclose(value, x[:, back], atol=1e-10)
    assert torch.allclose(log_det, log_slope.sum(1), atol=1e-10)


def test_sampling_computes_each_hidden_unit_once(monkeypatch) -> None:
    f = MaskedAutoregressive(43, hidden=(128, 128))
    work = {"whole": 0, "steps": 0}
    linear = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        work[part] += weight.numel()
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    x = torch.randn(2, 43)
    part = "whole"
    f.inverse(x)
    part = "steps"
    f.forward(x)
    assert 0 < work["steps"] <= work["whole"]


@pytest.mark.parametrize("elementwise", ["affine", "spline"])
def test_the_first_dimension_depends_on_context(elementwise: str) -> None:
    f = randomised(MaskedAutoregressive(3, elementwise, context=2))
    x = torch.randn(4, 3).double()
    a, b = (f.inverse(x, torch.full((2,), value).double()) for value in (0.0, 1.0))
    assert ((a - b).abs() > 1e-6).all()


@pytest.mark.parametrize(("elementwise", "limit"), [("affine", 1e-4), ("spline", 1e-3)])
def test_in_float32_wild_networks_come_back_to_where_they_went(
    elementwise: str, limit: float
) -> None:
    """Parameters three times as large as they start, 32 dimensions, 200 networks.

    Splines are given more: their slopes reach 140, and magnify the rounding of the network, which
    one pass and D steps do in another order.
    """
    torch.manual_seed(0)
    for _ in range(200):
        f = MaskedAutoregressive(32, elementwise, hidden=(32, 32))
        f.conditioner.last.reset_parameters()  # as any other layer starts
        with torch.no_grad():
            for p in f.parameters():
                p.mul_(3.0)
        z = torch.randn(16, 32)
        x, log_det = f.forward_and_log_det(z)
        returned, negative = f.inverse_and_log_det(x)
        assert x.isfinite().all()
        assert (returned - z).abs().max() <= limit
        assert (log_det + negative).abs().max() <= 1e-3


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(("dims", "width"), [(2, 2), (5, 5), (9, 20), (30, 64)])
def test_no_dependence_is_lost_in_a_layer_of_enough_units(
    context: int, dims: int, width: int
) -> None:
    torch.manual_seed(0)
    width += width // 8 + 1 if context else 0  # for context alone
    f = randomised(
        MaskedAutoregressive(dims, hidden=(width, width), context=context, activation="tanh")
    )
    c = torch.randn(1, context).double() if context else None
    matrix = jacobian(lambda x: f.inverse(x, c), torch.randn(dims).double())
    assert (matrix[torch.ones(dims, dims).tril().bool()] != 0).all()


def test_narrow_layers_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="a layer of 4 units cannot keep all of the 9"):
        MaskedAutoregressive(9, hidden=(16, 4))


def test_the_first_dimension_sees_context_by_an_eighth_of_the_units() -> None:
    made = MADE(64, 2, (64, 64), context=3)
    assert [degrees.count(0) for degrees in made.degrees] == [8, 8]


def test_empty_memory_becomes_the_masks_when_a_state_is_loaded() -> None:
    f = randomised(MaskedAutoregressive(4)).float()
    with torch.device("meta"):
        twin = MaskedAutoregressive(4)
    twin.to_empty(device="cpu")
    for buffer in twin.buffers():
        buffer.fill_(7)
    twin.load_state_dict(f.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(twin.inverse(x), f.inverse(x))
    with torch.device("meta"):
        twin = MaskedAutoregressive(4)
    twin.load_state_dict(f.state_dict(), assign=True)
    assert torch.equal(twin.inverse(x), f.inverse(x))


def test_iaf_is_its_inverse() -> None:
    f = randomised(MaskedAutoregressive(4))
    z = torch.randn(3, 4).double()
    assert torch.equal(Inverse(f).forward(z), f.inverse(z))


def test_wrong_arguments_are_refused() -> None:
    for ordering in ([0, 0, 1], [0, 1], ["a"], [0.0, 1.0, 2.0], [True, False, 2], 5):
        with pytest.raises(ValueError, match=r"ordering=.* each of the integers 0, ..., 2 once"):
            MaskedAutoregressive(3, ordering=ordering)
    with pytest.raises(ValueError, match="Did you mean 'reverse'"):
        MaskedAutoregressive(3, ordering="reversed")
    with pytest.raises(ValueError, match=r"features=\(1, 2, 2\) must be a number"):
        MaskedAutoregressive((1, 2, 2))
    with pytest.raises(ValueError, match=r"hidden=\(8, 9\) must be equal"):
        MADE(3, 2, (8, 9), residual=True)
    with pytest.raises(ValueError, match=r"hidden=\(\)"):
        MADE(3, 2, ())
