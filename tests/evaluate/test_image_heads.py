"""How much each head of a vision model matters, and how far it looks."""

import copy
import io
import math

import pytest
import torch
from datasets import Dataset
from PIL import Image as Picture
from transformers import BertConfig, Dinov2Config, Dinov2Model
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from attnconv.convert import convert_model
from attnconv.convert.planning.importance import read_importance
from attnconv.convert.planning.probe import probe
from attnconv.errors import CheckpointError
from attnconv.evaluate.diagnose.image_heads import image_measures, patch_distance, patch_grid
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import parse_recipe
from attnconv.runs import run_conversion
from attnconv.runs.image_importance import image_importance

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}


def tiny_vision() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(**SIZES, image_size=24, patch_size=4, layerscale_value=1.0)
    return Dinov2Model(config).eval()


def test_distances_are_between_patches() -> None:
    # The class token does not count, whatever it gets: 2 rows of 3 patches.
    weights = torch.zeros(1, 2, 7, 7)
    weights[..., 0] = 0.5
    weights[0, 0, 1:, 1:] = torch.eye(6) / 2
    weights[0, 1, 1:, 1] = 0.5
    found = patch_distance(weights, (2, 3))
    assert found is not None
    to_the_corner = [math.hypot(row, column) for row in (0, 1) for column in (0, 1, 2)]
    assert found.tolist() == pytest.approx([0, sum(to_the_corner) / 6])
    assert patch_distance(weights, (3, 3)) is None
    config = Dinov2Config(patch_size=4)
    assert patch_grid(config, torch.zeros(1, 3, 24, 12)) == (6, 3)
    assert patch_grid(BertConfig(), torch.zeros(1, 3, 24, 12)) is None


def test_what_is_lost_is_what_the_features_lose() -> None:
    """A head whose queries are zero looks at everything alike."""
    model = tiny_vision()
    modules = [module for module in probe(model.config, type(model)) if module.self_attention]
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = model(pixels).last_hidden_state
        attention = model.get_submodule(modules[1].name)
        # Releases of transformers name it in one way or the other.
        query = getattr(attention, "q_proj", None) or attention.query
        kept = copy.deepcopy(query.state_dict())
        query.weight[16:24] = 0
        query.bias[16:24] = 0
        changed = model(pixels).last_hidden_state
        query.load_state_dict(kept)
    convert_model(model, "head_roles")
    said: list[tuple[int, int, str]] = []
    found = image_measures(model, modules, [pixels], lambda *now: said.append(now))
    expected = float((changed - base).square().mean() / base.square().mean())
    assert found["ablation"][1][2] == pytest.approx(expected, rel=1e-3)
    assert said[-1][:2] == (8, 8)
    assert all(0 < value < 7 for row in found["distance"] for value in row)


def test_a_file_of_images_gives_one_of_importance(tmp_path) -> None:
    model, source = tiny_vision(), tmp_path / "model"
    model.save_pretrained(source)
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(source)
    rows = []
    for number in range(3):
        noise = torch.Generator().manual_seed(number)
        file = io.BytesIO()
        pixels = torch.randint(0, 256, (20, 30, 3), generator=noise, dtype=torch.uint8).numpy()
        Picture.fromarray(pixels).save(file, "PNG")
        rows.append(file.getvalue())
    images, path = tmp_path / "images.parquet", tmp_path / "heads.json"
    Dataset.from_dict({"image": rows}).to_parquet(images)
    found = image_importance(str(source), images, path)
    assert found == read_importance(path)
    assert (found.measure, set(found.measures)) == ("ablation", {"ablation", "distance"})
    assert found.settings["ablation"] == {"images": 3, "data": "images.parquet"}
    rules = [
        {"layers": "all", "heads": {"importance": str(path), "top": 3, "measure": "distance"}, "method": "softmax"},
        {"layers": "all", "method": "sliding_window", "options": {"window": 4}},
    ]
    made = run_conversion(source, parse_recipe(f"name: a\nattention: {rules}"), tmp_path / "out")
    kept = [method for entry in made.plan.entries for method in entry.head_methods]
    assert (kept.count("softmax"), kept.count("sliding_window")) == (3, 5)
    with pytest.raises(CheckpointError, match="has no image processor, so it cannot be diagnosed by images"):
        image_importance(str(embedded_model_path()), images, path)
