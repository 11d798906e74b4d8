"""LoRA: low-rank adapters beside the language model's linear layers, y = W x + B A x alpha / r.

Legend: W [out, in], A [r, in], B [out, r].
"""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

RANK, ALPHA = 128, 256  # r and alpha, as in the released scripts


def add_lora(llm: nn.Module) -> None:
    """Puts adapters beside all linear layers but the output layer (peft, extra `lora`)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ValueError('LoRA needs the package peft: pip install "sliming[lora]"') from error
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0)
    inject_adapter_in_model(config, llm)


def without_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model as it was before `add_lora`, by the names of that time."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()
            if ".lora_" not in name}


def write_lora(llm: nn.Module, tensors: dict[str, Tensor], folder: Path, base: str) -> None:
    """The adapters in peft's own format, for `PeftModel.from_pretrained(base model, folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {name.removeprefix("llm.").replace(".default.", "."): tensor.contiguous()
                for name, tensor in tensors.items() if ".lora_" in name}
    save_file({f"base_model.model.{name}": tensor for name, tensor in adapters.items()},
              folder / "adapter_model.safetensors", {"format": "pt"})
    config = llm.peft_config["default"]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)


def with_adapters(weight: Tensor, down: Tensor, up: Tensor, config: dict) -> Tensor:
    """W + B A alpha / r in W's dtype, summed in float32; `down` is A, `up` B."""
    change = config["lora_alpha"] / config["r"] * (up.float() @ down.float())
    return (weight.float() + change).to(weight.dtype)
