"""Numbers that SmolLM2-135M still finds in long prompts by each training-free sparse method, at 50, 25 and 10 %.

    python benchmarks/sparse_passkeys.py --threads 1 --rows passkeys.jsonl

Twelve prompts of about 550 and six of about 2,200 tokens hide a number at three depths. The text is read once, by
the dense model; then the question and the answer go token by token through the method, in all layers but where a row
says otherwise, over the keys, values and newest queries of that reading. Blocks are of 16 tokens;
answers are greedy, in fp32.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, add_rows_option, find_data, find_model, parser_of, set_threads, write_result

PROMPTS, DEPTHS = "longdoc/passkey.jsonl.gz", (0.1, 0.5, 0.9)
# Characters of a prompt, and prompts of each depth: half as many of those that take four times as long.
PER_DEPTH = {2_000: 4, 8_000: 2}
NEW_TOKENS = 8
SHARES, BLOCK = (0.5, 0.25, 0.1), 16
# What says most comes first.
ORDER = (0.25, 0.1, 0.5)
# As many as any method looks back at.
QUERIES = 160
Rule = dict[str, Any]
# A budget that no prompt fills.
ALL_TOKENS: list[Rule] = [{"layers": "all", "method": "quest", "options": {"budget": 1 << 20}}]
Preset = Callable[[float, int], list[Rule]]


def everywhere(method: str, options: Callable[[int, float, int], dict[str, Any]]) -> Preset:
    """One method for all layers, its options by blocks to attend, share and tokens of a prompt."""

    def rules(share: float, tokens: int) -> list[Rule]:
        return [{"layers": "all", "method": method, "options": options(blocks_of(share, tokens), share, tokens)}]

    return rules


def blocks_of(share: float, tokens: int) -> int:
    """That share of a prompt in blocks, its first and the own one included."""
    return max(2, round(share * tokens / BLOCK))


def by_layers(method: str, chosen: dict[str, Any], others: dict[str, Any], *, every: int) -> Preset:
    """A method whose layers differ: the first of every so many is another one."""

    def rules(share: float, tokens: int) -> list[Rule]:
        budget = {"budget": BLOCK * blocks_of(share, tokens)} if method == "delta" else {"window": int(share * tokens)}
        first = {"layers": {"every": every, "offset": 0}, "method": method, "options": {**chosen, **budget}}
        return [first, {"layers": "all", "method": method, "options": {**others, **budget}}]

    return rules


# Those that find most come first, the slowest last.
PRESETS: dict[str, Preset] = {
    "quest": everywhere("quest", lambda n, share, all: {"block": BLOCK, "budget": BLOCK * n}),
    "moba": everywhere("moba", lambda n, share, all: {"block": BLOCK, "top_k": n}),
    "infllm2": everywhere(
        "infllm2",
        lambda n, share, all: {
            "block": BLOCK,
            "kernel": 8,
            "stride": 4,
            "dense_len": 0,
            "local_blocks": 1,
            "blocks": max(1, n - 3),
        },
    ),
    "delta, every 7th layer dense": by_layers("delta", {"role": "select"}, {"role": "reuse"}, every=7),
    "tidal, 2 layers dense": by_layers("delta", {"role": "select"}, {"role": "reuse"}, every=15),
    "xattention": everywhere("xattention", lambda n, share, all: {"block": BLOCK, "stride": 8, "density": share}),
    "sliding_window": everywhere("sliding_window", lambda n, share, all: {"window": int(share * all), "num_sinks": 4}),
    "hip": everywhere("hip", lambda n, share, all: {"block": BLOCK, "blocks": n}),
    "sparse (block means)": everywhere("sparse", lambda n, share, all: {"block": BLOCK, "blocks": n}),
    "spans": everywhere("spans", lambda n, share, all: {"block": BLOCK, "base": 0.0, "growth": share}),
    "recycled": everywhere("recycled", lambda n, share, all: {"budget": int(share * all)}),
    "strided": everywhere(
        "strided", lambda n, share, all: {"block": BLOCK, "local_blocks": 1, "stride": round(1 / share)}
    ),
    "power": everywhere("power", lambda n, share, all: {"block": BLOCK, "local_blocks": max(0, n - 8)}),
    "bigbird": everywhere(
        "bigbird",
        lambda n, share, all: {"block": BLOCK, "local_blocks": (n - 1) // 2, "random_blocks": n - 2 - (n - 1) // 2},
    ),
    "neighborhood, gaps of 4 in every 2nd layer": by_layers("neighborhood", {"dilation": 4}, {"dilation": 1}, every=2),
    "vertical_slash": everywhere(
        "vertical_slash", lambda n, share, all: {"block": BLOCK, "refresh": 64, "columns": n // 2, "diagonals": n // 4}
    ),
    "flexprefill, by mass 0.9, 0.7, 0.4": everywhere(
        "flexprefill",
        lambda n, share, all: {"block": BLOCK, "refresh": 64, "mass": {0.5: 0.9, 0.25: 0.7, 0.1: 0.4}[share]},
    ),
    "xattention, by mass 0.9, 0.7, 0.4": everywhere(
        "xattention",
        lambda n, share, all: {"block": BLOCK, "stride": 8, "mass": {0.5: 0.9, 0.25: 0.7, 0.1: 0.4}[share]},
    ),
    "lserve": everywhere("lserve", lambda n, share, all: {"block": BLOCK, "part": 4, "budget": BLOCK * n}),
}


def main() -> None:
    """Read the prompts once, ask by each method, write and draw."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_rows_option(parser)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_model(arguments.model)
    with gzip.open(find_data(PROMPTS), "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {"model": folder.name, "dtype": "float32", "block": BLOCK, "prompts": PROMPTS}
    kept, rows = Rows(arguments.rows), []
    try:
        for chars in PER_DEPTH:
            asked = Asked(model, tokenizer, [row for depth in DEPTHS for row in of(prompts, chars, depth)])
            for name, share in [("dense", 1.0), *((name, share) for share in ORDER for name in PRESETS)]:
                rules = PRESETS[name](share, asked.length) if name in PRESETS else ALL_TOKENS
                row = {"preset": name, "share": share, "tokens": asked.length, "rules": rules}
                rows.append(row | kept.row({**settings, **row}, partial(asked.found, rules)))
                found, density = rows[-1]["found"], rows[-1]["density"]
                print(f"{asked.length} {name} {share}: {found} of {rows[-1]['of']} at {density:.3f}", flush=True)
    except KeyboardInterrupt:
        print("stopped: what is there is written, and --rows lets the next run go on behind it")
    path = write_result("sparse_passkeys", settings=settings, results={"rows": rows}, label=arguments.label)
    print(table(rows))
    draw(rows, RESULTS / f"{path.stem}.png")


def of(prompts: list[dict[str, Any]], chars: int, depth: float) -> list[dict[str, Any]]:
    """The first prompts of a length and a depth."""
    return [row for row in prompts if (row["chars"], row["depth"]) == (chars, depth)][: PER_DEPTH[chars]]


class Asked:
    """Prompts of about one length, padded on the left, and what a dense model's layers hold of them when asked.

    Attributes:
        length: mean of their tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: list[dict[str, Any]]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._answers = [str(row["answer"]) for row in prompts]
        self._ids = [tokenizer(row["prompt"])["input_ids"] for row in prompts]
        self.length = round(sum(map(len, self._ids)) / len(self._ids))
        # What all end with.
        apart = next(at for at, ends in enumerate(zip(*map(reversed, self._ids), strict=False)) if len(set(ends)) > 1)
        self._question = self._ids[0][-apart:]
        self._held: list[tuple[Any, ...]] | None = None

    @property
    def _mask(self) -> Any:
        """`[prompts, text]` bool, False for padding."""
        import torch

        texts = [len(ids) - len(self._question) for ids in self._ids]
        return torch.arange(max(texts)) >= max(texts) - torch.tensor(texts)[:, None]

    def _layers(self) -> list[tuple[Any, ...]]:
        """Keys, values and newest queries of each layer after the text, by the dense model; read once."""
        import torch

        from attnconv.convert.surgery.attention_function import AttentionCall, attention_hook

        if self._held is not None:
            return self._held
        held: list[tuple[Any, ...]] = []

        def keep(call: AttentionCall) -> Any:
            held.append((call.key.clone(), call.value.clone(), call.query[:, :, -QUERIES:].clone()))
            return call.teacher()

        mask = self._mask
        rows = torch.zeros(mask.shape, dtype=torch.int64)
        for row, real, ids in zip(rows, mask, self._ids, strict=True):
            row[real] = torch.tensor(ids[: -len(self._question)])
        with torch.inference_mode(), as_rules(self.model, ALL_TOKENS), attention_hook(self.model, keep):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            self.model.model(rows, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        self._held = held
        return held

    def found(self, rules: list[Rule]) -> dict[str, Any]:
        """Question and answer token by token, by these rules."""
        import torch

        from attnconv.attention_modules.counting import counting
        from attnconv.compat import cache_argument

        layers, mask = self._layers(), self._mask
        began = time.process_time()
        with torch.inference_mode(), as_rules(self.model, rules):
            cache = filled(self.model, layers, mask)
            with counting(self.model) as counter:
                tokens, answers = torch.tensor([self._question] * len(mask)), []
                for step in range(tokens.shape[1] + NEW_TOKENS - 1):
                    new = tokens[:, step : step + 1] if step < tokens.shape[1] else answers[-1]
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                    given = {"position_ids": mask.sum(-1, keepdim=True) - 1, cache_argument(self.model.forward): cache}
                    logits = self.model(new, attention_mask=mask.long(), use_cache=True, **given).logits
                    if step >= tokens.shape[1] - 1:
                        answers.append(logits[:, -1:].argmax(-1))
                total = counter.total
        row = self._judged([self.tokenizer.decode(ids) for ids in torch.cat(answers, 1)])
        return {**row, "density": total.density, "cpu_seconds": time.process_time() - began}

    def _judged(self, texts: list[str]) -> dict[str, Any]:
        right = [answer in text for answer, text in zip(self._answers, texts, strict=True)]
        return {"found": sum(right), "of": len(right), "which": right}


@contextmanager
def as_rules(model: Any, rules: list[Rule]) -> Iterator[None]:
    """Inside, a model is converted by these rules."""
    import attnconv
    from attnconv.convert.surgery.swap import undo_plan
    from attnconv.recipes import Recipe

    try:
        attnconv.convert_model(model, Recipe.model_validate({"name": "passkeys", "attention": rules}))
        yield
    finally:
        undo_plan(model)


def filled(model: Any, layers: list[tuple[Any, ...]], mask: Any) -> Any:
    """A cache of a converted model that holds these tokens."""
    from transformers import DynamicCache

    from attnconv.attention_modules import Tokens
    from attnconv.convert.surgery.cache_layer import layer_of
    from attnconv.convert.surgery.swap import converted_modules

    cache = DynamicCache(config=model.config)
    for number, (module, (keys, values, queries)) in enumerate(
        zip(converted_modules(model).values(), layers, strict=True)
    ):
        core, layer = module.attnconv, layer_of(cache, number)
        state = layer.state_of(core)
        state.note_real(mask, is_padded=True)
        state.append(Tokens(keys, values, mask))
        if core.tail_tokens is not None:
            state.evict(core.tail_tokens)
        if core.earlier_queries:
            assert core.earlier_queries <= queries.shape[2]
            near = queries[:, :, -core.earlier_queries :]
            state.queries.append(Tokens(near, near[..., :0], mask[:, -near.shape[2] :]))
    return cache


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each preset, found and density at each length and share."""
    cells = {
        (row["preset"], row["tokens"], share): f"{row['found']} of {row['of']} ({row['density']:.2f})"
        for row in rows
        for share in (SHARES if row["preset"] == "dense" else (row["share"],))
    }
    columns = [(tokens, share) for tokens in dict.fromkeys(row["tokens"] for row in rows) for share in SHARES]
    head = [
        "numbers found (share of tokens attended)",
        *(f"{tokens:,} tokens, {share:.0%}" for tokens, share in columns),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in ("dense", *PRESETS):
        found = [cells.get((name, *column), "") for column in columns]
        lines.append("| " + " | ".join([name, *found]) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Numbers found against density for each length, a curve for each preset; beside them time against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    figure, panels = pyplot.subplots(1, len(lengths) + 1, figsize=(5 * len(lengths) + 5, 5.5), layout="constrained")
    styles = [(color, line) for line in ("-", "--", ":") for color in pyplot.get_cmap("tab10").colors[:7]]
    for axes, tokens in zip(panels, lengths, strict=False):
        ours = [row for row in rows if row["tokens"] == tokens]
        for (color, line), name in zip(styles, PRESETS, strict=False):
            points = sorted((row["density"], row["found"]) for row in ours if row["preset"] == name)
            shares, found = ([point[n] for point in points] for n in (0, 1))
            axes.plot(shares, found, marker="o", markersize=4, color=color, linestyle=line, label=name)
        dense = next(row["found"] for row in ours if row["preset"] == "dense")
        axes.axhline(dense, color="grey", linewidth=0.8)
        axes.set(title=f"{tokens:,} tokens; grey: dense", xlabel="tokens attended (share of those before)")
        axes.set(ylabel=f"numbers found, of {ours[0]['of']}", xscale="log", xlim=(0.06, 1.1))
        axes.set_xticks([0.1, 0.25, 0.5, 1.0], labels=["10 %", "25 %", "50 %", "100 %"])
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=5)
    draw_times(panels[-1])
    figure.savefig(path, dpi=130)
    print(f"drawn to {path}")


def draw_times(axes: Any) -> None:
    """Milliseconds of one layer against tokens, out of the newest result of `sparse_speed`."""
    newest = json.loads(max(RESULTS.glob("sparse_speed-*.json")).read_text(encoding="utf-8"))["results"]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in newest["prompt"]:
        for name, seconds in row["seconds"].items():
            curves.setdefault(f"prompt: {name}", []).append((row["tokens"], 1e3 * seconds))
    for row in newest["token"]:
        for name, seconds in row["seconds"].get("in_turns", row["seconds"]).items():
            curves.setdefault(f"one token: {name}", []).append((row["tokens"], 1e3 * seconds))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms of a layer's attention, one thread")
    axes.set(title="time against length (sparse_speed)")
    axes.legend(fontsize=6)


if __name__ == "__main__":
    main()
