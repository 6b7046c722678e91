"""Run in a process of its own: load every saved conversion in a folder and compare it with what the saver noted.

Usage: python reload_saved.py FOLDER; prints one JSON object, name of the saved folder → what went wrong, or null.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from sweep_checks import difference, sentence
from sweep_models import outputs

from attnconv.convert import converted_modules

# Fused experts come back from disk in another memory layout, and sums in another order; all else is bit for bit.
EXACT = 1e-6


def problem(folder: Path) -> str | None:
    note = json.loads((folder / "expected.json").read_text())
    expected = torch.load(folder / "expected.pt")
    model, report = getattr(transformers, note["loader"]).from_pretrained(folder, output_loading_info=True)
    if sorted(converted_modules(model)) != note["modules"]:
        return f"{len(converted_modules(model))} of {len(note['modules'])} modules are converted"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if ours := [str(key) for key in report[kind] if ".attnconv." in str(key)]:
            return f"{kind}: {ours[0]}"
    found = outputs(model.eval(), expected["inputs"])
    errors = {name: difference(value, found[name]) for name, value in expected["outputs"].items()}
    worst = max(errors, key=errors.__getitem__)
    return None if errors[worst] <= EXACT else f"{worst} differs by {errors[worst]:.0e} after reloading"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    problems: dict[str, str | None] = {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        try:
            problems[folder.name] = problem(folder)
        # One broken folder must not hide the others.
        except Exception as error:  # noqa: BLE001
            problems[folder.name] = sentence(error)
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
