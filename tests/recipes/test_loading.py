"""From a file to a recipe: what can be wrong with the file, and all that can be wrong with what is in it, at once."""

import pytest

from attnconv.errors import AttnConvError, RecipeError
from attnconv.recipes import AttentionRule, Recipe, build_recipe, load_recipe, parse_recipe

MINIMAL = "name: mine\nattention:\n  - {layers: all, method: softmax}\n"

WRONG = """
name: my recipe
descripton: misspelt
paper: arxiv 2410
attention:
  - {layers: all, method: lolcat}
  - {layers: "0-3,x-", method: lolcats, options: {windw: 64, mixing: 2, feature_map: hedgehg}}
  - {layers: {evry: 4}, method: softmax}
  - {layers: "7-3", method: softmax}
stages:
  - {kind: lroa, tokens: 20}
  - {kind: lora, tokens: 2e6, sequence_length: 2.5, learning_rte: 1e-4, schedule: cosin}
  - {kind: logits, tokens: 1, steps: 2, sequence_length: 64, learning_rate: 1e-4, lora: {rnk: 4}}
  - {tokens: 5}
  - {kind: attention_transfer, steps: 2, sequence_length: 64, learning_rate: .inf, loss: {output_mse: -1}}
data: {path: text.txt, hub: some/data}
output: {shard_size: 5 bananas, dtype: bf16}
"""


def written(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(text, overrides=()):
    with pytest.raises(RecipeError) as refusal:
        parse_recipe(text, overrides)
    return str(refusal.value)


def test_a_file_is_loaded(tmp_path):
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert recipe.name == "mine"
    assert recipe.attention == [AttentionRule(layers="all", method="softmax")]
    assert recipe.stages == []


def test_a_file_without_suffix_is_loaded(tmp_path, monkeypatch):
    written(tmp_path, MINIMAL, "mine")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine").name == "mine"


def test_all_problems_are_reported_at_once():
    message = problems(WRONG)
    for problem in (
        "\n  name: 'my recipe' is no name; use letters",
        "\n  paper: 'arxiv 2410' is no link",
        "\n  descripton: unknown key; did you mean 'description'?",
        "\n  attention.0.method: unknown method 'lolcat'; did you mean 'lolcats'?",
        "\n  attention.1.options.windw: unknown key; did you mean 'window'?",
        "\n  attention.1.options.mixing: input should be less than 1, got 2",
        "\n  attention.1.options.feature_map: got 'hedgehg'; did you mean 'hedgehog'?",
        "\n  attention.2.layers: unknown key 'evry'; did you mean 'every'?",
        "\n  attention.3.layers: '7-3' has the range 7-3, which runs backwards",
        "\n  stages.0.kind: got 'lroa'; did you mean 'lora'?",
        "\n  stages.1.sequence_length: a whole number is wanted, got 2.5",
        "\n  stages.1.learning_rate: this key is required",
        "\n  stages.1.learning_rte: unknown key; did you mean 'learning_rate'?",
        "\n  stages.1.schedule: got 'cosin'; did you mean 'cosine'?",
        "\n  stages.2.lora.rnk: unknown key; did you mean 'rank'?",
        "\n  stages.3.kind: this key is required",
        "\n  stages.4.learning_rate: input should be a finite number, got inf",
        "\n  stages.4.loss.output_mse: input should be greater than or equal to 0, got -1",
        "\n  data: exactly one of path, hub, embedded is wanted, got path and hub",
        "\n  output.shard_size: '5 bananas' is no size",
        "\n  output.dtype: got 'bf16'; did you mean 'bfloat16'?",
    ):
        assert problem in message
    assert message.startswith(f"recipe has {message.count(chr(10))} problems:")


def test_one_problem_is_one_sentence():
    assert problems(MINIMAL + "stage: []\n") == "recipe: stage: unknown key; did you mean 'stages'?"


def test_a_key_like_no_other_is_answered_with_all_keys():
    message = problems(MINIMAL + "output: {zzz: 1}\n")
    assert message == "recipe: output.zzz: unknown key; use one of: dtype, shard_size, merge_lora"


def test_a_method_without_options_says_so():
    message = problems("name: x\nattention: [{layers: all, method: softmax, options: {window: 3}}]")
    assert message == "recipe: attention.0.options.window: unknown key; there are no keys here"


def test_the_error_belongs_to_both_trees():
    with pytest.raises(RecipeError) as refusal:
        build_recipe({})
    assert isinstance(refusal.value, AttnConvError)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- name: mine\n", "holds a list at its top"),
        ("just words", "holds a str at its top"),
        ("name: [unclosed", r"is no valid YAML: .*line 1"),
        ("name: x\n\tname: y", r"is no valid YAML: .*line 2, column 1"),
        ("a: &a [*b]", "is no valid YAML: found undefined alias"),
        ("name: one\nname: two\n", r"the key 'name' is there twice \(line 2, column 1\)"),
        ("? [a]\n: b\n", "is no valid YAML: found unhashable key"),
        ("name: \x00", "is no valid YAML"),
        ("name: !!python/object/apply:os.getcwd []", "is no valid YAML: could not determine a constructor"),
        ("attention: 5\nname: x", "attention: input should be a valid list, got 5"),
        ("attention: []\nname: x", "there is nothing to do: give attention rules, or a rewrite"),
        ("attention: [5]\nname: x", "attention.0: input should be a valid dictionary"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as refusal:
        load_recipe(path)
    assert str(refusal.value).startswith(f"recipe file {path}")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(RecipeError, match="is no text"):
        load_recipe(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="there is no recipe file nowhere.yml"):
        load_recipe("nowhere.yml")


def test_a_folder_is_answered_with_the_recipe_in_it(tmp_path):
    with pytest.raises(RecipeError, match="is a folder, not a recipe$"):
        load_recipe(tmp_path)
    written(tmp_path, MINIMAL, "recipe.yaml")
    with pytest.raises(RecipeError, match=r"did you mean .*recipe\.yaml"):
        load_recipe(tmp_path)


def test_the_same_object_from_python_yaml_and_plain_data():
    rule = {"layers": {"first": 2}, "method": "lolcats", "options": {"window": 8}}
    from_python = Recipe(name="mine", attention=[AttentionRule(**rule)])
    from_yaml = parse_recipe("name: mine\nattention: [{layers: {first: 2}, method: lolcats, options: {window: 8}}]")
    assert from_python == from_yaml == build_recipe({"name": "mine", "attention": [rule]})


def test_plain_data_is_not_changed():
    data = {"name": "mine", "attention": [{"layers": "all", "method": "softmax"}]}
    assert build_recipe(data, ["name=other", "attention.0.layers=0"]).name == "other"
    assert data == {"name": "mine", "attention": [{"layers": "all", "method": "softmax"}]}


def test_aliases_inside_of_anchors_are_refused():
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    with pytest.raises(RecipeError, match="alias .a0 stands inside"):
        parse_recipe("\n".join(lines))
    with pytest.raises(RecipeError, match="alias .a stands inside"):
        parse_recipe("name: &a [*a]")


def test_yaml_that_is_too_deep_is_one_sentence():
    with pytest.raises(RecipeError, match="too deep"):
        parse_recipe("name: " + "[" * 5000)
