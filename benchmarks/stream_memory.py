"""The `sliding-window` recipe on a checkpoint: wall time against `cp -r`, and memory above what importing takes.

    python benchmarks/stream_memory.py --model models/smollm2-135m-instruct

Both write to the same file system, in turns, from a warm page cache. The conversion runs in a process of its own,
which reports its highest resident memory after its imports (and a conversion of one megabyte) and at the end; the time
is that of the conversion, and beside it that of the whole command.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import attnconv_command, find_model, parser_of, peak_bytes, run_command, write_result

RECIPE = "sliding-window"


def convert(model: Path, output: Path) -> dict[str, float]:
    """Convert in this process; seconds, and highest resident bytes before and after."""
    from attnconv.packaged.model import embedded_model_path
    from attnconv.recipes import load_recipe
    from attnconv.runs import run_conversion

    recipe = load_recipe(RECIPE)
    # A conversion of a megabyte imports all that the one measured does.
    run_conversion(str(embedded_model_path()), recipe, output.with_name("tiny"))
    shutil.rmtree(output.with_name("tiny"))
    baseline = peak_bytes()
    began = time.perf_counter()
    run_conversion(str(model), recipe, output)
    return {"seconds": time.perf_counter() - began, "baseline_bytes": baseline, "peak_bytes": peak_bytes()}


def main() -> None:
    """Take turns between copying and converting."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--child", type=Path, help="convert to this folder, in this process, and print the figures")
    arguments = parser.parse_args()
    model = find_model(arguments.model)
    if arguments.child is not None:
        print(json.dumps(convert(model, arguments.child)))
        return
    copies, conversions, commands = [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        target = Path(scratch) / "out"
        for turn in range(arguments.repeats + 1):
            began = time.perf_counter()
            subprocess.run(["cp", "-r", str(model), str(target)], check=True)
            copied = time.perf_counter() - began
            shutil.rmtree(target)
            child = [sys.executable, __file__, "--model", model.resolve(), "--child", target]
            converted = json.loads(run_command(child).stdout.splitlines()[-1])
            shutil.rmtree(target)
            command = run_command(attnconv_command("-q", "convert", model, "--recipe", RECIPE, "--output", target))
            shutil.rmtree(target)
            # The first turn warms the page cache.
            if turn:
                copies.append(copied)
                conversions.append(converted)
                commands.append(command.seconds)
    seconds = statistics.median(row["seconds"] for row in conversions)
    copy_seconds = statistics.median(copies)
    write_result(
        "stream_memory",
        settings={
            "model": model.name,
            "weight_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
            "recipe": RECIPE,
            "repeats": arguments.repeats,
        },
        results={
            "cp_seconds": copy_seconds,
            "conversion_seconds": seconds,
            "ratio": seconds / copy_seconds,
            "command_seconds": statistics.median(commands),
            "bytes_above_imports": max(row["peak_bytes"] - row["baseline_bytes"] for row in conversions),
            "all_cp_seconds": copies,
            "all_conversions": conversions,
        },
        label=arguments.label,
    )


if __name__ == "__main__":
    main()
