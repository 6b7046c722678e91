import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from attnconv.errors import CheckpointError, DataError, TrainingError
from attnconv.evaluate.bench import bench_rows, crossover_sentences, run_bench, setup_sentence
from attnconv.evaluate.bench.models import ModelRunner
from attnconv.evaluate.bench.schema import BenchmarkFile
from attnconv.evaluate.engine.results import read_results
from attnconv.recipes import Recipe
from attnconv.runs import embedded_model_path, run_conversion

CPU = torch.device("cpu")
QUICK = {"contexts": (16, 48), "repeats": 2, "decode_tokens": 3, "device": "cpu"}
ONE = {**QUICK, "contexts": (8,)}
BASE = str(embedded_model_path())


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> str:
    recipe = Recipe(
        name="test",
        attention=[{"layers": "all", "method": "lolcats", "options": {"window": 8}}],
        stages=[],
    )
    return str(run_conversion(BASE, recipe, tmp_path_factory.mktemp("bench") / "model").output)


@pytest.fixture(scope="module")
def both(converted, tmp_path_factory):
    """A benchmark of the converted model beside its base, one length of which does not fit."""
    folder = tmp_path_factory.mktemp("results")
    return run_bench(
        converted, against=BASE, output=folder, **{**QUICK, "contexts": (48, 16, 512, 600)}, batches=(1, 2)
    )


def cases_of(document, **wanted):
    return [row for row in document["cases"] if all(row[name] == value for name, value in wanted.items())]


class TestWholeRuns:
    def test_every_case_is_in_the_file(self, both) -> None:
        document = json.loads(both.path.read_text())
        assert document == both.document
        assert (document["tool"], document["kind"]) == ("attnconv", "bench")
        assert (document["model"]["converted"], document["base"]["converted"]) == (True, False)
        assert document["settings"]["contexts"] == [16, 48, 512, 600]
        places = {(row["measure"], row["role"], row["context"], row["batch"]) for row in document["cases"]}
        assert len(places) == len(document["cases"]) == 2 * 2 * 4 * 2
        assert not list(both.path.parent.glob("*.partial"))

    def test_figures_follow_from_the_repeats(self, both) -> None:
        for row in both.document["cases"]:
            if row["context"] == 600:
                assert row["skipped"] == "the model was made for 512 positions"
                assert row["median"] is row["cache_bytes"] is row["peak_bytes"] is None
                continue
            assert row["skipped"] is None
            assert len(row["seconds"]) == (3 if row["measure"] == "decode" else 2)
            assert (row["low"], row["median"], row["high"]) == pytest.approx(
                np.quantile(row["seconds"], [0.25, 0.5, 0.75])
            )
            tokens = row["batch"] * (1 if row["measure"] == "decode" else row["context"])
            assert row["tokens_per_second"] == pytest.approx(tokens / row["median"])
            decoding = row["measure"] == "decode"
            assert row["ms_per_token"] == (pytest.approx(1000 * row["median"]) if decoding else None)
            # Working memory of a tiny step can come out of what the process had already; the cache is counted.
            assert row["peak_bytes"] >= (row["cache_bytes"] if decoding else 0)

    def test_caches_are_those_of_the_prompt(self, both) -> None:
        # 5 layers, keys and values of 4 heads of 8 numbers in fp32.
        per_token = 5 * 2 * 4 * 8 * 4
        for row in cases_of(both.document, role="base", measure="prefill", skipped=None):
            assert row["cache_bytes"] == row["context"] * row["batch"] * per_token
        for batch in (1, 2):
            states = {row["cache_bytes"] for row in cases_of(both.document, role="model", batch=batch, skipped=None)}
            assert len(states) == 1

    def test_decoding_ends_within_the_positions(self, both) -> None:
        for row in cases_of(both.document, measure="decode", context=512, role="base", batch=1):
            assert row["note"] == "decoding began after 507 tokens, so that it ends within the model's positions"
            assert row["cache_bytes"] == 507 * 1280
        assert cases_of(both.document, measure="decode", context=48)[0]["note"] is None

    def test_rows_and_sentences(self, both) -> None:
        rows = bench_rows(both.results)
        assert [(row.measure, row.context, row.batch) for row in rows][:3] == [
            ("prefill", 16, 1),
            ("decode", 16, 1),
            ("prefill", 48, 1),
        ]
        row = next(row for row in rows if (row.measure, row.context) == ("prefill", 512))
        assert row.speedup == pytest.approx(row.base.median / row.model.median)
        assert row.cache_ratio > 10
        assert row.peak_ratio == pytest.approx(row.base.peak_bytes / row.model.peak_bytes)
        left_out = next(row for row in rows if row.context == 600)
        assert left_out.speedup is left_out.cache_ratio is left_out.peak_ratio is None
        sentences = crossover_sentences(both.results.crossover)
        assert len(sentences) == 3 * 2
        assert "cache, batch 1: " in sentences[4]
        assert both.document["setup"]["cpu"] in setup_sentence(both.results)

    def test_an_unconverted_model_alone(self, tmp_path) -> None:
        made = []
        result = run_bench(BASE, output=tmp_path, **{**ONE, "repeats": 1, "decode_tokens": 1}, training=made.append)
        assert result.document["base"] is None
        assert result.document["crossover"] == {"prefill": [], "decode": [], "memory": []}
        assert not made
        for row in result.document["cases"]:
            assert row["role"] == "model"
            assert row["low"] == row["median"] == row["high"] == row["seconds"][0]
        assert all(row.base is None and row.speedup is None for row in bench_rows(result.results))
        assert crossover_sentences(result.results.crossover) == ()

    def test_the_clock_is_the_one_given(self, tmp_path) -> None:
        class Clock:
            now = 0.0

            def __call__(self) -> float:
                self.now += 0.25
                return self.now

        result = run_bench(BASE, output=tmp_path, clock=Clock(), **ONE)
        assert {value for row in result.document["cases"] for value in row["seconds"]} == {0.25}
        assert cases_of(result.document, measure="decode")[0]["ms_per_token"] == 250

    def test_training_steps_are_timed(self, converted, tmp_path) -> None:
        lengths = []

        def training(model):
            assert not model.training
            return lambda ids: lengths.append(tuple(ids.shape))

        result = run_bench(converted, output=tmp_path, training=training, training_contexts=(24, 8, 600), **ONE)
        rows = cases_of(result.document, measure="transfer")
        assert [(row["role"], row["context"], row["batch"]) for row in rows] == [
            ("model", 8, 1),
            ("model", 24, 1),
            ("model", 600, 1),
        ]
        assert "512 positions" in rows[2]["skipped"]
        # One warm-up each.
        assert lengths == [(1, 8)] * 3 + [(1, 24)] * 3
        assert rows[1]["tokens_per_second"] == pytest.approx(24 / rows[1]["median"])
        assert rows[1]["cache_bytes"] is None

    def test_nothing_to_train_is_said(self, converted, tmp_path) -> None:
        def training(model):
            raise TrainingError("There is nothing to train.")

        result = run_bench(converted, output=tmp_path, training=training, training_contexts=(8, 16), **ONE)
        reasons = [row["skipped"] for row in cases_of(result.document, measure="transfer")]
        assert reasons[0] == "There is nothing to train."
        assert reasons[1].endswith(reasons[0])


class TestInterruption:
    def test_finished_pieces_are_not_measured_again(self, converted, tmp_path, monkeypatch, caplog) -> None:
        prompts = []
        original = ModelRunner.forward

        def forward(self, ids, cache=None):
            prompts.append(tuple(ids.shape))
            return original(self, ids, cache)

        monkeypatch.setattr(ModelRunner, "forward", forward)

        def interrupt(done, total, text):
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_bench(converted, against=BASE, output=tmp_path, progress=interrupt, **QUICK)
        assert (1, 16) in prompts
        assert (1, 48) not in prompts
        assert (tmp_path / "bench.partial").is_file()
        assert read_results(tmp_path, BenchmarkFile) is None
        prompts.clear()
        told = []
        with caplog.at_level(logging.WARNING):
            result = run_bench(
                converted, against=BASE, output=tmp_path, progress=lambda *told_now: told.append(told_now), **QUICK
            )
        assert "2 of 4 pieces" in caplog.text
        assert (1, 16) not in prompts
        assert prompts.count((1, 48)) == 2 * (1 + 2) + 2
        assert [done for done, _, _ in told] == [0, 1, 2, 3, 4]
        assert {total for _, total, _ in told} == {4}
        assert told[1][2] == "decoding after 16 tokens, batch 1"
        assert len(result.document["cases"]) == 8
        assert not (tmp_path / "bench.partial").exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"restart": True},
            {"repeats": 1},
            pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
            pytest.param({"source": BASE}, marks=pytest.mark.slow),
        ],
    )
    def test_what_does_not_count_any_more(self, converted, tmp_path, change, caplog) -> None:
        def interrupt(done, total, text):
            if done == 1:
                raise KeyboardInterrupt

        options = {"source": converted, "output": tmp_path, **ONE}
        with pytest.raises(KeyboardInterrupt):
            run_bench(progress=interrupt, **options)
        run_bench(**{**options, **change})
        assert "interruption" not in caplog.text


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"contexts": ()}, "contexts is empty"),
            ({"contexts": (0, 5)}, "contexts is 0, 5"),
            ({"batches": (-1,)}, "batches is -1"),
            ({"training_contexts": (0,)}, "training_contexts is 0"),
            ({"repeats": 0}, "repeats is 0"),
            ({"decode_tokens": 0}, "decode_tokens is 0"),
            ({"max_seconds": 0.0}, "max_seconds is 0"),
            ({"dtype": "int8"}, "dtype is 'int8'"),
            ({"device": "toaster"}, "no device 'toaster'"),
        ],
    )
    def test_settings(self, change, match, tmp_path) -> None:
        with pytest.raises(DataError, match=match):
            run_bench(BASE, **{**QUICK, "output": tmp_path, **change})

    def test_other_models(self, tmp_path) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
        BertForMaskedLM(BertConfig(vocab_size=97, **sizes)).save_pretrained(tmp_path / "bert")
        small = T5Config(vocab_size=97, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(small).save_pretrained(tmp_path / "t5")
        for name in ("bert", "t5"):
            with pytest.raises(CheckpointError, match="causal language model"):
                run_bench(str(tmp_path / name), output=tmp_path, **QUICK)

    def test_two_dtypes_are_said(self, converted, tmp_path, caplog) -> None:
        LlamaForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
        run_bench(converted, against=str(tmp_path / "half"), output=tmp_path, **ONE)
        assert "base runs in bfloat16 and the model in float32" in caplog.text


class TestLeftOut:
    def test_decoding_that_never_fits(self, tmp_path) -> None:
        result = run_bench(BASE, output=tmp_path, contexts=(8,), repeats=1, decode_tokens=510, device="cpu")
        prefill, decode = result.document["cases"]
        assert prefill["skipped"] is None
        assert decode["skipped"] == "512 steps of decoding do not fit into 512 positions"

    def test_a_slow_warm_up(self, tmp_path) -> None:
        result = run_bench(BASE, output=tmp_path, max_seconds=1e-9, **QUICK)
        assert all(row["skipped"] for row in result.document["cases"])
        assert "allowed" in result.document["cases"][0]["skipped"]

    def test_the_longer_lengths_of_a_whole_run(self, tmp_path, monkeypatch) -> None:
        original = ModelRunner.forward

        def forward(self, ids, cache=None):
            if ids.shape[1] == 48:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 8 GiB.")
            return original(self, ids, cache)

        monkeypatch.setattr(ModelRunner, "forward", forward)
        result = run_bench(BASE, output=tmp_path, **{**QUICK, "contexts": (16, 48, 64)})
        skipped = {(row["measure"], row["context"]): row["skipped"] for row in result.document["cases"]}
        reason = "out of memory when asking for 20.00 GiB"
        later = f"not tried, since 48 tokens were left out: {reason}"
        assert skipped == {
            ("prefill", 16): None,
            ("decode", 16): None,
            ("prefill", 48): reason,
            ("decode", 48): reason,
            ("prefill", 64): later,
            ("decode", 64): later,
        }


def test_the_room_does_not_know_of_healing(repository: Path) -> None:
    for path in (repository / "evaluate" / "bench").glob("*.py"):
        assert "distill" not in path.read_text()
