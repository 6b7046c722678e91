"""How much each KV head matters, as measured on a model and written down."""

import torch

from attnconv.attention_modules.heads.head_roles import HeadRolesAttention
from attnconv.convert.planning.importance import read_importance
from attnconv.evaluate.diagnose import diagnose_model
from attnconv.evaluate.diagnose.importance import ablation, contribution, measure_importance, role_model
from attnconv.evaluate.diagnose.needles import divergences
from attnconv.packaged.model import embedded_model_path

BASE = str(embedded_model_path())
HEADS = [[4, 4, 4, 4, 4], 5]


def test_all_measures_are_written_down(tmp_path):
    path, said = tmp_path / "heads.json", []
    diagnosis = diagnose_model(BASE, text="book", tokens=512, context=256, window=32)
    found = measure_importance(BASE, diagnosis, path, texts=1, progress=lambda *args: said.append(args))
    assert found == read_importance(path)
    assert set(found.measures) == {"ablation", "contribution", "retrieval", "outside"}
    assert [layer.num_kv_heads for layer in found.layers] == HEADS[0]
    for name in found.measures:
        assert torch.tensor(found.scores(name)).isfinite().all()
    assert {role for row in found.roles for role in row} <= {"retrieval", "local", "streaming", "global"}
    assert said[-1][0] == said[-1][1] == 20
    head = max(diagnosis.layers[0].heads[:2], key=lambda one: one.induction or 0.0)
    assert found.scores("retrieval")[0][0] == head.induction


def test_what_is_lost_is_what_the_whole_model_loses():
    """Layers that were not run again give what they would have given."""
    roles = role_model(BASE, window=8, num_sinks=1)
    (text,) = roles.texts("book", number=1, length=128)
    found = torch.tensor(ablation(roles, [text]))
    assert (found >= 0).all()
    assert all(isinstance(core, HeadRolesAttention) for core in roles.cores.values())
    places = torch.cat([text.answers, text.others])
    with torch.no_grad():
        base = roles.model(text.ids).logits[0, places]
        for layer, head in ((0, 1), (3, 2)):
            core = list(roles.cores.values())[layer]
            core.alpha[head] = 0.0
            lost = divergences(roles.model(text.ids).logits[0, places], base)
            core.alpha[head] = 1.0
            split = len(text.answers)
            expected = lost[:split].mean() + lost[split:].mean()
            torch.testing.assert_close(found[layer, head], expected, rtol=1e-3, atol=1e-6)


def test_contribution_is_the_length_of_what_a_head_adds():
    roles = role_model(BASE, window=8, num_sinks=1)
    (text,) = roles.texts("book", number=1, length=64)
    seen = []
    projection = roles.model.model.layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = torch.tensor(contribution(roles, [text])[1])
    handle.remove()
    heads = seen[0][0].unflatten(-1, (4, -1))
    columns = projection.weight.unflatten(1, (4, -1))
    expected = torch.einsum("thd,ohd->tho", heads, columns).norm(dim=-1).mean(0)
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-6)
