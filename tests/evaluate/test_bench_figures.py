import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from attnconv.compat import cache_argument, cache_of
from attnconv.convert import convert_model
from attnconv.convert.reading.checkpoint import open_checkpoint
from attnconv.evaluate.bench import crossover_sentences, crossovers, quartiles
from attnconv.evaluate.bench.cache_size import held_bytes
from attnconv.evaluate.bench.cases import Case, Piece
from attnconv.evaluate.bench.crossover import Crossover, interpolate
from attnconv.evaluate.bench.models import ModelRunner, ordinary_tokens, random_prompt
from attnconv.runs import embedded_model_path

BASE = str(embedded_model_path())


def case(measure="prefill", role="model", context=512, seconds=(1.0,), batch=1, cache_bytes=None, peak_bytes=None):
    return Case.measured(Piece(measure, context, batch), role, seconds, peak_bytes=peak_bytes, cache_bytes=cache_bytes)


class TestCrossover:
    def test_lines_in_logarithms(self) -> None:
        # Twice as slow at 1,000 and twice as fast at 4,000: level at the geometric mean.
        assert interpolate({1000: 2.0, 4000: 0.5}) == pytest.approx(2000)
        assert interpolate({100: 8.0, 1000: 2.0, 8000: 0.25}) == pytest.approx(2000)
        assert interpolate({100: 0.5, 1000: 2.0, 4000: 0.5}) == pytest.approx(2000)
        assert interpolate({1000: 1.0, 4000: 0.5}) == pytest.approx(1000)
        assert interpolate({1000: 0.5, 4000: 2.0}) is None
        assert interpolate({1000: 0.5, 4000: 0.4}) is None
        assert interpolate({1000: 2.0}) is None
        assert interpolate({}) is None

    def found(self, model, base, measure="prefill", name=None):
        contexts = sorted(base)
        rows = [
            case(measure, role, context, side[context])
            for role, side in (("model", model), ("base", base))
            for context in contexts
        ]
        (entry,) = crossovers(rows)[name or measure]
        return entry

    def test_a_crossing_with_its_spread(self) -> None:
        model = {1000: (1.8, 2.0, 2.2), 4000: (7.2, 8.0, 8.8)}
        base = {1000: (0.9, 1.0, 1.1), 4000: (14.4, 16.0, 17.6)}
        entry = self.found(model, base)
        assert entry.context == 2000
        assert entry.low < 2000 < entry.high
        assert entry.note == "faster from about here on; slower at 1,000 tokens, faster at 4,000"
        (sentence,) = crossover_sentences({"prefill": [entry]})
        assert sentence.startswith(
            f"prefill, batch 1: 2,000 tokens (by the quartiles {entry.low:,} to {entry.high:,}), faster"
        )

    def test_a_crossing_that_the_spread_leaves_open(self) -> None:
        entry = self.found({1000: (2.0,), 4000: (1.0, 16.0, 19.0)}, {1000: (1.0,), 4000: (10.0, 16.5, 17.0)})
        assert entry.context is not None
        assert entry.high is None

    @pytest.mark.parametrize(
        ("model", "note"),
        [
            ((0.5, 0.5, 0.5), "faster at every measured length up to 8,192"),
            ((2.0, 2.0, 2.0), "slower at every measured length up to 8,192"),
            ((1.0, 1.0, 1.0), "as fast at every measured length up to 8,192"),
            ((0.5, 2.0, 2.0), "faster at 512 tokens, but not at 8,192 tokens, the longest measured"),
        ],
    )
    def test_no_crossing(self, model, note) -> None:
        contexts = (512, 2048, 8192)
        entry = self.found(
            {context: (value,) for context, value in zip(contexts, model, strict=True)},
            dict.fromkeys(contexts, (1.0,)),
            measure="decode",
        )
        assert entry == Crossover(1, None, None, None, note)

    def test_more_than_one_crossing(self) -> None:
        entry = self.found({100: (0.5,), 1000: (2.0,), 4000: (0.5,)}, dict.fromkeys((100, 1000, 4000), (1.0,)))
        assert entry.context == 2000
        assert entry.note.endswith("it changes more than once")

    def test_memory_and_what_was_left_out(self) -> None:
        rows = [
            case(role="base", context=100, cache_bytes=100),
            case(role="base", context=400, cache_bytes=400),
            case(role="base", context=800, cache_bytes=800),
            case(role="model", context=100, cache_bytes=200),
            case(role="model", context=400, cache_bytes=200),
            Case.left_out(Piece("prefill", 800, 1), "model", "out of memory"),
            Case.left_out(Piece("decode", 800, 1), "base", "out of memory"),
        ]
        found = crossovers(rows)
        assert found["memory"][0].context == found["memory"][0].low == found["memory"][0].high == 200
        assert found["decode"][0].note == "no length was measured for both models"
        assert crossover_sentences({"memory": found["memory"]})[0].startswith("cache, batch 1: 200 tokens, smaller")

    def test_quartiles(self) -> None:
        assert quartiles([3.0]) == (3.0, 3.0, 3.0)
        assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def cache_after(model, tokens):
    with torch.inference_mode():
        return cache_of(model.eval()(input_ids=torch.randint(5, 90, (2, tokens)), use_cache=True))


class TestCacheSize:
    PER_TOKEN = 2 * 2 * 2 * 8 * 4

    def test_full_and_sliding_layers(self) -> None:
        kinds = ["sliding_attention", "full_attention"]
        config = Gemma2Config(vocab_size=97, **SIZES, num_hidden_layers=2, sliding_window=8, layer_types=kinds)
        # A sliding layer keeps what the next token can see besides itself.
        assert held_bytes(cache_after(Gemma2ForCausalLM(config), 20)) == (7 + 20) * self.PER_TOKEN

    def test_recurrent_and_converted_layers(self) -> None:
        config = Qwen3NextConfig(
            vocab_size=97,
            **SIZES,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=0,
            mlp_only_layers=[0, 1],
        )
        recurrent = cache_after(Qwen3NextForCausalLM(config), 20)
        states = 2 * 4 * 8 * 8 * 4
        convolution = 2 * (2 * 16 + 32) * 4 * 4
        assert held_bytes(recurrent.layers[0]) == states + convolution
        assert held_bytes(recurrent) == states + convolution + 20 * self.PER_TOKEN

    def test_a_converted_layer_counts_its_state(self) -> None:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **SIZES, num_hidden_layers=2))
        cache = cache_after(convert_model(model, "sliding_window", window=4, num_sinks=1), 20)
        assert held_bytes(cache) == sum(layer.nbytes for layer in cache.layers)
        assert 0 < held_bytes(cache) < 20 * self.PER_TOKEN
        assert held_bytes(None) == 0


class TestPrompts:
    def test_ordinary_tokens_only(self, tmp_path) -> None:
        allowed = ordinary_tokens([open_checkpoint(BASE)]).tolist()
        assert not {0, 1, 2} & set(allowed)
        assert max(allowed) == 511
        config = LlamaConfig(vocab_size=90, **SIZES, num_hidden_layers=1, pad_token_id=7, eos_token_id=[8, 9])
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        mixed = ordinary_tokens([open_checkpoint(BASE), open_checkpoint(tmp_path)]).tolist()
        assert max(mixed) == 89
        assert not {0, 1, 2, 7, 8, 9} & set(mixed)

    def test_the_same_each_time(self) -> None:
        tokens = torch.arange(100, 200)
        prompt = random_prompt(tokens, context=50, batch=3)
        assert prompt.shape == (3, 50)
        assert prompt.equal(random_prompt(tokens, context=50, batch=3))
        assert prompt.min() >= 100
        assert len(prompt.unique()) > 50

    def test_models_without_the_option_for_few_logits(self) -> None:
        class Plain(LlamaForCausalLM):
            def forward(self, input_ids, past_key_values=None, use_cache=None):
                return super().forward(
                    input_ids, **{cache_argument(super().forward): past_key_values}, use_cache=use_cache
                )

        config = LlamaConfig(vocab_size=97, **SIZES, num_hidden_layers=1)
        ids = torch.arange(12)[None]
        assert ModelRunner(Plain(config)).forward(ids).logits.shape[1] == 12
        assert ModelRunner(LlamaForCausalLM(config)).forward(ids).logits.shape[1] == 1
