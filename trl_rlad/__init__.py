"""Reinforcement-aware knowledge distillation (RLAD) for TRL."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import RLADConfig
    from .objective.trrd import TRRDLoss
    from .scoring import TeacherScorer
    from .trainer import RLADTrainer

__all__ = ["RLADConfig", "RLADTrainer", "TRRDLoss", "TeacherScorer"]
__version__ = version("trl-rlad")

# Where each name is, imported when it is asked for: TRL takes seconds, and `trl-rlad --help` has no use for it
_MODULES = {
    "RLADConfig": "config",
    "RLADTrainer": "trainer",
    "TRRDLoss": "objective.trrd",
    "TeacherScorer": "scoring",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
