"""DINOv2-small made linear in all layers with minutes of transfer, layer by layer, then end to end: its features.

    python benchmarks/dinov2_features.py --model models/dinov2-small

CIFAR-10 at 224 pixels, 257 tokens: a few hundred steps of the recipe `lolcats-vision`, or another by `--recipe`, on
training images without their labels. What is measured are cosines between the features of teacher and conversion on
500 test images. Takes 10 to 17 minutes.
"""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import find_data, find_model, parser_of, peak_bytes, set_threads, write_result
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoModel

from attnconv import load_recipe, run_conversion

TRAIN, TEST = "vision/cifar10_train5000.parquet", "vision/cifar10_test1000.parquet"
BATCH = 16
SETTINGS = {
    "stages.0.steps": 400,
    "stages.0.batch_size": 2,
    "stages.1.steps": 300,
    "stages.1.batch_size": 2,
}


def main() -> None:
    """Convert, then compare features."""
    parser = parser_of(__doc__, model="dinov2-small")
    parser.add_argument("--recipe", default="lolcats-vision")
    parser.add_argument("--images", type=int, default=500, help="test images")
    parser.add_argument("--stages", type=int, default=2, help="stages of the recipe: 1 is attention transfer alone")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model, "dinov2-small")
    train, test = find_data(TRAIN), find_data(TEST)
    data = json.dumps({"path": str(train), "image_field": "image"})
    changes = [f"{key}={value}" for key, value in SETTINGS.items()]
    recipe = load_recipe(arguments.recipe, [*changes, f"data={data}", *arguments.changes])
    recipe = recipe.model_copy(update={"stages": recipe.stages[: arguments.stages]})
    with tempfile.TemporaryDirectory() as scratch:
        result = run_conversion(model, recipe, Path(scratch) / "linear")
        cosines = compare(model, result.output, read(test, arguments.images))
    plain = recipe.compact()
    write_result(
        "dinov2_features",
        settings={
            "model": model.name,
            "recipe": arguments.recipe,
            "train": TRAIN,
            "test": TEST,
            "attention": plain["attention"],
            "stages": plain["stages"],
        },
        results={
            "images": arguments.images,
            "cosine": {name: float(found.mean()) for name, found in cosines.items()},
            "cosine_of_a_tenth_below": {name: float(found.quantile(0.1)) for name, found in cosines.items()},
            "converted": len(result.plan.converted),
            "start_distance": dict(result.start_distance),
            "stages": [dict(row) for row in result.metrics],
            "conversion_seconds": result.seconds,
            "peak_bytes": peak_bytes(),
        },
        label=arguments.label,
    )


def read(path: Path, number: int) -> list[Image.Image]:
    """Images spread over a parquet file."""
    from pyarrow import parquet

    rows = parquet.read_table(path, columns=["image"]).to_pylist()
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows[:: len(rows) // number]][
        :number
    ]


@torch.no_grad()
def compare(teacher: Path, converted: Path, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """`[images]` cosines between teacher and conversion: of the pooled output and of the mean over patches."""
    processor: Any = AutoImageProcessor.from_pretrained(teacher)
    models = [AutoModel.from_pretrained(folder, dtype=torch.float32).eval() for folder in (teacher, converted)]
    pooled, patches = [], []
    for start in range(0, len(images), BATCH):
        inputs = processor(images=images[start : start + BATCH], return_tensors="pt")
        outputs = [model(**inputs) for model in models]
        # DINOv2 pools by taking its class token, behind the last norm.
        pooled.append(cosine_similarity(*(output.pooler_output for output in outputs), dim=-1))
        patches.append(cosine_similarity(*(output.last_hidden_state[:, 1:].mean(1) for output in outputs), dim=-1))
    return {"pooled_class_token": torch.cat(pooled), "mean_of_patches": torch.cat(patches)}


if __name__ == "__main__":
    main()
