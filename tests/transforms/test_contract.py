"""What every Transform promises, checked for each entry of one registry.

To put a new transform under the contract, add a `Kind` to `KINDS`.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import cnf

TIGHT = cnf.Solver(rtol=1e-8, atol=1e-8)
FIXED = cnf.Solver("rk4", steps=4)


class Rate(nn.Module):
    """A user's field of (t, x), for samples that are scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x.unsqueeze(-1) * self.weight + self.bias * (1 + t)).sum(-1)


class Kind(NamedTuple):
    """A kind of transform, and what its inputs look like."""

    name: str
    make: Callable[[], cnf.Transform]
    event: tuple[int, ...] = (3,)
    context: int = 0
    spread: float = 1.5

    def inputs(self, *batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(z,), or (z, context)."""
        z = torch.randn((*batch, *self.event), dtype=dtype)
        return (z, torch.randn(*batch, self.context, dtype=dtype)) if self.context else (z,)

    def random(self, dtype: torch.dtype = torch.float32) -> cnf.Transform:
        """The transform with every parameter drawn anew, so that none of it is the identity."""
        transform = self.make().to(dtype)
        with torch.no_grad():
            for parameter in transform.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.normal_(0.0, self.spread / math.sqrt(fan_in))
        return transform


def mlp(features, hidden=(12,), context=0, solver=None, **options) -> cnf.CNF:
    field = cnf.MLPField(features, hidden, context=context, frequencies=1, **options)
    return cnf.CNF(field, "exact", solver)


def squash(features, hidden=(12,), context=0) -> cnf.CNF:
    return cnf.CNF(cnf.ConcatSquashField(features, hidden, context=context), "exact")


def scales(features, context=0) -> cnf.Transform:
    small = {"hidden": (4, 4), "levels": 2, "blocks": 1, "frequencies": 0}
    return cnf.MultiscaleFFJORD(features, context=context, divergence="exact", **small).transform


KINDS = [
    Kind("cnf-mlp", lambda: mlp(3)),
    Kind("cnf-mlp-linear", lambda: mlp(3, hidden=())),
    Kind("cnf-mlp-softplus", lambda: mlp(3, activation="softplus")),
    Kind("cnf-mlp-context", lambda: mlp(3, context=2), context=2),
    Kind("cnf-mlp-picture", lambda: mlp((2, 2, 3)), event=(2, 2, 3)),
    Kind("cnf-concatsquash", lambda: squash(3)),
    Kind("cnf-concatsquash-context", lambda: squash(3, context=2), context=2),
    Kind("cnf-concatsquash-picture", lambda: squash((1, 2, 2)), event=(1, 2, 2)),
    Kind("cnf-scalar", lambda: cnf.CNF(Rate(), "exact", event_dims=0), event=()),
    Kind("cnf-one-dimension", lambda: mlp(1), event=(1,)),
    Kind("cnf-checkpoint", lambda: mlp(3, solver=cnf.Solver(gradient="checkpoint"))),
    Kind("cnf-adjoint", lambda: mlp(3, solver=cnf.Solver(gradient="adjoint"))),
    Kind("cnf-torchdiffeq", lambda: mlp(3, solver=cnf.TorchDiffEq(rtol=1e-6, atol=1e-6))),
    Kind("compose", lambda: cnf.Compose(mlp(3), squash(3))),
    Kind("inverse", lambda: cnf.Inverse(mlp(3))),
    Kind(
        "compose-nested",
        lambda: cnf.Compose(
            squash(3, context=2), cnf.Inverse(cnf.Compose(mlp(3, context=2), squash(3, context=2)))
        ),
        context=2,
    ),
    Kind("multiscale-grey", lambda: scales((1, 4, 4)), event=(1, 4, 4), spread=0.8),
    Kind("multiscale-colours", lambda: scales((3, 4, 4), 2), (3, 4, 4), context=2, spread=0.8),
]

DIRECTIONS = ("forward", "inverse")
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def kind(request) -> Kind:
    torch.manual_seed(1)
    return request.param


def joint(transform: cnf.Transform, direction: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(transform, f"{direction}_and_log_det")


def brute_force(
    transform: cnf.Transform, direction: str, tolerance: float, z: Tensor, *context: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and log |det J| in float64, far below the tolerance of the test.

    Row i of every sample's Jacobian comes from one backward pass, because samples do not depend
    on one another (which has its own test).
    """
    transform = copy.deepcopy(transform).double()
    z, *context = (t.double() for t in (z, *context))
    z.requires_grad_()
    truth = cnf.Solver("dopri8", rtol=tolerance / 100, atol=tolerance / 100)
    value = getattr(transform, direction)(z, *context, solver=truth)
    flat = value.reshape(len(z), -1)  # (B, D)
    rows = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0] for column in flat.T]
    jacobian = torch.stack([row.reshape(flat.shape) for row in rows], 1)  # (B, D, D)
    return value.detach(), torch.linalg.slogdet(jacobian).logabsdet


def assert_close(value: Tensor, truth: Tensor, tolerance: float) -> None:
    """Equal up to ten times the tolerance, relative to the size of the state."""
    assert torch.allclose(value.to(truth), truth, rtol=10 * tolerance, atol=10 * tolerance)


PRECISIONS = {
    "float32-default": (torch.float32, {}, 1e-4),
    "float64-tight": (torch.float64, {"solver": TIGHT}, 1e-7),
}
each_precision = pytest.mark.parametrize(
    ("dtype", "choices", "tolerance"), PRECISIONS.values(), ids=PRECISIONS
)


@each_precision
@each_direction
def test_log_det_equals_the_brute_force_jacobian(
    kind: Kind, direction: str, dtype, choices, tolerance: float
) -> None:
    transform = kind.random(dtype)
    inputs = kind.inputs(3, dtype=dtype)
    value, log_det = joint(transform, direction)(*inputs, **choices)
    true_value, true_log_det = brute_force(transform, direction, tolerance, *inputs)
    assert true_log_det.abs().max() > 0.1, "these parameters test nothing"
    assert (log_det - true_log_det).abs().max() <= tolerance
    assert_close(value, true_value, tolerance)


@each_precision
def test_round_trip(kind: Kind, dtype, choices, tolerance: float) -> None:
    transform = kind.random(dtype)
    z, *context = kind.inputs(8, dtype=dtype)
    for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
        x, log_det = joint(transform, there)(z, *context, **choices)
        returned, negative = joint(transform, back)(x, *context, **choices)
        assert (x - z).abs().max() > 0.1
        assert_close(returned, z, tolerance)
        assert_close(negative, -log_det, tolerance)


@each_direction
def test_the_value_alone_is_the_value_with_log_det(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = kind.inputs(8)
    alone = getattr(transform, direction)
    value, _ = joint(transform, direction)(*inputs)
    assert_close(alone(*inputs), value, 1e-5)
    value, _ = joint(transform, direction)(*inputs, solver=FIXED)
    assert torch.allclose(alone(*inputs, solver=FIXED), value, atol=1e-6)


def test_called_as_a_module_it_goes_forward(kind: Kind) -> None:
    transform = kind.random()
    inputs = kind.inputs(2)
    assert torch.equal(transform(*inputs), transform.forward(*inputs))


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
@each_direction
def test_shapes_and_any_batch_dimensions(kind: Kind, direction: str, batch: tuple) -> None:
    transform = kind.random()
    inputs = kind.inputs(*batch)
    value, log_det = joint(transform, direction)(*inputs, solver=FIXED)
    assert value.shape == inputs[0].shape
    assert log_det.shape == batch
    assert value.dtype == log_det.dtype == torch.float32
    flat = [t.reshape(math.prod(batch), *t.shape[len(batch) :]) for t in inputs]
    flat_value, flat_log_det = joint(transform, direction)(*flat, solver=FIXED)
    assert torch.allclose(value.reshape(flat_value.shape), flat_value, atol=1e-6)
    assert torch.allclose(log_det.reshape(-1), flat_log_det, atol=1e-6)
    assert getattr(transform, direction)(*inputs).shape == inputs[0].shape


@each_direction
def test_a_sample_does_not_depend_on_the_others(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = kind.inputs(3)
    value, log_det = joint(transform, direction)(*inputs)
    for i in range(3):
        one = [t[i : i + 1] for t in inputs]
        own_value, own_log_det = joint(transform, direction)(*one)
        assert_close(own_value[0], value[i], 1e-5)
        assert_close(own_log_det[0], log_det[i], 1e-5)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.context], ids=[k.name for k in KINDS if k.context]
)
@each_direction
def test_context_broadcasts_and_gets_a_gradient(kind: Kind, direction: str) -> None:
    transform = kind.random()
    z, _ = kind.inputs(5, 4)
    for shape in ((), (1,), (4,), (5, 1), (5, 4)):
        context = torch.randn(*shape, kind.context, requires_grad=True)
        value, log_det = joint(transform, direction)(z, context)
        full = context.detach().expand(5, 4, -1)
        expected, expected_log_det = joint(transform, direction)(z, full)
        assert torch.equal(value, expected)
        assert torch.equal(log_det, expected_log_det)
        (value.sum() + log_det.sum()).backward()
        assert context.grad.shape == context.shape
        assert (context.grad != 0).all()


@each_direction
def test_gradients_reach_every_parameter_and_the_input(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = [t.requires_grad_() for t in kind.inputs(8)]
    value, log_det = joint(transform, direction)(*inputs)
    (value.square().sum() + log_det.sum()).backward()
    leaves = {**dict(transform.named_parameters()), **dict(enumerate(inputs))}
    unreached = [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.any()]
    assert unreached == []
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


@each_direction
def test_the_gradient_is_that_of_the_function(kind: Kind, direction: str) -> None:
    if kind.name in ("cnf-adjoint", "cnf-torchdiffeq"):
        solver = cnf.Solver("rk4", steps=2)  # their gradients are approximate: tests/ode
    else:
        solver = cnf.Solver("rk4", steps=2, gradient="checkpoint")
    transform = kind.random(torch.float64)
    inputs = [t.requires_grad_() for t in kind.inputs(2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *args: joint(transform, direction)(*args, solver=solver), inputs, fast_mode=True
    )


COPIES: dict[str, Callable[[Kind, cnf.Transform], cnf.Transform]] = {
    "deepcopy": lambda _, transform: copy.deepcopy(transform),
    "pickle": lambda _, transform: pickle.loads(pickle.dumps(transform)),
    "state_dict": lambda kind, transform: loaded(kind.random(), transform.state_dict()),
}


def loaded(transform: cnf.Transform, state: dict[str, Tensor]) -> cnf.Transform:
    transform.load_state_dict(state)
    return transform


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_after_backward_is_the_same(kind: Kind, duplicate) -> None:
    transform = kind.random()
    inputs = kind.inputs(4)
    value, log_det = transform.forward_and_log_det(*inputs)
    (value.sum() + log_det.sum()).backward()
    twin = duplicate(kind, transform)
    twin_value, twin_log_det = twin.forward_and_log_det(*inputs)
    assert torch.equal(twin_value, value)
    assert torch.equal(twin_log_det, log_det)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(transform.forward_and_log_det(*inputs)[0], value), "they share parameters"


def test_state_is_parameters_alone(kind: Kind) -> None:
    transform = kind.random()
    before = set(transform.state_dict())
    transform.forward_and_log_det(*kind.inputs(4))
    assert set(transform.state_dict()) == before == set(dict(transform.named_parameters()))


@each_direction
def test_an_exact_map_draws_no_random_numbers(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = kind.inputs(4)
    state = torch.get_rng_state()
    first = joint(transform, direction)(*inputs)
    assert torch.equal(torch.get_rng_state(), state)
    transform.eval()
    second = joint(transform, direction)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_repr_names_the_parts(kind: Kind) -> None:
    transform = kind.make()
    text = repr(transform)
    assert text.startswith(type(transform).__name__)
    for module in transform.modules():
        assert type(module).__name__ in text
    assert "tensor(" not in text
    assert " object at 0x" not in text
