"""torch.export and ONNX of every model: its numbers at another batch size are those of eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import cnf
from cnf.transforms import (
    ActNorm,
    Coupling,
    Interval,
    Linear,
    LULinear,
    MaskedAutoregressive,
    QRLinear,
)

RK4 = cnf.Solver("rk4", steps=2)
EULER = cnf.Solver("euler", steps=2)  # few evaluations: a short program
SMALL = {"hidden": (8,)}
IMAGE = (1, 4, 4)
SIZES = (7, 1, 0)  # the program is traced with 3 samples

Models = dict[str, Callable[[int], cnf.Flow]]

MODELS: Models = {
    "RealNVP": lambda c: cnf.RealNVP(3, 2, context=c, **SMALL),
    "RealNVP of images": lambda c: cnf.RealNVP(IMAGE, 2, context=c, **SMALL),
    "NICE": lambda c: cnf.NICE(3, 2, context=c, **SMALL),
    "MAF": lambda c: cnf.MAF(3, 2, context=c, **SMALL),
    "IAF": lambda c: cnf.IAF(3, 2, context=c, **SMALL),
    "NeuralSpline": lambda c: cnf.NeuralSpline(3, layers=1, context=c, **SMALL),
    "autoregressive NeuralSpline": lambda c: cnf.NeuralSpline(
        2, layers=1, kind="autoregressive", context=c, **SMALL
    ),
    "HINT": lambda c: cnf.HINT(3, 1, context=c, **SMALL),
    "PlanarFlow": lambda c: cnf.PlanarFlow(3, layers=1, context=c),
    "RadialFlow": lambda c: cnf.RadialFlow(3, layers=1, context=c),
    "SylvesterFlow": lambda c: cnf.SylvesterFlow(3, layers=1, rank=1, context=c),
    "Glow": lambda c: cnf.Glow(IMAGE, levels=1, steps=1, context=c, **SMALL),
    "FFJORD": lambda c: cnf.FFJORD(3, context=c, solver=RK4, **SMALL),
    "FFJORD by Hutchinson": lambda c: cnf.FFJORD(
        3, context=c, solver=RK4, divergence="hutchinson", **SMALL
    ),
    "MultiscaleFFJORD": lambda c: cnf.MultiscaleFFJORD(
        IMAGE, (4,), levels=1, blocks=1, context=c, solver=RK4
    ),
}


class Deep(nn.Module):
    """A field of one's own, whose traces take products with the Jacobian."""

    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(dims + 1, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, dims)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(torch.cat((x, t.expand(x.shape[0], 1)), 1))


def continuous(
    divergence: str | cnf.Divergence,
    dims: int = 3,
    field: nn.Module | None = None,
    **choices: object,
) -> cnf.Flow:
    solver = choices.pop("solver", EULER)
    cnf_layer = cnf.CNF(field or Deep(dims), divergence, solver, **choices)
    return cnf.Flow(cnf.StandardNormal(dims), cnf_layer)


def discrete(*transforms: cnf.Transform) -> cnf.Flow:
    return cnf.Flow(cnf.StandardNormal(3), cnf.Compose(*transforms))


def levels() -> cnf.Flow:
    return discrete(*cnf.RealNVP(3, 2, **SMALL).transform, cnf.Sigmoid(), _to_levels())


def _to_levels() -> cnf.UniformDequantization:
    return cnf.UniformDequantization(17)


OTHERS: dict[str, Callable[[], cnf.Flow]] = {
    "matrices": lambda: discrete(Linear(3), LULinear(3), QRLinear(3), cnf.Inverse(LULinear(3))),
    "an end in an interval": lambda: discrete(Coupling(3, **SMALL), Interval(-1.0, 2.0)),
    "a random order": lambda: discrete(MaskedAutoregressive(3, ordering=[2, 0, 1], **SMALL)),
    "integers": levels,
    "exact by products": lambda: continuous("exact"),
    "more products than are unrolled": lambda: continuous("exact", dims=9),
    "Hutchinson by products": lambda: continuous(cnf.Hutchinson("gaussian", 2)),
    "Hutch++": lambda: continuous(cnf.HutchPlusPlus(1, 2)),
    "checkpoint": lambda: continuous("exact", solver=replace(EULER, gradient="checkpoint")),
    "PotentialField": lambda: continuous("exact", field=cnf.PotentialField(3, (8, 8))),
    "HollowField": lambda: continuous("exact", field=cnf.HollowField(3, hidden=(8,))),
    "ConcatSquashField": lambda: continuous("exact", field=cnf.ConcatSquashField(3, (8,))),
}


def prepared(flow: cnf.Flow, context: int) -> cnf.Flow:
    """The flow with weights that make it no identity, and its layers initialized."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if any(isinstance(part, ActNorm) for part in flow.modules()):
        flow.log_prob(*inputs(flow, context, 16))
    return flow


def inputs(flow: cnf.Flow, context: int, n: int, *, base: bool = False) -> tuple[Tensor, ...]:
    """x, or z, of n samples, and their context."""
    x = torch.rand(n, *(flow.base.event_shape if base else flow.event_shape))
    if flow.transform.quantized and not base:
        x = (17 * x).to(torch.uint8)
    return (x, torch.randn(n, context)) if context else (x,)


def sizes(example: Sequence[Tensor]) -> tuple[dict[int, Dim], ...]:
    batch = Dim("batch")
    return tuple({0: batch} for _ in example)


def assert_exported(module: nn.Module, flow: cnf.Flow, context: int, *, base: bool) -> None:
    example = inputs(flow, context, 3, base=base)
    program = export(module, example, dynamic_shapes=sizes(example)).module()
    for n in SIZES:
        new = inputs(flow, context, n, base=base)
        values = []
        for run in (module, program):
            torch.manual_seed(1)  # noise is drawn in the program
            values.append(run(*new))
        assert values[0].isfinite().all()
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_exported_with_a_free_batch_size(name: str, context: int) -> None:
    flow = prepared(MODELS[name](context), context)
    assert_exported(flow, flow, context, base=False)
    assert_exported(flow.transform, flow, context, base=True)


@pytest.mark.parametrize("name", OTHERS)
def test_ends_layers_and_traces_are_exported(name: str) -> None:
    flow = prepared(OTHERS[name](), 0)
    assert_exported(flow, flow, 0, base=False)
    assert_exported(flow.transform, flow, 0, base=True)


def test_compiled_steps_are_exported_as_they_are() -> None:
    flow = prepared(continuous("exact", solver=replace(EULER, compile=True)), 0)
    x = torch.randn(3, 3)
    program = export(flow, (x,)).module()
    torch.testing.assert_close(program(x), flow.log_prob(x, solver=EULER))


class Samples(nn.Module):
    """As many samples as the rows of a tensor."""

    def __init__(self, flow: cnf.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, rows: Tensor) -> Tensor:
        return self.flow.sample((rows.shape[0],))


def test_samples_are_drawn_in_the_program() -> None:
    flow = prepared(cnf.RealNVP(3, 2, **SMALL), 0)
    assert_exported(Samples(flow), flow, 0, base=False)


@pytest.mark.parametrize(
    "solver",
    [
        cnf.Solver("dopri5"),
        cnf.Solver("rk4", batch="independent"),
        cnf.Solver("rk4", on_failure="nan"),
        cnf.TorchDiffEq("rk4"),
    ],
    ids=["adaptive", "independent", "nan", "torchdiffeq"],
)
def test_a_solve_that_depends_on_values_is_refused(solver: object) -> None:
    flow = continuous("exact", solver=solver)
    with pytest.raises(ValueError, match=r"torch.export needs.*Solver\('rk4', steps=20\)"):
        export(flow, (torch.zeros(3, 3),))


def test_times_that_are_tensors_are_refused() -> None:
    flow = continuous("exact", times=(0.0, nn.Parameter(torch.tensor(1.0))))
    with pytest.raises(ValueError, match="times that are numbers"):
        export(flow, (torch.zeros(3, 3),))


@pytest.mark.parametrize("name", ["RealNVP", "NeuralSpline", "FFJORD", "exact by products"])
def test_onnx_has_the_numbers_of_eager_at_another_batch_size(name: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    flow = prepared(MODELS[name](0) if name in MODELS else OTHERS[name](), 0)
    for base, module in ((False, flow), (True, flow.transform)):
        example = inputs(flow, 0, 3, base=base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of onnxscript about itself
            program = torch.onnx.export(
                module, example, dynamic_shapes=sizes(example), dynamo=True, verbose=False
            )
        session = runtime.InferenceSession(program.model_proto.SerializeToString())
        (new,) = inputs(flow, 0, 7, base=base)
        (found,) = session.run(None, {session.get_inputs()[0].name: new.numpy()})
        torch.testing.assert_close(torch.tensor(found), module(new).detach(), rtol=1e-5, atol=1e-5)
