"""Where work runs: in this process, in others, on other machines."""

from forebear.executors.base import Executor, InProcess, Work
from forebear.executors.pieces import Pieces, results, write_tensors

__all__ = ["Executor", "InProcess", "Pieces", "Work", "results", "write_tensors"]
