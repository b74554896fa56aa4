"""What every discrete transform promises, checked for each entry of `discrete_kinds.KINDS`."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
import pkgutil
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import cnf
import cnf.transforms
from cnf.transforms import ActNorm, Coupling, LULinear, MaskedAutoregressive, Permutation
from tests.transforms.discrete_kinds import KINDS, Kind, Parameters

DIRECTIONS = ("forward", "inverse")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
NETWORKS = 200

each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def kinds(wanted: Callable[[Kind], object]) -> pytest.MarkDecorator:
    """For tests that concern some kinds alone."""
    some = [kind for kind in KINDS if wanted(kind)]
    return pytest.mark.parametrize("kind", some, ids=[kind.name for kind in some])


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def kind(request) -> Kind:
    return request.param


@pytest.fixture(autouse=True)
def _seed_of_this_file() -> None:
    torch.manual_seed(1)


def joint(transform: cnf.Transform, direction: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(transform, f"{direction}_and_log_det")


class Joint(nn.Module):
    """The joint call as a module's own, for `functional_call`."""

    def __init__(self, transform: cnf.Transform, direction: str) -> None:
        super().__init__()
        self.transform = transform
        self.direction = direction

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return joint(self.transform, self.direction)(*inputs)

    def with_parameters(self, parameters: Parameters, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        named = {f"transform.{name}": value for name, value in parameters.items()}
        return functional_call(self, named, inputs)


def each_network(
    transform: cnf.Transform, draws: Parameters, direction: str, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and log-determinants of n networks (n, ...), each at an input of its own."""
    x = inputs[0]
    call = Joint(copy.deepcopy(transform).to(x.dtype), direction).with_parameters
    return vmap(call)({name: draw.to(x.dtype) for name, draw in draws.items()}, *inputs)


def brute_force(
    transform: cnf.Transform, draws: Parameters, direction: str, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and log |det J| of n networks in float64, from every entry of the Jacobian J."""
    call = Joint(copy.deepcopy(transform).double(), direction).with_parameters

    def value_twice(x: Tensor, parameters: Parameters, *context: Tensor) -> tuple[Tensor, Tensor]:
        value, _ = call(parameters, x, *context)
        return value.flatten(), value

    x, *context = (t.double() for t in inputs)
    parameters = {name: draw.double() for name, draw in draws.items()}
    jacobian, value = vmap(jacrev(value_twice, has_aux=True))(x, parameters, *context)
    return value, torch.linalg.slogdet(jacobian.flatten(2)).logabsdet


def assert_close(value: Tensor, truth: Tensor, tolerance: float) -> None:
    """Equal up to the tolerance, relative to the size of the truth where that is above 1."""
    error = (value.to(truth) - truth).abs() / truth.abs().clamp_min(1)
    assert value.shape == truth.shape
    assert not error.numel() or error.max() <= tolerance


@each_dtype
@each_direction
def test_log_det_equals_the_brute_force_jacobian(kind: Kind, direction: str, dtype) -> None:
    transform, draws = kind.networks(NETWORKS)
    inputs = kind.inputs(direction, NETWORKS, dtype=dtype)
    value, log_det = each_network(transform, draws, direction, *inputs)
    true_value, truth = brute_force(transform, draws, direction, *inputs)
    assert log_det.dtype == value.dtype == dtype
    if kind.volume_preserving:
        assert not log_det.any()
    else:
        assert truth.abs().max() > 0.1, "these parameters test nothing"
    assert (log_det - truth).abs().max() <= (1e-4 if dtype == torch.float32 else 1e-9)
    assert_close(value, true_value, 1e-4 if dtype == torch.float32 else 1e-9)


@each_dtype
@pytest.mark.parametrize("there", DIRECTIONS)
def test_round_trip_with_cancelling_log_dets(kind: Kind, there: str, dtype) -> None:
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    back = DIRECTIONS[there == "forward"]
    transform, draws = kind.networks(20)
    x, *context = kind.inputs(there, 20, dtype=dtype)
    value, log_det = each_network(transform, draws, there, x, *context)
    returned, negative = each_network(transform, draws, back, value, *context)
    if value.shape == x.shape:
        assert (value - x).abs().max() > 0.1
    assert_close(returned, x, tolerance)
    assert_close(negative, -log_det, tolerance)


@each_direction
def test_the_value_alone_is_the_value_with_log_det(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = kind.inputs(direction, 8)
    value, _ = joint(transform, direction)(*inputs)
    assert_close(getattr(transform, direction)(*inputs), value, 1e-6)


def test_called_as_a_module_it_goes_forward(kind: Kind) -> None:
    transform = kind.random()
    inputs = kind.inputs("forward", 2)
    assert torch.equal(transform(*inputs), transform.forward(*inputs))


@each_direction
def test_shapes_and_any_batch_dimensions(kind: Kind, direction: str) -> None:
    transform = kind.random()
    (other,) = {*DIRECTIONS} - {direction}
    assert transform.event_shape == kind.shape("inverse")
    assert transform.base_shape == kind.shape("forward")
    for batch in ((), (0,), (1,), (2, 0), (2, 3)):
        inputs = kind.inputs(direction, *batch)
        value, log_det = joint(transform, direction)(*inputs)
        assert value.shape == (*batch, *kind.shape(other))
        assert log_det.shape == batch
        assert value.dtype == log_det.dtype == torch.float32
        flat = [t.reshape(math.prod(batch), *t.shape[len(batch) :]) for t in inputs]
        flat_value, flat_log_det = joint(transform, direction)(*flat)
        assert torch.equal(value.reshape(flat_value.shape), flat_value)
        assert torch.equal(log_det.reshape(-1), flat_log_det)
        assert getattr(transform, direction)(*inputs).shape == value.shape
        if value.requires_grad:
            (value.sum() + log_det.sum()).backward()
    gradients = [p.grad for p in transform.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@each_direction
def test_a_sample_does_not_depend_on_the_others(kind: Kind, direction: str) -> None:
    transform = kind.random(torch.float64)
    inputs = kind.inputs(direction, 4, dtype=torch.float64)
    before = joint(transform, direction)(*inputs)
    others = kind.inputs(direction, 4, dtype=torch.float64)
    far = 3 if kind.domain is Tensor.clone else 1
    for one, other in zip(inputs, others, strict=True):
        one[1:] = far * other[1:]
    after = joint(transform, direction)(*inputs)
    alone = joint(transform, direction)(*(t[:1] for t in inputs))
    for old, new, own in zip(before, after, alone, strict=True):
        assert_close(new[0], old[0], 1e-12)
        assert_close(own[0], old[0], 1e-12)


@kinds(lambda kind: kind.context)
@each_direction
def test_context_broadcasts_and_gets_a_gradient(kind: Kind, direction: str) -> None:
    transform = kind.random()
    x, _ = kind.inputs(direction, 5, 4)
    for shape in ((), (1,), (4,), (5, 1), (5, 4)):
        context = torch.randn(*shape, kind.context, requires_grad=True)
        value, log_det = joint(transform, direction)(x, context)
        full = context.detach().expand(5, 4, -1)
        expected, expected_log_det = joint(transform, direction)(x, full)
        assert_close(value, expected, 1e-6)
        assert_close(log_det, expected_log_det, 1e-6)
        (gradient,) = torch.autograd.grad(value.square().sum() + log_det.sum(), context)
        assert gradient.shape == context.shape
        assert (gradient != 0).all()


@each_direction
def test_gradients_reach_every_parameter_and_the_input(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = [t.requires_grad_() for t in kind.inputs(direction, 16)]
    value, log_det = joint(transform, direction)(*inputs)
    leaves = {**dict(transform.named_parameters()), **dict(enumerate(inputs))}
    gradients = torch.autograd.grad(
        value.square().sum() + log_det.sum(), [*leaves.values()], allow_unused=True
    )
    pairs = dict(zip(leaves, gradients, strict=True))
    unreached = [name for name, g in pairs.items() if g is None or not g.any()]
    assert unreached == list(kind.idle)
    assert all(g.isfinite().all() for g in gradients if g is not None)


@each_direction
def test_the_gradient_is_that_of_the_function(kind: Kind, direction: str) -> None:
    """In the input, the context and every parameter."""
    transform = kind.random(torch.float64)
    inputs = kind.inputs(direction, 2, dtype=torch.float64)
    names = [name for name, _ in transform.named_parameters()]
    module = Joint(transform, direction)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(names, leaves[len(inputs) :], strict=True))
        value, log_det = module.with_parameters(parameters, *leaves[: len(inputs)])
        assert log_det.requires_grad or kind.volume_preserving
        return value, log_det

    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, *transform.parameters())]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@each_direction
def test_no_call_changes_its_input_and_strides_do_not_matter(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = kind.inputs(direction, 4)
    before = [t.clone() for t in inputs]
    value, log_det = joint(transform, direction)(*inputs)
    getattr(transform, direction)(*inputs)
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))

    strided = [torch.stack((t, t + 1), -1)[..., 0] for t in inputs]
    assert not strided[0].is_contiguous()
    same, same_log_det = joint(transform, direction)(*strided)
    assert_close(same, value, 1e-6)
    assert_close(same_log_det, log_det, 1e-6)

    expanded = [t[:1].expand(t.shape) for t in inputs]
    same, same_log_det = joint(transform, direction)(*expanded)
    assert_close(same, value[:1].expand(value.shape), 1e-6)
    assert_close(same_log_det, log_det[:1].expand(log_det.shape), 1e-6)


COPIES: dict[str, Callable[[Kind, cnf.Transform], cnf.Transform]] = {
    "deepcopy": lambda _, transform: copy.deepcopy(transform),
    "pickle": lambda _, transform: pickle.loads(pickle.dumps(transform)),
    "state_dict": lambda kind, transform: loaded(kind, transform.state_dict()),
}


def loaded(kind: Kind, state: dict[str, Tensor]) -> cnf.Transform:
    """A new transform, neither prepared nor drawn, with this state."""
    transform = kind.make()
    transform.load_state_dict(state)
    return transform


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_after_use_is_the_same_and_shares_nothing(kind: Kind, duplicate) -> None:
    transform = kind.random()
    for direction in DIRECTIONS:
        value, log_det = joint(transform, direction)(*kind.inputs(direction, 4))
        if value.requires_grad:
            (value.sum() + log_det.sum()).backward()
    twin = duplicate(kind, transform).train(transform.training)
    values = {}
    for direction in DIRECTIONS:
        inputs = kind.inputs(direction, 4)
        values[direction] = inputs, joint(transform, direction)(*inputs)
        for ours, theirs in zip(values[direction][1], joint(twin, direction)(*inputs), strict=True):
            assert torch.equal(theirs, ours)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    for direction, (inputs, expected) in values.items():
        assert torch.equal(joint(transform, direction)(*inputs)[0], expected[0]), "they share"


def test_built_on_meta_it_is_the_same_once_its_state_is_loaded(kind: Kind) -> None:
    """`to_empty` gives memory of any content, also to what the state does not hold."""
    transform, inputs = kind.random(), kind.inputs("inverse", 4)
    with torch.device("meta"):
        twin = kind.make()
    twin.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
    twin.load_state_dict(transform.state_dict())
    twin.train(transform.training)
    assert torch.equal(twin.inverse(*inputs), transform.inverse(*inputs))


@kinds(lambda kind: kind.drawn)
def test_what_was_drawn_at_random_is_loaded_too(kind: Kind) -> None:
    """A saved flow is loaded into one that drew another mask, order or permutation."""
    inputs = kind.inputs("inverse", 4)
    for _ in range(10):
        transform = kind.random()
        twin = loaded(kind, transform.state_dict())
        assert torch.equal(twin.inverse(*inputs), transform.inverse(*inputs))
        assert torch.equal(twin.forward(*inputs), transform.forward(*inputs))


def test_use_leaves_nothing_behind(kind: Kind) -> None:
    """No tensors cached on modules, no state changed, but that its parts have been checked."""
    transform = kind.random()

    def own() -> dict[str, str]:
        parts = transform.named_modules()
        return {
            f"{name}.{key}": repr(value)
            for name, part in parts
            for key, value in vars(part).items()
            if key != "checked"
        }

    before = own()
    for direction in DIRECTIONS:
        joint(transform, direction)(*kind.inputs(direction, 4))
        getattr(transform, direction)(*kind.inputs(direction, 4))
    assert own() == before


@each_direction
def test_no_random_numbers_are_drawn_and_modes_choose_nothing(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = kind.inputs(direction, 4)
    state = torch.get_rng_state()
    first = joint(transform, direction)(*inputs)
    assert torch.equal(torch.get_rng_state(), state)
    if kind.modes:
        return
    second = joint(transform.eval(), direction)(*inputs)
    third = joint(transform.train(), direction)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@each_direction
def test_vmap_gives_the_same_values(kind: Kind, direction: str) -> None:
    transform = kind.random()
    inputs = kind.inputs(direction, 5)
    mapped = vmap(joint(transform, direction))(*inputs)
    for new, old in zip(mapped, joint(transform, direction)(*inputs), strict=True):
        assert_close(new, old, 1e-5)
    mapped = vmap(getattr(transform, direction))(*inputs)
    assert_close(mapped, getattr(transform, direction)(*inputs), 1e-5)


@kinds(lambda kind: kind.compiled)
@each_direction
def test_torch_compile_gives_the_same_values_and_gradients(kind: Kind, direction: str) -> None:
    """Traced whole by Dynamo, and by AOT autograd; kernels have a test of their own."""
    torch._dynamo.reset()
    transform = kind.random()
    compiled = torch.compile(joint(transform, direction), backend=kind.compiled, fullgraph=True)
    inputs = [t.requires_grad_() for t in kind.inputs(direction, 5)]
    leaves = [*inputs, *transform.parameters()]
    results = []
    for call in (joint(transform, direction), compiled):
        value, log_det = call(*inputs)
        loss = value.square().sum() + log_det.sum()
        results.append((value, log_det, *torch.autograd.grad(loss, leaves)))
    for eager, traced in zip(*results, strict=True):
        assert_close(traced, eager, 1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore")  # what torch says while it compiles is its own affair
def test_a_flow_compiled_to_kernels_gives_the_same_values_and_gradients() -> None:
    torch._dynamo.reset()
    smooth = {"hidden": (8,), "activation": "silu"}
    transform = cnf.Compose(
        LULinear(4),
        Coupling(4, "alternating", "spline", context=2, **smooth),
        Permutation(4),
        MaskedAutoregressive(4, context=2, **smooth),
        ActNorm(4),
    )
    transform.inverse(torch.randn(50, 4), torch.randn(50, 2))
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_(0.0, 0.5)
    x, context = torch.randn(5, 4), torch.randn(5, 2)
    results = []
    for call in (transform.inverse_and_log_det, torch.compile(transform.inverse_and_log_det)):
        value, log_det = call(x, context)
        loss = value.square().sum() + log_det.sum()
        results.append((value, log_det, *torch.autograd.grad(loss, [*transform.parameters()])))
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, 1e-4)


@each_direction
def test_double_and_mixed_dtypes(kind: Kind, direction: str) -> None:
    transform = kind.random()
    x, *context = kind.inputs(direction, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float32"):
        joint(transform, direction)(x.int(), *context)
    if context:
        with pytest.raises(TypeError, match=r"float64.*float32|float32.*float64"):
            joint(transform, direction)(x.float(), *context)
    if [*transform.parameters()]:
        with pytest.raises(TypeError, match=r"float64.*float32|float32.*float64"):
            joint(transform, direction)(x, *context)
    value, log_det = joint(transform.double(), direction)(x, *context)
    assert value.dtype == log_det.dtype == torch.float64


@each_direction
def test_another_device_is_refused_and_its_own_followed(kind: Kind, direction: str) -> None:
    """The device "meta" stands for any: a tensor made on another meets it with an error."""
    transform = kind.random()
    inputs = kind.inputs(direction, 2)
    elsewhere = [t.to("meta") for t in inputs]
    if kind.context:
        with pytest.raises(ValueError, match=r"meta"):
            joint(transform, direction)(inputs[0], elsewhere[1])
    if transform.state_dict():
        with pytest.raises(ValueError, match=r"cpu.*meta|meta.*cpu"):
            joint(transform, direction)(*elsewhere)
    value, log_det = joint(transform.to("meta"), direction)(*elsewhere)
    assert value.device.type == log_det.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_values_are_the_same() -> None:
    for kind in KINDS:
        transform = kind.random(torch.float64)
        for direction in DIRECTIONS:
            inputs = kind.inputs(direction, 4, dtype=torch.float64)
            expected = joint(transform.cpu(), direction)(*inputs)
            found = joint(transform.cuda(), direction)(*(t.cuda() for t in inputs))
            for there, here in zip(found, expected, strict=True):
                assert there.is_cuda
                assert_close(there.cpu(), here, 1e-9)


@each_direction
def test_wrong_shapes_contexts_and_choices_are_refused(kind: Kind, direction: str) -> None:
    transform = kind.random()
    x, *context = kind.inputs(direction, 2)
    shape = kind.shape(direction)
    sizes = f"D={shape[0]}" if len(shape) == 1 else str(shape)[1:-1]
    expected = rf"expected \(\.\.\., {sizes}\)"
    for call in (joint(transform, direction), getattr(transform, direction)):
        for wrong in (x[..., :-1], torch.cat((x, x), -1), x[0, ..., 0]):
            with pytest.raises(ValueError, match=expected):
                call(wrong, *context)
        with pytest.raises(TypeError, match=r"x must be a tensor"):
            call(x.tolist(), *context)
        with pytest.raises(TypeError, match=r"nonsense"):
            call(x, *context, nonsense=1)
        if context:
            with pytest.raises(ValueError, match=r"context is missing"):
                call(x)
            with pytest.raises(ValueError, match=rf"expected context={kind.context}"):
                call(x, torch.cat((context[0], context[0]), -1))
            with pytest.raises(ValueError, match=r"broadcast"):
                call(x, torch.randn(3, kind.context))
            with pytest.raises(TypeError, match=r"context must be a tensor"):
                call(x, 1.0)
        else:
            with pytest.raises(ValueError, match=r"context .*was given"):
                call(x, torch.randn(2, 1))
    assert transform.takes_context == bool(kind.context)


def test_repr_names_the_parts(kind: Kind) -> None:
    transform = kind.random()
    text = repr(transform)
    assert text.startswith(type(transform).__name__)
    for module in transform.modules():
        assert type(module).__name__ in text
    assert "tensor(" not in text
    assert " object at 0x" not in text


def test_the_registry_is_complete() -> None:
    """Every public transform occurs in it; the CNF has a contract of its own."""
    package = cnf.transforms
    modules = [package] + [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]
    public = [getattr(module, name) for module in modules for name in module.__all__]
    classes = {each for each in public if inspect.isclass(each) and issubclass(each, cnf.Transform)}
    transforms = {each for each in classes if not inspect.isabstract(each)}
    covered = {type(part) for kind in KINDS for part in kind.make().modules()}
    noisy = {"UniformDequantization", "VariationalDequantization"}  # see test_dequantization.py
    assert {each.__name__ for each in transforms - covered} == {"CNF", *noisy}
    assert len({kind.name for kind in KINDS}) == len(KINDS)
