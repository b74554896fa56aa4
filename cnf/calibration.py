"""Is a conditional density right? Calibration of posteriors, and a classifier two-sample test.

It reads any object with `sample((n,), context)` and `log_prob(x, context)`, such as a conditional
`Flow`. The uniformity tests need SciPy and `c2st` scikit-learn; nothing else here does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from cnf.checks import check_count
from cnf.noise import draw

__all__ = ["Calibration", "Posterior", "c2st", "simulation_based_calibration"]


class Posterior(Protocol):
    """A conditional density q(x | c): a `Flow`, or any object with these two methods."""

    def sample(self, shape: tuple[int, ...], context: Tensor, /) -> Tensor:
        """Draw (*shape, B, D), given context (B, C)."""

    def log_prob(self, x: Tensor, context: Tensor, /) -> Tensor:
        """Evaluate log q (n, B) at x (n, B, D), given context (B, C)."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where true parameters x_i stand among L draws x_il from q(x | c_i), for i = 1 ... N.

        ranks_id         = #{l: x_ild < x_id}
        density_ranks_i  = #{l: log q(x_il | c_i) > log q(x_i | c_i)}

    and to each is added a uniform draw from 0 ... #{l: equal}, which breaks ties: integers and
    constant columns have them, and densities that are constant.

    If q is the posterior, every one of them is uniform on 0 ... L. The first finds what is wrong
    with a dimension: bias gives ranks that pile up at one end, over-confidence at both ends,
    under-confidence in the middle. The second says how much of q lies above the density of the
    truth, and so in how small a highest-density region the truth is: those of content gamma should
    have it with probability gamma (`coverage`). A uniform rank is necessary, not sufficient: the
    prior itself, whatever c, is calibrated too.

    Args:
        ranks: (N, D), integers.
        density_ranks: (N,), integers.
        draws: L.

    Reference:
        Talts et al., arXiv 1804.06788; Hermans et al., arXiv 2110.06581.

    Example:
        >>> ranks = torch.randint(100, (500, 3))
        >>> result = Calibration(ranks[:, :2], ranks[:, 2], draws=99)
        >>> result.coverage(torch.tensor([0.5, 0.9])).shape
        torch.Size([2])
    """

    ranks: Tensor
    density_ranks: Tensor
    draws: int

    def coverage(self, levels: Tensor) -> Tensor:
        """The share of true parameters in the highest-density region of each content (K,).

            1/N sum_i clip((L + 1) gamma - density_ranks_i, 0, 1)

        Its mean is gamma if q is right; less of it means that q is over-confident.

        Args:
            levels: contents gamma (K,), in [0, 1].
        """
        if not isinstance(levels, Tensor) or levels.ndim != 1 or not levels.is_floating_point():
            raise TypeError(
                "levels must be a tensor (K,) of floats, such as torch.linspace(0, 1, 21)"
            )
        if not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"levels must lie in [0, 1], got {levels.tolist()}")
        above = (self.draws + 1) * levels - self.density_ranks.to(levels)[:, None]  # (N, K)
        return above.clamp(0, 1).mean(0)

    def band(self, levels: Tensor, *, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Where the coverage of a right q lies with probability `confidence`, at each level (K,).

        Quantiles of Binomial(N, gamma) / N, each level for itself.

        Raises:
            ImportError: SciPy is not installed.
        """
        return self._quantiles(levels, confidence)

    def histogram(self, bins: int = 20) -> Tensor:
        """How many ranks of each dimension, and of the density, are in each bin, (D + 1, bins).

        Bin b has the ranks r with b <= bins r / (L + 1) < b + 1. They hold as many ranks each if
        `bins` divides L + 1, as is therefore asked.
        """
        check_count("bins", bins)
        if (self.draws + 1) % bins:
            raise ValueError(
                f"bins={bins} does not divide the {self.draws + 1} ranks that {self.draws} draws "
                "have; take as many bins as do, such as 20 with draws=99"
            )
        width = (self.draws + 1) // bins
        return torch.stack([(r // width).bincount(minlength=bins) for r in self._columns()])

    def histogram_band(self, bins: int = 20, *, confidence: float = 0.95) -> tuple[float, float]:
        """Where a bin's count lies with probability `confidence` if q is right.

        Raises:
            ImportError: SciPy is not installed.
        """
        n = len(self.ranks)
        low, high = self._quantiles(
            torch.tensor([1 / bins], dtype=torch.float64, device="cpu"), confidence
        )
        return float(low) * n, float(high) * n

    def p_values(self) -> Tensor:
        """How likely ranks as uneven are if q is right: of each dimension, and of the density.

        By Kolmogorov and Smirnov's test of the ranks' distribution function F at the points that
        they can take, D = max_j |F(j) - j / (L + 1)|, F(j) the share of ranks below j: as they are
        discrete, the p-value is at least what it should be.

        Returns:
            (D + 1,), float64; with more than a few dimensions compare the smallest with
            0.05 / (D + 1), say.

        Raises:
            ImportError: SciPy is not installed.
        """
        stats = _require("scipy.stats", "the uniformity test")
        uniform = torch.arange(1, self.draws + 1, device="cpu").double() / (self.draws + 1)
        found = []
        for ranks in self._columns():
            below = ranks.bincount(minlength=self.draws + 1).cumsum(0)[:-1] / len(ranks)
            distance = float((below.double() - uniform).abs().max())
            found.append(float(stats.kstwo.sf(distance, len(ranks))))
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def _columns(self) -> Sequence[Tensor]:
        return [*self.ranks.cpu().unbind(-1), self.density_ranks.cpu()]

    def _quantiles(self, levels: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
        """Of the share of successes in N trials of these probabilities."""
        stats = _require("scipy.stats", "the band")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, such as 0.95")
        n, tail = len(self.ranks), (1 - confidence) / 2
        p = levels.double().cpu().numpy()
        low, high = (torch.from_numpy(stats.binom.ppf(q, n, p)) for q in (tail, 1 - tail))
        return low.clamp_min(0) / n, high / n


@torch.no_grad()
def simulation_based_calibration(
    posterior: Posterior,
    x: Tensor,
    context: Tensor,
    *,
    draws: int = 99,
    rows: int = 100,
    solver: Any = None,
    divergence: Any = None,
    generator: torch.Generator | None = None,
) -> Calibration:
    """Ranks of parameters among draws from their posterior, by value and by density.

    Args:
        posterior: what is judged, q(x | c).
        x: true parameters (N, D), drawn from the prior.
        context: what was then observed (N, C). Pairs that q was trained on flatter it.
        draws: L, from each posterior; 99 or 999 make ranks that divide into 20 bins.
        rows: observations at once.
        solver: a solver for the flow's calls.
        divergence: that of its log-densities; a Hutchinson estimate blurs the density's ranks, so
            that "exact" is what to give where there is no closed form.
        generator: source of randomness, also of the ranks among ties; where None is given, none is
            passed on.

    Returns:
        The ranks, with their tests: see `Calibration`.

    Raises:
        TypeError: x or context that is no tensor; a posterior without the two methods.
        ValueError: x or context that does not have two dimensions, or of different lengths; counts
            that are not positive; draws of a wrong shape; draws or densities that are NaN.

    Example:
        >>> import cnf
        >>> flow = cnf.FFJORD(2, hidden=(8,), context=3)
        >>> x, c = torch.randn(50, 2), torch.randn(50, 3)
        >>> result = simulation_based_calibration(flow, x, c, draws=19)
        >>> result.ranks.shape, result.density_ranks.shape
        (torch.Size([50, 2]), torch.Size([50]))
    """
    _check_posterior(posterior)
    _check_pairs(x, context)
    check_count("draws", draws)
    check_count("rows", rows)
    options = {"solver": solver, "generator": generator}
    options = {name: choice for name, choice in options.items() if choice is not None}
    own = options if divergence is None else {**options, "divergence": divergence}
    ranks, density_ranks = [], []
    for x_i, c_i in zip(x.split(rows), context.split(rows), strict=True):
        found = posterior.sample((draws,), c_i, **options)  # (L, B, D)
        if found.shape != (draws, *x_i.shape):
            raise ValueError(
                f"posterior.sample(({draws},), context) must return {(draws, *x_i.shape)} for "
                f"context {tuple(c_i.shape)}, got {tuple(found.shape)}"
            )
        # Draws and truth in one call, so that they share the error of a solver.
        log_q = posterior.log_prob(torch.cat((found, x_i[None].to(found.device))), c_i, **own)
        for name, value in (("draws", found), ("densities", log_q)):
            if value.isnan().any():
                raise ValueError(f"posterior gives {name} that are NaN; it cannot be judged")
        ranks.append(_rank(x_i, found, generator))
        density_ranks.append(_rank(-log_q[-1], -log_q[:-1], generator))
    return Calibration(torch.cat(ranks).cpu(), torch.cat(density_ranks).cpu(), draws)


def _rank(value: Tensor, draws: Tensor, generator: torch.Generator | None) -> Tensor:
    """How many draws (L, *batch) are below the value (*batch), ties broken at random."""
    equal = (draws == value).sum(0)
    u = draw(torch.rand, equal.shape, like=equal.double(), generator=generator)
    return (draws < value).sum(0) + (u * (equal + 1)).long().clamp(max=equal)


def c2st(a: Tensor, b: Tensor, *, seed: int = 1, folds: int = 5) -> float:
    """Classifier two-sample test: how well a network tells samples a from samples b.

    The accuracy on held-out samples, a mean over the folds: 0.5 if they are of one distribution,
    1 if they are apart. In the limit 1/2 + 1/2 TV(p_a, p_b), of the total variation distance, as
    far as the network can tell. Both sets are divided by the scale of a, and classified by a
    perceptron with two hidden layers of 10 D units, as in the benchmark of simulation-based
    inference, whose sets are of 10,000 each: with fewer samples it tells less.

    Args:
        a: samples (N, D), of the truth.
        b: samples (M, D), about as many: of unequal sets the accuracy of a guess is above 0.5.
        seed: of the network and the folds.
        folds: of the cross-validation.

    Returns:
        The accuracy.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: a or b is no tensor of floats.
        ValueError: their shapes do not fit, they have too few rows, or are not finite; or a column
            of a is constant.

    Reference:
        Lopez-Paz and Oquab, arXiv 1610.06545; Lueckmann et al., arXiv 2101.04653.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 200, 1, generator=generator)
        >>> c2st(a, b + 10, folds=2)
        1.0
    """
    check_count("folds", folds)
    _check_samples(a, b, folds)
    networks = _require("sklearn.neural_network", "c2st")
    selection = _require("sklearn.model_selection", "c2st")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    mean, std = a.mean(0), a.std(0)
    data = ((torch.cat((a, b)) - mean) / std).float().numpy()
    labels = torch.cat((a.new_zeros(len(a)), b.new_ones(len(b)))).long().numpy()
    width = 10 * a.shape[1]
    network = networks.MLPClassifier((width, width), max_iter=10_000, random_state=seed)
    shuffled = selection.KFold(folds, shuffle=True, random_state=seed)
    return float(selection.cross_val_score(network, data, labels, cv=shuffled).mean())


def _require(name: str, task: str) -> ModuleType:
    """An optional package."""
    try:
        return import_module(name)
    except ImportError as error:
        package = {"scipy": "scipy", "sklearn": "scikit-learn"}[name.partition(".")[0]]
        raise ImportError(f"{task} needs {package}: pip install {package}") from error


def _check_posterior(posterior: object) -> None:
    """Refuse what cannot be sampled or evaluated."""
    missing = [name for name in ("sample", "log_prob") if not hasattr(posterior, name)]
    if missing:
        raise TypeError(
            f"posterior must have sample((n,), context) and log_prob(x, context), as a cnf.Flow "
            f"has; {type(posterior).__name__} lacks {' and '.join(missing)}"
        )


def _check_pairs(x: Tensor, context: Tensor) -> None:
    """Refuse what is not pairs (N, D) and (N, C)."""
    for name, value, shape in (("x", x, "(N, D)"), ("context", context, "(N, C)")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
        if value.ndim != 2 or not value.numel():
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}, N >= 1")
    if len(x) != len(context):
        raise ValueError(
            f"x has {len(x)} rows and context {len(context)}; expected as many, pair by pair"
        )


def _check_samples(a: Tensor, b: Tensor, folds: int) -> None:
    """Refuse two sets that cannot be compared."""
    if folds < 2:
        raise ValueError(f"folds={folds} must be 2 or more: some are learned from, one is held out")
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            seen = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of floats (N, D), got {seen}")
        if value.ndim != 2 or not value.shape[1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (N, D)")
        if len(value) < 2 * folds:
            raise ValueError(
                f"{name} has {len(value)} rows, too few for {folds} folds; expected at least "
                f"{2 * folds}, and thousands for a figure that means something"
            )
        bad = ~value.isfinite().all(-1)
        if bad.any():
            raise ValueError(
                f"{name} has non-finite values in {int(bad.sum())} of {len(value)} rows "
                f"(first index {int(bad.nonzero()[0])}); remove them"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} dimensions and b {b.shape[1]}; expected as many")
    constant = (a.amax(0) == a.amin(0)).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"a is constant in column {constant[0]}, it has no scale; leave it out")
