"""`attnconv demo` after installation: its time and the perplexities it shows.

python benchmarks/demo.py
"""

import json
import tempfile
from pathlib import Path

from common import attnconv_command, parser_of, run_command, set_threads, write_result


def main() -> None:
    """Run the demo once."""
    arguments = parser_of(__doc__).parse_args()
    set_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        finished = run_command(attnconv_command("-q", "demo", "--output", Path(scratch) / "demo", "--json"))
    shown = json.loads(finished.stdout)
    write_result(
        "demo",
        settings={"recipe": "quickstart"},
        results={**shown, "command_seconds": finished.seconds, "peak_bytes": finished.peak_bytes},
        label=arguments.label,
    )


if __name__ == "__main__":
    main()
