"""A conversion from end to end, with every admitted set of versions: heal, generate, save, and load in a fresh process.

Other tests that count for every set of versions carry the same mark where they stand.
"""

import json
import os
from pathlib import Path

import fresh_process
import pytest
import torch
from safetensors.torch import load_file
from small_conversions import convert
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv.runs import embedded_tokens

pytestmark = pytest.mark.compat

STEPS = 20
TRANSFER = {
    "kind": "attention_transfer",
    "steps": STEPS,
    "sequence_length": 64,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "log_every": 1,
}
# What a user's own script does; it prints what was generated with and without a cache, and keeps logits.
FRESH = """
import json, sys
import attnconv
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
given = load_file(sys.argv[2])
ids, mask = given["ids"], given["mask"]
with torch.no_grad():
    save_file({"logits": model(ids).logits, "padded": model(ids, attention_mask=mask).logits}, sys.argv[3])
ways = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 5},
    "drafts": {"prompt_lookup_num_tokens": 3},
}
answers = {}
for way, options in ways.items():
    rows = slice(0, 1) if way == "drafts" else slice(None)
    common = {"attention_mask": mask[rows], "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    kept = {name: value for name, value in options.items() if name == "num_beams"}
    with_cache = model.generate(ids[rows], **common, **options)
    without = model.generate(ids[rows], **common, **kept, use_cache=False)
    answers[way] = [with_cache.tolist(), without.tolist()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("story") / "model", TRANSFER)


def test_healing_brings_the_layers_closer_to_their_teachers(healed: Path) -> None:
    rows = [json.loads(line) for line in (healed / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    assert len(losses) >= STEPS
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_fresh_process_says_the_same(healed: Path, repository: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    ids = embedded_tokens("valid")[:2, :24].contiguous()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    save_file({"ids": ids, "mask": mask}, tmp_path / "given")
    environment = os.environ | {"PYTHONPATH": str(repository / ".dev")}
    done = fresh_process.run("-c", FRESH, healed, tmp_path / "given", tmp_path / "logits", env=environment)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(healed).eval()
    found = load_file(tmp_path / "logits")
    with torch.no_grad():
        assert torch.equal(found["logits"], model(ids).logits)
        alone = model(ids[:1, 7:]).logits
    torch.testing.assert_close(found["padded"][:1, 7:], alone, atol=1e-4, rtol=1e-4)
    for way, (with_cache, without) in json.loads(done.stdout.splitlines()[-1]).items():
        assert with_cache == without, way


def test_the_tokenizer_came_along(healed: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(healed)
    text = "Once upon a time"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
