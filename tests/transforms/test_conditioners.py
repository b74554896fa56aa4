"""Conditioners: their formulas written out, context that is an image, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cnf
from cnf.transforms import Compose, Coupling, Squeeze
from cnf.transforms.conditioners import MLP, ConvNet


def randomised(module: nn.Module) -> nn.Module:
    """In float64, every parameter random."""
    for p in module.parameters():
        nn.init.normal_(p, 0.0, 1 / math.sqrt(p[0].numel() if p.ndim > 1 else 4))
    return module.double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_perceptron_written_out() -> None:
    net = randomised(MLP((2, 3), (4, 2), 5, hidden=(7,), activation="tanh"))
    w1, b1, w2, b2 = net.parameters()
    x, c = normal(6, 2, 3), normal(6, 5)
    h = F.linear(torch.cat((x.flatten(1), c), 1), w1, b1).tanh()
    torch.testing.assert_close(net(x, c), F.linear(h, w2, b2).view(6, 4, 2))


@pytest.mark.parametrize("context", [0, 3])
def test_convolutions_written_out(context: int) -> None:
    net = randomised(ConvNet((2, 4, 3), (5, 4, 3), context, hidden=(6, 7)))
    k1, b1, k2, b2, *vectors, k3, b3 = net.parameters()
    x = normal(6, 2, 4, 3)
    c = normal(6, context) if context else None
    shifts: list[Any] = [0.0, 0.0]
    if c is not None:
        w1, v1, w2, v2 = vectors
        shifts = [F.linear(c, w, v)[:, :, None, None] for w, v in ((w1, v1), (w2, v2))]
    h = (F.conv2d(x, k1, b1, padding=1) + shifts[0]).relu()
    h = (F.conv2d(h, k2, b2) + shifts[1]).relu()
    torch.testing.assert_close(net(x, c), F.conv2d(h, k3, b3, padding=1))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_context_image_is_more_channels(factor: int) -> None:
    shape = (3, 4 * factor, 2 * factor)
    net = randomised(ConvNet((2, 4, 2), (5, 4, 2), hidden=(6, 7), context_shape=shape))
    k1, b1, k2, b2, added, k3, b3 = net.parameters()
    x, c = normal(6, 2, 4, 2), normal(6, math.prod(shape))
    image = F.pixel_unshuffle(c.view(6, *shape), factor)
    h = F.conv2d(torch.cat((x, image), 1), torch.cat((k1, added), 1), b1, padding=1).relu()
    h = F.conv2d(h, k2, b2).relu()
    torch.testing.assert_close(net(x, c), F.conv2d(h, k3, b3, padding=1))


@pytest.mark.parametrize("context", [{}, {"context": 3}, {"context_shape": (1, 8, 8)}], ids=str)
def test_zero_at_first(context: dict[str, Any]) -> None:
    net = ConvNet((2, 4, 4), (3, 4, 4), **context)
    n = {"context": 3, "context_shape": 64}.get(next(iter(context), ""))
    found = net(torch.randn(5, 2, 4, 4), torch.randn(5, n) if n else None)
    assert torch.equal(found, torch.zeros(5, 3, 4, 4))
    assert net(torch.zeros(0, 2, 4, 4), torch.zeros(0, n) if n else None).shape == (0, 3, 4, 4)


def test_couplings_at_two_scales_of_one_image() -> None:
    """The context image is that of the data; where the images are squeezed, it is folded."""
    net = partial(ConvNet, hidden=(5,), context_shape=(1, 4, 4))
    flow = randomised(
        Compose(
            Coupling((4, 2, 2), "channel", context=16, conditioner=net),
            Squeeze((1, 4, 4)),
            Coupling((1, 4, 4), "checkerboard", context=16, conditioner=net),
        )
    )
    x, c = normal(3, 1, 4, 4), normal(3, 16)
    z, log_det = flow.inverse_and_log_det(x, c)
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda x, c: flow.inverse(x[None], c[None]).flatten())
    )(x, c)
    torch.testing.assert_close(log_det, jacobian.view(3, 16, 16).slogdet()[1])
    torch.testing.assert_close(flow.forward(z, c), x)
    assert (z - flow.inverse(x, c.flip(0))).abs().amax((1, 2, 3))[0] > 1e-3


def test_the_image_conditions_a_flow() -> None:
    """q(u | image): log_prob with its gradient in the image."""
    net = partial(ConvNet, hidden=(5,), context_shape=(2, 4, 4))
    transform = randomised(Coupling((2, 4, 4), "channel", context=32, conditioner=net))
    flow = cnf.Flow(cnf.StandardNormal(2, 4, 4), transform).double()
    c = normal(3, 32).requires_grad_()
    flow.log_prob(normal(3, 2, 4, 4), context=c).sum().backward()
    assert c.grad is not None
    assert (c.grad != 0).any(1).all()


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"context_shape": (4, 4)}, ValueError, r"context_shape=\(4, 4\) must be the shape"),
        (
            {"context_shape": (1, 6, 4)},
            ValueError,
            r"context_shape=\(1, 6, 4\) does not fit images",
        ),
        (
            {"context_shape": (1, 2, 2)},
            ValueError,
            r"context_shape=\(1, 2, 2\) does not fit images",
        ),
        (
            {"context_shape": (1, 4, 4), "context": 3},
            ValueError,
            r"context=3 does not fit.* has 16",
        ),
        ({"context_shape": (1, 4, 4), "hidden": ()}, ValueError, r"hidden=\(\) leaves context no"),
        ({"context": 2, "hidden": ()}, ValueError, r"hidden=\(\) leaves context no"),
        ({"hidden": (0,)}, ValueError, r"hidden=\(0,\) must be positive"),
        ({"outputs": (1, 4, 5)}, ValueError, r"must be shapes \(C, H, W\) of one height"),
        ({"activation": "step"}, ValueError, r"activation='step' is not known"),
    ],
)
def test_what_is_refused(choices: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConvNet(**{"inputs": (1, 4, 4), "outputs": (2, 4, 4), **choices})
