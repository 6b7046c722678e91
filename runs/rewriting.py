"""Rewrites of a recipe: the ordinary model that is the result, or the base of what follows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..convert.planning.plan import Plan
from ..convert.reading.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from ..convert.rewriting.exactness import Exactness, check_exactness
from ..convert.rewriting.plan import RewritePlan, write_rewritten
from ..convert.writing.card import make_card
from ..convert.writing.receipt import make_receipt
from ..convert.writing.save import write_companions
from ..distill.progress import Progress
from ..distill.team import Team, find_team
from ..errors import PlanError
from ..evaluate import load_tokens
from ..files.output_folder import atomic_folder, check_output, scratch_folder
from ..recipes import Recipe
from .settling import settled_plan

COMPARED_TOKENS = 512
"""Of a text on which whole models are compared, at most."""


@dataclass(frozen=True)
class Base:
    """What attention is converted in.

    Attributes:
        checkpoint: the model, rewritten if the recipe says so.
        rewrites: what was done to it, a clause each.
        origin: what it was rewritten from; None if it was not.
        digests: digests of the origin's weight files.
        exactness: how far the rewritten model is from its origin; None if it was not rewritten.
        incomplete: whether a method has to complete the rewritten model.
    """

    checkpoint: Checkpoint
    rewrites: tuple[str, ...] = ()
    origin: Checkpoint | None = None
    digests: Mapping[str, str] | None = None
    exactness: Exactness | None = None
    incomplete: bool = False

    @property
    def differs(self) -> bool:
        """Whether the rewritten model, with its attention as it is, computes something else than its origin."""
        return self.exactness is not None and bool(
            self.exactness.reasons or self.exactness.objection or self.incomplete
        )


@contextmanager
def rewritten_base(
    opened: Checkpoint,
    recipe: Recipe,
    output: Path,
    *,
    allow_inexact: bool,
    progress: Progress,
    device: str | None = None,
    compare_on: str | Path | None = None,
) -> Iterator[Base]:
    """Rewrite a model into a temporary folder beside the output, where it stays for as long as the context lasts.

    The same model gives the same files, so a run that goes on makes them again.

    Args:
        opened: the model that the user named.
        recipe: the recipe; without a rewrite the model is taken as it is.
        output: the folder that the run will write.
        allow_inexact: go on with a rewrite that is not what it promised to be.
        progress: whom to tell.
        device: where a model is measured that a rewrite is to be settled on, as torch names it.
        compare_on: a text on which the whole rewritten model is compared with its source; None compares cut ones.

    Raises:
        PlanError: the model cannot be rewritten so.
        DataError: the text cannot be read.
    """
    if not recipe.rewrite:
        yield Base(opened)
        return
    plan = settled_plan(opened, recipe, output, device=find_team(device).device, progress=progress)
    exactness = _check(plan, allow_inexact, progress, compare_on)
    with scratch_folder(output) as folder:
        digests = _write(plan, folder, recipe, progress)
        checkpoint = open_checkpoint(folder, trust_remote_code=opened.trust_remote_code)
        # In messages and receipts it is still the model that the user named.
        named = replace(checkpoint, source=opened.source, repo_id=opened.repo_id, revision=opened.revision)
        incomplete = any(rewrite.needs_method for rewrite in recipe.rewrite)
        yield Base(named, plan.summaries, opened, digests, exactness, incomplete)


def write_native(
    opened: Checkpoint,
    recipe: Recipe,
    output: Path,
    *,
    team: Team,
    overwrite: bool,
    allow_inexact: bool,
    progress: Progress,
    compare_on: str | Path | None = None,
) -> tuple[Plan, Exactness | None]:
    """Rewrite a model into the output, which is an ordinary model that transformers alone loads.

    Args:
        opened: the model.
        recipe: a recipe with a rewrite, and with neither attention rules nor stages.
        output: the folder to write; it appears when all is done.
        team: the processes of the run, one of which writes.
        overwrite: replace an earlier result.
        allow_inexact: write a result that is not what its rewrites promised.
        progress: whom to tell.
        compare_on: as for `rewritten_base`.

    Returns:
        what was done, and how far the result is from the model; None in processes that write nothing.

    Raises:
        PlanError: the model cannot be rewritten so.
        OutputError: the output cannot be written.
    """
    plan = settled_plan(opened, recipe, output, device=team.device, progress=progress)
    done = Plan((), plan.summaries)
    exactness = None
    if team.leads:
        check_output(output, overwrite=overwrite)
        exactness = _check(plan, allow_inexact, progress, compare_on)
        with atomic_folder(output, overwrite=overwrite) as folder:
            digests = _write(plan, folder, recipe, progress)
            # Whatever cannot be opened again must not take the output's place.
            open_checkpoint(folder, trust_remote_code=opened.trust_remote_code)
            receipt = make_receipt(opened, done, inputs=digests, exactness=exactness.to_dict())
            recipe_yaml = recipe.to_yaml()
            card = make_card(
                output.name,
                checkpoint=opened,
                plan=done,
                receipt=receipt,
                recipe_name=recipe.name,
                recipe_yaml=recipe_yaml,
                papers=[recipe.paper] if recipe.paper else [],
                native_config=plan.config,
            )
            write_companions(folder, recipe_yaml=recipe_yaml, receipt=receipt, card=card)
    team.wait()
    return done, exactness


def _check(plan: RewritePlan, allow_inexact: bool, progress: Progress, compare_on: str | Path | None) -> Exactness:
    text = None
    if compare_on is not None:
        tokenizer = load_tokenizer(plan.checkpoint)
        if tokenizer is None:
            raise PlanError(f"{plan.checkpoint.source} has no tokenizer to read {compare_on} with")
        most = getattr(plan.checkpoint.config.get_text_config(), "max_position_embeddings", None) or COMPARED_TOKENS
        length = min(COMPARED_TOKENS, most)
        text = load_tokens(compare_on, tokenizer, context=length, limit=length)
    progress.phase("Comparing the start with the source")
    exactness = check_exactness(plan, allow_inexact=allow_inexact, text=text)
    progress.end()
    return exactness


def _write(plan: RewritePlan, folder: Path, recipe: Recipe, progress: Progress) -> dict[str, str]:
    digests = write_rewritten(plan, folder, shard_bytes=recipe.output.shard_bytes, tell=progress.phase)
    progress.end()
    return digests
