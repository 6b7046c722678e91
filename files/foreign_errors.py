"""How other libraries' errors are put into one sentence of ours."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, or of a text, without its full stop; an error's type if it says nothing."""
    lines = str(error).strip().splitlines()
    if lines:
        return lines[0].rstrip(".:")
    return "no reason given" if isinstance(error, str) else type(error).__name__
