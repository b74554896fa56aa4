"""Linear maps: against the matrices that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap
from torch.utils._pytree import tree_map

from cnf.transforms.linear import Conv1x1, Diagonal, Linear, LULinear, QRLinear
from cnf.transforms.matrices import FullMatrix, LUMatrix, QRMatrix
from cnf.transforms.permutation import Permutation

MATRICES = {
    "full": FullMatrix,
    "lu": LUMatrix,
    "qr": QRMatrix,
    "qr-2": lambda n: QRMatrix(n, min(n, 2)),
}
MAPS = {
    "linear": lambda: Linear(5),
    "lu": lambda: LULinear(5),
    "qr": lambda: QRLinear(5),
    "qr-2": lambda: QRLinear(5, 2),
    "picture": lambda: LULinear((2, 2, 2)),
    "one": lambda: LULinear(1),
    "conv": lambda: Conv1x1((3, 2, 4)),
    "conv-full": lambda: Conv1x1((3, 2, 4), "full"),
    "conv-qr": lambda: Conv1x1((3, 2, 4), "qr"),
    "conv-vector": lambda: Conv1x1(5),
}
each_matrix = pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
each_map = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)


def drawn(make):
    """A module in float64, all of whose parameters are drawn anew."""
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.7)
    return module


def dense(matrix: nn.Module) -> Tensor:
    return matrix.multiply(torch.eye(matrix.size, dtype=torch.float64)).T


@each_matrix
@pytest.mark.parametrize("n", [1, 2, 6])
def test_a_matrix_solves_what_it_multiplies(make, n: int) -> None:
    matrix = drawn(lambda: make(n))
    a = dense(matrix)
    rows = torch.randn(7, n, dtype=torch.float64)
    assert torch.allclose(matrix.multiply(rows), rows @ a.T)
    assert torch.allclose(matrix.solve(rows), rows @ torch.linalg.inv(a).T)
    assert torch.allclose(matrix.log_det(), torch.linalg.slogdet(a).logabsdet)


def test_the_factors_of_lu_are_those_of_its_formula() -> None:
    matrix = drawn(lambda: LUMatrix(4))
    f, order = matrix.factors.detach(), matrix.permutation.order
    lower = f.tril(-1) + torch.eye(4)
    diagonal = nn.functional.softplus(f.diagonal() + math.log(math.expm1(0.999))) + 0.001
    upper = f.triu(1) + torch.diag(diagonal)
    assert torch.allclose(dense(matrix), torch.eye(4, dtype=torch.float64)[order] @ lower @ upper)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_qr_is_a_product_of_householder_reflections(k: int) -> None:
    matrix = drawn(lambda: QRMatrix(5, k))
    v = (matrix.factors.tril(-1) + torch.eye(5)).detach()[:, :k]
    q = torch.linalg.householder_product(
        torch.cat((v, torch.zeros(5, 5 - k)), 1).double(),
        torch.cat((2 / v.square().sum(0), torch.zeros(5 - k))).double(),
    )
    r = q.T @ dense(matrix)
    assert torch.allclose(r.tril(-1), torch.zeros(5, 5, dtype=torch.float64), atol=1e-12)
    assert (r.diagonal() > 0).all()
    assert torch.linalg.det(q).sign() == (-1) ** k


def test_they_start_where_they_say() -> None:
    n = 6
    eye = torch.eye(n, dtype=torch.float64)
    full, qr = dense(FullMatrix(n).double()), dense(QRMatrix(n).double())
    assert torch.allclose(full @ full.T, eye, atol=1e-6)
    assert torch.allclose(qr @ qr.T, eye, atol=1e-6)
    assert (qr - eye).abs().max() > 0.1
    lu = LUMatrix(n).double()
    assert torch.allclose(dense(lu), eye[lu.permutation.order], atol=1e-6)


def test_the_permutation_of_lu_comes_from_the_generator() -> None:
    def order(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return LULinear(20, generator=generator).matrix.permutation.order.tolist()

    assert order(1) == order(1) != order(2)
    generator = torch.Generator().manual_seed(1)
    assert Conv1x1((20, 2, 2), generator=generator).matrix.permutation.order.tolist() == order(1)


@each_map
@pytest.mark.parametrize("batch", [3, 50])  # one product with the matrix, and with each factor
def test_log_det_equals_the_brute_force_jacobian(make, batch: int) -> None:
    f = drawn(make)
    x = torch.randn(batch, *f.event_shape, dtype=torch.float64)
    for direction in (f.forward_and_log_det, f.inverse_and_log_det):
        jacobian = vmap(jacrev(lambda x, go=direction: go(x)[0].flatten()))(x).flatten(2)
        log_det = direction(x)[1]
        assert log_det.abs().min() > 0.01
        assert torch.allclose(log_det, torch.linalg.slogdet(jacobian).logabsdet)


@each_map
@pytest.mark.parametrize("batch", [(), (0,), (3,), (50,), (2, 3)], ids=str)
def test_both_directions_agree_whatever_the_batch(make, batch: tuple) -> None:
    f = drawn(make)
    z = torch.randn(*batch, *f.event_shape, dtype=torch.float64)
    x, log_det = f.forward_and_log_det(z)
    returned, negative = f.inverse_and_log_det(x)
    assert x.shape == z.shape
    assert log_det.shape == batch
    assert torch.allclose(returned, z)
    assert torch.allclose(negative, -log_det)
    assert torch.equal(f.forward(z), x)
    assert torch.equal(f.inverse(x), returned)


def test_a_convolution_acts_on_every_pixel_by_the_same_matrix() -> None:
    f = drawn(lambda: Conv1x1((3, 2, 4)))
    z = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    expected = nn.functional.conv2d(z, dense(f.matrix)[:, :, None, None], f.bias)
    x, log_det = f.forward_and_log_det(z)
    assert torch.allclose(x, expected)
    assert torch.allclose(log_det, 8 * f.matrix.log_det())


@each_map
@pytest.mark.parametrize("batch", [2, 30])
def test_first_and_second_derivatives(make, batch: int) -> None:
    f = drawn(make)
    x = torch.randn(batch, *f.event_shape, dtype=torch.float64, requires_grad=True)
    parameters = list(f.parameters())

    def both(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return (*f.forward_and_log_det(x), *f.inverse_and_log_det(x))

    assert torch.autograd.gradcheck(both, (x, *parameters), fast_mode=True)
    if batch == 2:
        assert torch.autograd.gradgradcheck(both, (x, *parameters), fast_mode=True)


@each_map
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("mode", [jacfwd, jacrev, hessian])
def test_derivatives_of_single_samples_under_vmap(make, mode) -> None:
    """In x, and in the parameters of several maps at once, against autograd without torch.func."""
    f = drawn(make)
    x = torch.randn(3, *f.event_shape, dtype=torch.float64)
    names, parameters = zip(*f.named_parameters(), strict=True)
    several = [p + 0.1 * torch.randn(3, *p.shape, dtype=torch.float64) for p in parameters]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = f

        def forward(self, x: Tensor) -> Tensor:
            ends = (*self.f.forward_and_log_det(x), *self.f.inverse_and_log_det(x))
            return torch.cat([v.flatten() for v in ends]).sin().sum()

    both = Both()

    def value(x: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"f.{name}": p for name, p in zip(names, parameters, strict=True)}
        return functional_call(both, named, (x,))

    inputs = (x, *several)
    found = vmap(mode(value, argnums=tuple(range(len(inputs)))))(*inputs)
    autograd = torch.autograd.functional
    for i in range(3):
        row = tuple(v[i].detach() for v in inputs)
        truth = autograd.hessian(value, row) if mode is hessian else autograd.jacobian(value, row)
        torch.testing.assert_close(tree_map(lambda v, i=i: v[i], found), truth)


@each_map
def test_values_alone_compute_no_log_det(make, monkeypatch) -> None:
    f = drawn(make)
    x = torch.randn(4, *f.event_shape, dtype=torch.float64)
    monkeypatch.setattr(f.matrix, "log_det", None)
    assert f.inverse(f.forward(x)).shape == x.shape
    with pytest.raises(TypeError, match="nonsense"):
        f.forward(x, nonsense=1)
    with pytest.raises(ValueError, match="context"):
        f.inverse(x, torch.randn(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("make", [LULinear, QRLinear, lambda n: Conv1x1((n, 2, 2))])
@pytest.mark.parametrize("raw", [-1e30, -100.0])
def test_a_diagonal_driven_to_zero_is_floored(make, raw: float) -> None:
    f = make(3)
    with torch.no_grad():
        f.matrix.factors.fill_diagonal_(raw)
    x = torch.randn(5, *f.event_shape)
    z, log_det = f.inverse_and_log_det(x)
    pixels = math.prod(f.event_shape) // 3
    assert torch.allclose(log_det, torch.full((5,), -pixels * 3 * math.log(1e-3)))
    assert z.isfinite().all()
    assert torch.allclose(f.forward(z), x, atol=1e-3)
    (z.sum() + log_det.sum()).backward()
    assert all(p.grad.isfinite().all() for p in f.parameters())


@pytest.mark.parametrize("make", [Linear, lambda n: Conv1x1((n, 2, 2), "full")])
def test_a_singular_matrix_is_refused(make) -> None:
    f = make(3)
    with torch.no_grad():
        f.matrix.weight.zero_()
    x = torch.randn(5, *f.event_shape)
    assert f.forward(x).isfinite().all()
    for call in (f.forward_and_log_det, f.inverse_and_log_det, f.inverse):
        with pytest.raises(ValueError, match=r"weight \(3, 3\) is singular.*LULinear"):
            call(x)
    with torch.no_grad():
        f.matrix.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"weight \(3, 3\) is not finite"):
        f.forward_and_log_det(x)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reflections=4 must be at most .* 3"):
        QRLinear(3, 4)
    with pytest.raises(ValueError, match=r"reflections=0 must be a positive"):
        QRLinear(3, 0)
    with pytest.raises(
        ValueError, match=r"parametrisation='LU' is not known.*'lu'|expected one of"
    ):
        Conv1x1(3, "LU")
    for wrong in ([0, 1], [0, 1, 1], [1, 2, 3], [0.0, 1.0, 2.0], [True, 0, 2]):
        with pytest.raises(ValueError, match=r"no permutation of the 3 indices 0 \.\.\. 2"):
            Permutation(3, wrong)
    with pytest.raises(ValueError, match=r"permutation='reversed'.*'reverse'"):
        Permutation(3, "reversed")
    with pytest.raises(TypeError, match=r"permutation must be"):
        Permutation(3, 2)


@pytest.mark.parametrize(
    ("shape", "permutation"),
    [(7, "reverse"), (7, "random"), ((5, 2, 3), "random"), (3, (2, 0, 1)), (1, [0])],
    ids=str,
)
def test_permutations_come_back_bit_for_bit(shape, permutation) -> None:
    f = Permutation(shape, permutation)
    z = torch.randn(4, *f.event_shape)
    x, log_det = f.forward_and_log_det(z)
    order = f.order.tolist()
    assert all(torch.equal(x[:, i], z[:, j]) for i, j in enumerate(order))
    assert torch.equal(f.inverse(x), z)
    assert torch.equal(f.forward(f.inverse(z)), z)
    assert torch.equal(log_det, torch.zeros(4))
    twin = Permutation(shape, "reverse")
    twin.load_state_dict(f.state_dict())
    assert torch.equal(twin.forward(z), x)
    assert torch.equal(twin.inverse(x), z)


def test_named_and_given_orders() -> None:
    assert Permutation(4).order.tolist() == [3, 2, 1, 0]
    orders = [
        Permutation(50, "random", generator=torch.Generator().manual_seed(s)).order.tolist()
        for s in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(50))
    assert Permutation(3, torch.tensor([1, 2, 0])).order.tolist() == [1, 2, 0]


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)], ids=str)
def test_a_diagonal_map_without_context(shape: tuple) -> None:
    f = drawn(lambda: Diagonal(shape))
    s, b = f.amortized(None)
    z = torch.randn(4, *shape, dtype=torch.float64)
    x, log_det = f.forward_and_log_det(z)
    assert torch.allclose(x, s.exp() * z + b)
    assert torch.allclose(log_det, s.sum().expand(4))
    assert torch.allclose(f.inverse(x), z)
    fresh = Diagonal(shape)
    assert torch.equal(fresh.forward(z.float()), z.float()), "the identity at first"
    assert len({p.data_ptr() for p in fresh.parameters()}) == 2, "s and b share memory"


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)], ids=str)
def test_a_diagonal_map_by_context_is_each_samples_own(shape: tuple) -> None:
    f = drawn(lambda: Diagonal(shape, context=2))
    z = torch.randn(4, *shape, dtype=torch.float64)
    context = torch.randn(4, 2, dtype=torch.float64)
    x, log_det = f.forward_and_log_det(z, context)
    s, b = f.amortized(context)
    assert s.shape == (4, *shape)
    for i in range(4):
        assert torch.allclose(x[i], s[i].exp() * z[i] + b[i])
        assert torch.allclose(log_det[i], s[i].sum())
    assert log_det.std() > 0.1
    returned, negative = f.inverse_and_log_det(x, context)
    assert torch.allclose(returned, z)
    assert torch.allclose(negative, -log_det)
    assert f.forward(z[:0], context[:0]).shape == (0, *shape)


@pytest.mark.parametrize("context", [0, 2])
def test_a_diagonal_initialised_by_data_standardises_it(context) -> None:
    torch.manual_seed(0)
    f = Diagonal((2, 3), context)
    x = torch.randn(500, 4, 2, 3) * torch.rand(2, 3) + torch.randn(2, 3)
    f.initialize(x)
    given = (torch.zeros(500, 4, 2),) if context else ()
    z = f.inverse(x, *given)
    assert z.mean((0, 1)).abs().max() < 1e-5
    torch.testing.assert_close(z.std((0, 1)), torch.ones(2, 3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(f.forward(z, *given), x)


@pytest.mark.parametrize("shape", [(1, 3), (5, 2), (0, 3), ()])
def test_a_diagonal_refuses_data_without_a_spread(shape) -> None:
    x = torch.randn(shape) if shape else torch.ones(5, 3)
    with pytest.raises(ValueError, match=r"constant|expected"):
        Diagonal(3).initialize(x)
