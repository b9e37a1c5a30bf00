"""How many weights each layer keeps, so that all layers together keep a given share.

    uniform:      density of a layer = density
    first_dense:  the first layer is dense, the others share the rest evenly
    erk:          density of a layer = min(1, eps (inputs + outputs) / (inputs outputs))

ERK is Erdos-Renyi as of Mocanu et al. (arXiv 1707.04780), which leaves small matrices denser. eps follows from the
total; layers that reach 1 are dense, and eps is solved again for the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from scrimp.errors import UserError


def densities(shapes: Mapping[str, tuple[int, int]], density: float, kind: str) -> dict[str, float]:
    """Share of the weights that each layer keeps.

    Args:
        shapes: (outputs, inputs) of each layer.
    Raises:
        UserError: if the first layer alone has more weights than shall remain.
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    total = sum(sizes.values())
    if kind == "uniform" or density == 1:
        return dict.fromkeys(shapes, density)
    if kind == "first_dense":
        first, *others = shapes
        rest = sum(sizes[name] for name in others)
        share = (density * total - sizes[first]) / rest if rest else -1.0
        if share <= 0:
            what = f"the first layer alone has more than {density:g} of the weights."
            raise UserError(what, "", "Set `allocation` to erk or uniform, or raise `density`.")
        return {first: 1.0, **dict.fromkeys(others, share)}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        open_ = [name for name in shapes if name not in dense]
        left = density * total - sum(sizes[name] for name in dense)
        eps = left / sum(raw[name] * sizes[name] for name in open_)
        over = {name for name in open_ if eps * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= over


def counts(shapes: Mapping[str, tuple[int, int]], density: float, kind: str) -> dict[str, int]:
    """Weights that each layer keeps: at least one, and together exactly the rounded share of all of them."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    exact = {name: share * sizes[name] for name, share in densities(shapes, density, kind).items()}
    found = {name: max(1, math.floor(value + 1e-9)) for name, value in exact.items()}
    short = max(len(shapes), round(density * sum(sizes.values()))) - sum(found.values())
    # The largest remainders are rounded up; where floors of one took too many, the fullest layers give some back.
    for name in sorted(exact, key=lambda name: found[name] - exact[name]):
        step = min(max(short, 0), 1, sizes[name] - found[name])
        found[name] += step
        short -= step
    for name in sorted(found, key=lambda name: -found[name]):
        step = max(short, 1 - found[name]) if short < 0 else min(short, sizes[name] - found[name])
        found[name] += step
        short -= step
    return found
