"""Optimizers and clipping on the compiled core."""

from pyft.optim.adafactor import Adafactor
from pyft.optim.adagrad import Adagrad
from pyft.optim.adam import Adam, AdamW
from pyft.optim.backward import BackwardNorms, norm_in_backward
from pyft.optim.base import LastStep
from pyft.optim.clip import clip_grad_agc_, clip_grad_norm_, clip_grad_value_, grad_norm
from pyft.optim.lion import Lion
from pyft.optim.options import StepOptions
from pyft.optim.rmsprop import RMSprop
from pyft.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "BackwardNorms",
    "LastStep",
    "Lion",
    "RMSprop",
    "StepOptions",
    "clip_grad_agc_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "grad_norm",
    "norm_in_backward",
]
