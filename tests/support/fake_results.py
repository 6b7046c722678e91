"""Results files with made-up scores, put together by the package's own functions, for tests of what is made of them."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from attnconv.evaluate.bench.schema import BenchmarkFile
from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.engine.items import Item, Metric
from attnconv.evaluate.engine.results import write_results
from attnconv.evaluate.engine.schema import EvaluationFile
from attnconv.evaluate.tasks.answers import AnswersTask

PERPLEXITY = Metric("perplexity", "nll", "tokens", "exp", compare="ratio", meaning="how many tokens it wavers between")
BITS = Metric("bits/char", "bits", "characters", meaning="bits for a character of the text")
RECALL = Metric("recall", "right", better="higher", style="percent", meaning="answers that hold the number")
ACCURACY = Metric("accuracy", "right", better="higher", style="percent", meaning="questions answered right")
NORMALISED = Metric("normalised accuracy", "right_normalised", better="higher", style="percent")
KL = Metric("KL divergence", "kl", "tokens", meaning="nats between the predictions of both models")
TOP1 = Metric("top-1 agreement", "same", "tokens", better="higher", style="percent")
ATTENTION_KL = Metric("attention KL", "kl", meaning="nats between the attention of both models")
PATH_RATIO = Metric(
    "perplexity ratio", "excess", "tokens", "exp", better="higher", compare="ratio", meaning="1 is no use"
)
OUTPUT_ERROR = Metric("output error", "error", "power")

SETUP = {
    "time": "2026-01-02 03:04:05 UTC",
    "device": "cpu",
    "gpu": None,
    "cpu": "A <fast> processor",
    "cores": 2,
    "threads": 1,
    "memory_bytes": 8 * 2**30,
    "system": "Linux",
    "load_average": 0.5,
    "versions": {"python": "3.11.7", "attnconv": "0.1.0", "torch": "2.13.0"},
}


def model_row(name, *, converted, digest, source=None):
    return {
        "source": source or f"models/{name}",
        "name": name,
        "model_type": "llama",
        "dtype": "float32",
        "converted": converted,
        "bytes": 1_000_000,
        "digests": {"model.safetensors": f"xxh3_128:{digest}"},
    }


def task(kind, model, base, metrics, slices=(), extras=None, *, overall=True):
    """One task of eval.json, as the engine writes it."""

    def columns(items):
        names = list(dict.fromkeys(key for item in items for key in item.values))
        return {
            "ids": [item.id for item in items],
            "groups": [item.group for item in items],
            "values": {name: [item.values.get(name) for item in items] for name in names},
            "notes": {},
        }

    figures = make_figures(model, base, metrics, [*([()] if overall else []), *slices])
    return {
        "kind": kind,
        "settings": {"kind": kind, "data": "book"},
        "limit": None,
        "time": SETUP["time"],
        "seconds": {"model": 1.5, "base": 1.25},
        "metrics": [asdict(metric) for metric in metrics],
        "figures": [asdict(figure) for figure in figures],
        "items": {"model": columns(model)} | ({} if base is None else {"base": columns(base)}),
        "extras": {"model": extras} if extras else {},
    }


def text_items(level, seed, buckets=("0-512", "512-1024", "1024-2048")):
    # The same texts for every model: what is hard for one is hard for the other.
    hardness, own = np.random.default_rng(1), np.random.default_rng(seed)
    items = []
    for place, bucket in enumerate(buckets):
        for block in range(12):
            nll = 128 * (level - 0.1 * place + 0.3 * hardness.standard_normal() + 0.03 * own.standard_normal())
            values = {"nll": nll, "tokens": 128, "bits": nll / math.log(2), "characters": 512}
            items.append(Item(f"{bucket}/{block}", values, {"position": bucket}))
    return items


def recall_items(strength, seed):
    random = np.random.default_rng(seed)
    items = []
    for length in (512, 1024, 2048):
        for depth in (0.1, 0.5, 0.9):
            chance = min(1.0, strength * (0.55 + 0.45 * depth) * (1.2 - length / 5000))
            for sample in range(4):
                group = {"task": "passkey", "length": length, "depth": depth}
                right = float(random.random() < chance)
                items.append(Item(f"{length}/{depth}/{sample}", {"right": right}, group))
    return items


def choice_items(chance, seed, count=150):
    random = np.random.default_rng(seed)
    return [
        Item(
            str(number), {"right": float(random.random() < chance), "right_normalised": float(random.random() < chance)}
        )
        for number in range(count)
    ]


def answer_items(written, chosen, seed, count=24):
    random = np.random.default_rng(seed)
    items = []
    for number in range(count):
        right, likely = float(random.random() < written), float(random.random() < chosen)
        items.append(Item(f"copy/{number}", {"written": right, "chosen": likely, "gap": likely - right}))
    return items


def fidelity_parts(layers, heads, size=16, name="model.layers.{}.self_attn"):
    random = np.random.default_rng(7)
    items, statistics = [], []
    for layer in range(layers):
        for head in range(heads):
            group = {"layer": layer, "head": head}
            kl = float(random.gamma(2.0, 0.15) * (1 + layer / layers))
            items += [Item(f"{window}/{layer}/{head}", {"kl": kl * (1 + 0.1 * window)}, group) for window in range(3)]
        error = 0.02 + 0.1 * random.random()
        items += [Item(f"{w}/{layer}", {"error": error + 0.01 * w, "power": 1.0}, {"layer": layer}) for w in range(3)]
        place = {"layer": name.format(layer), "layer_index": layer}
        share = [float(random.random()) for _ in range(heads)]
        statistics.append(
            place
            | {
                "name": "linear share",
                "meaning": "weight outside the window",
                "style": "percent",
                "per": "head",
                "values": share,
            }
        )
        statistics.append(
            place
            | {
                "name": "density",
                "meaning": "part of all pairs",
                "style": "percent",
                "per": "layer",
                "values": [0.25 + 0.01 * layer],
            }
        )
    maps = []
    for layer, head in ((0, 0), (layers - 1, heads - 1)):
        scores = random.standard_normal((size, size)) + 3 * np.eye(size) + 2 * np.eye(size, k=-1)
        student = scores + 0.5 * random.standard_normal((size, size))
        both = [_attention(scores), _attention(student)]
        place = {"layer": name.format(layer), "layer_index": layer, "head": head, "kl": 0.4}
        maps.append(place | {"teacher": both[0], "student": both[1]})
    words = ["<s>", " Once", " upon", " a", " time", "\n", " <b>", " &"]
    tokens = [words[number % len(words)] for number in range(size)]
    return items, [{"maps": maps, "size": size, "tokens": tokens, "statistics": statistics}]


def _attention(scores):
    weights = np.tril(np.exp(scores))
    return (weights / weights.sum(axis=1, keepdims=True)).round(4).tolist()


def evaluation(model, base, *, loss=0.35, seed=3, layers=5, heads=8, size=16):
    """A whole eval.json of a model that is worse than its base by `loss` nats."""
    fidelity, extras = fidelity_parts(layers, heads, size)
    agreement = [Item(str(n), {"kl": 10 + n, "same": 100 - n, "tokens": 128}) for n in range(12)]
    paths = [
        Item(f"{n} {path}", {"excess": cost + 2 * n, "tokens": 128}, {"left out": path})
        for path, cost in (("linear", 20), ("window", 240))
        for n in range(12)
    ]
    return {
        "model": model,
        "base": base,
        "setup": SETUP,
        "suite": "standard",
        "tasks": {
            "book": task(
                "perplexity", text_items(2.7 + loss, seed), text_items(2.7, 2), [PERPLEXITY, BITS], [("position",)]
            ),
            "passkey": task(
                "retrieval",
                recall_items(0.8 - loss / 2, seed),
                recall_items(1.1, 2),
                [RECALL],
                [("length",), ("length", "depth"), ("chars",), ("chars", "depth")],
            ),
            "piqa": task(
                "multiple_choice", choice_items(0.62 - loss / 10, seed), choice_items(0.66, 2), [ACCURACY, NORMALISED]
            ),
            "openbookqa": task(
                "multiple_choice", choice_items(0.33, seed), choice_items(0.31, 2), [ACCURACY, NORMALISED]
            ),
            "copy": task("answers", answer_items(0.5, 0.9, seed), answer_items(0.7, 0.95, 2), AnswersTask.metrics),
            "agreement": task("agreement", agreement, None, [KL, TOP1]),
            "fidelity": task(
                "fidelity", fidelity, None, [ATTENTION_KL, OUTPUT_ERROR], [("layer", "head"), ("layer",)], extras
            ),
            "path_use": task("path_use", paths, None, [PATH_RATIO], [("left out",)], overall=False),
        },
    }


def benchmark(model, base, *, slope=1.0, contexts=(512, 1024, 2048, 4096, 8192)):
    """A whole bench.json: quadratic against linear reading, growing against constant decoding and cache."""
    cases = []
    for context in contexts:
        for role in ("base", "model"):
            prefill = (context / 2000) ** 2 + context / 8000 if role == "base" else slope * context / 1500
            decode = 6 + context / 400 if role == "base" else 9.0 * slope
            cache = context * 23_040 if role == "base" else 6_500_000
            peak = 60_000_000 + context * (90_000 if role == "base" else 40_000)
            shared = {"role": role, "context": context, "batch": 1, "skipped": None}
            cases.append(_case("prefill", prefill, shared, tokens=context, peak_bytes=peak, cache_bytes=cache))
            cases.append(_case("decode", decode * 0.064, shared, tokens=64, cache_bytes=cache, ms=decode))
            if context <= 2048:
                cases.append(
                    _case("transfer", 3 * prefill, shared, tokens=context, peak_bytes=900_000_000 + context * 90_000)
                )
    too_long = {"measure": "prefill", "role": "base", "context": 16384, "batch": 1, "seconds": [], "median": None}
    cases.append(too_long | {"skipped": "it would not fit into memory"})
    return {
        "model": model,
        "base": base,
        "setup": SETUP,
        "settings": {"contexts": list(contexts), "batches": [1], "repeats": 5, "decode_tokens": 64, "dtype": "float32"},
        "cases": cases,
        "crossover": {
            "prefill": [{"batch": 1, "context": 2167, "low": 2100, "high": 2250, "note": "faster from about here on"}],
            "decode": [{"batch": 1, "context": 1200, "low": 1150, "high": 1260, "note": "faster from about here on"}],
            "memory": [
                {"batch": 1, "context": None, "low": None, "high": None, "note": "smaller at every measured length"}
            ],
        },
    }


def _case(measure, median, shared, *, tokens, ms=None, peak_bytes=None, cache_bytes=None):
    seconds = [median * factor for factor in (0.95, 0.98, 1.0, 1.03, 1.08)]
    return {
        "measure": measure,
        **shared,
        "seconds": seconds,
        "median": median,
        "low": seconds[1],
        "high": seconds[3],
        "tokens_per_second": tokens / median,
        "ms_per_token": ms,
        "peak_bytes": peak_bytes,
        "cache_bytes": cache_bytes,
    }


def write_fakes(folder: Path, *, name="converted", digest="beef", loss=0.35, slope=1.0, bench=True, **sizes):
    """Write both files into a folder of results."""
    model = model_row(name, converted=True, digest=f"{name}{loss}")
    base = model_row("teacher", converted=False, digest=digest)
    write_results(folder, EvaluationFile.model_validate(evaluation(model, base, loss=loss, **sizes)))
    if bench:
        write_results(folder, BenchmarkFile.model_validate(benchmark(model, base, slope=slope)))
