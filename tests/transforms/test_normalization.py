"""Normalization: what the first batch, each batch and the mode do, and the flag that is saved."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import cnf
from cnf.transforms.normalization import ActNorm, BatchNorm

SHAPES = [(3,), (2, 4, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def data(shape: tuple, n: int = 64, dtype: torch.dtype = torch.float64) -> Tensor:
    """Samples whose channels have means and deviations of their own."""
    channels = torch.arange(1, shape[0] + 1, dtype=dtype).reshape(-1, *(1 for _ in shape[1:]))
    return 10 * channels + channels * torch.randn(n, *shape, dtype=dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    values = x.transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1, correction=0)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@each_shape
def test_the_first_inverse_call_initialises_and_no_other(shape: tuple) -> None:
    f = ActNorm(shape).double()
    x = data(shape)
    before = state(f)
    assert torch.equal(f.forward(x), x)
    assert unchanged(f, before)
    z, log_det = f.inverse_and_log_det(x)
    mean, var = moments(z)
    assert mean.abs().max() < 1e-12
    assert (var - 1).abs().max() < 1e-12
    assert f.initialized
    true_mean, true_var = moments(x)
    assert torch.allclose(f.shift, true_mean)
    assert torch.allclose(log_det, (-true_var.log().sum() / 2 * math.prod(shape[1:])).expand(64))
    set_once = state(f)
    f.inverse(3 * x)
    f.forward(x)
    assert unchanged(f, set_once)


@each_shape
def test_log_det_equals_the_brute_force_jacobian_of_actnorm(shape: tuple) -> None:
    f = ActNorm(shape).double()
    f.initialize(data(shape))
    x = data(shape, 3)
    for direction in (f.forward_and_log_det, f.inverse_and_log_det):
        jacobian = vmap(jacrev(lambda x, go=direction: go(x)[0].flatten()))(x).flatten(2)
        assert torch.allclose(direction(x)[1], torch.linalg.slogdet(jacobian).logabsdet)
    assert torch.allclose(f.inverse(f.forward(x)), x)


def test_no_gradient_goes_through_the_initial_values_and_all_through_the_call() -> None:
    f = ActNorm(3).double()
    x = data((3,)).requires_grad_()
    z, log_det = f.inverse_and_log_det(x)
    (z.square().sum() + log_det.sum()).backward()
    assert torch.allclose(x.grad, 2 * z.detach() * (-f.log_scale).exp().detach())
    assert f.shift.is_leaf
    assert f.log_scale.grad.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_initialises_where_no_graph_is_kept(mode) -> None:
    f = ActNorm(3).double()
    with mode():
        z = f.inverse(data((3,)))
    assert moments(z)[0].abs().max() < 1e-12
    f.inverse_and_log_det(data((3,)))[0].sum().backward()
    assert f.shift.grad.all()


def test_initialize_sets_it_anew_with_any_batch_dimensions() -> None:
    f = ActNorm(3).double()
    f.inverse(data((3,)))
    x = 7 * data((3,))
    f.initialize(x.reshape(8, 8, 3))
    assert moments(f.inverse(x))[0].abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"expected \(\.\.\., D=3\)"):
        f.initialize(x[:, :2])
    with pytest.raises(TypeError, match="float32"):
        f.initialize(x.float())


BAD = {
    "one": (torch.randn(1, 3), r"batch of 1: channel 0 has 1 values, expected 2.*larger batch"),
    "none": (torch.randn(0, 3), r"batch of 0: channel 0 has 0 values, expected 2.*larger batch"),
    "constant": (torch.randn(9, 3).index_fill(1, torch.tensor(1), 0.1), r"channel 1 is constant"),
    "nan": (torch.randn(9, 3).index_fill(1, torch.tensor(2), math.nan), r"channel 2 is not finite"),
    "inf": (torch.tensor([[0.0, 0, 1], [1, math.inf, 2]]), r"channel 1 is not finite"),
}


@pytest.mark.parametrize(("x", "message"), BAD.values(), ids=BAD)
def test_a_batch_that_cannot_initialise_is_refused_and_leaves_it_as_it_was(x, message) -> None:
    f = ActNorm(3)
    before = state(f)
    for call in (f.inverse, f.inverse_and_log_det, f.initialize):
        with pytest.raises(ValueError, match=message):
            call(x)
    assert unchanged(f, before)
    assert torch.equal(f.forward(torch.ones(1, 3)), torch.ones(1, 3))
    f.inverse(torch.randn(9, 3))
    assert f.initialized
    if x.isfinite().all():
        assert f.inverse(x).shape == x.shape


def test_one_image_has_values_enough() -> None:
    z = ActNorm((2, 4, 4)).inverse(data((2, 4, 4), 1, torch.float32))
    assert moments(z)[0].abs().max() < 1e-5


def test_under_function_transforms_it_asks_to_be_called_before() -> None:
    f = ActNorm(3).double()
    x = data((3,), 4)
    before = state(f)
    for call in (vmap(f.inverse), torch.func.grad(lambda x: f.inverse(x).sum())):
        with pytest.raises(ValueError, match=r"call it once on a batch outside.*initialize\(x\)"):
            call(x)
    copies = {name: p.detach().clone() for name, p in cnf.Inverse(f).named_parameters()}
    with pytest.raises(ValueError, match=r"initialize\(x\)"):
        functional_call(cnf.Inverse(f), copies, x)
    assert unchanged(f, before)
    expected = f.inverse(x)
    assert torch.allclose(vmap(f.inverse)(x), expected)
    compiled = torch.compile(f.inverse, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected)


def test_a_loaded_flag_counts_whatever_it_was_before() -> None:
    fresh, ready = ActNorm(3).double(), ActNorm(3).double()
    x = data((3,))
    ready.inverse(x)
    loaded = ActNorm(3).double()
    loaded.load_state_dict(ready.state_dict())
    assert torch.equal(vmap(loaded.inverse)(x + 1), ready.inverse(x + 1)), "no call before"
    loaded.load_state_dict(fresh.state_dict())
    assert torch.equal(loaded.forward(x), x)
    z = loaded.inverse(5 * x)
    assert moments(z)[0].abs().max() < 1e-12, "initialised anew"
    assert ready.initialized
    assert not fresh.initialized
    with torch.device("meta"):
        empty = ActNorm(3).double()
    empty.load_state_dict(ready.state_dict(), assign=True)
    assert torch.equal(empty.inverse(x), ready.inverse(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
@pytest.mark.parametrize("ready", [False, True])
def test_copies_keep_the_flag_and_share_nothing(duplicate, ready: bool) -> None:
    f = ActNorm(3).double()
    if ready:
        f.initialize(data((3,)))
    twin = duplicate(f)
    assert bool(twin.initialized) == ready
    twin.inverse(100 * data((3,)))
    assert bool(f.initialized) == ready


def test_the_flag_is_read_once() -> None:
    """Later calls do not wait for the device."""
    f = ActNorm(3)
    f.inverse(torch.randn(9, 3))
    del f.initialized
    f.inverse(torch.randn(9, 3))


def test_a_stack_is_initialised_layer_by_layer() -> None:
    flow = cnf.Flow(cnf.StandardNormal(3), cnf.Compose(*(ActNorm(3) for _ in range(3))))
    x = data((3,), 500, torch.float32)
    flow.log_prob(x)
    assert moments(flow.transform.inverse(x))[1].sub(1).abs().max() < 1e-4
    assert all(f.initialized for f in flow.transform)
    true = -0.5 * (3 * math.log(2 * math.pi) + 3) - moments(x)[1].log().sum() / 2
    assert torch.allclose(flow.log_prob(x).mean(), true, atol=1e-3)


@each_shape
def test_batch_norm_in_training_normalises_by_the_batch(shape: tuple) -> None:
    f = drawn(BatchNorm(shape))
    x = data(shape)
    mean, var = moments(x)
    z, log_det = f.inverse_and_log_det(x)
    wide = lambda t: t.reshape(-1, *(1 for _ in shape[1:]))  # noqa: E731
    unit = (x - wide(mean)) / wide(var + 1e-5).sqrt()
    assert torch.allclose(z, wide(f.log_scale.exp()) * unit + wide(f.shift))
    pixels = math.prod(shape[1:])
    true = pixels * (f.log_scale - (var + 1e-5).log() / 2).sum()
    assert torch.allclose(log_det, true.expand(64))
    n = 64 * pixels
    assert torch.allclose(f.running_mean, 0.1 * mean)
    assert torch.allclose(f.running_var, 0.9 + 0.1 * var * n / (n - 1))


def drawn(f: BatchNorm) -> BatchNorm:
    """In float64, with every parameter and running average drawn anew."""
    f = f.double()
    with torch.no_grad():
        f.log_scale.normal_()
        f.shift.normal_()
    return f


def test_batch_norm_agrees_with_pytorchs() -> None:
    f, theirs = BatchNorm(3, momentum=0.3), nn.BatchNorm1d(3, momentum=0.3)
    for _ in range(4):
        x = data((3,), 20, torch.float32)
        assert torch.allclose(f.inverse(x), theirs(x), atol=1e-5)
    assert torch.allclose(f.running_mean, theirs.running_mean)
    assert torch.allclose(f.running_var, theirs.running_var)
    f.eval(), theirs.eval()
    assert torch.allclose(f.inverse(x), theirs(x), atol=1e-5)


@each_shape
def test_batch_norm_in_evaluation_is_a_fixed_map(shape: tuple) -> None:
    f = drawn(BatchNorm(shape))
    for _ in range(3):
        f.inverse(data(shape))
    f.eval()
    before = state(f)
    x = data(shape, 3)
    for direction in (f.forward_and_log_det, f.inverse_and_log_det):
        jacobian = vmap(jacrev(lambda x, go=direction: go(x)[0].flatten()))(x).flatten(2)
        assert torch.allclose(direction(x)[1], torch.linalg.slogdet(jacobian).logabsdet)
    z, log_det = f.inverse_and_log_det(x)
    returned, negative = f.forward_and_log_det(z)
    assert torch.allclose(returned, x)
    assert torch.allclose(negative, -log_det)
    assert torch.allclose(f.inverse(x[:1]), z[:1]), "a batch of one"
    assert unchanged(f, before)


def test_the_way_to_data_takes_the_running_averages_in_either_mode() -> None:
    f = drawn(BatchNorm(3))
    f.inverse(data((3,)))
    z = data((3,), 5)
    before = state(f)
    in_training = f.forward_and_log_det(z)
    in_evaluation = f.eval().forward_and_log_det(z)
    assert all(torch.equal(a, b) for a, b in zip(in_training, in_evaluation, strict=True))
    assert unchanged(f, before)


def test_gradients_go_through_the_statistics_of_the_batch() -> None:
    f = drawn(BatchNorm((2, 2, 2)))
    x = data((2, 2, 2), 3).requires_grad_()
    parameters = (f.log_scale, f.shift)
    assert torch.autograd.gradcheck(
        lambda x, *_: f.inverse_and_log_det(x), (x, *parameters), fast_mode=True
    )
    (gradient,) = torch.autograd.grad(f.inverse_and_log_det(x)[0][:, 0].sum(), x)
    assert gradient.abs().max() < 1e-10, "the sum of a normalised channel is constant"
    assert not f.running_mean.requires_grad


def test_batch_norm_of_awkward_batches() -> None:
    f = BatchNorm(3)
    before = state(f)
    with pytest.raises(ValueError, match=r"2 or more values.*batch of 1; use eval\(\)"):
        f.inverse(torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"use eval\(\)"):
        vmap(f.inverse)(torch.randn(2, 4, 3))
    z, log_det = f.inverse_and_log_det(torch.randn(0, 3))
    assert z.shape == (0, 3)
    assert log_det.shape == (0,)
    assert unchanged(f, before)
    constant = torch.randn(9, 3).index_fill(1, torch.tensor(1), 0.1).requires_grad_()
    z, log_det = f.inverse_and_log_det(constant)
    (z.square().sum() + log_det.sum()).backward()
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    assert constant.grad.isfinite().all()
    assert BatchNorm((2, 4, 4)).inverse(torch.randn(1, 2, 4, 4)).shape == (1, 2, 4, 4)


def test_batch_norm_compiles_in_training() -> None:
    torch._dynamo.reset()
    f = BatchNorm(3)
    twin = copy.deepcopy(f)
    compiled = torch.compile(twin.inverse_and_log_det, backend="aot_eager", fullgraph=True)
    x = data((3,), 9, torch.float32)
    for ours, theirs in zip(f.inverse_and_log_det(x), compiled(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(f.running_var, twin.running_var)


def test_constants_out_of_range_are_refused() -> None:
    for momentum in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="momentum"):
            BatchNorm(3, momentum=momentum)
    with pytest.raises(ValueError, match="eps"):
        BatchNorm(3, eps=0.0)
    with pytest.raises(TypeError, match="momentum"):
        BatchNorm(3, momentum="0.1")
