"""How the models are built: nothing passes through unchanged, and every argument arrives."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.models.parts import MIXINGS
from cnf.transforms import (
    MADE,
    MLP,
    ActNorm,
    Additive,
    Affine,
    Compose,
    Conv1x1,
    Coupling,
    Diagonal,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    Permutation,
    Planar,
    RationalQuadraticSpline,
    Squeeze,
    Sylvester,
    make_mask,
)

SMALL = {"hidden": (8,), "activation": "tanh"}
COUPLINGS = {"RealNVP": cnf.RealNVP, "NICE": cnf.NICE, "NeuralSpline": cnf.NeuralSpline}
LAYERS = (2, 3, 4, 8)
FIRST_AND_LAST = torch.tensor([True, False, False, True])
each_mixing = pytest.mark.parametrize("mixing", MIXINGS)


def randomised(flow: cnf.Flow) -> cnf.Flow:
    """The flow in float64 with every parameter drawn anew."""
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0.0, 0.8 / math.sqrt(p[0].numel() if p.ndim > 1 else 4))
    return flow.double()


def passes_through(flow: cnf.Flow) -> bool:
    """Whether some dimension of z is one of x, but for a scale and a shift."""
    transform = randomised(flow).transform
    if isinstance(flow, cnf.IAF):  # its one pass is the other direction
        transform = Inverse(transform)
    x = torch.randn(24, *flow.event_shape, dtype=torch.float64)
    with torch.no_grad():
        z = transform.inverse(x)
    correlations = torch.cat([x.flatten(1), z.flatten(1)], 1).T.corrcoef()
    dims = x[0].numel()
    return bool((correlations[:dims, dims:].abs() > 1 - 1e-9).any())


def modules_of(flow: nn.Module, kind: type) -> list[Any]:
    """Its modules of one kind, in order from base to data."""
    return [m for m in flow.modules() if isinstance(m, kind)]


def kept_by(coupling: Coupling) -> Tensor:
    """The dimensions that a coupling leaves alone, as a mask, found by moving the others."""
    with torch.no_grad():
        for p in coupling.parameters():
            p.normal_()
        z = torch.randn(5, *coupling.event_shape)
        return (coupling.forward(z) == z).all(0)


# Every dimension changes


@each_mixing
@pytest.mark.parametrize("name", COUPLINGS)
def test_no_dimension_passes_through_couplings(name: str, mixing: str) -> None:
    masks = (None, "halves", "alternating", "random")
    for mask, dims, layers in product(masks, range(2, 7), LAYERS):
        flow = COUPLINGS[name](dims, layers, **SMALL, mask=mask, mixing=mixing)
        assert not passes_through(flow), (mask, dims, layers)


@each_mixing
@pytest.mark.parametrize("name", COUPLINGS)
def test_no_pixel_passes_through_couplings(name: str, mixing: str) -> None:
    masks = (None, "channel", "checkerboard")
    for mask, shape, layers in product(masks, [(2, 2, 2), (3, 1, 2)], (2, 3, 4)):
        flow = COUPLINGS[name](shape, layers, **SMALL, mask=mask, mixing=mixing)
        assert not passes_through(flow), (mask, shape, layers)


@pytest.mark.parametrize("name", COUPLINGS)
def test_no_dimension_passes_through_one_coupling_and_a_matrix(name: str) -> None:
    assert not passes_through(COUPLINGS[name](5, 1, **SMALL, mixing="lu"))


@pytest.mark.parametrize("depth", [None, 1, 2])
@pytest.mark.parametrize("mixing", ["lu", "reverse", "random"])
def test_no_dimension_passes_through_recursive_couplings(mixing: str, depth: int | None) -> None:
    for dims, layers in product(range(2, 7), LAYERS):
        flow = cnf.HINT(dims, layers, **SMALL, mixing=mixing, depth=depth)
        assert not passes_through(flow), (dims, layers)


def test_no_dimension_is_kept_by_two_layers_and_any_random_permutation_between_them() -> None:
    for _ in range(20):
        for depth in (None, 1):
            flow = cnf.HINT(4, 2, **SMALL, mixing="random", depth=depth)
            assert not passes_through(flow), depth


@pytest.mark.parametrize("mixing", ["lu", "reverse", "random"])
def test_no_pixel_passes_through_recursive_couplings(mixing: str) -> None:
    for layers in (2, 3):
        assert not passes_through(cnf.HINT((4, 2, 1), layers, **SMALL, mixing=mixing)), layers


@each_mixing
@pytest.mark.parametrize("model", [cnf.MAF, cnf.IAF])
def test_no_dimension_passes_through_autoregressive_layers(model: Callable, mixing: str) -> None:
    for ordering, dims, layers in product(["alternate", "random"], range(2, 7), LAYERS):
        if ordering == "random" and mixing != "lu":
            continue  # two orders may begin with the same dimension
        flow = model(dims, layers, **SMALL, mixing=mixing, ordering=ordering)
        assert not passes_through(flow), (ordering, dims, layers)


@each_mixing
@pytest.mark.parametrize(
    "make",
    [
        cnf.MAF,
        cnf.IAF,
        lambda *args, **options: cnf.NeuralSpline(*args, kind="autoregressive", **options),
    ],
    ids=["MAF", "IAF", "NeuralSpline"],
)
def test_two_autoregressive_layers_have_a_dense_jacobian(make: Callable, mixing: str) -> None:
    """One order in all layers would leave it triangular."""
    for dims, layers in product((2, 3, 4), (2, 3)):
        flow = randomised(make(dims, layers, (16,), activation="tanh", mixing=mixing))
        x = 0.5 * torch.randn(dims, dtype=torch.float64)
        direction = flow.transform.forward if isinstance(flow, cnf.IAF) else flow.transform.inverse
        jacobian = torch.func.jacrev(lambda v: direction(v[None])[0])(x)  # noqa: B023
        assert (jacobian.abs() > 1e-12).all(), (dims, layers)


# What stands where


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("mask", ["halves", "alternating", FIRST_AND_LAST])
def test_couplings_keep_a_mask_and_what_it_leaves_in_turns(name: str, mask: str | Tensor) -> None:
    flow = COUPLINGS[name](4, 5, **SMALL, mask=mask, mixing="none")
    expected = make_mask(mask, 4)
    for coupling in modules_of(flow, Coupling):
        assert torch.equal(kept_by(coupling), expected)
        expected = ~expected


@pytest.mark.parametrize("name", COUPLINGS)
def test_random_masks_change_from_pair_to_pair(name: str) -> None:
    flow = COUPLINGS[name](8, 8, **SMALL, mask="random", mixing="none")
    kept = [kept_by(coupling) for coupling in modules_of(flow, Coupling)]
    assert all(torch.equal(a, ~b) for a, b in zip(kept[::2], kept[1::2], strict=True))
    assert len({tuple(mask.tolist()) for mask in kept[::2]}) > 1


@pytest.mark.parametrize(
    ("features", "mask"), [(5, "alternating"), ((2, 2), "alternating"), ((2, 2, 2), "checkerboard")]
)
@pytest.mark.parametrize("name", COUPLINGS)
def test_the_mask_of_none(name: str, features: Any, mask: str) -> None:
    first = modules_of(COUPLINGS[name](features, 2, **SMALL), Coupling)[0]
    assert torch.equal(kept_by(first), make_mask(mask, features))


MIXED = {
    "RealNVP": cnf.RealNVP,
    "NICE": cnf.NICE,
    "NeuralSpline": cnf.NeuralSpline,
    "NeuralSpline-autoregressive": lambda *a, **o: cnf.NeuralSpline(*a, kind="autoregressive", **o),
    "HINT": cnf.HINT,
    "MAF": cnf.MAF,
    "IAF": cnf.IAF,
}


@pytest.mark.parametrize("name", MIXED)
def test_the_mixing_that_was_asked_for(name: str) -> None:
    for mixing in MIXINGS[name == "HINT" :]:  # which refuses "none"
        flow = MIXED[name](6, 4, **SMALL, mixing=mixing)
        matrices, orders = modules_of(flow, LULinear), modules_of(flow, Permutation)
        inverted = [m for m in modules_of(flow, Inverse) if isinstance(m.transform, LULinear)]
        assert len(matrices) == len(inverted) == (4 if mixing == "lu" else 0)
        if mixing == "none":
            assert orders == []
        elif mixing != "lu":
            reverse = [torch.equal(m.order, torch.arange(5, -1, -1)) for m in orders]
            assert reverse != []
            assert all(reverse) if mixing == "reverse" else not all(reverse)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("layers", [2, 3])
def test_the_number_of_layers_and_their_networks(name: str, layers: int) -> None:
    options = {"hidden": (9, 9), "activation": "elu", "context": 2}
    flow = MIXED[name](4, layers, **options)
    networks = modules_of(flow, MLP if name in COUPLINGS or name == "HINT" else MADE)
    assert len(networks) == layers * (3 if name == "HINT" else 1)
    for network in networks:
        assert widths_of(network)[:-1] == [9, 9]
        assert len(modules_of(network, nn.ELU)) == 2
    for layer in modules_of(flow, Coupling) + modules_of(flow, MaskedAutoregressive):
        assert layer.context == 2


def widths_of(network: nn.Module) -> list[int]:
    """The widths of its layers, those of context left out."""
    return [
        m.out_channels if isinstance(m, nn.Conv2d) else m.out_features
        for name, m in network.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and "context" not in name
    ]


ELEMENTWISE = {
    "RealNVP": Affine(),
    "NICE": Additive(),
    "HINT": Affine(),
    "MAF": Affine(),
    "IAF": Affine(),
    "NeuralSpline": RationalQuadraticSpline(),
    "NeuralSpline-autoregressive": RationalQuadraticSpline(),
}


@pytest.mark.parametrize("name", MIXED)
def test_the_elementwise_map_of_a_model(name: str) -> None:
    flow = MIXED[name](4, 2, **SMALL)
    layers = modules_of(flow, Coupling) + modules_of(flow, MaskedAutoregressive)
    assert {layer.elementwise for layer in layers} == {ELEMENTWISE[name]}
    assert len(modules_of(flow, Diagonal)) == (name == "NICE")
    assert isinstance(flow.transform, Inverse) == (name == "IAF")


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
def test_bins_and_bound_reach_the_splines(kind: str) -> None:
    flow = cnf.NeuralSpline(4, 3, (8,), kind=kind, bins=5, bound=2.5, mixing="none")
    layers = modules_of(flow, Coupling if kind == "coupling" else MaskedAutoregressive)
    assert [layer.elementwise for layer in layers] == 3 * [RationalQuadraticSpline(5, 2.5)]
    beyond = torch.full((2, 4), 2.6).double()
    assert torch.equal(randomised(flow).transform.inverse(beyond), beyond)
    assert not torch.equal(flow.transform.inverse(beyond - 0.2), beyond - 0.2)


@pytest.mark.parametrize("model", [cnf.MAF, cnf.IAF])
def test_what_autoregressive_networks_are_built_with(model: Callable) -> None:
    for residual in (False, True):
        networks = modules_of(model(4, 3, (8, 8), residual=residual), MADE)
        assert [network.residual for network in networks] == 3 * [residual]
    orders = [layer.order for layer in modules_of(model(6, 4, (8,)), MaskedAutoregressive)]
    assert orders[0] is orders[2] is None
    assert all(torch.equal(order, torch.arange(5, -1, -1)) for order in orders[1::2])
    flow = model(6, 5, (8,), ordering="random")
    drawn = {tuple(layer.order.tolist()) for layer in modules_of(flow, MaskedAutoregressive)}
    assert len(drawn) == 5, "every layer draws its own"


@pytest.mark.parametrize("name", ["RealNVP", "NICE", "HINT"])
def test_a_conditioner_of_ones_own_is_that_of_every_coupling(name: str) -> None:
    calls = []

    def conditioner(inputs: Any, outputs: Any, context: int) -> nn.Module:
        calls.append((inputs, context))
        return MLP(inputs, outputs, context, hidden=(3,))

    flow = MIXED[name](4, 3, conditioner=conditioner, context=2)
    couplings = modules_of(flow, Coupling)
    assert calls == [(coupling.parts.shapes[0], 2) for coupling in couplings]
    assert all(widths_of(coupling.conditioner)[0] == 3 for coupling in couplings)


@pytest.mark.parametrize("depth", [None, 1, 2, 3])
def test_the_depth_of_recursive_couplings(depth: int | None) -> None:
    flow = cnf.HINT(16, 2, hidden=(4,), depth=depth)
    assert len(modules_of(flow, Coupling)) == 2 * (2 ** (depth or 4) - 1)


@pytest.mark.parametrize(
    ("elementwise", "expected"),
    [
        ("additive", Additive()),
        ("spline", RationalQuadraticSpline()),
        (RationalQuadraticSpline(4, 2.0), RationalQuadraticSpline(4, 2.0)),
    ],
    ids=str,
)
def test_the_elementwise_map_of_recursive_couplings(elementwise: Any, expected: Any) -> None:
    flow = cnf.HINT(5, 2, (8,), elementwise=elementwise, activation="elu")
    assert {coupling.elementwise for coupling in modules_of(flow, Coupling)} == {expected}
    assert len(modules_of(flow, nn.ELU)) == len(modules_of(flow, Coupling)) == 8


@pytest.mark.parametrize("activation", ["tanh", "softplus", "elu", "leaky_relu", "arctan"])
def test_the_activation_of_planar_layers(activation: str) -> None:
    layers = modules_of(cnf.PlanarFlow(3, 4, activation=activation, context=2), Planar)
    assert [layer.activation for layer in layers] == 4 * [activation]
    assert [layer.context for layer in layers] == 4 * [2]


@pytest.mark.parametrize("kind", ["orthogonal", "householder", "triangular"])
def test_the_kind_of_sylvester_layers(kind: str) -> None:
    layers = modules_of(cnf.SylvesterFlow(3, 4, kind=kind, context=2), Sylvester)
    assert [layer.kind for layer in layers] == 4 * [kind]
    assert [layer.context for layer in layers] == 4 * [2]
    assert [layer.reverse for layer in layers] == 2 * [False, kind == "triangular"]


def test_triangular_sylvester_layers_leave_no_triangle() -> None:
    flow = randomised(cnf.SylvesterFlow(3, 2, kind="triangular"))
    jacobian = torch.func.jacrev(flow.transform.forward)(torch.randn(3, dtype=torch.float64))
    assert (jacobian.abs() > 1e-12).all()


@pytest.mark.parametrize("explicit", ["sampling", "density"])
@pytest.mark.parametrize("model", [cnf.PlanarFlow, cnf.RadialFlow, cnf.SylvesterFlow])
def test_the_explicit_direction(model: Callable, explicit: str) -> None:
    transform = model(3, 5, explicit=explicit).transform
    assert isinstance(transform, Inverse) == (explicit == "density")
    assert len(transform.transform if explicit == "density" else transform) == 5


@pytest.mark.parametrize(("levels", "steps"), [(1, 3), (2, 1), (2, 3)])
def test_the_scales_and_steps_of_glow(levels: int, steps: int) -> None:
    flow = cnf.Glow((1, 8, 8), levels, steps, (6, 7), activation="elu", context=2)
    shapes = [(4, 4, 4), (8, 2, 2)][:levels]
    assert [m.base_shape for m in modules_of(flow, Squeeze)] == shapes[::-1]
    couplings = modules_of(flow, Coupling)
    assert [c.event_shape for c in couplings] == [s for s in shapes[::-1] for _ in range(steps)]
    for coupling in couplings:
        assert isinstance(coupling.elementwise, Affine)
        assert coupling.context == 2
        assert widths_of(coupling.conditioner)[:-1] == [6, 7]
        assert len(modules_of(coupling, nn.ELU)) == 2
        assert not hasattr(coupling.parts, "mask"), "halves of the channels"


def test_a_step_of_glow_normalises_multiplies_and_couples() -> None:
    steps = [
        m
        for m in modules_of(cnf.Glow((1, 8, 8), 2, 3, (4,)), Compose)
        if isinstance(m.transforms[-1], ActNorm)
    ]
    assert len(steps) == 6
    for step in steps:
        coupling, mixing, _ = step
        assert isinstance(coupling, Coupling)
        assert isinstance(mixing, Inverse), "the way to the base multiplies"
        assert isinstance(mixing.transform, Conv1x1)


# Where randomness comes from

DRAWN: dict[str, Callable[..., cnf.Flow]] = {
    "RealNVP": lambda g: cnf.RealNVP(8, 6, (4,), mask="random", mixing="random", generator=g),
    "RealNVP-mask": lambda g: cnf.RealNVP(8, 6, (4,), mask="random", generator=g),
    "RealNVP-mixing": lambda g: cnf.RealNVP(8, 6, (4,), mixing="random", generator=g),
    "NICE": lambda g: cnf.NICE(8, 6, (4,), mask="random", mixing="random", generator=g),
    "HINT": lambda g: cnf.HINT(8, 3, (4,), mixing="random", generator=g),
    "HINT-lu": lambda g: cnf.HINT(8, 3, (4,), generator=g),
    "MAF": lambda g: cnf.MAF(8, 4, (8,), ordering="random", generator=g),
    "MAF-mixing": lambda g: cnf.MAF(8, 4, (8,), mixing="random", generator=g),
    "IAF": lambda g: cnf.IAF(8, 4, (8,), ordering="random", mixing="lu", generator=g),
    "NeuralSpline": lambda g: cnf.NeuralSpline(8, 3, (4,), mixing="lu", generator=g),
    "NeuralSpline-mask": lambda g: cnf.NeuralSpline(8, 4, (4,), mask="random", generator=g),
    "NeuralSpline-autoregressive": lambda g: cnf.NeuralSpline(
        8, 3, (8,), kind="autoregressive", generator=g
    ),
    "Glow": lambda g: cnf.Glow((2, 4, 4), 1, 3, (4,), generator=g),
}
each_drawn = pytest.mark.parametrize("name", DRAWN)


def buffers(name: str, seed: int, elsewhere: int) -> dict[str, Tensor]:
    """What a flow never trains, built with a generator, whatever the global state."""
    torch.manual_seed(elsewhere)
    return dict(DRAWN[name](torch.Generator().manual_seed(seed)).named_buffers())


@each_drawn
def test_masks_orders_and_permutations_follow_the_generator(name: str) -> None:
    first, again, other = buffers(name, 1, 0), buffers(name, 1, 7), buffers(name, 2, 0)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    drawn = [value for key, value in first.items() if key.endswith("order") and len(value) == 8]
    assert len({tuple(value.tolist()) for value in drawn}) > 1, "every layer draws its own"


@each_drawn
def test_a_generator_leaves_the_global_one_alone(name: str, monkeypatch) -> None:
    """But for the weights: the state is that of a build that draws no order at all."""
    torch.manual_seed(0)
    DRAWN[name](torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    DRAWN[name](None)
    assert not torch.equal(torch.get_rng_state(), state), "without one the global one is read"
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n - 1, -1, -1))
    torch.manual_seed(0)
    DRAWN[name](None)
    assert torch.equal(torch.get_rng_state(), state)
