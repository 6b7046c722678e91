"""Which model types can be converted: a dozen in every run of the suite, all that transformers has in the slow one."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import fresh_process
import pytest
from sweep_checks import PARTS, Verdict, examine
from sweep_models import MAPPINGS, auto_classes

Verdicts = dict[str, dict[str, Verdict]]

FAST = {
    "causal_lm": (
        *("llama", "qwen3", "gemma2", "gpt2"),
        # Mixtures of experts, latent attention, recurrent layers beside attention, layers that share keys.
        *("gpt_oss", "deepseek_v3", "qwen3_next", "gemma3n_text"),
        # Rotary positions from a table of sines instead of frequencies.
        "gptj",
    ),
    "masked_lm": ("modernbert",),
    "seq2seq": ("t5", "whisper"),
    "vision": ("vit", "clip"),
}
REFUSED = {"causal_lm": ("bloom", "mamba", "doge")}
# Types that must never be lost, beside the numbers of all.
REQUIRED = {
    "masked_lm": ("bert", "roberta", "modernbert"),
    "seq2seq": ("t5", "bart", "whisper"),
    "vision": ("vit", "dinov2", "clip", "siglip"),
}
# Of the newest transformers, of which constraints.txt names the version.
LEAST = {"causal_lm": 164, "masked_lm": 27, "seq2seq": 39, "vision": 34}


def sweep(types: dict[str, Iterable[str]], folder: Path, repository: Path) -> Verdicts:
    """Examine types and reload what they saved, all of it in one fresh process."""
    verdicts: Verdicts = {}
    for mapping, names in types.items():
        verdicts[mapping] = {}
        for model_type in names:
            verdicts[mapping][model_type] = examine(mapping, model_type, folder)
    program = str(Path(__file__).with_name("reload_saved.py"))
    environment = os.environ | {"PYTHONPATH": str(repository / ".dev")}
    run = fresh_process.run(program, folder, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    problems = json.loads(run.stdout.splitlines()[-1])
    for mapping, found in verdicts.items():
        for model_type, verdict in found.items():
            for part in PARTS if verdict.status == "ok" else ():
                # A folder that the child never saw is a problem too.
                problem = problems.get(f"{mapping}.{model_type}.{part}", "it was not reloaded")
                if problem is not None:
                    found[model_type] = Verdict("failed", f"{part}: {problem}")
    return verdicts


@pytest.fixture(scope="module")
def fast_verdicts(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Verdicts:
    types = {mapping: (*names, *REFUSED.get(mapping, ())) for mapping, names in FAST.items()}
    return sweep(types, tmp_path_factory.mktemp("fast"), repository)


@pytest.mark.parametrize(("mapping", "model_type"), [(m, name) for m, names in FAST.items() for name in names])
def test_converts(fast_verdicts: Verdicts, mapping: str, model_type: str) -> None:
    assert fast_verdicts[mapping][model_type] == Verdict("ok")


@pytest.mark.parametrize(("mapping", "model_type"), [(m, name) for m, names in REFUSED.items() for name in names])
def test_refuses(fast_verdicts: Verdicts, mapping: str, model_type: str) -> None:
    verdict = fast_verdicts[mapping][model_type]
    assert verdict.status == "refused"
    assert verdict.reason


def test_every_wanted_type_exists() -> None:
    for types in (FAST, REFUSED, REQUIRED):
        for mapping, names in types.items():
            assert set(names) <= auto_classes(mapping).keys()
    assert sum(map(len, FAST.values())) >= 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_type(tmp_path: Path, repository: Path) -> None:
    verdicts = sweep({mapping: auto_classes(mapping) for mapping in MAPPINGS}, tmp_path, repository)
    results = repository / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    report = {m: {name: found[name].to_dict() for name in sorted(found)} for m, found in verdicts.items()}
    (results / "coverage.json").write_text(json.dumps(report, indent=1) + "\n")
    assert not [(m, name) for m, found in verdicts.items() for name, v in found.items() if v.status == "failed"]
    for mapping, names in REQUIRED.items():
        assert {name: verdicts[mapping][name].status for name in names} == dict.fromkeys(names, "ok")
    reached = {m: sum(verdict.status == "ok" for verdict in found.values()) for m, found in verdicts.items()}
    assert {m: number for m, number in reached.items() if number < LEAST[m]} == {}
