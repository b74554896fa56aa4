"""The package as imported: light, without side effects, documented, and made of plain parts."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cnf
from cnf.data import potential

ROOT = Path(cnf.__file__).parent
OPTIONAL = ("matplotlib", "tqdm", "sklearn", "safetensors", "scipy", "PIL", "pandas", "torchdiffeq")
MODULES = ["cnf", *(m.name for m in pkgutil.walk_packages([str(ROOT)], "cnf."))]
SOURCES = sorted(ROOT.rglob("*.py"))


def fresh(code: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_import_brings_in_no_optional_dependency() -> None:
    """Nothing but torch's own imports and the package's modules."""
    code = "import sys, torch; old = set(sys.modules); import cnf; print(*set(sys.modules) - old)"
    new = fresh(code).stdout.split()
    roots = {name.partition(".")[0] for name in new}
    assert "cnf" in roots
    assert not roots & set(OPTIONAL)


STATE = """
import random, warnings, numpy, torch
from torch.distributions import Distribution, kl

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch's generator": torch.get_rng_state().tolist(),
        "python's generator": random.getstate(),
        "numpy's generator": str(numpy.random.get_state()),
        "validate_args": Distribution._Distribution__validate_args
        if hasattr(Distribution, "_Distribution__validate_args")
        else Distribution._validate_args,
        "kl registry": set(kl._KL_REGISTRY),
        "warning filters": list(warnings.filters),
        "print options": str(torch._tensor_str.PRINT_OPTS),
    }

before = state()
import cnf
after = state()
changed = [key for key in before if before[key] != after[key]]
assert not changed, changed
"""


def test_import_changes_no_global_state() -> None:
    fresh(STATE)


def test_import_is_quick(tmp_path: Path) -> None:
    """What torch has not already imported costs at most 0.2 s, in the best of three tries.

    Beyond the first, which compiles: users import bytecode.
    """
    code = "import torch, time; t = time.process_time(); import cnf; print(time.process_time() - t)"
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    assert any(float(fresh(code, **cached).stdout) < 0.2 for _ in range(4))


def test_import_prints_nothing() -> None:
    result = fresh("import cnf")
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_what_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert isinstance(module.__all__, list)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)


@pytest.mark.parametrize(
    ("home", "name"),
    [(cnf, name) for name in cnf.__all__]
    + [(cnf.transforms, name) for name in sorted(set(cnf.transforms.__all__) - set(cnf.__all__))],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_public_name_is_documented_with_an_example(home, name: str) -> None:
    thing = getattr(home, name)
    text = inspect.getdoc(thing) or ""
    assert text
    own = "__doc__" in vars(thing) if inspect.isclass(thing) else True
    assert own, "the docstring is inherited"
    abstract = inspect.isabstract(thing) or thing in (cnf.VectorField, cnf.transforms.Choices)
    exception = inspect.isclass(thing) and issubclass(thing, Exception)
    if not abstract and not exception:
        assert ">>> " in text


def test_the_public_names_are_what_is_imported() -> None:
    assert len(set(cnf.__all__)) == len(cnf.__all__)
    imported = {
        alias.asname or alias.name
        for node in ast.parse((ROOT / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    assert imported == set(cnf.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_no_code_is_loaded_from_data(path: Path) -> None:
    """Neither pickle nor torch.load, whose files can run code; nor eval and exec."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            assert not names & {"pickle", "marshal", "shelve", "dill", "joblib"}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("pickle", "marshal", "shelve", "dill", "joblib")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "eval", "exec", "pickle.loads")


def flow(**options) -> cnf.Flow:
    return cnf.FFJORD(2, hidden=(8,), divergence="exact", **options)


x = torch.linspace(-1, 1, 10).reshape(5, 2)


def noisy(f: cnf.Transform) -> Tensor:
    """Integers with noise of one seed."""
    integers = torch.arange(10).reshape(5, 2)
    return f.inverse_and_log_det(integers, generator=torch.Generator().manual_seed(0))[0]


# Every public class that is no interface, and what to do with an instance of it.
def integral(penalty: object) -> Tensor:
    """What a regulariser integrates along the path of a flow with a potential."""
    torch.manual_seed(0)
    curved = cnf.FFJORD(2, hidden=(8,), field=cnf.PotentialField)
    generator = torch.Generator().manual_seed(0)
    return curved.log_prob_and_integrals(x, regularizers=[penalty], generator=generator)[1]


USES: dict[str, tuple[Callable[[], object], Callable[[object], Tensor]]] = {
    "CNF": (lambda: cnf.CNF(cnf.MLPField(2), "exact"), lambda f: f.forward_and_log_det(x)[1]),
    "Compose": (
        lambda: cnf.Compose(flow().transform, flow().transform),
        lambda f: f.inverse_and_log_det(x)[1],
    ),
    "Sigmoid": (cnf.Sigmoid, lambda f: f.forward_and_log_det(x)[1]),
    "UniformDequantization": (lambda: cnf.UniformDequantization(17), noisy),
    "VariationalDequantization": (
        lambda: cnf.VariationalDequantization(cnf.RealNVP(2, context=2)),
        noisy,
    ),
    "Inverse": (lambda: cnf.Inverse(flow().transform), lambda f: f.forward_and_log_det(x)[1]),
    **{
        name: (lambda name=name: getattr(cnf, name)(2), lambda f: f.log_prob(x))
        for name in (
            *("HINT", "IAF", "MAF", "NICE", "NeuralSpline", "RealNVP"),
            *("PlanarFlow", "RadialFlow", "SylvesterFlow"),
        )
    },
    "Glow": (
        lambda: cnf.Glow((1, 2, 2), 1, 1, (4,)),
        lambda f: f.log_prob(torch.linspace(-1, 1, 20).square().reshape(5, 1, 2, 2)),
    ),
    "MultiscaleFFJORD": (
        lambda: cnf.MultiscaleFFJORD((1, 2, 2), (4,), levels=2, blocks=1),
        lambda f: f.log_prob(torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2)),
    ),
    "ConcatSquashField": (lambda: cnf.ConcatSquashField(2), lambda f: f(torch.tensor(0.5), x)),
    "ConvField": (
        lambda: cnf.ConvField((1, 5, 2), (3, 3)),
        lambda f: f.with_divergence(torch.tensor(0.5), x.reshape(-1, 1, 5, 2))[1],
    ),
    "HollowField": (
        lambda: cnf.HollowField(2),
        lambda f: f.with_divergence(torch.tensor(0.5), x)[1],
    ),
    "LinearField": (
        lambda: cnf.LinearField(2),
        lambda f: f.with_divergence(torch.tensor(0.5), x)[1],
    ),
    "MLPField": (
        lambda: cnf.MLPField(2, gates=True),
        lambda f: f.with_divergence(torch.tensor(0.5), x)[1],
    ),
    "PotentialField": (
        lambda: cnf.PotentialField(2),
        lambda f: f.with_divergence(torch.tensor(0.5), x)[1],
    ),
    "SumField": (
        lambda: cnf.SumField(cnf.LinearField(2), cnf.MLPField(2)),
        lambda f: f.with_divergence(torch.tensor(0.5), x)[1],
    ),
    "FFJORD": (flow, lambda f: f.log_prob(x)),
    "Flow": (
        lambda: cnf.Flow(cnf.StandardNormal(2), flow().transform),
        lambda f: f.log_prob(x),
    ),
    "ReverseKL": (
        lambda: cnf.ReverseKL(cnf.FFJORD(2, hidden=(8,)), potential(1).log_density, samples=8),
        lambda f: f(generator=torch.Generator().manual_seed(0)),
    ),
    "FlowMatching": (
        lambda: cnf.FlowMatching(flow()),
        lambda f: f(x, generator=torch.Generator().manual_seed(0)),
    ),
    "MaximumLikelihood": (lambda: cnf.MaximumLikelihood(flow()), lambda f: f(x)),
    **{
        name: (
            lambda name=name: getattr(cnf, name)(*([2] if name == "TaylorDerivative" else []), 0.5),
            integral,
        )
        for name in ("HJBResidual", "JacobianFrobenius", "KineticEnergy", "TaylorDerivative")
    },
    "StandardNormal": (lambda: cnf.StandardNormal(2), lambda f: f.log_prob(x)),
    "Exact": (lambda: cnf.Exact(3), lambda d: CUBIC.log_prob(x, divergence=d)),
    "HutchPlusPlus": (
        lambda: cnf.HutchPlusPlus(1, 3),
        lambda d: CUBIC.log_prob(x, divergence=d, generator=torch.Generator().manual_seed(0)),
    ),
    "Hutchinson": (
        lambda: cnf.Hutchinson("gaussian", 3),
        lambda d: CUBIC.log_prob(x, divergence=d, generator=torch.Generator().manual_seed(0)),
    ),
    "Solver": (lambda: cnf.Solver("rk4", steps=3), lambda s: CUBIC.log_prob(x, solver=s)),
    "TorchDiffEq": (
        lambda: cnf.TorchDiffEq("rk4", steps=3),
        lambda s: CUBIC.log_prob(x, solver=s),
    ),
}
CUBIC = flow()
REGULARIZERS = ("HJBResidual", "JacobianFrobenius", "KineticEnergy", "TaylorDerivative")
VALUES = ("Exact", "HutchPlusPlus", "Hutchinson", *REGULARIZERS, "Solver", "TorchDiffEq")
INTERFACES = {"Divergence", "Regularizer", "Transform", "VectorField"}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing))}


def test_the_table_of_uses_is_complete() -> None:
    classes = {
        name
        for name in cnf.__all__
        if inspect.isclass(getattr(cnf, name)) and not issubclass(getattr(cnf, name), Exception)
    }
    assert classes == set(USES) | INTERFACES


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", USES)
def test_a_copy_after_use_gives_the_same_bits(name: str, duplicate) -> None:
    make, use = USES[name]
    thing = make()
    value = use(thing)
    if value.requires_grad:
        value.sum().backward()
    twin = duplicate(thing)
    assert type(twin) is type(thing)
    assert torch.equal(use(twin), value)
    assert repr(twin) == repr(thing)
    if dataclasses.is_dataclass(thing):
        assert twin == thing


@pytest.mark.parametrize("name", [name for name in USES if name not in VALUES])
def test_a_state_dict_carries_a_module_over(name: str) -> None:
    make, use = USES[name]
    thing, other = make(), make()
    use(thing).sum()
    assert all(type(value) is Tensor for value in thing.state_dict().values())
    other.load_state_dict(thing.state_dict(), strict=True)
    assert torch.equal(use(other), use(thing))


@pytest.mark.parametrize("name", [name for name in USES if name not in VALUES])
def test_a_module_built_on_meta_is_the_same_once_its_state_is_loaded(name: str) -> None:
    """`to_empty` gives memory of any content, also to what the state does not hold."""
    make, use = USES[name]
    thing = make()
    value = use(thing)
    with torch.device("meta"):
        other = make()
    other.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
    other.load_state_dict(thing.state_dict())
    assert torch.equal(use(other), value)


@pytest.mark.parametrize("name", VALUES)
def test_a_choice_is_an_immutable_value(name: str) -> None:
    thing = USES[name][0]()
    assert dataclasses.replace(thing) == thing
    field = dataclasses.fields(thing)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(thing, field, None)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_errors_keep_what_they_know(duplicate) -> None:
    """They travel between processes by pickle, as in a data loader or a test runner."""
    error = cnf.SolverError("why", status="blow_up", t=0.5, dt=0.1, nfe=7, samples=[3])
    twin = duplicate(error)
    assert str(twin) == "why"
    assert (twin.status, twin.t, twin.dt, twin.nfe, twin.samples) == ("blow_up", 0.5, 0.1, 7, (3,))
