"""A field at a time of each sample: the value that each sample has by itself at its own time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.fields.time import at_own_times, takes_batched_time

FIELDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: cnf.MLPField(3, (8, 8)),
    "mlp with context and gates": lambda: cnf.MLPField(3, (8,), context=2, gates=True),
    "mlp with gates": lambda: cnf.MLPField(3, (8, 8, 8), gates=True, frequencies=0),
    "concatsquash": lambda: cnf.ConcatSquashField(3, (8, 8)),
    "concatsquash with context": lambda: cnf.ConcatSquashField(3, (8,), context=2),
    "potential": lambda: cnf.PotentialField(3),
    "potential with context": lambda: cnf.PotentialField(3, context=2),
    "hollow": lambda: cnf.HollowField(3, (8,)),
    "hollow with context": lambda: cnf.HollowField(3, (8,), context=2),
    "linear": lambda: cnf.LinearField(3, context=2),
    "sum": lambda: cnf.SumField(cnf.MLPField(3, (8,)), cnf.LinearField(3, context=2)),
    "film": lambda: cnf.ConvField((2, 4, 4), (5,)),
    "film with context": lambda: cnf.ConvField((2, 4, 4), (5, 5), context=2),
    "film of images": lambda: cnf.ConvField((2, 4, 4), (5,), context_shape=(1, 4, 4)),
    "conv concat": lambda: cnf.ConvField((2, 4, 4), (5,), time="concat"),
    "conv concat with context": lambda: cnf.ConvField((2, 4, 4), (5,), time="concat", context=2),
    "conv concatsquash": lambda: cnf.ConvField((2, 4, 4), (5,), time="concatsquash", context=2),
}


@pytest.mark.parametrize("name", FIELDS)
def test_each_sample_at_its_own_time(name: str) -> None:
    torch.manual_seed(0)
    field = FIELDS[name]().double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(5, *field.event_shape, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    width = field.context
    context = torch.randn(5, width, dtype=torch.float64) if width else None
    own = [
        field(t[i], x[i : i + 1], None if context is None else context[i : i + 1]) for i in range(5)
    ]
    assert takes_batched_time(field)
    torch.testing.assert_close(at_own_times(field, t, x, context), torch.cat(own))


class Decay(nn.Module):
    """A field of one's own, which multiplies by t ()."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        assert t.shape == ()
        return -t * x


class Doubled(cnf.MLPField):
    """A subclass whose values know of one time alone."""

    def derivative(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return 2 * t.reshape(()) * super().derivative(t, x, context)


@pytest.mark.parametrize("field", [Decay(), Doubled(3, (8,)), lambda t, x: -t * x])
def test_another_field_sees_one_time(field: Callable[..., Tensor]) -> None:
    x, t = torch.randn(5, 3), torch.rand(5)
    own = torch.cat([field(t[i], x[i : i + 1]) for i in range(5)])
    assert not takes_batched_time(field)
    torch.testing.assert_close(at_own_times(field, t, x), own)


def test_a_field_that_vmap_does_not_allow_is_told_of() -> None:
    with pytest.raises(ValueError, match="batched_time"):
        at_own_times(lambda t, x: x * t.item(), torch.rand(5), torch.randn(5, 3))


def test_no_samples() -> None:
    """Of a field of one time, too, which vmap would refuse."""
    t, x, context = torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, 2)
    assert at_own_times(lambda t, x: t * x, t, x).shape == (0, 3)
    assert at_own_times(lambda t, x, c: t * x + c.sum(-1, True), t, x, context).shape == (0, 3)
