"""GGUF files: their configuration as transformers reads it, and whether the file is whole."""

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from ...errors import CheckpointError
from ...files.foreign_errors import first_line


def read_gguf(path: Path) -> tuple[PreTrainedConfig, torch.dtype]:
    """Read a GGUF file's configuration and the type its weights get once they are dequantised; no weight is read.

    Args:
        path: the `.gguf` file.

    Returns:
        the configuration, and the file's own float type, or float32 for quantised weights.

    Raises:
        CheckpointError: the file is truncated, is one part of several, or is nothing that transformers reads.
    """
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    try:
        header = GgufHeader.from_file(str(path))
        metadata, _ = read_gguf_metadata(str(path))
    # What a damaged file makes the reader raise (struct, index, memory, value or decoding errors) is not specified.
    except Exception as error:
        raise CheckpointError(f"{path} is not a GGUF file that can be read: {first_line(error)}.") from error
    promised = header.data_start + max((info.offset + info.nbytes for info in header.tensors), default=0)
    size = path.stat().st_size
    if size < promised:
        raise CheckpointError(
            f"{path} is truncated: its header promises {promised} bytes and the file has {size}; download it again."
        )
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts: merge them with llama-gguf-split first."
        )
    try:
        # Said outright, for transformers asks on stdin whether it may run code where nothing is said.
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except ImportError as error:
        raise CheckpointError("Reading GGUF files needs one more package: pip install gguf") from error
    # Each architecture's own mapping may fail in its own way on metadata it does not expect.
    except Exception as error:
        raise CheckpointError(
            f"{path} holds a {header.architecture!r} model, which transformers cannot read: {first_line(error)}."
        ) from error
    return config, header.dtype or torch.float32
