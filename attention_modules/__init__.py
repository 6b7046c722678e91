"""The maths: attention methods behind one contract."""

from .base import AttentionModule
from .contract import AttentionOptions
from .geometry import Geometry
from .linear.agent import AgentAttention
from .linear.gated import GatedLinearAttention
from .linear.gated_delta import GatedDeltaAttention
from .linear.hedgehog import HedgehogAttention
from .linear.lightning import LightningAttention
from .linear.linear import LinearAttention
from .linear.lola import LolaAttention
from .linear.lolcats import LolcatsAttention
from .registry import MethodInfo, available, create, get_method, register
from .softmax import SoftmaxAttention
from .sparse.sliding_window import SlidingWindowAttention
from .state import AttentionState
from .tokens import Call, Surroundings, Tokens

__all__ = [
    "AgentAttention",
    "AttentionModule",
    "AttentionOptions",
    "AttentionState",
    "Call",
    "GatedDeltaAttention",
    "GatedLinearAttention",
    "Geometry",
    "HedgehogAttention",
    "LightningAttention",
    "LinearAttention",
    "LolaAttention",
    "LolcatsAttention",
    "MethodInfo",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "Surroundings",
    "Tokens",
    "available",
    "create",
    "get_method",
    "register",
]
