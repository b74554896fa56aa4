"""`torch.set_default_device` chooses where modules are made, and nothing else."""

import ast
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import cnf
from cnf.calibration import simulation_based_calibration
from cnf.data import TOY_NAMES, ImageDensity, image_data, toy
from cnf.data.linear_gaussian import LinearGaussian
from cnf.data.patches import image_patches
from cnf.data.tabular import split_table
from cnf.training import fit
from cnf.transforms import Coupling, MaskedAutoregressive, Permutation
from cnf.variational import ELBO, VAE, Gaussian, posterior

PACKAGE = Path(cnf.__file__).parent
FACTORIES = {f.__name__ for f in _device_constructors()}
MADE_WITH_MODULES = {"_order", "_seen"}  # buffers of permutations and of masks


def factory_calls(path):
    """Where a file makes a tensor on the default device, outside of constructors."""

    def visit(node, inside):
        if isinstance(node, ast.FunctionDef):
            inside = node.name
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in FACTORIES
            and inside not in {"__init__", *MADE_WITH_MODULES}
            and not {"device", None} & {keyword.arg for keyword in node.keywords}
        ):
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(ast.parse(path.read_text(encoding="utf-8")), None))


def test_nothing_but_constructors_follows_the_default_device():
    found = [call for path in sorted(PACKAGE.rglob("*.py")) for call in factory_calls(path)]
    assert not found, "pass device= to\n" + "\n".join(found)


def test_the_search_finds_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "some.py"
    path.write_text("def f(x):\n    return torch.randn(3), torch.zeros(2, device=x.device)\n")
    assert factory_calls(path) == ["some.py:2: torch.randn(3)"]


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
ROWS = np.random.default_rng(0).normal(5, 2, (50, 2))
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 14))
FFJORD = cnf.FFJORD(2, hidden=(8,), divergence="exact")
DISCRETE = [cnf.RealNVP(2, layers=2), cnf.MAF(2, layers=1), cnf.NeuralSpline(2, layers=1)]
INTEGERS = cnf.Flow(
    cnf.StandardNormal(2),
    cnf.Compose(cnf.RealNVP(2, layers=2).transform, cnf.Sigmoid(), cnf.UniformDequantization(4)),
)
LEVELS = torch.arange(40).reshape(20, 2) % 4
GAUSSIAN = LinearGaussian.random(2, 2)
DENSITY = ImageDensity(PICTURE)
POSTERIOR = cnf.RealNVP(2, layers=2, context=2)
VAE_ = VAE(nn.Linear(2, 4), posterior("planar", latent=2, context=4), Gaussian(nn.Linear(2, 2)))


def trained(objective, train, **options):
    objective = copy.deepcopy(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)  # Adam's own state follows it
    fit(objective, train, steps=2, optimizer=optimizer, progress=False, **options)
    return torch.cat([p.detach().flatten() for p in objective.parameters()])


CALLS = {
    "split_table": lambda: split_table(ROWS).train,
    "split_table of a tensor": lambda: split_table(X).train,
    "image_data": lambda: image_data("digits").train[0].float(),
    "image_patches": lambda: image_patches([PICTURE], 3, size=4),
    "ImageDensity": lambda: ImageDensity(PICTURE).log_prob(X),
    "ImageDensity.entropy": lambda: torch.tensor(ImageDensity(PICTURE).entropy, device="cpu"),
    "LinearGaussian": lambda: LinearGaussian.random(2, 2).posterior_covariance,
    **{
        f"toy({name!r})": lambda name=name: toy(name).log_prob(X)
        for name in TOY_NAMES
    },
    "fit": lambda: trained(cnf.MaximumLikelihood(FFJORD), X, batch_size=8),
    "fit with validate": lambda: trained(
        cnf.MaximumLikelihood(FFJORD), X, batch_size=8, validate=lambda _: 1.0, validate_every=1
    ),
    "flow matching": lambda: trained(cnf.FlowMatching(FFJORD), X, batch_size=8),
    "optimal transport": lambda: cnf.FlowMatching(FFJORD, coupling="optimal-transport")(X),
    "STEER": lambda: cnf.MaximumLikelihood(FFJORD, steer=0.25)(X),
    "log_prob": lambda: FFJORD.log_prob(X),
    "adjoint": lambda: FFJORD.log_prob(X, solver=cnf.Solver("rk4", steps=4, gradient="adjoint")),
    "torchdiffeq": lambda: FFJORD.log_prob(X, solver=cnf.TorchDiffEq("dopri5")),
    "independent": lambda: FFJORD.log_prob(X, solver=cnf.Solver(batch="independent")),
    "sample": lambda: FFJORD.sample((5,)),
    "seeded sample": lambda: FFJORD.sample((5,), generator=torch.Generator().manual_seed(0)),
    "trajectory": lambda: FFJORD.trajectory(X, times=[0.0, 0.5, 1.0]),
    "odeint": lambda: cnf.odeint(lambda t, x: -x, X, 0.0, 1.0).x,
    "check": lambda: torch.tensor(
        cnf.check(FFJORD, X[:4], gradients=["backprop"], verbose=False).log_det_error, device="cpu"
    ),
    "importance": lambda: cnf.importance_sampling(
        FFJORD, lambda x: -x.square().sum(-1), 50
    ).log_normalizer,
    "calibration": lambda: simulation_based_calibration(
        POSTERIOR, *GAUSSIAN.sample(20, torch.Generator().manual_seed(0)), draws=19
    ).p_values(),
    "integers": lambda: INTEGERS.log_prob(LEVELS),
    "integers' samples": lambda: INTEGERS.sample((5,)).float(),
    "VAE": lambda: ELBO(VAE_)(X),
    **{f"{type(flow.transform[0]).__name__} {i}": lambda f=flow: f.log_prob(X)
       for i, flow in enumerate(DISCRETE)},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_values_do_not_depend_on_the_default_device(name):
    torch.manual_seed(0)
    expected = CALLS[name]()
    torch.manual_seed(0)
    with torch.device("meta"):
        found = CALLS[name]()
    assert not found.is_meta
    assert torch.equal(found, expected)


@pytest.mark.parametrize("make", [
    lambda: cnf.Flow(cnf.StandardNormal(1, 4, 4), Coupling((1, 4, 4), "checkerboard")),
    lambda: cnf.RealNVP(4, layers=2),
    lambda: cnf.MAF(4, layers=2),
    lambda: cnf.Glow((1, 4, 4)),
    lambda: cnf.FFJORD(4),
    lambda: cnf.Flow(cnf.StandardNormal(4), Permutation(4, "random")),
    lambda: cnf.Flow(cnf.StandardNormal(4), MaskedAutoregressive(4, ordering="random")),
])  # fmt: skip
def test_modules_are_made_on_the_default_device(make):
    with torch.device("meta"):
        flow = make()
    tensors = [*flow.parameters(), *flow.buffers()]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
