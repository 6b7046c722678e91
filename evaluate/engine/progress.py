"""How a measurement tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is to do in all, in one unit, and what is being done now."""
