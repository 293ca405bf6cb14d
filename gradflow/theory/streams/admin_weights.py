"""Admin's weights of the shortcuts, which a forward pass at initialisation finds.

x' = LN(omega_i x + f_i(x)), omega_i^2 = 1 + sum over j < i of Var f_j, Liu et al. 2020
(arXiv:2004.08249). Var f is over all elements of a batch, whose mean is 0: E f^2.
"""

from __future__ import annotations

import math
from dataclasses import replace

from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.norms import Stream
from gradflow.theory.mean_field.recursion import unit_forward
from gradflow.theory.template import Stack


def with_omegas(stack: Stack, layout: Layout) -> Stack:
    """The stack with the weights of its shortcuts in place, of one stream."""
    x, square, units = Stream(layout.start(stack.input_square)), 1.0, []
    for unit in stack.units:
        f, _ = unit_forward(replace(unit, a=0.0, norm_out=None), x, layout)
        units.append(replace(unit, a=math.sqrt(square)))
        square += layout.mean_square(f.s)
        x, _ = unit_forward(units[-1], x, layout)
    return replace(stack, units=tuple(units), state=None)
