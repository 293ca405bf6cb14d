"""What theory predicts for the gradient's profile of a stack; no torch, no measuring.

`predict(spec)` for a stack that gradflow builds, `predict_stack(Stack(...))` for units of the
template `x' = Np(a x + b No(f(c Ni(x))))`. Formulas stand beside the code with source and limits:
moments, kernels (activations), norms, attention, passes (the recursion), corrections and spread
(finite width), limits (where none is given). Beyond the template: restated and omegas (units in its
terms), copies (streams that are Pre-LN's), and bundle, programs, several (streams of their own).
"""

from gradflow.theory.describe import describe
from gradflow.theory.predict import Prediction, predict, predict_stack, total_decades
from gradflow.theory.template import Head, NoTheoryError, Shape, Stack, Unit, Weights

__all__ = [
    "Head",
    "NoTheoryError",
    "Prediction",
    "Shape",
    "Stack",
    "Unit",
    "Weights",
    "describe",
    "predict",
    "predict_stack",
    "total_decades",
]
