"""Checkpoint folders: config.json, safetensors, tokenizer files. Read strictly, written whole.

A reader (`read` here, `released.read` for the paper's own checkpoints) gives the settings, the
tokenizer and a stream of (name, tensor); `fill` puts them into a model, every tensor and no other.
Nothing but JSON and tensors is read, and no code of a checkpoint is run.
"""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from sliming.config import SliMEConfig
from sliming.distributed import collected, is_main, put
from sliming.guard import InputError, ends, naming, open_file, read_text

Tensors = Iterator[tuple[str, Tensor]]
INDEX = "model.safetensors.index.json"
SHARD = 5_000_000_000  # bytes of one file of weights, at most, unless one tensor has more
# The most that a setting of tower or language model may be: several times what published ones have.
LARGEST = {"num_hidden_layers": 1000, "hidden_size": 2**15, "intermediate_size": 2**18,
           "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 4096,
           "num_experts": 4096, "num_local_experts": 4096, "n_routed_experts": 4096,
           "vocab_size": 10**7}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(InputError):
    """A folder that cannot be read as a checkpoint; the message is one line."""


@dataclass
class Checkpoint:
    """What a folder holds."""

    folder: Path
    config: SliMEConfig
    tokenizer: PreTrainedTokenizerBase | None
    tensors: Tensors  # by our names, read as they are asked for
    # Our names -> those that the folder's files use, for messages.
    called: Callable[[list[str]], list[str]] = list
    optional: tuple[str, ...] = ()  # beginnings of names that need not be in the stream


def find(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded where `name` is a hub id. FileNotFoundError."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2 or str(name).startswith("."):
            raise FileNotFoundError(f"{name}: no such checkpoint folder")
        try:
            folder = download(str(name), revision)
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise FileNotFoundError(f"{name}: neither a folder nor to be had from the hub "
                                    f"({reason})") from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so this is no checkpoint")
    return checked(folder)


def checked(folder: Path) -> Path:
    """The folder, where it holds nothing but files and folders: a pipe would be waited for."""
    for path in (*folder.glob("*"), *folder.glob("lora/*")):
        if not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is neither a file nor a folder: remove it, or download "
                                  "it again")
    return folder


def weights_key(*folders: str | Path | None) -> str:
    """Tells the weights in local folders apart from others put there later: a hash of their files'
    names, sizes, and first and last megabytes, and of the settings; empty for hub ids."""
    digest = hashlib.sha256()
    for folder in [Path(folder) for folder in folders if folder and Path(folder).is_dir()]:
        for path in sorted([*folder.glob("*"), *folder.glob("lora/*")]):
            if path.suffix in (".safetensors", ".bin", ".pt") or path.name == "config.json":
                digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
                digest.update(ends(path, 1 << 20))
    return digest.hexdigest()[:16] if digest.digest() != hashlib.sha256().digest() else ""


def newest(out: Path) -> Path:
    """The checkpoint folder in `out` that was written last; FileNotFoundError with the command that
    makes one."""
    found = [path.parent for path in out.glob("*/config.json")]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {out}/; make one with: python train.py")
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)


def download(name: str, revision: str | None = None) -> Path:
    """The folder of a hub repository: settings, tokenizer, and weights once, as safetensors where
    it has them."""
    patterns = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "lora/*"]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # Older checkpoints are .bin files, and what was trained beside a released LoRA always is.
    if not list(folder.glob("*.safetensors")) or (folder / "adapter_config.json").is_file():
        snapshot_download(name, revision=revision, allow_patterns=["*.bin"],
                          ignore_patterns=["*/*"])
    return folder


# ------------------------------------------------------------------------------------------ reading


def read(folder: Path) -> Checkpoint:
    """A checkpoint of this package; LoRA adapters beside the weights are merged.
    CheckpointError."""
    settings = read_json(folder / "config.json")
    if settings.pop("format", None) != "sliming":
        raise CheckpointError(f"{folder}: config.json is not that of a sliming checkpoint")
    if unknown := sorted(set(settings) - {f.name for f in fields(SliMEConfig)}):
        raise CheckpointError(f"{folder}/config.json: unknown field {', '.join(unknown)}; was it "
                              "written by a newer version?")
    named = shards_of(folder / INDEX) if (folder / INDEX).is_file() else {"model.safetensors"}
    if stray := {path.name for path in folder.glob("*.safetensors")} - named:
        raise CheckpointError(f"{folder}: {', '.join(sorted(stray))} does not belong to the "
                              "checkpoint (another program's, or left by a save that was killed); "
                              "remove it")
    tensors = read_weights(folder, "model")
    if (folder / "lora" / "adapter_config.json").is_file():
        tensors = with_lora(tensors, folder / "lora", prefix="llm.")
    with reading(folder / "config.json"):
        config = checked_settings(SliMEConfig(**settings))
    return Checkpoint(folder, config, read_tokenizer(folder), tensors)


def checked_settings(config: SliMEConfig) -> SliMEConfig:
    """The settings, as they are; ValueError, which names the field, where one cannot be right."""
    config.check()
    check_sizes(CLIPVisionConfig.from_dict(config.vision_config))
    check_sizes(llm := AutoConfig.for_model(**config.llm_config))
    if (config.separator_id or 0) >= (words := getattr(llm, "vocab_size", 2**32)):
        raise ValueError(f"separator_id is {config.separator_id} of {words} tokens")
    return config


def check_sizes(backbone: PreTrainedConfig) -> None:
    """ValueError, which names the field, for settings that would fill the memory."""
    for name, most in LARGEST.items():
        if isinstance(value := getattr(backbone, name, None), int) and not 0 <= value <= most:
            raise ValueError(f"{name} of the {backbone.model_type} is {value}, not 0 to {most}")
    if getattr(backbone, "image_size", 0) > 256 * getattr(backbone, "patch_size", 1):
        raise ValueError(f"image_size {backbone.image_size} is more than 256 patches "
                         f"(patch_size {backbone.patch_size})")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What transformers makes of settings and tokenizers: whatever it raises becomes a
    CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # there is no end to what it raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{path}: cannot be used ({reason})") from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; no code that came with it is run."""
    with reading(folder / "tokenizer_config.json"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def read_json(path: Path) -> dict:
    """A JSON file of a checkpoint; CheckpointError where it is missing or damaged."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy or download the "
                              "file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object of settings")
    return content


def read_weights(folder: Path, stem: str) -> Tensors:
    """All tensors of `stem`'s file or shards, one at a time; CheckpointError for a missing or
    broken file."""
    names = (f"{stem}.safetensors", "pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    for name in names:
        index = folder / f"{name}.index.json"
        shards = shards_of(index) if index.is_file() else {name}
        if index.is_file() and (folder / name).is_file() and name not in shards:
            raise CheckpointError(f"{folder} has {name} and {index.name}, which names others: "
                                  "remove the older one")
        if index.is_file() or (folder / name).is_file():
            for shard in sorted(shards):
                yield from read_file(folder / shard)
            return
    raise CheckpointError(f"{folder} has no weights: neither {' nor '.join(names)} nor shards of "
                          "them")


def shards_of(index: Path) -> set[str]:
    """The files that an index names, all of them in its own folder."""
    named = read_json(index).get("weight_map")
    names = set(map(str, named.values())) if isinstance(named, dict) else {""}
    if bad := [name for name in names if Path(name).name != name or not name]:
        raise CheckpointError(f"{index}: {bad[0]!r} is not the name of a file beside it")
    return names


def read_file(path: Path) -> Tensors:
    """The tensors of one safetensors or .bin file, read as they are asked for."""
    try:
        open_file(path).close()  # a regular file
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in names:  # opened anew, so that what was read of one leaves memory with it
                with safe_open(path, framework="pt") as file:
                    yield name, file.get_tensor(name)
            return
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not (isinstance(content, dict)
                and all(isinstance(tensor, Tensor) for tensor in content.values())):
            raise RuntimeError("it holds something else than tensors by name")
        yield from content.items()
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError,
            pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: unreadable weights ({reason}); copy or download the file "
                              "again") from error


def with_lora(tensors: Tensors, folder: Path, prefix: str = "") -> Tensors:
    """The stream with the adapters of `folder` added: W + B A alpha / r, A [r, in], B [out, r].

    `prefix` stands before the adapters' names in the stream. Adapters without a weight to be added
    to come last, under their own names, which nobody knows. CheckpointError for another kind.
    """
    settings = read_json(folder / "adapter_config.json")
    for kind in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
                 "lora_bias", "layer_replication"):
        if settings.get(kind):
            raise CheckpointError(f"{folder}/adapter_config.json: {kind} is set; only plain LoRA "
                                  "can be merged")
    for field in ("r", "lora_alpha"):
        if not isinstance(settings.get(field), int | float) or not 0 < settings[field] < 1e6:
            raise CheckpointError(f"{folder}/adapter_config.json: {field} is "
                                  f"{settings.get(field)!r}, not a number above 0")
    low_rank = {}
    for name, tensor in read_weights(folder, "adapter_model"):
        name = prefix + name.removeprefix("base_model.model.").replace(".default.", ".")
        if ".lora_A." in name and len(tensor) != settings["r"]:
            raise CheckpointError(f"{folder}: {name} has rank {len(tensor)}, adapter_config.json "
                                  f"says {settings['r']}")
        low_rank[name] = tensor
    for name, tensor in tensors:
        down, up = (f"{name.removesuffix('.weight')}.lora_{which}.weight" for which in "AB")
        if down in low_rank and up in low_rank:
            a, b = low_rank.pop(down), low_rank.pop(up)
            if a.dim() != 2 or b.dim() != 2 or [*tensor.shape] != [len(b), a.shape[1]] or (
                    len(a) != b.shape[1]):
                raise CheckpointError(f"{folder}: {down} and its B are {list(a.shape)} and "
                                      f"{list(b.shape)}, the weight {list(tensor.shape)}: they "
                                      "belong to another base model")
            change = settings["lora_alpha"] / settings["r"] * (b.float() @ a.float())
            tensor = (tensor.float() + change).to(tensor.dtype)
        yield name, tensor
    yield from low_rank.items()


@torch.no_grad()
def fill(own: dict[str, Tensor], tensors: Tensors, source: Path | str,
         called: Callable[[list[str]], list[str]] = list, optional: tuple[str, ...] = ()) -> None:
    """Copies a stream into the tensors of a model, `own`, by name; of one that is divided among the
    ranks each rank reads its own rows.

    Strict: an unknown name, a wrong shape, or a tensor that the stream lacks (unless its name
    begins with one of `optional`) is a CheckpointError.
    """
    found, unknown = set(), []
    for name, tensor in tensors:
        if name not in own:
            unknown.append(name)
            continue
        if name in found:
            raise CheckpointError(f"{source}: {called([name])[0]} is there twice")
        if own[name].shape != tensor.shape:
            raise CheckpointError(f"{source}: {called([name])[0]} has shape {list(tensor.shape)}, "
                                  f"the config asks for {list(own[name].shape)}")
        if tensor.dtype not in (FLOATS if own[name].is_floating_point() else (own[name].dtype,)):
            raise CheckpointError(f"{source}: {called([name])[0]} is {tensor.dtype}, which is not "
                                  "what the model computes with")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {called([name])[0]} holds numbers that are not "
                                  "finite")
        put(own[name], tensor)
        found.add(name)
    missing = [name for name in own if name not in found and not name.startswith(optional)]
    for what, names in (("has unknown", called(unknown)), ("lacks", called(missing))):
        if names:
            some = ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")
            raise CheckpointError(f"{source}: the checkpoint {what} {len(names)} tensors: {some}")


# ---------------------------------------------------------------------------------------- writing


def write(folder: Path, config: SliMEConfig, tensors: dict[str, Tensor],
          tokenizer: PreTrainedTokenizerBase | None,
          half: Callable[[str], bool] = lambda name: False) -> None:
    """Writes a checkpoint: config.json, safetensors (in shards above 5 GB), tokenizer files.

    All ranks call it, the first one writes what the others send. Tensors whose name `half` names
    become bfloat16.

    Everything is written beside the old files first. Weights change in one step, the replacing or
    removing of one file; so a full disk (OSError) or a kill leaves the old checkpoint or the new
    one. Weights that the new ones replace are removed last.
    """
    dtypes = {name: torch.bfloat16 if half(name) else tensor.dtype
              for name, tensor in tensors.items()}
    if not is_main():
        save_tensors(None, tensors, dtypes)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        new = Path(new)
        save_tensors(new, tensors, dtypes, mark=new.name.removeprefix(".saving-"))
        save_tokenizer(tokenizer, new)
        settings = {"format": "sliming", **asdict(config)}
        (new / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        named = {path.name for path in new.iterdir()}
        order = {INDEX: 1, "config.json": 2}  # what points to others comes after them
        for path in sorted(new.iterdir(), key=lambda path: (order.get(path.name, 0), path.name)):
            os.replace(path, folder / path.name)
    for old in (folder / INDEX, *folder.glob("*.safetensors")):
        if old.name not in named:
            old.unlink(missing_ok=True)
    shutil.rmtree(folder / "lora", ignore_errors=True)  # adapters of a model that lay here


def save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Its files; OSError on a full disk, for which its library has an Exception of its own."""
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(f"{folder}: cannot write the tokenizer ({error})") from error


def write_lora(folder: Path, llm: nn.Module, tensors: dict[str, Tensor], base: str) -> None:
    """Writes the adapters in peft's own format, for `PeftModel.from_pretrained(base, folder)`. All
    ranks call it, the first one writes."""
    adapters = {name.removeprefix("llm.").replace(".default.", "."): tensor
                for name, tensor in tensors.items() if ".lora_" in name}
    adapters = {f"base_model.model.{name}": tensor for name, tensor in adapters.items()}
    dtypes = {name: tensor.dtype for name, tensor in adapters.items()}
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder if is_main() else None, adapters, dtypes, "adapter_model")
    if is_main():
        config = llm.peft_config["default"]
        config.base_model_name_or_path = base
        config.save_pretrained(folder)


def save_tensors(folder: Path | None, tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype],
                 stem: str = "model", mark: str = "0") -> None:
    """Writes tensors as STEM.safetensors or, above SHARD bytes, in files with an index, whose names
    bear `mark`. A rank without a `folder` only sends its parts. OSError on a full disk."""
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}
    shards, room = [], 0
    for name, size in sizes.items():
        if size > room:
            shards, room = [*shards, []], SHARD
        shards[-1].append(name)
        room -= size
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{mark}-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(names, file)
        with (naming(folder / file if folder else Path(file)),
              open(folder / file, "wb") if folder else nullcontext() as out):
            if out:
                out.write(safetensors_header(names, tensors, dtypes, sizes))
            for name in names:
                for part in collected(tensors[name].detach()):
                    part = part.to("cpu", dtypes[name]).contiguous()
                    if not part.isfinite().all():
                        raise FloatingPointError(f"{name} holds numbers that are not finite; "
                                                 "nothing was saved")
                    out.write(part.flatten().view(torch.uint8).numpy())
    if folder and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def safetensors_header(names: list[str], tensors: dict[str, Tensor],
                       dtypes: dict[str, torch.dtype], sizes: dict[str, int]) -> bytes:
    """The beginning of a safetensors file, before the tensors' bytes: 8 bytes of its length, then
    JSON that gives each tensor's dtype, shape and place."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
