"""The engine for any `nn.Module` and any training loop: taps on tensors, nothing left behind."""

from gradflow.watching.flow import Flow, watch

__all__ = ["Flow", "watch"]
