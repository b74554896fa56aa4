"""Couplings and recursive couplings: what is kept, what depends on what, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cnf.transforms import (
    ActNorm,
    Additive,
    Affine,
    BatchNorm,
    Conv1x1,
    Coupling,
    Permutation,
    RationalQuadraticSpline,
    RecursiveCoupling,
    make_mask,
)


def randomised(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, 0.0, 1.5 / math.sqrt(p.shape[-1] if p.ndim > 1 else 4))
    return module.double()


def jacobian(transform, x: Tensor, *context: Tensor) -> Tensor:
    """(D, D) of one sample (D,)."""
    return torch.autograd.functional.jacobian(
        lambda v: transform.inverse(v[None], *context)[0].flatten(), x
    ).reshape(x.numel(), -1)


class Recorder(nn.Module):
    """A conditioner that returns one parameter set, and remembers what it was given."""

    def __init__(self, inputs, outputs, context) -> None:
        super().__init__()
        self.sizes = (inputs, outputs, context)
        self.values = nn.Parameter(torch.linspace(-1, 1, math.prod(outputs)).reshape(outputs))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        self.seen = (x, context)
        return self.values.expand(len(x), *self.values.shape)


def test_the_affine_formula() -> None:
    f = Coupling(5, "halves", "affine", conditioner=Recorder, context=2)
    assert f.conditioner.sizes == ((2,), (6,), 2)
    z, context = torch.randn(4, 5), torch.randn(4, 2)
    x, log_det = f.forward_and_log_det(z, context)
    kept, given = f.conditioner.seen
    assert torch.equal(kept, z[:, :2])
    assert torch.equal(given, context)
    shift, raw = torch.linspace(-1, 1, 6).reshape(2, 3)
    log_scale = 3 * torch.tanh(raw / 3)
    expected = torch.cat([z[:, :2], log_scale.exp() * z[:, 2:] + shift], 1)
    assert torch.allclose(x, expected, atol=1e-6)
    assert torch.allclose(log_det, log_scale.sum().expand(4), atol=1e-6)


def test_scales_are_clamped() -> None:
    raw = torch.tensor([-1e4, -10.0, 10.0, 1e4])
    parameters = torch.stack([torch.zeros(4), raw])[None]
    _, log_scale = Affine(2.0).forward(torch.ones(1, 4), parameters)
    assert log_scale.abs().max() <= 2.0
    assert torch.allclose(log_scale, 2 * torch.tanh(raw / 2), atol=1e-6)


def test_nice_keeps_volumes() -> None:
    f = randomised(Coupling(5, "alternating", "additive"))
    _, log_det = f.forward_and_log_det(torch.randn(4, 5).double())
    assert torch.equal(log_det, torch.zeros(4).double())


MASKS = [
    ("halves", (5,), [1, 1, 0, 0, 0]),
    ("alternating", (5,), [0, 1, 0, 1, 0]),
    ("channel", (2, 1, 2), [1, 1, 0, 0]),
    ("checkerboard", (1, 2, 3), [0, 1, 0, 1, 0, 1]),
    ("halves", (3, 2), [1, 1, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("name", "event", "kept"), MASKS, ids=lambda v: str(v))
def test_masks_by_name(name: str, event: tuple, kept: list[int]) -> None:
    mask = make_mask(name, event)
    assert mask.shape == event
    assert mask.flatten().int().tolist() == kept


@pytest.mark.parametrize("elementwise", ["affine", "additive", RationalQuadraticSpline(4, 2.0)])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("name", "event"),
    [(name, event) for name, event, _ in MASKS]
    + [("random", (6,)), ("random", (3, 2, 2)), ("halves", (2,)), ("alternating", (3,))],
    ids=lambda v: str(v),
)
def test_what_is_kept_stays_and_what_changes_depends_on_it_alone(
    elementwise, swap: bool, name: str, event: tuple
) -> None:
    torch.manual_seed(0)
    kept = make_mask(name, event)
    kept = ~kept if swap else kept
    f = randomised(Coupling(event, kept, elementwise, hidden=(8, 8)))
    x = 1.9 * torch.rand(event).double()  # within the bounds of the spline
    z = f.inverse(x[None])[0]
    assert torch.equal(z[kept], x[kept])
    assert ((z - x)[~kept].abs() > 1e-6).all()
    rows = jacobian(f, x)[~kept.flatten()]  # of what changes
    among = rows[:, ~kept.flatten()]
    assert torch.equal(among, torch.diag(among.diag())), "elementwise"
    if len(event) == 1:
        assert (rows[:, kept] != 0).all(), "every kept dimension conditions"


def test_a_loaded_layer_keeps_the_random_mask_it_was_trained_by() -> None:
    make = [lambda s=s: Coupling(7, "random", generator=torch.Generator().manual_seed(s))
            for s in (0, 1)]  # fmt: skip
    f, other = (randomised(m()).float() for m in make)
    x = torch.randn(4, 7)
    assert not torch.equal(f.inverse(x)[:, :] == x, other.inverse(x) == x)
    other.load_state_dict(f.state_dict())
    assert torch.equal(f.inverse(x), other.inverse(x))


@pytest.mark.parametrize("event", [(1,), (1, 4, 4)], ids=str)
def test_one_dimension_alone_is_refused(event: tuple) -> None:
    for make in (lambda: Coupling(event), lambda: RecursiveCoupling(event)):
        with pytest.raises(ValueError, match="two dimensions or more"):
            make()


def test_masks_that_leave_dimensions_unused_are_refused() -> None:
    for mask in (torch.ones(3).bool(), torch.zeros(3).bool()):
        with pytest.raises(ValueError, match="all of the 3 dimensions"):
            Coupling(3, mask)
    with pytest.raises(ValueError, match=r"shape \(4,\), expected features=\(3,\)"):
        Coupling(3, torch.ones(4).bool())
    with pytest.raises(TypeError, match=r"torch.float32; use mask.bool"):
        Coupling(3, torch.ones(3))
    with pytest.raises(TypeError, match=r"got list; use torch.tensor\(mask"):
        Coupling(3, [True, False, True])
    with pytest.raises(ValueError, match="checkerboard"):
        Coupling(3, "checkerboard")
    with pytest.raises(ValueError, match="Did you mean 'alternating'"):
        Coupling(3, "alternate")


def test_wrong_maps_and_conditioners_are_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'spline'"):
        Coupling(3, elementwise="splines")
    with pytest.raises(TypeError, match="elementwise must be a name"):
        Coupling(3, elementwise=3)
    narrow = Coupling(5, conditioner=lambda inputs, outputs, context: _Narrow())
    with pytest.raises(ValueError, match=r"returned the shape \(4, 2\), expected \(4, 6\)"):
        narrow.inverse(torch.randn(4, 5))
    for wrong in (5, nn.Linear(2, 6)):
        with pytest.raises(TypeError, match=r"called as conditioner\(inputs, outputs, context\)"):
            Coupling(5, conditioner=wrong)
    with pytest.raises(ValueError, match="leaves context no layer"):
        Coupling((2, 4, 4), hidden=(), context=3)
    with pytest.raises(TypeError, match="max_log_scale"):
        Affine("3")
    with pytest.raises(ValueError, match="max_log_scale"):
        Affine(0.0)
    assert Additive() == Additive()


class _Narrow(nn.Module):
    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x[:, :2]


def test_scalars_are_refused() -> None:
    for kind in (Coupling, RecursiveCoupling, Permutation, ActNorm, BatchNorm, Conv1x1):
        with pytest.raises(ValueError, match=r"features=\(\) are scalars"):
            kind(())


def test_a_layer_made_on_the_meta_device_is_filled_by_loading() -> None:
    f = randomised(Coupling(5, "alternating")).float()
    with torch.device("meta"):
        twin = Coupling(5, "alternating")
    twin.to_empty(device="cpu").load_state_dict(f.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(twin.inverse(x), f.inverse(x))
    Coupling(5).to("meta").load_state_dict(Coupling(5).state_dict(), assign=True)


@pytest.mark.parametrize("dims", [2, 3, 5, 8])
def test_a_full_recursion_has_a_dense_triangular_jacobian(dims: int) -> None:
    torch.manual_seed(0)
    f = randomised(RecursiveCoupling(dims, hidden=(16, 16), activation="tanh"))
    matrix = jacobian(f, torch.randn(dims).double())
    assert torch.equal(matrix, matrix.tril())
    assert (matrix[torch.ones(dims, dims).tril().bool()] != 0).all()
    assert matrix[0, 0] == 1


def test_the_depth_of_a_recursion() -> None:
    torch.manual_seed(0)
    flat = randomised(RecursiveCoupling(8, depth=1, activation="tanh"))
    matrix = jacobian(flat, torch.randn(8).double())
    assert torch.equal(matrix[:4, :4], torch.eye(4).double())
    assert torch.equal(matrix[4:, 4:], matrix[4:, 4:].diag().diag())
    two = randomised(RecursiveCoupling(8, depth=2, activation="tanh"))
    matrix = jacobian(two, torch.randn(8).double())
    assert torch.equal(matrix[:2, :2], torch.eye(2).double())
    assert (matrix[2:4, :2] != 0).all()
    assert torch.equal(matrix[6:, 6:], matrix[6:, 6:].diag().diag())
    with pytest.raises(ValueError, match="depth=0"):
        RecursiveCoupling(8, depth=0)
