"""Attention in a field: PyTorch's fused kernels, which have a first derivative alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cnf

SOLVERS = {
    "backprop": cnf.Solver("rk4", steps=4),
    "checkpoint": cnf.Solver("rk4", steps=4, gradient="checkpoint"),
    "adjoint": cnf.Solver(gradient="adjoint"),
    "independent": cnf.Solver(batch="independent"),
    "torchdiffeq": cnf.TorchDiffEq("rk4", steps=4),
    "torchdiffeq adjoint": cnf.TorchDiffEq("rk4", steps=4, gradient="adjoint"),
}


class Attention(nn.Module):
    """One head over the tokens of x (B, 3, 4), by the fused kernel or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.inputs, self.outputs, self.fused = nn.Linear(4, 12), nn.Linear(4, 4), fused

    def forward(self, t, x):
        q, k, v = self.inputs(x).unsqueeze(1).chunk(3, -1)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT / 2).softmax(-1) @ v
        return (1 + t) * self.outputs(y.squeeze(1))


class Transformer(nn.Module):
    """A layer as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, t, x):
        return self.layer(x)


def flow_of(field: nn.Module, divergence: str, solver) -> cnf.Flow:
    return cnf.Flow(cnf.StandardNormal(3, 4), cnf.CNF(field, divergence, solver, event_dims=2))


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_fused_attention_trains_like_attention_written_out(solver, divergence: str) -> None:
    fused, written = Attention(True), Attention(False)
    written.load_state_dict(fused.state_dict())
    x = torch.randn(5, 3, 4)
    found = []
    for field in (fused, written):
        noise = torch.Generator().manual_seed(0)
        log_prob = flow_of(field, divergence, solver).log_prob(x, generator=noise)
        log_prob.sum().backward()
        found.append((log_prob.detach(), field.inputs.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_transformer_layer_has_its_trace_and_is_compared() -> None:
    flow, x = flow_of(Transformer(), "exact", cnf.Solver("rk4", steps=2)), torch.randn(4, 3, 4)
    flow.log_prob(x).sum().backward()
    field, t = flow.transform.field, torch.zeros(())
    jacobian = torch.autograd.functional.jacobian(lambda x: field(t, x[None])[0], x[0])
    _, divergence = cnf.Exact()(lambda t, x, c: field(t, x), t, x[:1])
    trace = jacobian.reshape(12, 12).trace()
    torch.testing.assert_close(divergence[0], trace, rtol=1e-4, atol=1e-4)
    table = cnf.compare_trace(flow, x, draws=2, rounds=1)
    assert all(row.training_seconds is not None for row in table.rows)
