"""The benches' parts: they time what they say, refuse wrong results, and print their tables."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch

from sliming.bench import attention, busy, data, inference, laptop, router, run, timing, training
from sliming.bench.gpu import gpu, run_parts
from sliming.bench.memory import estimate
from sliming.config import TrainConfig
from sliming.qformer import QueryFormer
from sliming.trainer import one_step, set_up

CPU = torch.device("cpu")


def test_medians_take_turns_and_leave_warm_up_out(monkeypatch):
    order, clock = [], [0.0]
    cost = {"a": iter([9, 1, 3, 2]), "b": iter([9, 4, 4, 7])}   # seconds; the first call warms up

    def call(name):
        order.append(name)
        clock[0] += next(cost[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    medians = timing.medians_ms({name: partial(call, name) for name in "ab"}, CPU, 3, 1)
    assert medians == {"a": 2000, "b": 4000} and order == ["a", "b"] * 4


def test_query_former_keeps_what_its_docstring_says():
    """x_hat, k with its bias, v, the output in two layouts, W_o's output; less than the peers."""
    crops, patches, queries, dim = 8, 144, 16, 64
    former, x = QueryFormer(dim, queries, num_heads=2), torch.randn(crops, patches, dim)
    leaf = x.clone().requires_grad_()                    # exp keeps what sin keeps; inputs are free
    assert attention.kept_bytes(lambda x: (x * x).exp().sin(), (leaf,), former) == 4 * x.numel()
    kept = {name: attention.kept_bytes(way, (x,), former)
            for name, way in attention.peers(CPU, former)[1].items()}
    per_step = 4 * (patches * dim + 6 * dim * dim + 8 * queries * dim)
    per_crop = 3 * patches * dim + 3 * queries * dim + queries * 2 * former.num_heads + 2 * patches
    assert kept["sliming, sdpa"] <= 4 * crops * per_crop + per_step
    assert kept["straightforward, SDPA"] > kept["sliming, sdpa"] + 3.2 * crops * patches * dim


def test_peers_of_a_gpu_compute_the_same_and_wrong_results_are_refused(monkeypatch):
    """What only a GPU's run times, as far as a CPU can: compiled without code generation."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    former = QueryFormer(64, 4, num_heads=2)
    bare, whole, _ = attention.peers(torch.device("cuda"), former)
    cannot = ("triton", "flex", "flash", "efficient", "cudnn")
    assert all(any(word in name for name in bare) for word in cannot)
    for ways, (_, *case, expected) in zip((bare, whole), attention.cases(former, 2, 9),
                                          strict=True):
        for name in [name for name in ways if not any(word in name for word in cannot)]:
            got = attention.results(ways[name], *case)
            attention.check(got, expected)
        for wrong in (got[-1] * 1.001, got[-1] * float("nan")):
            with pytest.raises(RuntimeError, match=f"wrong: result {len(got) - 1}"):
                attention.check([*got[:-1], wrong], expected)


def test_attention_prints_tables_and_saves_a_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "copy_bandwidth", lambda device: 1e10)
    attention.attention(CPU, tmp_path / "new", [(32, 4, (1, 2))])
    text = capsys.readouterr().out
    assert text.count("attention: Nq 4, D 32") == text.count("query former: Nq 4, D 32") == 2
    assert "wrong" not in text and "not run: sliming, triton: needs a CUDA device" in text
    assert (tmp_path / "new" / "attention.png").stat().st_size > 10_000


def test_small_subjects_print_their_tables(model, tmp_path, capsys, monkeypatch):
    for room in (training, data):                              # a process costs seconds of imports
        monkeypatch.setattr(room, "own_process", lambda: ThreadPoolExecutor(1))
    views, logits, loss = [], [], training.F.cross_entropy
    monkeypatch.setattr(training.F, "cross_entropy",
                        lambda x, *rest, **more: logits.append(len(x)) or loss(x, *rest, **more))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, x: views.append(len(x[0])) if type(module) is type(model.vision) else None)
    training.train(CPU, tmp_path, samples=2, repeats=1)
    hook.remove()
    router.router(CPU, tmp_path, {"uneven": (16, [4, 9, 1])}, repeats=1)
    data.preprocessing(CPU, tmp_path, ((200, 90), (336, 336)), 1)
    data.data(CPU, tmp_path, 300)
    inference.inference(CPU, tmp_path, {"tiny": lambda: model}, 3)
    text = capsys.readouterr().out
    first = [line.split("  ")[0] for line in text.splitlines()]
    assert {"uneven", "200 x 90", "336 x 336", "records.json", "40 shards of parquet", "a.parquet",
            *training.WAYS} <= set(first)
    assert first.count("tiny") == 5 and "      300  " in text
    tokens = model.adapter.num_tokens         # 128 x 128: 4 crops and the whole, not compressed
    assert f" {5 * tokens} " in text and f" {tokens + 1 + 4 * model.config.num_queries} " in text
    few, many, _, _, most = logits[:5]        # of WAYS in turn, and what the tower was given
    assert logits[:5] == [few, many, few, few, most] and few < 20 < 100 < many == most
    real, _, missing = views[:3]
    assert views[:7] == [real, real, 20 - real, real, real, 20 - real, real]


def test_rows_of_the_laptop(capsys, monkeypatch, tmp_path):
    laptop.resizing(CPU, tmp_path, sizes=((1500, 900),), repeats=1)
    laptop.features(CPU, tmp_path, steps=1)
    laptop.answers(CPU, tmp_path, questions=4)
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: ran.append(words[1:3]))
    laptop.starting(CPU, tmp_path, repeats=1)
    assert ran == [["train.py", "--help"], ["sample.py", "--help"], ["sample.py", "--checkpoint"]]
    rows = capsys.readouterr().out.splitlines()
    for begin, numbers in (("1500 x 900, decoded", 9), ("1500 x 900, JPEG", 9), ("stage 2", 3),
                           ("one question a picture", 3), ("all questions of a picture", 3),
                           ("sample.py, one question", 1)):
        row = next(row for row in rows if row.startswith(begin))
        assert len([float(cell) for cell in row.removeprefix(begin).split()]) == numbers


def test_two_trainings_have_the_setting_that_their_row_names(tmp_path, capsys, monkeypatch):
    def submit(_, folder, steps):
        seen.append((os.environ.get("GOMP_SPINCOUNT"), steps))
        (done := Future()).set_result(2.0 * steps)
        return done

    seen, pool = [], ThreadPoolExecutor(1)
    pool.submit = submit
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr(busy, "own_process", lambda: pool)
    busy.busy(CPU, tmp_path, ({"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "5"}), 3, 1)
    assert seen == [(count, steps) for count in ("9", "5") for steps in (1, 3, 1, 1, 3, 3)]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["GOMP_SPINCOUNT=5", "6.0", "1.00", "6.0", "1.00"]


def test_whole_training_steps_run(model, tmp_path, capsys, monkeypatch):
    model.save_pretrained(tmp_path)
    assert busy.training_seconds(str(tmp_path), 1) > 0
    monkeypatch.setattr(training, "picture", lambda *_: timing.picture(64, 64))
    training.full_size(CPU, lambda: model, 2, 2)
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split("  ")[0] for row in rows] == ["1", "2", "3", "3 LoRA"]


def test_what_is_wrong_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "normalised", lambda _: torch.zeros(1, 3, 336, 336))
    monkeypatch.setattr(router, "padded", lambda local, *_: [row[:, 0] > 9 for row in local])
    (tmp_path / "file").touch()
    for what, said in (("weather", "invalid choice: 'weather'"), ("preprocessing", "other pixels"),
                       ("router", "chooses other tokens"), ("attention", "File exists")):
        monkeypatch.setattr("sys.argv", ["bench", "--what", what, "--out", f"{tmp_path}/file"])
        with pytest.raises(SystemExit) as stopped:
            run.main()
        line = capsys.readouterr().err.strip() if what == "weather" else stopped.value.code
        assert "sliming.bench: " in line and said in line and "\n" not in line


def test_memory_on_paper_is_what_a_run_holds(tmp_path):
    """Weights, gradients and moments of the tiny preset's stages, to the byte."""
    start = None
    for stage in (1, 3):
        config = TrainConfig(out=str(tmp_path), max_steps=1, batch_size=2, init_from=start,
                             bf16=True)
        begun = set_up(config, stage, CPU)
        parts = estimate(begun.model, begun.recipe, stage, 1)
        one_step(begun, next(begun.shares), 0, 0.0)
        begun.optimizer.step()
        weights = sum(p.numel() * p.element_size() for p in begun.model.parameters())
        # Adapter and compression stay in float32, whatever is trained: a few MB at any size.
        frozen = sum(p.numel() for part in (begun.model.adapter, begun.model.compression)
                     for p in part.parameters() if not p.requires_grad)
        assert weights - 2 * frozen == parts["weights"]
        assert sum(4 * p.numel() for p in begun.trained) == parts["gradients"]
        moments = sum(m.numel() * 4 for state in begun.optimizer.state.values()
                      for name, m in state.items() if "exp" in name)
        assert moments == parts["moments"]
        start = str(tmp_path / "start")
        begun.model.save_pretrained(start)


def test_parts_end_in_time_and_leave_their_output(tmp_path, capsys):
    code = {"good": (20, "print('a row')"), "bad": (20, "1 / 0"), "long": (1, "while True: pass")}
    parts = {name: (limit, [sys.executable, "-c", text]) for name, (limit, text) in code.items()}
    run_parts(tmp_path, parts, "no device")
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    ends = {name: row["end"] for name, row in found.items()}
    assert ends == {"good": "done", "bad": "exit 1", "long": "stopped after 1 s"}
    assert (tmp_path / "good.txt").read_text() == "a row\n" and "long" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs a CUDA device"):
        gpu(CPU, tmp_path)
