"""The exceptions that attnconv raises for whatever a user can cause; each message is one clear sentence."""

INSTALL_COMMAND = "pip install ."
INSTALL_PLACE = "in a clone of attnconv's repository"
"""Where the command works, until there is a package on the index."""
INSTALL = f"`{INSTALL_COMMAND}` {INSTALL_PLACE}"


class AttnConvError(Exception):
    """Base of every error that attnconv raises on purpose."""


class RecipeError(AttnConvError, ValueError):
    """A recipe, an override or a method's options are wrong."""


class CheckpointError(AttnConvError, ValueError):
    """A checkpoint cannot be read, or is refused."""


class PlanError(AttnConvError, ValueError):
    """A conversion cannot be carried out on this model as asked."""


class DataError(AttnConvError, ValueError):
    """Training or evaluation data cannot be used."""


class TrainingError(AttnConvError, RuntimeError):
    """A healing stage had to stop."""


class OutputError(AttnConvError, OSError):
    """The output folder cannot be written."""


class HubError(AttnConvError, RuntimeError):
    """Talking to the Hugging Face Hub failed."""


class InterruptedRun(KeyboardInterrupt):
    """A signal asked a run to stop, and what it had is saved.

    Args:
        saved: what is saved, as half a sentence.
        signal: number of the signal; None if another process of the team got it.
    """

    def __init__(self, saved: str, signal: int | None = None) -> None:
        super().__init__(saved)
        self.saved = saved
        self.signal = signal
