"""What a reader should know about an evaluation before believing its figures."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from ...convert.planning.plan import Plan
from ...files.own_files import SECTION
from ...formats import count

# Settings of a task that say how long its texts are at most, in tokens.
LENGTHS = ("context", "lengths")
# Texts of any length, or of answers to questions, which are short.
UNKNOWN, SHORT = ("harness",), ("multiple_choice",)


def remarks_on(config: PreTrainedConfig, tasks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sentences about what the tasks cannot show of a model.

    Args:
        config: the model's configuration.
        tasks: settings of each task, as its file has them.
    """
    window, longest = _shortest_window(config), _longest_text(tasks)
    if window is None or longest is None or longest > window:
        return []
    return [
        f"No text of these tasks is longer than the window of {count(window)} tokens, inside which the model attends "
        f"as its base does: they say nothing of longer texts; use `--suite standard`, or `--text FILE` with "
        f"`--context` of more than {count(window)}."
    ]


def _shortest_window(config: PreTrainedConfig) -> int | None:
    """The shortest window of a converted model's layers; None unless each converted layer has one."""
    section = getattr(config, SECTION, None)
    if section is None:
        return None
    windows = [entry.options.get("window") for entry in Plan.from_config(section).entries if entry.converted]
    known = [window for window in windows if isinstance(window, int)]
    return min(known) if known and len(known) == len(windows) else None


def _longest_text(tasks: Iterable[Mapping[str, Any]]) -> int | None:
    """Tokens of the longest text that any task may have; None where that is not known."""
    lengths = [0]
    for settings in tasks:
        if settings["kind"] in SHORT:
            continue
        found = [settings[key] for key in LENGTHS if settings.get(key)]
        # Prompts from a file are as long as they are.
        from_file = settings["kind"] == "retrieval" and settings.get("task") == "file"
        if settings["kind"] in UNKNOWN or from_file or not found:
            return None
        lengths += [max(value) if isinstance(value, list | tuple) else int(value) for value in found]
    return max(lengths) or None
