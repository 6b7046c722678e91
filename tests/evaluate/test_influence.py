"""What some heads do for the loss of a text."""

from dataclasses import replace

import pytest
import torch

from attnconv.convert.planning.head_rules import most_important
from attnconv.errors import PlanError
from attnconv.evaluate.diagnose.importance import RoleModel, role_model
from attnconv.evaluate.diagnose.influence import Influence, influences
from attnconv.evaluate.tasks.perplexity import token_losses
from attnconv.packaged.model import embedded_model_path


@pytest.fixture(scope="module")
def roles() -> RoleModel:
    return role_model(str(embedded_model_path()), window=1, num_sinks=0)


def test_heads_that_are_masked_look_at_everything_alike(roles: RoleModel) -> None:
    ids = torch.randint(3, 400, (37,), generator=torch.Generator().manual_seed(0))
    (found,) = influences(roles, {1: (0, 3), 4: (2,)}, [ids])
    assert found is not None
    assert found.tokens == 36
    # Queries of zero weigh all keys alike; two query heads share a KV head.
    for layer, groups in ((1, (0, 3)), (4, (2,))):
        attention = roles.model.model.layers[layer].self_attn
        for group in groups:
            attention.q_proj.weight[group * 16 : (group + 1) * 16] *= 0
    changed = token_losses(roles.model, ids[None])
    roles.model.load_state_dict(role_model(str(embedded_model_path()), window=1, num_sinks=0).model.state_dict())
    assert found.masked_loss == pytest.approx(float(changed.mean()), rel=1e-5)
    assert found.loss == pytest.approx(float(token_losses(roles.model, ids[None]).mean()), rel=1e-6)
    assert found.score == pytest.approx(found.masked_loss / found.loss - 1)
    (same,) = influences(roles, {}, [ids])
    assert same is not None
    assert same.score == 0


def test_texts_do_not_see_each_other(roles: RoleModel) -> None:
    ids = torch.randint(3, 400, (29,), generator=torch.Generator().manual_seed(1))
    texts = [ids[:5], ids[:0], ids, ids[:1], ids[3:20]]
    together = influences(roles, {0: (1,)}, texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = influences(roles, {0: (1,)}, [text])
        assert (found is None) == (alone is None) == (len(text) < 2)
        if isinstance(found, Influence) and isinstance(alone, Influence):
            assert found.tokens == alone.tokens
            assert found.loss == pytest.approx(alone.loss, rel=1e-5)
            assert found.masked_loss == pytest.approx(alone.masked_loss, rel=1e-5)


def test_a_model_that_sees_both_ways_is_refused(roles: RoleModel) -> None:
    modules = tuple(replace(module, geometry=replace(module.geometry, causal=False)) for module in roles.modules)
    both_ways = RoleModel(roles.source, roles.model, roles.tokenizer, modules)
    with pytest.raises(PlanError, match="sees both ways, so it has no loss of the next token"):
        influences(both_ways, {}, [torch.tensor([1, 2])])


def test_of_heads_that_matter_the_same_the_first_are_taken() -> None:
    scores = [[0.5, 0.1], [0.5, float("-inf")], [0.9, 0.5]]
    assert most_important(scores, range(3), 3) == {2: (0,), 0: (0,), 1: (0,)}
    assert most_important(scores, [0, 2], 3) == {2: (0, 1), 0: (0,)}
