"""Calibration: right posteriors are accepted, wrong ones found, and C2ST tells what can be told."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

import cnf
from cnf.calibration import Calibration, c2st, simulation_based_calibration
from cnf.data import LinearGaussian
from cnf.plotting import plot_calibration, plot_posteriors

PROBLEM = LinearGaussian.random(2, 2, seed=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass
class Wrong:
    """The true posterior, moved and scaled about its mean."""

    shift: float = 0.0
    scale: float = 1.0

    def sample(self, shape, context, generator=None) -> Tensor:
        x = PROBLEM.posterior_sample(context, *shape, generator)
        mean = PROBLEM.posterior_mean(context)
        return mean + self.shift + self.scale * (x - mean)

    def log_prob(self, x, context, generator=None) -> Tensor:
        mean = PROBLEM.posterior_mean(context)
        before = mean + (x - mean - self.shift) / self.scale
        return PROBLEM.posterior_log_prob(before, context) - x.shape[-1] * math.log(self.scale)


class Prior:
    """Right, but for all it does not look at the observation."""

    def sample(self, shape, context, generator=None) -> Tensor:
        return torch.randn(*shape, len(context), 2, generator=generator)

    def log_prob(self, x, context, generator=None) -> Tensor:
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)


@dataclasses.dataclass
class Counts:
    """A right posterior with ties: c = x + noise, given a column of counts and a constant one."""

    levels: int = 3

    def pairs(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(self.levels, (n, 1), generator=generator(seed))
        noise = torch.randn(n, 1, generator=generator(seed + 1000))
        return torch.cat((x, torch.full_like(x, 7)), -1), x + noise

    def sample(self, shape, context, generator=None) -> Tensor:
        p = self._log_p(context).exp()
        x = p.multinomial(math.prod(shape), replacement=True, generator=generator).T
        return torch.stack((x, torch.full_like(x, 7)), -1).reshape(*shape, len(context), 2)

    def log_prob(self, x, context, generator=None) -> Tensor:
        log_p = self._log_p(context).expand(*x.shape[:-1], self.levels)
        return log_p.gather(-1, x[..., :1])[..., 0]

    def _log_p(self, context) -> Tensor:
        return (-0.5 * (torch.arange(self.levels) - context).square()).log_softmax(-1)


class Flat:
    """A right posterior of constant density, with an error that all of a call share."""

    def pairs(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        c = torch.randn(n, 1, generator=generator(seed))
        return self.sample((), c, generator(seed + 1000)), c

    def sample(self, shape, context, generator=None) -> Tensor:
        return context + torch.rand(*shape, len(context), 2, generator=generator)

    def log_prob(self, x, context, generator=None) -> Tensor:
        return torch.full(x.shape[:-1], 1e-6 * x.numel())


class FlowOfCounts:
    """A flow of integers, judged by pairs of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        ends = cnf.Sigmoid(), cnf.UniformDequantization(3)
        inner = cnf.transforms.Diagonal(2, context=1)
        self.flow = cnf.Flow(cnf.StandardNormal(2), cnf.Compose(inner, *ends))
        self.sample, self.log_prob = self.flow.sample, self.flow.log_prob

    def pairs(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        c = torch.randn(n, 1, generator=generator(seed))
        return self.flow.sample((), c, generator=generator(seed + 1000)), c


TIED = {"counts": Counts, "flat": Flat, "flow-of-counts": FlowOfCounts}


def judged(posterior, n: int = 1000, draws: int = 99, seed: int = 0) -> Calibration:
    x, c = PROBLEM.sample(n, generator(seed))
    return simulation_based_calibration(posterior, x, c, draws=draws, generator=generator(seed + 1))


LEVELS = torch.linspace(0, 1, 21, dtype=torch.float64)


def assert_accepted(found: Calibration) -> None:
    assert found.p_values().min() > 0.01
    low, high = found.band(LEVELS, confidence=0.9999)
    coverage = found.coverage(LEVELS)
    assert ((coverage >= low) & (coverage <= high)).all()
    small, large = found.histogram_band(20, confidence=0.9999)
    counts = found.histogram(20)
    assert small <= counts.min() <= counts.max() <= large


@pytest.mark.parametrize("posterior", [Wrong(), Prior()], ids=["posterior", "prior"])
def test_what_is_calibrated_is_accepted(posterior):
    found = judged(posterior)
    assert_accepted(found)
    assert found.histogram(20).sum(1).tolist() == [1000] * 3


@pytest.mark.parametrize("make", TIED.values(), ids=TIED)
def test_what_is_calibrated_is_accepted_with_ties(make):
    posterior = make()
    x, c = posterior.pairs(1000, 0)
    found = simulation_based_calibration(posterior, x, c, generator=generator(1))
    assert_accepted(found)
    again = simulation_based_calibration(posterior, x, c, generator=generator(1))
    assert torch.equal(found.ranks, again.ranks)
    assert torch.equal(found.density_ranks, again.density_ranks)


def test_a_wrong_posterior_of_counts_is_refused():
    x, c = Counts().pairs(1000, 0)
    found = simulation_based_calibration(Counts(), x, c + 0.5, generator=generator(1))
    counts, constant, _ = found.p_values()
    assert counts < 1e-6
    assert constant > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_a_right_posterior_is_refused_as_often_as_the_test_says_at_most(tied):
    p = torch.stack(
        [
            simulation_based_calibration(
                Counts(), *Counts().pairs(60, s), draws=19, generator=generator(s)
            ).p_values()
            if tied
            else judged(Wrong(), n=60, draws=19, seed=2 * s).p_values()
            for s in range(100)
        ]
    )
    for alpha in (0.01, 0.05, 0.2):
        most = stats.binom.ppf(0.9999, p.numel(), alpha)
        assert (p < alpha).sum() <= most
    assert (p < 0.5).double().mean() > 0.2  # and not as if all were well always


def test_a_shift_is_found_in_the_ranks_and_its_direction():
    found = judged(Wrong(shift=0.25))
    assert found.p_values()[:2].max() < 1e-6
    assert (found.ranks.double().mean(0) < 45).all()  # the truth is below the draws
    assert (judged(Wrong(shift=-0.25)).ranks.double().mean(0) > 54).all()


@pytest.mark.parametrize(("scale", "over"), [(0.7, True), (1.4, False)])
def test_a_wrong_width_is_found_and_of_which_kind(scale, over):
    found = judged(Wrong(scale=scale))
    assert found.p_values()[-1] < 1e-6
    middle = slice(4, 17)
    coverage, (low, high) = found.coverage(LEVELS)[middle], found.band(LEVELS[middle])
    assert (coverage < low).all() if over else (coverage > high).all()
    ends = found.histogram(10)[:2, [0, -1]].double().mean()
    assert ends > 110 if over else ends < 90


def test_coverage_of_a_scaled_normal_is_the_closed_form():
    """In 2-D the region of content g has r^2 < -2 log(1 - g) s^2: it has the truth with
    1 - (1 - g)^(s^2).
    """
    scale, n = 0.7, 20_000
    found = judged(Wrong(scale=scale), n=n)
    truth = 1 - (1 - LEVELS) ** (scale**2)
    assert (found.coverage(LEVELS) - truth).abs().max() < 4 * 0.5 / math.sqrt(n) + 0.01


def test_ranks_by_counting_each():
    x, c = PROBLEM.sample(6, generator())
    truth = Wrong()
    found = simulation_based_calibration(truth, x, c, draws=4, rows=6, generator=generator(1))
    draws = truth.sample((4,), c, generator=generator(1))
    for i in range(6):
        for d in range(2):
            assert found.ranks[i, d] == sum(bool(draw[i, d] < x[i, d]) for draw in draws)
        own = truth.log_prob(x[i], c[i])
        above = sum(bool(truth.log_prob(draw[i], c[i]) > own) for draw in draws)
        assert found.density_ranks[i] == above


def test_coverage_at_levels_by_hand():
    """Of 3 draws the ranks are 0 ... 3; rank k is in regions from content k/4 on, by degrees."""
    found = Calibration(torch.zeros(2, 1, dtype=torch.long), torch.tensor([1, 3]), draws=3)
    levels = torch.tensor([0.0, 0.25, 0.375, 0.5, 0.75, 1.0])
    assert found.coverage(levels).tolist() == [0.0, 0.0, 0.25, 0.5, 0.5, 1.0]


def test_p_values_are_those_of_the_distance_by_hand():
    ranks = torch.tensor([0, 0, 0, 1, 2])
    found = Calibration(ranks[:, None], 3 - ranks, draws=3)
    distance = max(abs(3 / 5 - 1 / 4), abs(4 / 5 - 2 / 4), abs(5 / 5 - 3 / 4))
    expected = stats.kstwo.sf(distance, 5)
    assert found.p_values().tolist() == pytest.approx([expected, expected])


def test_a_flow_is_judged_in_any_number_of_rows_at_once():
    flow = cnf.FFJORD(2, hidden=(8,), context=2, solver=cnf.Solver("rk4", steps=4))
    x, c = PROBLEM.sample(30, generator())
    choices = {"draws": 9, "divergence": "exact", "solver": cnf.Solver("rk4", steps=5)}
    found = simulation_based_calibration(flow, x, c, generator=generator(), rows=30, **choices)
    assert found.ranks.shape == (30, 2)
    again = simulation_based_calibration(flow, x, c, generator=generator(), rows=30, **choices)
    assert torch.equal(found.density_ranks, again.density_ranks)
    parts = simulation_based_calibration(flow, x, c, generator=generator(), rows=7, **choices)
    assert parts.ranks.shape == (30, 2)
    assert parts.ranks.max() <= 9
    assert not parts.ranks.requires_grad


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_c2st_is_the_best_accuracy_of_two_normals(shift):
    """Phi(shift / 2), in several dimensions of any scale."""
    x = torch.randn(2, 1000, 2, generator=generator(1))
    a, b = x[0], x[1] + shift / math.sqrt(2)
    scale = torch.tensor([1e-3, 1e4])
    best = NormalDist().cdf(shift / 2)
    got = c2st(scale * a + 5 * scale, scale * b + 5 * scale, folds=2)
    assert got == pytest.approx(best, abs=0.05)
    assert got == c2st(scale * a + 5 * scale, scale * b + 5 * scale, folds=2)


def test_c2st_of_what_no_plane_separates():
    """A ring around a disc, of which half is in it: 3/4 can be told."""
    (angle, u) = torch.rand(2, 2000, 1, generator=generator())
    x = torch.cat(((2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()), -1) * u
    inner, outer = x[:1000], x[1000:] * (1 + 0.5 / u[1000:])  # radii of 0 ... 1 and 0.5 ... 1.5
    assert c2st(inner, outer, folds=2) == pytest.approx(0.75, abs=0.05)
    assert c2st(inner, 10 + outer, folds=2) == 1.0


def test_pictures_are_drawn():
    pictures = plot_calibration({"right": judged(Wrong()), "wrong": judged(Wrong(scale=0.5))})
    assert isinstance(pictures, Figure)
    assert len(pictures.axes) == 8
    lines = pictures.axes[0].get_lines()
    torch.testing.assert_close(
        torch.as_tensor(lines[1].get_ydata()),
        judged(Wrong()).coverage(torch.linspace(0, 1, 101, dtype=torch.float64)),
    )
    heights = [bar.get_height() for bar in pictures.axes[1].patches if hasattr(bar, "get_height")]
    assert sum(heights[-20:]) == 1000
    x = torch.randn(50, 3, 2)
    side = plot_posteriors({"true": x, "flow": x + 0.1}, torch.zeros(3, 2))
    assert len(side.axes) == 6
    assert side.axes[0].get_xlim() == side.axes[1].get_xlim()
    assert len(side.axes[1].collections[0].get_offsets()) == 50


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, c: simulation_based_calibration(3, x, c), TypeError, "sample.*int lacks"),
        (lambda x, c: simulation_based_calibration(Wrong(), [1.0], c), TypeError, "x must"),
        (lambda x, c: simulation_based_calibration(Wrong(), x, None), TypeError, "context must"),
        (lambda x, c: simulation_based_calibration(Wrong(), x[0], c), ValueError, r"x has shape"),
        (lambda x, c: simulation_based_calibration(Wrong(), x[:3], c), ValueError, "3 rows"),
        (lambda x, c: simulation_based_calibration(Wrong(), x, c, draws=0), ValueError, "draws=0"),
        (lambda x, c: simulation_based_calibration(Wrong(), x, c, rows=0), ValueError, "rows=0"),
        (
            lambda x, c: simulation_based_calibration(Wrong(shift=math.nan), x, c),
            ValueError,
            "NaN|non-finite",
        ),
        (
            lambda x, c: simulation_based_calibration(Wrong(), x[:, :1], c),
            ValueError,
            "must return",
        ),
        (lambda x, c: judged(Wrong()).coverage([0.5]), TypeError, "levels"),
        (lambda x, c: judged(Wrong()).coverage(torch.tensor([1.5])), ValueError, r"\[1.5\]"),
        (lambda x, c: judged(Wrong()).band(LEVELS, confidence=1.0), ValueError, "confidence=1.0"),
        (lambda x, c: judged(Wrong()).histogram(7), ValueError, "bins=7.*100 ranks"),
        (lambda x, c: c2st([1.0], x), TypeError, "a must"),
        (lambda x, c: c2st(x, x.long()), TypeError, "b must"),
        (lambda x, c: c2st(x[0], x), ValueError, r"a has shape \(2,\)"),
        (lambda x, c: c2st(x, x[:, :1]), ValueError, "a has 2 dimensions and b 1"),
        (lambda x, c: c2st(x, x[:9]), ValueError, "b has 9 rows"),
        (lambda x, c: c2st(x / 0 * x, x), ValueError, "a has non-finite"),
        (lambda x, c: c2st(x * 0, x), ValueError, "constant in column 0"),
        (lambda x, c: c2st(x, x, folds=1), ValueError, "folds=1"),
        (lambda x, c: plot_calibration({}), ValueError, "calibrations is empty"),
        (lambda x, c: plot_posteriors({}), ValueError, "samples is empty"),
        (lambda x, c: plot_posteriors({"a": x}), ValueError, r"samples\['a'\]"),
    ],
)
def test_bad_input_is_told(call, error, words):
    with pytest.raises(error, match=words):
        call(*PROBLEM.sample(20, generator()))


@pytest.mark.parametrize(
    ("package", "pip", "call"),
    [
        ("scipy", "scipy", lambda found, x: found.p_values()),
        ("scipy", "scipy", lambda found, x: found.band(LEVELS)),
        ("sklearn", "scikit-learn", lambda found, x: c2st(x, x)),
    ],
)
def test_a_package_that_is_not_there_is_named(monkeypatch, package, pip, call):
    found = judged(Wrong(), n=20)
    import importlib

    real = importlib.import_module

    def missing(name, *rest):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr("cnf.calibration.import_module", missing)
    with pytest.raises(ImportError, match=f"pip install {pip}"):
        call(found, torch.randn(20, 2))
