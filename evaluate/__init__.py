"""The proof: how well a model still predicts text, and what its attention costs in memory."""

from .tasks.perplexity import PerplexityResult, perplexity
from .tasks.textfile import load_tokens, read_documents

__all__ = ["PerplexityResult", "load_tokens", "perplexity", "read_documents"]
