"""LoRA: low-rank adapters beside the language model's linear layers, y = W x + B A x alpha / r.

Legend: W [out, in], A [r, in], B [out, r].
"""

import math

import torch
from torch import Tensor, nn

from sliming.distributed import put

RANK, ALPHA = 128, 256  # r and alpha, as in the released scripts


def add_lora(llm: nn.Module) -> None:
    """Puts adapters beside all linear layers but the output layer (peft, extra `lora`)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ValueError('LoRA needs the package peft: pip install "sliming[lora]"') from error
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0)
    inject_adapter_in_model(config, llm)


@torch.no_grad()
def begin_lora(llm: nn.Module) -> None:
    """New adapters: A drawn as peft draws it, whole and then each rank's rows, B zero."""
    for name, parameter in llm.named_parameters():
        if ".lora_" in name:
            value = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            put(parameter, value)


def without_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model as it was before `add_lora`, by the names of that time."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()
            if ".lora_" not in name}
