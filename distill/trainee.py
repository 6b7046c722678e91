"""The converted model while it is being healed: what of it can train, and what it was before."""

import ctypes
import gc
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..attention_modules import AttentionModule
from ..convert.surgery.attention_function import AttentionCall, attention_hook
from ..convert.surgery.swap import converted_modules
from ..errors import TrainingError
from .mixtures import router_weights
from .own_weights import OwnWeights
from .targets import ALL_LINEAR, CORES, EXPERTS, LoraSettings, find_targets

FIRST_ADAPTER = "default"
# Queries of all heads and layers in a micro-batch; each keeps about 4 KiB for its gradients if nothing is recomputed.
RECOMPUTE_ABOVE = 50_000


class Trainee:
    """A converted model and the low-rank adapters on it.

    Adapters of earlier stages stay in place, active and frozen, until the end, so that the model without adapters and
    with softmax attention remains the teacher throughout.

    Where the model is a rewritten form of another one and does not start as that, the other one is the teacher instead.

    Args:
        model: a converted model; its parameters are frozen, and those of its cores turned to fp32.
        load_teacher: loads a teacher of its own, when it is first asked for; None if the model can be its own.
        tokenizer: its tokenizer or processor, for stages that make texts; None if it has none.
    """

    def __init__(
        self, model: PreTrainedModel, load_teacher: Callable[[], PreTrainedModel] | None = None, tokenizer: Any = None
    ) -> None:
        self.model = model
        self._load_teacher = load_teacher
        self.tokenizer = tokenizer
        # A peft.PeftModel; importing peft takes seconds, which a run without adapters need not spend.
        self.peft: Any = None
        self.adapters: list[str] = []
        self.own = OwnWeights()
        model.requires_grad_(False)
        for core in self.cores().values():
            core.float()

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The model that teaches: one of its own, which stays in memory from now on, or the trained one itself."""
        if self._load_teacher is None:
            return self.model
        teacher = self._load_teacher()
        teacher.requires_grad_(False)
        teacher.eval()
        return teacher

    def cores(self) -> dict[str, AttentionModule]:
        """The converted attention by the names of the modules it serves."""
        return {name: cast(AttentionModule, module.attnconv) for name, module in converted_modules(self.model).items()}

    def core_parameters(self) -> dict[str, nn.Parameter]:
        """The cores' parameters under their names in a checkpoint, `<module>.attnconv.<parameter>`."""
        return {
            f"{name}.attnconv.{parameter_name}": parameter
            for name, core in self.cores().items()
            for parameter_name, parameter in core.named_parameters()
        }

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, under their names in the model."""
        marked = re.compile(rf"\.lora_[^.]+\.{re.escape(adapter)}(\.|$)")
        return {name: parameter for name, parameter in self.model.named_parameters() if marked.search(name)}

    def add_adapter(self, settings: LoraSettings, *, seed: int) -> str:
        """Put one more adapter on the model and return its name.

        Args:
            settings: rank, alpha, dropout in [0, 1) and target modules.
            seed: of the random start.

        Raises:
            TrainingError: a target names no linear module of the model, or the rank is beyond theirs.
        """
        from peft import LoraConfig, get_peft_model

        targets = find_targets(self.model, settings)
        name = FIRST_ADAPTER if self.peft is None else f"adapter_{len(self.adapters) + 1}"
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            # peft declares whole numbers and takes any.
            lora_alpha=cast(int, settings.alpha),
            lora_dropout=settings.dropout,
            target_modules=[target for target in settings.targets if target != EXPERTS or not targets.parameters]
            if ALL_LINEAR not in settings.targets
            else list(targets.modules),
            target_parameters=list(targets.parameters) or None,
            exclude_modules=CORES if self.cores() else None,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 asks the model for an attribute that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            if self.peft is None:
                self.peft = get_peft_model(self.model, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)
        self.adapters.append(name)
        self.peft.base_model.set_adapter(self.adapters)
        self.train_only(())
        return name

    def open_routers(self) -> None:
        """Let the weights of a mixture's routers be trained: they are no targets of adapters."""
        self.own.add(router_weights(self.model))

    def train_only(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let these parameters take gradients and no others."""
        parameters = list(parameters)
        self.model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.own.open(parameters)

    @contextmanager
    def as_teacher(self) -> Iterator[PreTrainedModel]:
        """Within the context there is a model to learn from: one of its own, or this one as it was.

        As it was it has softmax attention, no adapters and no dropout.
        """
        if self.teacher is not self.model:
            yield self.teacher
            return
        taught = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        taught += [parameter for parameter in self.own.trained.values() if parameter.requires_grad]
        was_training = self.model.training
        self.model.eval()
        if self.peft is not None:
            self.peft.base_model.disable_adapter_layers()
        try:
            with attention_hook(self.model, AttentionCall.teacher), self.own.as_before():
                yield self.model
        finally:
            if self.peft is not None:
                self.peft.base_model.enable_adapter_layers()
            self.train_only(taught)
            self.model.train(was_training)

    @contextmanager
    def as_student(self, look: Callable[[AttentionCall], None] | None = None) -> Iterator[None]:
        """Within the context the model is in training mode.

        Unless the model is small it computes its new attention again for the backward pass: what the maths inside a
        layer would keep for its gradients is several times what enters and leaves it.

        Args:
            look: called with each converted layer's call, outside of what is computed again.
        """
        num_layers = len(self.cores())

        def attend(call: AttentionCall) -> torch.Tensor:
            if look is not None:
                look(call)
            small = call.query[..., 0].numel() * num_layers < RECOMPUTE_ABOVE
            return call.converted() if small else _recomputed(call)

        self.own.push()
        self.model.train()
        with attention_hook(self.model, attend):
            yield

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that healing changes: the cores, all adapters and weights of its own, detached, on the CPU."""
        parameters: dict[str, nn.Parameter] = self.core_parameters() | self.own.trained
        for adapter in self.adapters:
            parameters |= self.adapter_parameters(adapter)
        # Adapters rename the modules they wrap, but cores keep their names: they are never targets.
        return {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}

    @torch.no_grad()
    def load_trained(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `trained_tensors` returned.

        Raises:
            TrainingError: the tensors are not those of this model and its adapters.
        """
        parameters: dict[str, Any] = self.core_parameters() | self.own.trained
        for adapter in self.adapters:
            parameters |= self.adapter_parameters(adapter)
        if parameters.keys() != tensors.keys():
            odd = sorted(parameters.keys() ^ tensors.keys())
            raise TrainingError(f"The checkpoint does not fit the model: {len(odd)} tensors differ, first {odd[0]}.")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
        self.own.push()

    def release(self) -> None:
        """Give up the model's weights; the trainee is of no more use."""
        nn.Module.to(self.model, "meta")
        self.peft = None
        self.__dict__.pop("teacher", None)
        gc.collect()
        # glibc keeps what was freed, and the next model's weights would come on top of it.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def detach_adapters(self, folder: Path, *, base: str) -> PreTrainedModel:
        """Save the adapters beside the model instead, the first in `folder`, others in folders of their own in it.

        Args:
            folder: where to; nothing is written if there are none.
            base: what the adapters name as the model they belong to.

        Returns:
            the plain model, without the adapters.
        """
        if self.peft is not None:
            for config in self.peft.peft_config.values():
                config.base_model_name_or_path = base
            # The embeddings are never trained, and the base is not in its place yet to compare them with.
            self.peft.save_pretrained(folder, save_embedding_layers=False)
            self.model = self.peft.unload()
            self.peft, self.adapters = None, []
        return self.model

    def merge_adapters(self) -> PreTrainedModel:
        """Add all adapters to the weights they adapt and return the plain model."""
        if self.peft is not None:
            self.model = self.peft.merge_and_unload()
            self.peft, self.adapters = None, []
        return self.model


def _recomputed(call: AttentionCall) -> torch.Tensor:
    output: torch.Tensor = checkpoint(call.converted, use_reentrant=False, preserve_rng_state=False)
    return output
