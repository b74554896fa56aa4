"""`cnf`: continuous-time normalizing flows in PyTorch.

A vector field carries a simple density to the data; an ODE engine integrates the state together
with its log-density, the trace of the Jacobian exact or by Hutchinson's estimator (FFJORD).

    flow = cnf.FFJORD(2)                        # an nn.Module
    loss = -flow.log_prob(x).mean()             # x (B, 2)
    x, log_prob = flow.sample_and_log_prob((1000,))

Discrete flows, `cnf.RealNVP` and the like, are models of the same interface; their layers are in
`cnf.transforms`.

Conventions, the same everywhere:

- Direction: `forward` goes from base z to data x, `inverse` from x to z.
- Time: t = 0 is the base, t = 1 the data; a vector field is `f(t, x, context=None)`.
- Shapes: x (*batch, *event); log-determinants and log-densities (*batch,); context (*batch, C).
- Log-determinants belong to the map just applied and are added:
  log_prob = base.log_prob(z) + log_det.
- Integers, such as pixels, have a transform that ends in a dequantization: `log_prob` is then a
  draw of a lower bound of their log-probability.
- Outside the support of a flow, where its density is zero, log_prob is -inf: beyond the ends of an
  `Interval`, of a base of bounded support, of the levels of integers; the other rows of a batch
  keep their values. Values that no data could be are errors where values can be looked at: NaN and
  infinities, a fraction where an integer is due. Where log_prob is -inf its
  gradient is zero, and `flow.score` is NaN;
  `transform.inverse(x)`, which has no log-determinant to say so, refuses x that no z is mapped to.
- Noise is drawn once a solve, from an optional `torch.Generator`.
- A module of yours (a field, a conditioner, an encoder in a flow) is a function of its arguments,
  of each sample by itself. Dropout, batch norm in `train()`, random numbers drawn inside, and
  writing into an argument of a field are errors, as is a field that changes between the two
  evaluations of "checkpoint" or "adjoint"; other modules get copies to write into. To train with
  dropout on purpose, set `check_modules = False` on the layer (`Solver(check_field=False)` for a
  field). Reductions over the batch written by hand are found by `cnf.check` alone, where a flow
  has a `CNF`.
- `train()` and `eval()` choose no algorithm: estimator, solver and gradient are arguments. (The
  one exception is `cnf.transforms.BatchNorm`, which is defined by it.)
- Modes of PyTorch change no number: under `torch.func.vmap` the samples share the steps of the
  worst one, as they do in a batch, and `torch.compile` leaves a solve out of its graph.
- State and log-density are never below float32; time is float64 on the host.
- Statistics are plain values, collected by `record_solves()`.
"""

from __future__ import annotations

from cnf.audit import check
from cnf.base import StandardNormal
from cnf.comparison import compare_trace
from cnf.divergence import Divergence, Exact, Hutchinson, HutchPlusPlus
from cnf.errors import CheckpointError, SolverError, TrainingError
from cnf.fields import (
    ConcatSquashField,
    ConvField,
    HollowField,
    LinearField,
    MLPField,
    PotentialField,
    SumField,
    VectorField,
)
from cnf.flow import Flow
from cnf.importance import importance_sampling
from cnf.models import (
    FFJORD,
    HINT,
    IAF,
    MAF,
    NICE,
    Glow,
    MultiscaleFFJORD,
    NeuralSpline,
    PlanarFlow,
    RadialFlow,
    RealNVP,
    SylvesterFlow,
)
from cnf.objectives import FlowMatching, MaximumLikelihood, ReverseKL
from cnf.ode import Solver, TorchDiffEq, odeint, record_solves
from cnf.regularizers import (
    HJBResidual,
    JacobianFrobenius,
    KineticEnergy,
    Regularizer,
    TaylorDerivative,
)
from cnf.transforms import (
    CNF,
    Compose,
    Inverse,
    Sigmoid,
    Transform,
    UniformDequantization,
    VariationalDequantization,
)

__version__ = "0.1.0"

__all__ = [
    "CNF",
    "FFJORD",
    "HINT",
    "IAF",
    "MAF",
    "NICE",
    "CheckpointError",
    "Compose",
    "ConcatSquashField",
    "ConvField",
    "Divergence",
    "Exact",
    "Flow",
    "FlowMatching",
    "Glow",
    "HJBResidual",
    "HollowField",
    "HutchPlusPlus",
    "Hutchinson",
    "Inverse",
    "JacobianFrobenius",
    "KineticEnergy",
    "LinearField",
    "MLPField",
    "MaximumLikelihood",
    "MultiscaleFFJORD",
    "NeuralSpline",
    "PlanarFlow",
    "PotentialField",
    "RadialFlow",
    "RealNVP",
    "Regularizer",
    "ReverseKL",
    "Sigmoid",
    "Solver",
    "SolverError",
    "StandardNormal",
    "SumField",
    "SylvesterFlow",
    "TaylorDerivative",
    "TorchDiffEq",
    "TrainingError",
    "Transform",
    "UniformDequantization",
    "VariationalDequantization",
    "VectorField",
    "check",
    "compare_trace",
    "importance_sampling",
    "odeint",
    "record_solves",
]
