"""What a head is for, as far as its weights tell."""

from collections.abc import Mapping
from typing import Literal

Role = Literal["retrieval", "local", "streaming", "global"]
ROLES: tuple[Role, ...] = ("retrieval", "local", "streaming", "global")
MEANINGS: Mapping[Role, str] = {
    "retrieval": "finds what followed the same token earlier, however far back",
    "local": "looks at the newest tokens only",
    "streaming": "looks at the first tokens and the newest ones only",
    "global": "looks at everything",
}

# Mass by which a head counts as one that copies: of hundreds of keys one gets a fifth, where chance would give it less
# than a hundredth. A head that finds it half of the time and looks elsewhere otherwise is above it too.
RETRIEVAL_SCORE = 0.2
# Mass that a window must hold for a head to do without the rest; DuoAttention, https://arxiv.org/abs/2410.10819, finds
# that heads of this kind can lose everything between the first and the newest tokens.
STREAMING_SHARE = 0.95


def role_of(*, induction: float | None, local: float, streaming: float) -> Role:
    """The role of a head.

    Args:
        induction: `measures.induction_score`, None for a head that sees both ways.
        local: `measures.local_mass`.
        streaming: `measures.streaming_mass` in the same window.
    """
    # First of all: in ordinary text such a head rests on the first tokens while there is nothing to copy.
    if induction is not None and induction >= RETRIEVAL_SCORE:
        return "retrieval"
    if local >= STREAMING_SHARE:
        return "local"
    return "streaming" if streaming >= STREAMING_SHARE else "global"
