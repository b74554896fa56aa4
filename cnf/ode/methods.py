"""Explicit Runge-Kutta methods as data: one Butcher tableau each, written as in the textbooks.

A tableau with an embedded solution (a second row of weights) estimates its own error and takes
adaptive steps; one without takes a fixed number of equal steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from cnf.checks import check_choice

__all__ = ["METHODS", "Coefficients", "Tableau", "tableau"]


class Coefficients(NamedTuple):
    """A tableau in double precision, as a step uses it.

    Attributes:
        a: the stages.
        b: the weights.
        c: the nodes.
        e: the weights of the error estimate, b - b^ (empty if fixed).
        first_same_as_last: whether the last stage is f at the new state.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    e: tuple[float, ...]
    first_same_as_last: bool


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method, k_i = f(t + c_i h, x + h sum_j a_ij k_j).

        x(t + h) = x + h sum_i b_i k_i,    error = h sum_i (b_i - b^_i) k_i

    Attributes:
        name: what `Solver(method=...)` calls it.
        order: p, the order of the solution that is carried on.
        nodes: c, one a stage.
        stages: a, row i with i entries.
        weights: b, one a stage.
        embedded: b^, the weights of the embedded solution of order p - 1, or None (fixed steps).
    """

    name: str
    order: int
    nodes: tuple[Fraction, ...]
    stages: tuple[tuple[Fraction, ...], ...]
    weights: tuple[Fraction, ...]
    embedded: tuple[Fraction, ...] | None

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error and so chooses its steps."""
        return self.embedded is not None

    @cached_property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is f at the new state, and so the first stage of the next step."""
        return self.nodes[-1] == 1 and (*self.stages[-1], Fraction(0)) == self.weights

    @cached_property
    def coefficients(self) -> Coefficients:
        """The tableau in double precision."""
        embedded = self.embedded or self.weights
        error = tuple(float(b - d) for b, d in zip(self.weights, embedded, strict=True))
        return Coefficients(
            a=tuple(tuple(float(v) for v in row) for row in self.stages),
            b=tuple(float(v) for v in self.weights),
            c=tuple(float(v) for v in self.nodes),
            e=error if self.adaptive else (),
            first_same_as_last=self.first_same_as_last,
        )


def _parse(name: str, order: int, text: str) -> Tableau:
    rows = [line.split("|") for line in text.strip().splitlines()]
    numbers = [(c.strip(), tuple(Fraction(v) for v in row.split())) for c, row in rows]
    stages = [(Fraction(c), row) for c, row in numbers if c]
    weights = [row for c, row in numbers if not c]
    return Tableau(
        name=name,
        order=order,
        nodes=tuple(c for c, _ in stages),
        stages=tuple(row for _, row in stages),
        weights=weights[0],
        embedded=weights[1] if len(weights) > 1 else None,
    )


_EULER = """
    0 |
      | 1
"""

_MIDPOINT = """
    0   |
    1/2 | 1/2
        | 0    1
"""

_HEUN = """
    0 |
    1 | 1
      | 1/2  1/2
"""

_RK4 = """
    0   |
    1/2 | 1/2
    1/2 | 0    1/2
    1   | 0    0    1
        | 1/6  1/3  1/3  1/6
"""

# Bogacki & Shampine 1989.
_BOSH3 = """
    0   |
    1/2 | 1/2
    3/4 | 0     3/4
    1   | 2/9   1/3  4/9
        | 2/9   1/3  4/9  0
        | 7/24  1/4  1/3  1/8
"""

# Dormand & Prince 1980.
_DOPRI5 = """
    0    |
    1/5  | 1/5
    3/10 | 3/40        9/40
    4/5  | 44/45      -56/15       32/9
    8/9  | 19372/6561 -25360/2187  64448/6561  -212/729
    1    | 9017/3168  -355/33      46732/5247   49/176  -5103/18656
    1    | 35/384      0           500/1113     125/192 -2187/6784     11/84
         | 35/384      0           500/1113     125/192 -2187/6784     11/84     0
         | 5179/57600  0           7571/16695   393/640 -92097/339200  187/2100  1/40
"""

# Tsitouras 2011; the published error weights b - b^, turned into b^ below.
_TSIT5 = """
    0                  |
    0.161              | 0.161
    0.327              | -0.008480655492356989 0.335480655492357
    0.9                | 2.8971530571054935 -6.359448489975075 4.3622954328695815
    0.9800255409045097 | 5.325864828439257 -11.748883564062828 7.4955393428898365 -0.09249506636175525
    1                  | 5.86145544294642 -12.92096931784711 8.159367898576159 -0.071584973281401 -0.028269050394068383
    1                  | 0.09646076681806523 0.01 0.4798896504144996 1.379008574103742 -3.290069515436081 2.324710524099774
                       | 0.09646076681806523 0.01 0.4798896504144996 1.379008574103742 -3.290069515436081 2.324710524099774 0
                       | 0.09824077787029101 0.0108164344596567469 0.472008772404237605 1.5237195812770049 -3.8724266808886362 2.78279263002896097 -0.015151515151515152
"""

# Prince & Dormand 1981, RK8(7)13M.
_DOPRI8 = """
    0                     |
    1/18                  | 1/18
    1/12                  | 1/48  1/16
    1/8                   | 1/32  0  3/32
    5/16                  | 5/16  0  -75/64  75/64
    3/8                   | 3/80  0  0  3/16  3/20
    59/400                | 29443841/614563906  0  0  77736538/692538347  -28693883/1125000000  23124283/1800000000
    93/200                | 16016141/946692911  0  0  61564180/158732637  22789713/633445777  545815736/2771057229  -180193667/1043307555
    5490023248/9719169821 | 39632708/573591083  0  0  -433636366/683701615  -421739975/2616292301  100302831/723423059  790204164/839813087  800635310/3783071287
    13/20                 | 246121993/1340847787  0  0  -37695042795/15268766246  -309121744/1061227803  -12992083/490766935  6005943493/2108947869  393006217/1396673457  123872331/1001029789
    1201146811/1299019798 | -1028468189/846180014  0  0  8478235783/508512852  1311729495/1432422823  -10304129995/1701304382  -48777925059/3047939560  15336726248/1032824649  -45442868181/3398467696  3065993473/597172653
    1                     | 185892177/718116043  0  0  -3185094517/667107341  -477755414/1098053517  -703635378/230739211  5731566787/1027545527  5232866602/850066563  -4093664535/808688257  3962137247/1805957418  65686358/487910083
    1                     | 403863854/491063109  0  0  -5068492393/434740067  -411421997/543043805  652783627/914296604  11173962825/925320556  -13158990841/6184727034  3936647629/1978049680  -160528059/685178525  248638103/1413531060  0
                          | 14005451/335480064  0  0  0  0  -59238493/1068277825  181606767/758867731  561292985/797845732  -1041891430/1371343529  760417239/1151165299  118820643/751138087  -528747749/2220607170  1/4
                          | 13451932/455176623  0  0  0  0  -808719846/976000145  1757004468/5645159321  656045339/265891186  -3867574721/1518517206  465885868/322736535  53011238/667516719  2/45  0
"""

METHODS: dict[str, Tableau] = {
    method.name: method
    for method in (
        _parse("euler", 1, _EULER),
        _parse("midpoint", 2, _MIDPOINT),
        _parse("heun", 2, _HEUN),
        _parse("rk4", 4, _RK4),
        _parse("bosh3", 3, _BOSH3),
        _parse("dopri5", 5, _DOPRI5),
        _parse("tsit5", 5, _TSIT5),
        _parse("dopri8", 8, _DOPRI8),
    )
}
"""Every method by its name."""


def tableau(name: str) -> Tableau:
    """The Butcher tableau of a method.

    Args:
        name: a key of `METHODS`.

    Raises:
        ValueError: for a name that is not there.

    Example:
        >>> tableau("dopri5").order, tableau("dopri5").first_same_as_last
        (5, True)
    """
    check_choice("method", name, METHODS)
    return METHODS[name]
