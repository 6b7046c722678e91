"""Run in a process of its own: load every saved conversion in a folder and compare it with what the saver noted.

Usage: python reload_saved.py FOLDER; prints one JSON object, name of the saved folder → what went wrong, or null.
"""

import gc
import json
import sys
from pathlib import Path

import attnconv  # noqa: F401 - what a user imports before `from_pretrained`
import torch
import transformers
from attnconv.convert import converted_modules

from conversions import difference
from tiny_models import outputs


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
    return None if errors[worst] == 0 else f"{worst} differs by {errors[worst]:.0e} after reloading"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    problems: dict[str, str | None] = {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        try:
            problems[folder.name] = problem(folder)
        except Exception as error:  # noqa: BLE001 - one broken folder must not hide the others
            problems[folder.name] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
