"""The benchmark's own parts: it times what it says, refuses wrong results, and writes its table and plot."""

import pytest
import torch

from sliming.bench import everything as bench
from sliming.qformer import QueryFormer

CPU = torch.device("cpu")


def test_medians_take_turns_and_leave_warm_up_out(monkeypatch):
    order, clock = [], [0.0]
    cost = {"a": iter([9, 1, 3, 2]), "b": iter([9, 4, 4, 7])}          # seconds; the first call warms up

    def run(name):
        order.append(name)
        clock[0] += next(cost[name])

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    medians = bench.medians_ms({"a": lambda: run("a"), "b": lambda: run("b")}, CPU, repeats=3, warmup=1)
    assert medians == {"a": 2000, "b": 4000} and order == ["a", "b"] * 4


def test_wrong_results_are_refused():
    right = [torch.arange(5.0), torch.ones(3)]
    bench.check([t.clone() for t in right], right)
    for wrong in (torch.tensor([1, 1, 1.001]), torch.tensor([1, 1, float("nan")])):
        with pytest.raises(RuntimeError, match="wrong: result 1"):
            bench.check([right[0], wrong], right)


def test_kept_bytes_counts_each_storage_once_and_no_inputs():
    former, x = QueryFormer(8, 4), torch.randn(6, 8, requires_grad=True)
    assert bench.kept_bytes(lambda x: x * x, (x,), former) == 0
    # exp keeps its output and sin its input: the same numbers.
    assert bench.kept_bytes(lambda x: x.exp().sin(), (x,), former) == 6 * 8 * 4


def test_query_former_keeps_what_its_docstring_says():
    """x_hat, k with its bias, v, the attention's output in two layouts, W_o's output; less than the peers."""
    crops, patches, queries, dim = 8, 144, 16, 64
    former, x = QueryFormer(dim, queries, num_heads=2), torch.randn(crops, patches, dim)
    kept = {name: bench.kept_bytes(run, (x,), former) for name, run in
            bench.peers(CPU, former)[1].items()}
    per_step = 4 * (patches * dim + 6 * dim * dim + 8 * queries * dim)         # what has no crop axis
    floor = 4 * crops * (3 * patches * dim + 3 * queries * dim + queries * 2 * former.num_heads + 2 * patches)
    assert kept["sliming, sdpa"] <= floor + per_step
    assert kept["straightforward, SDPA"] - kept["sliming, sdpa"] > 0.8 * 4 * crops * patches * dim


def test_peers_of_a_gpu_compute_the_same(monkeypatch):
    """What only a GPU's run times, as far as a CPU can run it: compiled without code generation."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="aot_eager"))
    torch.manual_seed(0)
    former, x = QueryFormer(64, 4, num_heads=2), torch.randn(2, 9, 64)
    bare, formers, _ = bench.peers(torch.device("cuda"), former)
    assert {"sliming, triton", "flex_attention, compiled", "SDPA cudnn"} <= bare.keys()
    parameters = [p for name, p in former.named_parameters() if name != "w_k.bias"]
    expected = bench.results(bench.Straightforward(former), (x,), parameters)
    for name in ("released way", "released way, compiled", "straightforward, compiled", "sliming, sdpa"):
        bench.check(bench.results(formers[name], (x,), parameters), expected)
    qkv = [torch.randn(n, requires_grad=True) for n in ((2, 4, 32), (3, 2, 9, 32), (3, 2, 9, 32))]
    expected = bench.results(bare["SDPA math"], qkv, qkv)
    for name in ("released way, compiled", "SDPA, compiled"):
        bench.check(bench.results(bare[name], qkv, qkv), expected)


def test_attention_prints_tables_and_saves_a_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)
    bench.attention(CPU, tmp_path, sizes=[(32, 4)], crop_counts=(1, 2))
    text = capsys.readouterr().out
    assert text.count("bare attention: Nq 4, D 32") == text.count("query former: Nq 4, D 32") == 2
    assert "wrong" not in text and "not run: sliming, triton: needs a CUDA device" in text
    methods = {line.split("  ")[0] for line in text.splitlines()}
    assert {"released way", "sliming, sdpa", "straightforward, SDPA"} <= methods
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_inference_prints_every_table(model, tmp_path, capsys):
    bench.inference(CPU, tmp_path, {"tiny": lambda: model}, sizes=((200, 90), (336, 336)), answers=3)
    text = capsys.readouterr().out
    rows = {tuple(line.split("  ")[0] for line in text.splitlines() if line.startswith(start)) for start in ("tiny", "200 x 90")}
    assert rows == {("tiny",) * 5, ("200 x 90",)}          # two image sizes in two tables, and the batch
    tiny = model.adapter.num_tokens                        # 128 x 128: 4 crops and the global view, not compressed
    assert f" {5 * tiny} " in text and f" {tiny + 1 + 4 * model.config.num_queries} " in text


def test_ways_of_preprocessing_must_agree(monkeypatch):
    monkeypatch.setattr(bench, "per_crop", lambda image, slices, processor: torch.zeros(1, 3, 336, 336))
    with pytest.raises(RuntimeError, match="the two ways give different pixels"):
        bench.preprocessing(((64, 48),), 1)


def test_unknown_subject_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--what", "weather"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "invalid choice: 'weather'" in capsys.readouterr().err
