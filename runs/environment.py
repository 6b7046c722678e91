"""What this package finds where it runs: versions, devices, and which of its kernels can run there."""

from dataclasses import asdict, dataclass
from pkgutil import iter_modules
from typing import Any

import torch

from ..attention_modules import kernels
from ..attention_modules.kernels.selection import device_problem
from ..evaluate.engine.results import describe_setup


@dataclass(frozen=True)
class DeviceReport:
    """A device and what can be had of it.

    Attributes:
        device: as torch names it.
        name: its maker's name for it.
        memory_bytes: of the machine, or of the GPU.
        kernel_problem: why the Triton kernels cannot run there, None if they can.
    """

    device: str
    name: str
    memory_bytes: int | None
    kernel_problem: str | None


@dataclass(frozen=True)
class Environment:
    """Versions, devices and kernels.

    Attributes:
        system: operating system and processor architecture.
        versions: Python and the packages that can change a figure.
        devices: the CPU first, then each accelerator.
        kernels: names of the operators that have Triton kernels.
    """

    system: str
    versions: dict[str, str]
    devices: tuple[DeviceReport, ...]
    kernels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def describe_environment() -> Environment:
    """Look at what is installed and which devices there are."""
    cpu = torch.device("cpu")
    setup = describe_setup(cpu)
    name = f"{setup.cpu or 'CPU'}, {setup.cores} cores"
    devices = [DeviceReport("cpu", name, setup.memory_bytes, device_problem(cpu))]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found = torch.cuda.get_device_properties(device)
        devices.append(DeviceReport(str(device), found.name, found.total_memory, device_problem(device)))
    other = torch.accelerator.current_accelerator()
    if other is not None and other.type != "cuda":
        devices.append(DeviceReport(str(other), other.type, None, device_problem(other)))
    operators = tuple(sorted(module.name for module in iter_modules(kernels.__path__) if module.ispkg))
    return Environment(setup.system, setup.versions, tuple(devices), operators)
