"""What of a transform can be regularised."""

from __future__ import annotations

from collections.abc import Sequence

from cnf.regularizers import Regularizer
from cnf.transforms.base import Transform
from cnf.transforms.continuous import CNF
from cnf.transforms.steer import check_steer

__all__ = ["check_regularization"]


def check_regularization(
    transform: Transform, regularizers: Sequence[Regularizer], steer: float = 0.0
) -> None:
    """Refuse regularisers that are none, or that a transform has no use for; likewise a steer.

    Raises:
        TypeError: not a sequence of regularisers, one that has no hash, or one for other fields.
        ValueError: two of one name; no CNF to regularise; too large a steer.

    Example:
        >>> import cnf
        >>> check_regularization(cnf.CNF(cnf.MLPField(2)), [cnf.KineticEnergy(0.01)])
    """
    _check_values(regularizers)
    check_steer(steer, (0.0, float("inf")))
    parts = [part for part in transform.modules() if isinstance(part, CNF)]
    if (regularizers or steer) and not parts:
        what = "steer" if steer else regularizers[0].name
        raise ValueError(
            f"{what} needs the path of a CNF, but there is none in this "
            f"{type(transform).__name__}; leave it out, or use a continuous flow such as "
            "cnf.FFJORD"
        )
    for part in parts:
        check_steer(steer, part.times)
        for regularizer in regularizers:
            regularizer.check_field(part.field)


def _check_values(regularizers: Sequence[Regularizer]) -> None:
    if not isinstance(regularizers, (list, tuple)):
        raise TypeError(
            "regularizers must be a list such as [cnf.KineticEnergy(0.01)], got "
            f"{type(regularizers).__name__}"
        )
    for i, regularizer in enumerate(regularizers):
        kind = type(regularizer).__name__
        if not isinstance(regularizer, Regularizer):
            raise TypeError(f"regularizers[{i}] must be a cnf.Regularizer, got {kind}")
        if type(regularizer).__hash__ is None:
            raise TypeError(
                f"regularizers[{i}], a {kind}, has no hash, which tells compiled solves apart; "
                "decorate its class with @dataclass(frozen=True)"
            )
    names = [regularizer.name for regularizer in regularizers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"regularizers has two of the name {name!r}, under which each is logged; keep one"
            )
