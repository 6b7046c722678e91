"""What an attention method says and does: the contract that each one fills in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .geometry import Geometry
from .state import AttentionState, Mixed
from .tokens import Call, Tokens
from .weights import Statistic

Memory = dict[str, Tensor]


class AttentionOptions(BaseModel):
    """Options of a method; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionContract(nn.Module, ABC):
    """One layer's attention, between the model's own projections.

    A method implements `attend_naive` (the law: every weight written out, O(L^2), or the recurrence itself, token by
    token) and `attend_torch` (sub-quadratic), and, if it forgets exact tokens, `tail_tokens` and `absorb`; a form that
    has the accumulators behind its last tokens anyway returns them too (`Mixed`), and a state takes them over. What it
    needs of a token besides key and value, such as a gate, comes from `signals`; what it does to the mixed values, such
    as a norm, belongs into `finish`. Padding, dtypes and states are handled here.

    Args:
        geometry: head counts and sizes.
        options: the method's own options.
        implementation: `"auto"`, `"naive"`, `"torch"` or, where a method has kernels, `"triton"`; auto takes the
            fastest that the device has.

    Raises:
        ValueError: no such implementation, or the method cannot serve such a layer.
    """

    name: ClassVar[str] = ""
    implementations: ClassVar[tuple[str, ...]] = ("auto", "naive", "torch")
    # Whether the state stays as it is while the context grows.
    is_recurrent: bool = True
    # Whether the model's own attention, cache and kernels mix the values, and the method acts on what each head made of
    # them; its `forward` then takes that as `mixed`.
    keeps_softmax: ClassVar[bool] = False
    # Whether it can leave out KV heads for good, so that saved layers may have narrower projections than their class.
    prunes_heads: ClassVar[bool] = False
    # What the method asks for besides queries, keys and values; see `tokens.Surroundings`. The layer's input is asked
    # for by `reads_hidden_states`, which may depend on the options.
    reads_positions: bool = False
    reads_unrotated: bool = False
    reads_board: bool = False
    # Whether it makes queries, keys and values of its own out of those of the module's projections; see `project`.
    reprojects: ClassVar[bool] = False
    # Whether bfloat16 is enough for the factors of its products where tokens came in that, see `bf16_products`: not
    # where what they come to is compared, and another choice made, nor where it is divided by its own size.
    rounds_products: ClassVar[bool] = False
    # Names of the parts that the numerator and the normaliser are sums of; see `leaving_out`.
    paths: ClassVar[tuple[str, ...]] = ()
    # Those of them that are left out at present.
    left_out: frozenset[str] = frozenset()
    # What share of a row's tokens a query must leave out for its output to show that it does, where tokens are random.
    telling_share: float = 0.5
    # Calls in which the method, by choice, is softmax attention over all tokens: `prefill` and `decode` are there.
    dense_in: frozenset[str] = frozenset()
    # Whether the present call is counted, and how many tokens each of its queries attended, `[batch, T]`, mean over the
    # heads: for methods that cannot tell by `tokens_attended`.
    counts_tokens: bool = False
    tokens_counted: Tensor | None = None

    def __init__(self, geometry: Geometry, options: AttentionOptions, implementation: str = "auto") -> None:
        super().__init__()
        if implementation not in self.implementations:
            raise ValueError(
                f"implementation={implementation!r} is not available for {self.name!r}; "
                f"choose one of {', '.join(self.implementations)}"
            )
        why_unsupported = self.why_unsupported(geometry, options)
        if why_unsupported is not None:
            raise ValueError(why_unsupported)
        self.geometry = geometry
        self.options = options
        self.implementation = implementation

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """Why the method with these options (of its own class) cannot serve such a layer, None if it can."""
        return None

    @classmethod
    def why_unsupported_tokens(cls, options: Any, image_tokens: int | None) -> str | None:
        """Why the method cannot serve the tokens that a model makes of its inputs, None if it can.

        Args:
            options: of its own class.
            image_tokens: how many there are of an image of the model's own size; None if it takes no images.
        """
        return None

    @property
    def parts(self) -> "tuple[AttentionContract, ...]":
        """Modules that serve some of the heads each; empty for a method that serves all of them by itself."""
        return ()

    @classmethod
    def num_kept(cls, geometry: Geometry, options: Any) -> int:
        """KV heads that the method with these options (of its own class) uses; the others may leave the model."""
        return geometry.num_kv_heads

    @property
    def kept_heads(self) -> list[int]:
        """Numbers of the KV heads that the method uses, of all that its layer has."""
        return list(range(self.geometry.num_kv_heads))

    @property
    def reads_hidden_states(self) -> bool:
        """Whether `signals` or `finish` need the layer's input."""
        return False

    @property
    def is_normalized(self) -> bool:
        """Whether a query's attention weights are never negative and add up to one."""
        return True

    def reset_parameters(self) -> None:
        """Set every learnable parameter to its start; methods without parameters have nothing to do."""
        return

    @property
    def tail_tokens(self) -> int | None:
        """Newest tokens the state keeps exactly between calls; None = all of them."""
        return None

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fp32 accumulators of one sequence, without the batch axis."""
        return {}

    @property
    def projected_tokens(self) -> int:
        """Tokens before each new one whose projections `project` reads."""
        return 0

    @property
    def earlier_queries(self) -> int:
        """Newest queries of earlier calls that the method reads, as `Call.queries`."""
        return 0

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What takes the place of the module's projections, before the rotary embedding; for methods that reproject.

        Args:
            query: `[batch, num_heads, P + T, head_dim]`, fp32 or fp64, of T tokens and the P = `projected_tokens` real
                ones before them; zero where there is none, at the beginning of a text.
            key: `[batch, num_kv_heads, P + T, head_dim]`, likewise.
            value: `[batch, num_kv_heads, P + T, value_dim]`, likewise.

        Returns:
            query, key and value of the T tokens.
        """
        return query, key, value

    def signals(self, key: Tensor, hidden_states: Tensor | None) -> Memory:
        """What the method derives from each new token besides its key and value, such as the logarithm of its gate.

        It stays with keys and values wherever they go, as `signals` of the tokens.

        Args:
            key: `[batch, num_kv_heads, seq, head_dim]`, fp32 or fp64.
            hidden_states: `[batch, seq, hidden]`, zero where padding stands; None unless `reads_hidden_states`.

        Returns:
            tensors `[batch, heads, seq, dim]` by name, of any heads and dim.
        """
        return {}

    def finish(self, out: Tensor, hidden_states: Tensor | None) -> Tensor:
        """What follows the mixing of values, for each token by itself; the output need not be linear in it.

        Args:
            out: `[batch, num_heads, T, value_dim]`, fp32 or fp64.
            hidden_states: `[batch, T, hidden]`, zero where padding stands; None unless `reads_hidden_states`.
        """
        return out

    def absorb(self, tokens: Tokens, memory: Memory) -> Memory:
        """Fold tokens that left the tail into the accumulators.

        Args:
            tokens: with keys and values in fp32 or fp64.
            memory: accumulators so far, empty at the start.
        """
        return memory

    @abstractmethod
    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        """The oracle, with every attention weight written out.

        Args:
            call: queries, and the tokens that are exactly there, all in fp32 or fp64.
            memory: accumulators of all tokens before those.

        Returns:
            `[batch, num_heads, T, value_dim]`.
        """

    @abstractmethod
    def attend_torch(self, call: Call, memory: Memory) -> Tensor | Mixed:
        """The same function as `attend_naive`, sub-quadratic in time and memory where the method is.

        Returns:
            the output alone, or beside it what `absorb` would make of the oldest keys, gradients included.
        """

    def attend_triton(self, call: Call, memory: Memory) -> Tensor | Mixed | None:
        """The same in Triton kernels, on tensors in the dtype they came in; None where the torch path is to serve.

        Raises:
            ValueError: `implementation="triton"` was asked for and cannot be had.
        """
        return None

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor | None:
        """One new token of every row, with a state that changes in place; None where a call like others is to serve.

        Called where no gradients are wanted and nothing will be taken back.

        Args:
            call: the query in fp32 or fp64, and the new token alone, in the dtype it came in; where
                it is not valid, anything may come out.
            state: memory of earlier calls, with no more than `tail_tokens` tokens in its tail.

        Returns:
            `[batch, num_heads, 1, value_dim]`.
        """
        return None

    def decode_triton(self, call: Call, state: AttentionState) -> Tensor | None:
        """The same as one kernel, on a query too in the dtype it came in; None where the torch path is to serve."""
        return None

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        """How many tokens each query attends one by one, whatever it sees through a state; for `counting`.

        All that it may see, or what is in the tail together with the query's own token.

        Args:
            rank: `[batch, T]` int64, real tokens of the row up to each query, itself included.
            total: `[batch, 1]` int64, real tokens of the row.

        Returns:
            `[batch, T]` int64; where a query is padding, anything.
        """
        seen = rank if self.geometry.causal else total.expand_as(rank)
        return seen if self.tail_tokens is None else seen.clamp_max(self.tail_tokens + 1)

    def heads_used(self, hidden_states: Tensor | None) -> int | Tensor:
        """How many heads serve each query, for `counting`: all of them, unless the method shuts or chooses some.

        A head that does not serve costs nothing; a method that computes all heads and weighs them must say all.

        Args:
            hidden_states: `[batch, T, hidden]`, the layer's input as it came; None where the caller had none.

        Returns:
            one number for all queries, or `[batch, T]` int64.
        """
        return self.geometry.num_heads

    def state_multiply_adds(self) -> int:
        """Multiply-adds of a query, all heads, that reads what stands for other tokens, and of its token's entering it.

        0 where nothing stands for them, so that a token which is not attended is not seen at all.
        """
        return 0

    def summary_multiply_adds(self) -> float:
        """Multiply-adds of a query, all heads, for each token that it sees through summaries that grow in number."""
        return 0.0

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """What the method can tell about itself on these tokens, by name; arguments as for `attention_weights`."""
        return {}
