"""A rank that shares a model holds its part, a layer and little more, reading and writing it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def resident():
    """Megabytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Peak(threading.Thread):
    """The most resident memory above what was there at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_at = self.most = resident()
        self.start()

    def run(self):
        while True:
            self.most = max(self.most, resident())
            time.sleep(0.005)

    def taken(self):
        most, self.most = self.most, resident()
        return most - self.start_at


def rank(folder):
    """What each rank runs: sharded reading and writing of a bfloat16 model, stage I."""
    from sliming.checkpoints import files, pretrained
    from sliming.config import SliMEConfig, TrainConfig
    from sliming.model import SliME
    from sliming.trainer import prepare
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = SliMEConfig(vision="tiny", llm=str(folder), vision_layer=-1, num_queries=16)
    found = pretrained.read(config)
    model = SliME.build(found, torch.bfloat16, ("adapter", "compression"))
    peak = Peak()
    prepare(model, TrainConfig(stage="1", shard="params", bf16=True), 1, torch.device("cpu"))
    model.fill(found, "cpu")
    row = {"reading": peak.taken()}
    files.write(folder / "out", model.config, model.tensors(), model.processor.tokenizer)
    row["writing"] = peak.taken()
    layer = model.llm.get_decoder().layers[0].parameters()
    row["shard"] = sum(p.to_local().numel() * p.element_size() for p in model.parameters()) / 2**20
    row["layer"] = sum(p.numel() * p.element_size() for p in layer) / 2**20
    print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for resident memory")
@pytest.mark.parametrize("ranks", [2, 4])
def test_half_a_billion_parameters(tmp_path, ranks):
    import shutil

    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from sliming.backbones import TINY
    config = LlamaConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096,
                         num_hidden_layers=20, num_attention_heads=12, num_key_value_heads=4,
                         bos_token_id=0, eos_token_id=1)
    llm = LlamaForCausalLM(config).bfloat16()
    assert sum(p.numel() for p in llm.parameters()) > 5e8
    llm.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "llm" / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
         __file__, str(tmp_path)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
             "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == ranks
    for row in rows:
        print(row)
        most = row["shard"] + row["layer"] + 300
        assert row["reading"] <= most and row["writing"] <= most
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in llm.state_dict().items():
        assert torch.equal(written[f"llm.{name}"], tensor), name


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
