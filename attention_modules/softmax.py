"""Softmax attention itself, as a method: the identity of every conversion."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import AttentionModule
from .contract import AttentionOptions, Memory
from .registry import register
from .window import LOG2E, softmax_terms, window_mask


class SoftmaxOptions(AttentionOptions):
    """Softmax has no options."""


@register(name="softmax", options=SoftmaxOptions, paper="", summary="softmax attention, kept as it is")
class SoftmaxAttention(AttentionModule):
    """`y_i = Σ_j softmax_j(s q_i·k_j) v_j` over `j ≤ i`, or over all j when not causal.

    In a recipe `method: softmax` leaves a layer untouched; this class is what other methods are compared with.
    """

    is_recurrent = False

    def attend_naive(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """All weights written out."""
        keys, values = (t.repeat_interleave(self.geometry.num_groups, 1) for t in (keys, values))
        visible = self._visible(query, keys, valid)
        numerator, denominator, _ = softmax_terms(query @ keys.transpose(-1, -2) * (scaling * LOG2E), visible, values)
        empty = denominator == 0
        return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)

    def attend_torch(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """PyTorch's scaled_dot_product_attention."""
        if valid is None and (not self.geometry.causal or query.shape[2] == keys.shape[2]):
            mask, is_causal = None, self.geometry.causal
        else:
            mask, is_causal = self._visible(query, keys, valid), False
        return F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=is_causal, scale=scaling, enable_gqa=self.geometry.num_groups > 1
        )

    def _visible(self, query: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
        num_keys = keys.shape[2]
        inside = window_mask(query.shape[2], num_keys, num_keys, causal=self.geometry.causal, device=query.device)
        if valid is None:
            return inside
        # Rows of padding look at themselves, so that no kernel divides zero by zero.
        return (
            inside & valid[:, None, None, :]
            | torch.eye(num_keys, dtype=torch.bool, device=query.device)[num_keys - query.shape[2] :]
        )
