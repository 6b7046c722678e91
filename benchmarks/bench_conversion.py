"""Prefill, decoding, memory and transfer steps of a converted SmolLM2 beside its base, by `attnconv bench`.

python benchmarks/bench_conversion.py --model models/smollm2-135m-instruct --converted models/lolcats
"""

import json
import tempfile
from pathlib import Path

from common import attnconv_command, find_model, parser_of, run_command, set_threads, write_result


def main() -> None:
    """Run the command and keep what it measured."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument(
        "--converted", type=Path, help="folder of the conversion; default $ATTNCONV_MODELS/smollm2-lolcats"
    )
    parser.add_argument("--contexts", default="512,2048,8192", help="tokens of context")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model, converted = find_model(arguments.model), find_model(arguments.converted, "smollm2-lolcats")
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--contexts", arguments.contexts, "--repeats", str(arguments.repeats), "--output", scratch]
        finished = run_command(attnconv_command("-q", "bench", converted, "--against", model, *options, "--json"))
    document = json.loads(finished.stdout)
    write_result(
        "bench_conversion",
        settings={"model": model.name, "converted": converted.name, **document["settings"]},
        results={"cases": document["cases"], "crossover": document["crossover"], "seconds": finished.seconds},
        label=arguments.label,
    )


if __name__ == "__main__":
    main()
