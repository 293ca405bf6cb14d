"""What theory predicts for the gradient's profile of a stack, without torch or measuring.

`predict(spec)` is for a stack that gradflow builds, `predict_stack(Stack(...))` for units of the
template `x' = Np(a x + b No(f(c Ni(x))))`. Each formula stands beside its code with its source or
its derivation, and its limits:

- `mean_field`: the recursion at infinite width; activations, norms, attention, branches.
- `finite_width`: how far one seed may lie from it.
- `streams`: units that carry several streams, or that are the template in other terms.
- `highway`: highway layers.
- `limits`: where no prediction is given, and how closely the others hold.
"""

from gradflow.theory.describe import describe_stack
from gradflow.theory.predict import Prediction, predict, predict_stack, total_decades
from gradflow.theory.template import (
    Head,
    NoTheoryError,
    Stack,
    StreamShape,
    TemplateUnit,
    WeightMoments,
)

__all__ = [
    "Head",
    "NoTheoryError",
    "Prediction",
    "Stack",
    "StreamShape",
    "TemplateUnit",
    "WeightMoments",
    "describe_stack",
    "predict",
    "predict_stack",
    "total_decades",
]
