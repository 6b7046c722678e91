"""The healing: stages of training that teach a converted model to work as it did before."""

from .progress import LineProgress, Progress, Silent, TerminalProgress

__all__ = ["LineProgress", "Progress", "Silent", "TerminalProgress"]
