"""How other libraries' errors are put into one sentence of ours."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
