"""Encoders and vision models: images as data, and whole conversions of layers that look both ways."""

import io
import itertools

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from attnconv.commands.tables import show_conversion
from attnconv.distill.batches import ImageBatch
from attnconv.distill.features import feature_error
from attnconv.distill.images import ImageStream, read_images
from attnconv.distill.packing import PackedSequence, Position
from attnconv.distill.progress import LineProgress
from attnconv.errors import DataError, PlanError, TrainingError
from attnconv.evaluate.report.gathering import gather
from attnconv.evaluate.report.healing_part import healing_section
from attnconv.recipes import DataSection, Recipe
from attnconv.runs import run_conversion

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SIZES, "image_size": 24, "patch_size": 4}
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box and quip at dawn"


def draw(number):
    """The bytes of a picture that is like no other."""
    noise = torch.Generator().manual_seed(number)
    picture = Picture.fromarray(torch.randint(0, 256, (20, 30, 3), generator=noise, dtype=torch.uint8).numpy())
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures():
    return [draw(number) for number in range(12)]


@pytest.fixture(scope="module")
def sources(pictures, tmp_path_factory):
    """The same pictures as a parquet file whose column is known to hold images, one of plain bytes, and a folder."""
    folder = tmp_path_factory.mktemp("data")
    kinds = {"known.parquet": Features({"image": Image(), "label": Value("int64")}), "plain.parquet": None}
    for name, features in kinds.items():
        images = pictures if features is None else [{"bytes": content, "path": None} for content in pictures]
        Dataset.from_dict({"image": images, "label": list(range(12))}, features=features).to_parquet(folder / name)
    (folder / "pictures").mkdir()
    for number, content in enumerate(pictures):
        (folder / "pictures" / f"{number:02}.png").write_bytes(content)
    return {name: folder / name for name in ("known.parquet", "plain.parquet", "pictures")}


def section(path, **changes):
    return DataSection(path=str(path), **{"image_field": "image", **changes})


def processor(size=24):
    return ViTImageProcessorPil(size={"height": size, "width": size})


@pytest.mark.parametrize("kind", ["known.parquet", "plain.parquet", "pictures"])
def test_every_source_gives_its_images(sources, pictures, kind):
    assert list(read_images(section(sources[kind]))) == pictures


def test_images_come_in_the_order_of_seed_and_epoch_and_go_on_where_they_stopped(sources):
    stream = ImageStream(section(sources["plain.parquet"]), processor())
    found = list(itertools.islice(stream.sequences(), 24))
    first, second = ({image.tokens.sum().item() for image in part} for part in (found[:12], found[12:]))
    assert len(first) == 12
    assert first == second
    assert not torch.equal(found[0].tokens, found[12].tokens)
    for stop in (4, 11, 12, 17):
        rest = list(itertools.islice(stream.sequences(None, found[stop].end), 24 - stop - 1))
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(rest, found[stop + 1 :], strict=True))
    other = next(ImageStream(section(sources["plain.parquet"], seed=1), processor()).sequences())
    assert not torch.equal(other.tokens, found[0].tokens)


def test_a_batch_of_images(sources):
    stream = ImageStream(section(sources["pictures"]), processor())
    batch = stream.collate(list(itertools.islice(stream.sequences(), 3)))
    assert batch.pixel_values.shape == (3, 3, 24, 24)
    assert (batch.num_tokens, list(batch.inputs(torch.bfloat16))) == (3, ["pixel_values"])
    assert batch.inputs(torch.bfloat16)["pixel_values"].dtype == torch.bfloat16
    assert isinstance(batch.to(torch.device("cpu")), ImageBatch)
    with pytest.raises(DataError, match="at different sizes"):
        stream.collate([PackedSequence(torch.zeros(3, 4, width), Position()) for width in (4, 5)])


def test_what_holds_no_images_is_refused_in_one_sentence(sources, tmp_path):
    path = sources["plain.parquet"]
    with pytest.raises(DataError, match='no field "picture"; its fields are: image, label'):
        next(read_images(section(path, image_field="picture")))
    with pytest.raises(DataError, match=r'no image \(int\) in the field "label"'):
        next(read_images(section(path, image_field="label")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        next(read_images(section(tmp_path / "empty")))
    with pytest.raises(DataError, match="There is no data file"):
        next(read_images(section(tmp_path / "nowhere")))
    Dataset.from_dict({"image": [b"no picture"]}).to_parquet(tmp_path / "odd.parquet")
    with pytest.raises(DataError, match="holds an image that cannot be read: row 1"):
        next(ImageStream(section(tmp_path / "odd.parquet"), processor()).sequences())


def test_a_broken_image_in_a_folder_is_named(pictures, tmp_path):
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    for name, content in (("a.png", pictures[0]), ("b.png", b"no picture"), ("c.png", pictures[1])):
        (tmp_path / "pictures" / "cats" / name).write_bytes(content)
    stream = ImageStream(section(tmp_path / "pictures"), processor()).sequences()
    with pytest.raises(DataError, match=r"holds an image that cannot be read: cats/b\.png\."):
        list(itertools.islice(stream, 3))


LOSS = {"output_mse": 1, "normalize_per_layer": True}


def recipe(data, method="hedgehog", options=None, **stage):
    settings = {"kind": "attention_transfer", "steps": 25, "batch_size": 4, "learning_rate": 0.02, "log_every": 5}
    return Recipe(
        name="test",
        attention=[{"layers": "all", "method": method, "options": options or {}}],
        data=data,
        stages=[{key: value for key, value in (settings | {"loss": LOSS} | stage).items() if value is not None}],
    )


def save_vision(folder, model_class, config):
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def check_healed(result, inputs):
    """Both layers are converted, the loss went down, and what was saved is finite and not the teacher."""
    before, after = result.start_distance["mean_relative_squared_error"], result.metrics[-1]["loss"]
    assert after < 0.8 * before
    model = AutoModel.from_pretrained(result.output).eval()
    cores = [module for name, module in model.named_modules() if name.endswith("attnconv")]
    assert len(cores) == 2
    assert not any(core.geometry.causal for core in cores)
    with torch.no_grad():
        assert model(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    "method", ["lolcats", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hedgehog", "linear"))]
)
def test_dinov2_is_converted_whole(tmp_path, sources, capsys, method):
    folder = save_vision(tmp_path / "dinov2", Dinov2Model, Dinov2Config(**VISION))
    options = {"window": 3} if method == "lolcats" else {}
    chosen = recipe(section(sources["known.parquet"]).model_dump(), method, options)
    result = run_conversion(folder, chosen, tmp_path / "out", device="cpu", progress=LineProgress())
    check_healed(result, {"pixel_values": torch.randn(2, 3, 24, 24)})
    assert (result.output / "preprocessor_config.json").is_file()
    # Images are not called tokens, wherever somebody reads of them; patches are, where attention is spoken of.
    assert result.metrics[-1]["images"] == 25 * 4
    card = (result.output / "README.md").read_text().splitlines()
    assert not any("tokens" in line for line in card if not line.startswith("What the attention of"))
    show_conversion(result, base="org/base")
    said = capsys.readouterr()
    assert "images/s" in said.out
    assert "images/s" in said.err
    assert "tokens" not in said.out + said.err
    healing = str(healing_section(gather(result.output)))
    assert "training images" in healing
    assert "tokens" not in healing


@pytest.mark.parametrize("stages", [True, False])
def test_a_wrong_number_of_prefix_tokens_is_found_before_anything_is_done(tmp_path, sources, stages):
    folder = save_vision(tmp_path / "dinov2", Dinov2Model, Dinov2Config(**VISION))
    options = {"layout": "image", "num_agents": 4, "prefix_tokens": 0}
    chosen = recipe(section(sources["pictures"]).model_dump(), "agent", options)
    if not stages:
        chosen = Recipe(name="test", attention=chosen.attention, stages=[])
    with pytest.raises(PlanError, match=r"37 tokens without 0 first ones are no square image: set prefix_tokens"):
        run_conversion(folder, chosen, tmp_path / "out", device="cpu")
    assert not list(tmp_path.glob(".out*"))
    assert not (tmp_path / "out").exists()


def test_a_vit_classifier_is_converted_from_a_folder(tmp_path, sources):
    folder = save_vision(tmp_path / "vit", ViTForImageClassification, ViTConfig(**VISION, num_labels=3))
    result = run_conversion(folder, recipe(section(sources["pictures"]).model_dump()), tmp_path / "out", device="cpu")
    check_healed(result, {"pixel_values": torch.randn(2, 3, 24, 24)})


def test_features_are_distilled_through_all_layers(tmp_path, sources):
    """From where attention transfer got to."""
    folder = save_vision(tmp_path / "dinov2", Dinov2Model, Dinov2Config(**VISION))
    first = recipe(section(sources["known.parquet"]).model_dump())
    features = {"kind": "features", "steps": 60, "batch_size": 4, "learning_rate": 0.01, "schedule": "cosine"}
    both = Recipe(**first.model_dump() | {"stages": [*first.model_dump()["stages"], features]})
    pixels = torch.randn(8, 3, 24, 24)
    teacher = AutoModel.from_pretrained(folder).eval()
    errors = []
    for number, chosen in enumerate((first, both)):
        result = run_conversion(folder, chosen, tmp_path / str(number), device="cpu")
        student = AutoModel.from_pretrained(result.output).eval()
        with torch.no_grad():
            errors.append(float(feature_error(student(pixel_values=pixels), teacher(pixel_values=pixels), None)))
    assert [row["stage"] for row in result.metrics] == ["attention_transfer", "features"]
    assert result.metrics[-1]["images"] == 60 * 4
    assert errors[1] < 0.9 * errors[0]


def test_the_error_of_features_is_relative_and_knows_no_padding():
    hidden, taught = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    broken = hidden.masked_fill(~mask[..., None], float("nan"))
    expected = (hidden - taught)[mask].square().mean() / taught[mask].square().mean()
    error = feature_error(BaseModelOutput(broken), BaseModelOutput(taught), mask)
    torch.testing.assert_close(error, expected)
    pooled = hidden[:, 0], taught[:, 0]
    outputs = (BaseModelOutputWithPooling(*both) for both in zip((broken, taught), pooled, strict=True))
    both = expected + (pooled[0] - pooled[1]).square().mean() / pooled[1].square().mean()
    torch.testing.assert_close(feature_error(*outputs, mask), both)
    assert feature_error(BaseModelOutput(taught), BaseModelOutput(taught), mask) == 0


def test_there_must_be_something_to_distil_into(tmp_path, sources):
    folder = save_vision(tmp_path / "dinov2", Dinov2Model, Dinov2Config(**VISION))
    chosen = recipe(
        section(sources["pictures"]).model_dump(), "sliding_window", {"window": 4}, kind="features", loss=None
    )
    with pytest.raises(TrainingError, match="features has nothing to train"):
        run_conversion(folder, chosen, tmp_path / "out", device="cpu")


def save_bert(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(TEXT.split()))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, vocab_size=len(words), max_position_embeddings=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["hedgehog", "linear"])
def test_bert_is_converted_whole_and_padding_changes_nothing(tmp_path, method):
    folder = save_bert(tmp_path / "bert")
    words = TEXT.split()
    lines = [" ".join(words[i % 16 :] + words[: i % 16]) for i in range(64)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    chosen = recipe({"path": str(tmp_path / "text.txt")}, method, sequence_length=24)
    result = run_conversion(folder, chosen, tmp_path / "out", device="cpu")
    ids = torch.randint(5, 20, (2, 12))
    check_healed(result, {"input_ids": ids})
    model = AutoModel.from_pretrained(result.output).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state
        alone = model(input_ids=ids[1:, :7]).last_hidden_state
        whole = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(padded[1:, :7], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[:1], whole[:1], atol=1e-5, rtol=1e-5)
    assert (whole[1, :7] - alone[0]).abs().max() > 1e-3


def test_a_model_without_an_image_processor_takes_no_images(tmp_path, sources):
    folder = save_bert(tmp_path / "bert")
    with pytest.raises(TrainingError, match="has no image processor"):
        run_conversion(folder, recipe(section(sources["pictures"]).model_dump()), tmp_path / "out")


def test_a_vision_model_reads_no_text(tmp_path, sources):
    folder = save_vision(tmp_path / "dinov2", Dinov2Model, Dinov2Config(**VISION))
    with pytest.raises(TrainingError, match="has no tokenizer, so a stage cannot read text"):
        run_conversion(folder, recipe({"embedded": True}, sequence_length=24), tmp_path / "out")
    measured = recipe(section(sources["pictures"]).model_dump()).model_dump() | {"evaluate": {"embedded": True}}
    with pytest.raises(TrainingError, match="reads no text, so it has no perplexity"):
        run_conversion(folder, Recipe(**measured), tmp_path / "out")
