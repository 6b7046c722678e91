"""What every test room shares: a quiet, offline process and the data that lies beside the checkout."""

import atexit
import gc
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent


def _prepare_environment() -> None:
    # Before torch or huggingface_hub are imported, for they read these once. Tiny models run fastest on one thread, and
    # one thread makes sums repeatable; nothing may reach for the network or write to the user's caches.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Some shells tell their children how wide the terminal is, and what is printed here goes to none.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    cache = tempfile.mkdtemp(prefix="attnconv-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["HF_HOME"] = cache


_prepare_environment()

# The machine may be busy, and a suite that is green today should be green tomorrow.
settings.register_profile("attnconv", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("attnconv")


def pytest_report_header() -> str:
    """The versions that results are true for."""
    names = (
        "torch",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "peft",
        "accelerate",
        "datasets",
        "numpy",
        "triton",
    )
    found = ", ".join(f"{name} {_version(name)}" for name in names)
    return f"with Python {platform.python_version()}, {found}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


# The longest files. They go first, so that at the end no worker is left alone with one of them.
LONGEST = (
    # These two in the long tests.
    "sweep/test_coverage.py",
    "attention_modules/kernels/test_compilation.py",
    "attention_modules/test_state_invariants.py",
    "attention_modules/test_invariants.py",
    "cli/test_process.py",
    "convert/test_loading.py",
    "convert/test_generation.py",
    "attention_modules/kernels/test_state_kernels.py",
    "evaluate/test_report.py",
    "distill/test_conversion.py",
    "attention_modules/kernels/test_decoding.py",
    "evaluate/test_report_files.py",
    "cli/test_measuring.py",
    "attention_modules/kernels/test_kernels.py",
    "evaluate/test_compare.py",
    "convert/test_executed.py",
    "evaluate/test_report_details.py",
    "convert/test_bundle.py",
    "distill/test_choices.py",
    "convert/test_expert_table.py",
    "cli/test_doctor.py",
    "distill/test_training.py",
    "cli/test_conversion.py",
    "convert/test_experts.py",
    "convert/test_rewriting.py",
    "attention_modules/test_packed.py",
    "distill/test_images.py",
    "runs/test_rewrite_healing.py",
    "convert/test_selected_heads.py",
    "test_registries.py",
    "attention_modules/test_recording.py",
    "evaluate/test_bench.py",
    "benchmarks/test_method_table.py",
    "convert/test_files.py",
    "distill/test_objectives.py",
    "convert/test_head_gates.py",
    "evaluate/test_harness.py",
    "evaluate/test_retrieval.py",
    "convert/test_native_windows.py",
    "distill/test_roles.py",
    "convert/test_widen.py",
    "cli/test_data.py",
    "compat/test_story.py",
    "cli/test_commands.py",
    "evaluate/test_engine.py",
    "convert/test_swap.py",
    "convert/test_exactness.py",
    "convert/test_latent.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep xdist from putting files with many tests first, whatever they take; `LONGEST` says which are long."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, and see to what pytest takes for packages."""
    ranks = {REPOSITORY / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    _keep_the_package_alone(items)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what is there for good: all modules, and some thousand tests."""
    gc.collect()
    gc.freeze()


def _keep_the_package_alone(items: list[pytest.Item]) -> None:
    """Keep pytest from importing the package a second time, under the name of the folder that the checkout is in.

    It takes the checkout for a package of tests because of its `__init__.py`; a second copy of everything, hooks
    included, would then live in the process beside `attnconv`.
    """
    for node in {node for item in items for node in item.listchain()}:
        if isinstance(node, pytest.Package) and node.path == REPOSITORY:
            node.setup = lambda: None  # type: ignore[method-assign]


@pytest.fixture(scope="session", autouse=True)
def _runs_draw_nothing() -> Iterator[None]:
    """Leave out the pictures of healed runs, which take longer to draw than tiny models to heal.

    A file that begins like a PNG stands in for each. Tests that look at pictures put the functions back.
    """
    # Whoever does not import runs does none.
    runs = sys.modules.get("attnconv.runs.figures")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_losses", "plot_layers") if runs is not None else ():
            patch.setattr(runs, name, lambda found, path: path.write_bytes(b"\x89PNG\r\n\x1a\n"))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the checkout, which is also the package's own folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of evaluation data and small models beside the checkout; tests that need it skip without it."""
    folder = Path(os.environ.get("ATTNCONV_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the shared data folder, and {folder} is none; ATTNCONV_SHARED names another")
    return folder
