"""The language model's side of a GPU, as far as a CPU can tell: precision, packed attention, its
cache, compiled layers.

Legend: T packed tokens, Tk rows of keys, H attention heads, Hkv of keys and values, Dh head size.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from flows import run_train
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sliming import backbones
from sliming.backbones import (
    TINY,
    PackedCache,
    Segments,
    build_llm,
    packed_attention,
    without_cudnn,
)
from sliming.checkpoints import pretrained, released
from sliming.checkpoints.states import States
from sliming.config import PRESETS, Recipe, TrainConfig
from sliming.data import load_sample
from sliming.inputs import Batch
from sliming.model import SliME
from sliming.tiny.held_out import held_out
from sliming.trainer import prepare, set_up

BF16, CPU = torch.bfloat16, torch.device("cpu")


# ---------------------------------------------------------------------------------------- precision

def buffers(model):
    return {name: (buffer.dtype, buffer.double().sum().item())
            for name, buffer in model.named_buffers()}


def begun(**flags):
    """The model of stage III in bfloat16 as training begins with it: built without weights,
    divided, filled."""
    config = TrainConfig(bf16=True, **flags)
    found = pretrained.read(PRESETS["tiny"].model)
    model = SliME.build(found, BF16, float32=("adapter", "compression"))
    prepare(model, config, 3, CPU)
    model.fill(found, CPU, offload=config.shard == "offload")
    return model


def sharded(rank, file, results):
    """One of two ranks: the buffers where parameters are divided or kept on the CPU."""
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    for mode in ("params", "offload"):
        results.put(buffers(begun(shard=mode)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("door", ["from_backbones", "ours", "released", "lora", "sharded"])
def test_buffers_keep_their_precision(model, tmp_path, door):
    """Rotary frequencies, positions, pixel statistics: whatever the way into a model in bfloat16,
    they are as in float32."""
    if door == "sharded":
        results = multiprocessing.get_context("forkserver").SimpleQueue()
        multiprocessing.start_processes(sharded, (tmp_path / "store", results), nprocs=2,
                                         start_method="forkserver")
        found = [results.get() for _ in range(4)]
    elif door == "lora":
        pytest.importorskip("peft")
        new = begun(lora=True)
        assert new.llm.dtype == BF16 and any(".lora_" in name for name, _ in new.named_parameters())
        found = [buffers(new)]
    elif door == "from_backbones":
        found = [buffers(SliME.from_backbones(PRESETS["tiny"].model, BF16))]
    else:
        model.save_pretrained(tmp_path) if door == "ours" else released.export(model, tmp_path)
        new = SliME.from_pretrained(tmp_path, dtype=BF16)
        assert {parameter.dtype for parameter in new.parameters()} == {BF16}
        found = [buffers(new)]
    expected = buffers(model)
    assert {"llm.model.rotary_emb.inv_freq", "compression.position", "vision.mean"} <= set(expected)
    assert all(one == expected for one in found)


@torch.no_grad()
def test_bfloat16_at_far_positions_is_as_good_as_that_of_transformers(tmp_path):
    """Logits beyond position 2,000 of a Llama with Llama 3's rotary base, against float32."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llm")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=128, max_position_embeddings=4096, initializer_range=0.1,
                         rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
                         bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.randint(0, len(tokenizer), (2600,))

    def theirs(dtype):
        llm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        return llm(ids[None]).logits[0, 2000:].float()

    def ours(model):
        hidden = model.decode(model.llm.get_input_embeddings()(ids), [len(ids)])
        return model.llm.get_output_embeddings()(hidden[2000:]).float()

    exact = theirs(torch.float32)
    model = SliME.from_backbones(replace(PRESETS["tiny"].model, llm=str(tmp_path)), BF16)
    good, usual = ((logits - exact).norm() for logits in (ours(model), theirs(BF16)))
    assert good <= 1.2 * usual
    model.llm.to(BF16)  # what must not happen: buffers are cast too
    assert (ours(model) - exact).norm() > 3 * usual


# ---------------------------------------------------------------------------------- all in one call

def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size,
             enable_gqa, seqused_k=None):
    """torch's varlen_attn as its documentation and flash attention's source have it, in plain
    torch: [T, H, Dh]. The causal mask is aligned at the last query and the last key; seqused_k are
    the keys of a sequence that count."""
    assert query.dim() == 3 and all(t.stride(-1) == 1 and len(t) == len(key) for t in (key, value))
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (cu_seq_q, cu_seq_k))
    q_bounds, k_bounds = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert [q_bounds[0], q_bounds[-1]] == [0, len(query)]
    assert [k_bounds[0], k_bounds[-1]] == [0, len(key)]
    assert enable_gqa or query.shape[1] == key.shape[1]
    heads, out, longest = query.shape[1] // key.shape[1], torch.zeros_like(query), [0, 0]
    for i in range(len(q_bounds) - 1):
        q = query[q_bounds[i]:q_bounds[i + 1]].transpose(0, 1)
        k, v = (t[k_bounds[i]:k_bounds[i + 1]] for t in (key, value))
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32 and seqused_k[i] <= len(k)
            assert not torch.is_grad_enabled()
            k, v = k[:seqused_k[i]], v[:seqused_k[i]]
        k, v = (t.transpose(0, 1).repeat_interleave(heads, 0) for t in (k, v))
        scores = scale * q @ k.mT
        longest = [max(pair) for pair in zip(longest, scores.shape[1:], strict=True)]
        if window_size == (-1, 0):
            ones = torch.ones(scores.shape[1:], dtype=torch.bool)
            scores = scores.masked_fill(ones.triu(1 + k.shape[1] - q.shape[1]), -torch.inf)
        else:
            assert window_size == (-1, -1)
        out[q_bounds[i]:q_bounds[i + 1]] = (scores.softmax(-1) @ v).transpose(0, 1)
    assert [max_q, max_k] == longest
    return out


@pytest.mark.parametrize("lengths, rooms, keys", [
    ([5], None, None), ([1, 7, 3], None, None), ([64, 1, 1, 130], None, None),
    ([1, 1, 1], [9, 4, 7], [8, 4, 1]), ([3, 1, 6], [9, 4, 7], [8, 4, 6])], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_all_at_once_equals_one_after_the_other(monkeypatch, lengths, rooms, keys, kv_heads):
    """Forward and every gradient, float64; with rooms as a cache has them, too."""
    monkeypatch.setattr(backbones, "varlen_attn", stand_in)
    torch.manual_seed(0)
    q = torch.randn(1, 4, sum(lengths), 8, dtype=torch.float64, requires_grad=keys is None)
    k, v = (torch.randn(1, sum(rooms or lengths), kv_heads, 8, dtype=torch.float64).transpose(1, 2)
            .requires_grad_(keys is None) for _ in range(2))
    segments = Segments(lengths, CPU, rooms, keys)
    with torch.set_grad_enabled(keys is None):
        results = [attend(q, k, v, segments, 0.3, 0.0)
                   for attend in (backbones.attend_at_once, backbones.attend_in_turn)]
    if keys is None:
        weight = torch.randn_like(results[0])
        results = [(out, *torch.autograd.grad((out * weight).sum(), (q, k, v))) for out in results]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cached, new", [(0, 4), (6, 1), (6, 3)])
def test_without_segments_the_row_continues_one_sample(cached, new):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8) for length in (new, cached + new, cached + new))
    out, _ = packed_attention(None, q, k, v, None, scaling=1.0)
    mask = torch.ones(new, cached + new, dtype=torch.bool).tril(cached)
    scores = (q @ k.mT).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), atol=1e-6, rtol=1e-5)
    for other, options in ((None, {"sliding_window": 2}), (mask[None, None], {})):
        with pytest.raises(ValueError, match="no sliding window and no other mask"):
            packed_attention(None, q, k, v, other, scaling=1.0, **options)


def test_torch_takes_what_it_is_given():
    """Its own operator, on the meta device: layouts, groups of heads, the backward pass; and with
    room, without one."""
    segments = Segments([3, 4], "meta")
    q = torch.empty(1, 7, 4, 32, dtype=BF16, device="meta", requires_grad=True)
    k, v = (torch.empty(1, 7, 2, 32, dtype=BF16, device="meta", requires_grad=True)
            for _ in range(2))
    out = backbones.attend_at_once(*(t.transpose(1, 2) for t in (q, k, v)), segments, 0.1, 0.0)
    assert out.shape == (1, 7, 4, 32) and out.dtype == BF16
    out.sum().backward()
    assert k.grad.shape == k.shape
    segments = Segments([1, 2], "meta", rooms=[5, 9], keys=[4, 8])
    with torch.no_grad():
        k, v = (torch.empty(1, 2, 14, 32, dtype=BF16, device="meta") for _ in range(2))
        out = backbones.attend_at_once(q[:, :3].transpose(1, 2), k, v, segments, 0.1, 0.0)
    assert out.shape == (1, 3, 4, 32)


def test_which_way(monkeypatch):
    """Two-byte numbers on a GPU in one call, autocast's too; float32, dropout and odd heads one
    after the other."""
    monkeypatch.setattr(backbones, "takes_all_at_once", lambda device: True)
    ways = []
    for way in ("attend_at_once", "attend_in_turn"):
        monkeypatch.setattr(backbones, way, lambda q, *_, way=way: ways.append((way, q.dtype)) or q)

    def attend(dtype, width=16, values=None, **options):
        q = torch.zeros(1, 2, 3, width, dtype=dtype)
        return packed_attention(None, q, q, q.to(values or dtype), None, 1.0, **options)

    for options in ({"dtype": BF16}, {"dtype": torch.float16}, {"dtype": torch.float32},
                    {"dtype": BF16, "dropout": 0.1}, {"dtype": BF16, "width": 20},
                    {"dtype": BF16, "width": 264}):
        attend(**options)
    with torch.autocast("cpu", BF16):  # where rotated queries are float32 and values are not
        attend(torch.float32, values=BF16)
    assert [way for way, _ in ways] == (["attend_at_once"] * 2 + ["attend_in_turn"] * 4
                                        + ["attend_at_once"])
    assert ways[-1][1] == BF16


def test_no_plans_of_cudnn(monkeypatch, model):
    """SDPA on a GPU leaves cuDNN out: it makes a plan for every new length.
    On a CPU nothing is set."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with without_cudnn(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    entered = []
    monkeypatch.setattr(backbones, "without_cudnn",
                        lambda device: entered.append(device) or without_cudnn(device))
    x = torch.randn(1, 2, 3, 8)
    packed_attention(None, x, x, x, None, scaling=1.0)
    model.vision(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert entered == [CPU, CPU]


# ------------------------------------------------------------------------------------------ answers

@pytest.fixture
def questions(model):
    """Prompts of all lengths for a model whose answers differ and end at different steps."""
    torch.manual_seed(4)
    model.llm.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.llm.lm_head.weight))
    asked = [held_out(family, i) for i, family in
             enumerate(("global", "detail", "detail", "detail", "global"))]
    prompts = [model.processor.ask(record["image"], record["conversations"][0]["value"])
               for record in asked]
    prompts.append(model.processor.ask(None, "Who?"))
    model.end_ids = set()
    model.end_ids = {ids[4] for ids in model.generate_batch(prompts[:3], max_new_tokens=5)}
    return prompts


class Copies(TorchDispatchMode):
    """Bytes that copies wrote."""

    written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::cat", "aten::copy_", "aten::index_copy_"):
            copied = out if function._schema.name == "aten::cat" else args[-1]
            self.written += copied.numel() * copied.element_size()
        return out


def test_answers_do_not_depend_on_rooms_or_the_way_of_attending(model, questions, monkeypatch):
    """Rooms that are moved at every step or never, samples that end in between; and all samples in
    one call."""
    expected = model.generate_batch(questions, max_new_tokens=12)
    assert len({len(ids) for ids in expected}) > 2
    for room in (0, 3):
        monkeypatch.setattr(PackedCache, "ROOM", room)
        assert model.generate_batch(questions, max_new_tokens=12) == expected
    monkeypatch.setattr(backbones, "varlen_attn", stand_in)
    monkeypatch.setattr(backbones, "attend_in_turn", backbones.attend_at_once)
    assert model.generate_batch(questions, max_new_tokens=12) == expected


def test_a_step_copies_only_what_is_new(model, questions):
    model.end_ids = set()
    written = []
    for steps in (2, 42):
        with Copies() as copies:
            model.generate_batch(questions, max_new_tokens=steps)
        written.append(copies.written)
    llm = model.llm.config
    # Keys and values, float32; what is more: outputs joined, and the rotation's halves.
    new = 4 * 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * len(questions)
    assert new <= (written[1] - written[0]) / 40 < 3 * new


# --------------------------------------------------------------------------------- waits, compiling

class Waits(TorchDispatchMode):
    """What makes the host wait for a GPU: numbers that go back to it, sizes that depend on numbers,
    lists that go there."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        masked = name in ("aten::index", "aten::index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1])
        self.count += masked or name in ("aten::nonzero", "aten::_local_scalar_dense",
                                         "aten::masked_select", "aten::lift_fresh")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts, most", [("global", 1), ("local", 2), ("both", 2)])
def test_a_forward_pass_waits_once_or_twice(model, monkeypatch, parts, most):
    """For how many local tokens are kept, and for where something is learned. What Segments sends
    is pinned: no wait."""
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "that"}]
    samples = [load_sample({"image": held_out("detail", index)["image"], "conversations": turns},
                           None, "chat", model.processor, parts=parts) for index in range(3)]
    batch, waits, tolist = Batch.pack(samples), Waits(), torch.Tensor.tolist

    def counted(tensor):
        waits.count += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with waits:
        model.train()(batch, parts=parts, normalizer=7.0, logits=False)
    assert waits.count - 1 == most


@torch.library.custom_op("sliming_test::packed", mutates_args=())
def opaque(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor,
           scale: float) -> torch.Tensor:
    """Packed attention as the compiler sees it on a GPU: one node."""
    return torch.cat([torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in part), is_causal=True, scale=scale).transpose(0, 1)
        for part in zip(*(t.tensor_split(bounds[1:-1].long()) for t in (q, k, v)), strict=True)])


opaque.register_fake(lambda q, *_: torch.empty_like(q))
opaque.register_autograd(lambda ctx, g: (g, 2 * g, 3 * g, None, None))  # all that is compared


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_compile_once(monkeypatch, recompute):
    """Twenty steps of other lengths and numbers of samples run what the first compiled, to the same
    numbers."""
    monkeypatch.setattr(backbones, "takes_all_at_once", lambda device: True)
    monkeypatch.setattr(backbones, "varlen_attn", lambda q, k, v, bounds, *_, scale, **__: opaque(
        q.contiguous(), k.contiguous(), v.contiguous(), bounds, scale))
    monkeypatch.setattr(backbones, "attend_in_turn", backbones.attend_at_once)  # for float32, too
    torch._dynamo.reset()
    llms, graphs = [SliME.from_backbones(PRESETS["tiny"].model).llm.train() for _ in range(2)], []
    counters = torch._dynamo.utils.counters
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options:
                        compile(layer, backend="aot_eager", **options))
    if recompute:
        for llm in llms:
            llm.activation_checkpointing_enable({"use_reentrant": False})
    backbones.compile_layers(llms[0], True, CPU)
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        count = 1 + (5 * step + 1) % 6
        lengths = torch.randint(1 + (step == 0), 40, (count,), generator=generator).tolist()
        x = torch.randn(1, sum(lengths), 128, generator=generator)
        segments, results = Segments(lengths, CPU), []
        for llm in llms:
            rows = x.clone().requires_grad_()
            hidden = llm.get_decoder()(inputs_embeds=rows, segments=segments, use_cache=False,
                                       position_ids=segments.positions[None]).last_hidden_state
            results.append((hidden, *torch.autograd.grad(hidden.square().sum(), rows)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0 and not counters["graph_break"]


def test_what_a_gpu_gets_by_default(model, monkeypatch, tmp_path):
    """AdamW in one kernel, as everywhere; four readers; no compiling where it would never end."""
    class Stop(Exception):
        pass

    def stop(groups, fused, **_):
        raise Stop(fused)

    monkeypatch.setattr("torch.optim.AdamW", stop)
    monkeypatch.setattr(SliME, "fill", lambda *_, **__: None)
    monkeypatch.setattr("sliming.trainer.training_set", lambda *_: range(100))
    monkeypatch.setattr("sliming.trainer.prepare", lambda model, *_: model)
    monkeypatch.setattr(Recipe, "check", lambda *_: None)
    for flags, device in (({}, "cpu"), ({}, "cuda"), ({"shard": "offload"}, "cpu")):
        with pytest.raises(Stop) as stopped:
            set_up(TrainConfig(out=str(tmp_path), **flags), 1, torch.device(device))
        assert stopped.value.args[0] is True, (flags, device)
    monkeypatch.undo()
    meta = torch.nn.Linear(2, 2, device="meta")  # a state read before any step: AdamW's own layout
    optimizer = torch.optim.AdamW([{"params": [*meta.parameters()], "fused": True}])
    states = States(tmp_path, meta, optimizer, {}, 1).tensors()
    assert {t.device.type for name, t in states.items() if name.endswith("/step")} == {"meta"}
    asked = ((None, "cuda"), (None, "cpu"), (0, "cuda"), (3, "cpu"))
    assert [TrainConfig(workers=w).readers(d) for w, d in asked] == [4, 0, 0, 3]
    with pytest.raises(ValueError, match="--compile needs --bf16 and a GPU"):
        prepare(model, TrainConfig(compile=True, bf16=True), 3, CPU)


def test_the_tests_run_on_the_cpu(tmp_path, monkeypatch):
    """Also on a machine with GPUs: neither they nor the processes that they start see one."""
    assert not torch.cuda.is_available()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    script = tmp_path / "script.py"
    script.write_text("import os\ndef main(): print(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    assert run_train([], program=script).stdout == "\n"
    assert run_train([], program=script, CUDA_VISIBLE_DEVICES="1").stdout == "1\n"


@pytest.mark.parametrize("kind, settings, named", [
    ("mistral", {"sliding_window": 64}, "mistral has .*sliding_window"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "qwen2 has .*sliding"),
    ("gemma2", {}, "gemma2 has .*attn_logit_softcapping"),
    ("gpt_oss", {}, "gpt_oss has .*sliding"),
    ("mpt", {}, "mpt has an attention of its own"),
    ("mamba", {}, "mamba has .*an attention of its own")])
def test_language_models_that_attend_otherwise_are_refused_by_name(kind, settings, named):
    with pytest.raises(ValueError, match=f"{named}.*; take one .*Qwen2"):
        build_llm({"model_type": kind, **settings})


@pytest.mark.parametrize("kind, settings", [
    ("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": None})])
def test_packed_samples_of_other_language_models_are_as_alone(kind, settings):
    """Hidden states of two samples in one row, and of each by itself."""
    torch.manual_seed(0)
    llm = build_llm({"model_type": kind, "vocab_size": 50, "hidden_size": 32, "head_dim": 8,
                     "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2, **settings})
    llm.to_empty(device="cpu")
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    llm.get_decoder().rotary_emb = type(llm.get_decoder().rotary_emb)(llm.config)
    inputs, lengths = torch.randn(11, 32), [4, 7]

    def read(inputs, lengths):
        segments = Segments(lengths, "cpu")
        return llm.get_decoder()(inputs_embeds=inputs[None], segments=segments, use_cache=False,
                                 position_ids=segments.positions[None]).last_hidden_state[0]

    alone = torch.cat([read(part, [len(part)]) for part in inputs.split(lengths)])
    torch.testing.assert_close(read(inputs, lengths), alone, atol=1e-5, rtol=1e-5)
