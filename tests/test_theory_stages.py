"""The smallest network like SliME (theory/stages.py): against loops, against torch's optimisers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "theory"))  # scripts, not a package

import stages  # noqa: E402


def setting(seeds, images):
    world, w = stages.make_world(seeds, 1, 0), stages.make_parameters(seeds, 1, 0)
    return world, w, stages.make_batch(world, images, 1, torch.Generator().manual_seed(0))


def test_answer_against_loops():
    """The batched network against one written token by token, for each view."""
    world, w, batch = setting(1, 2)
    adapter, queries, key, value = (w[name][0] for name in ("adapter", "queries", "key", "value"))
    for image in range(2):
        whole = [view @ adapter for view in batch["global"][0, image]]
        parts = []
        for crop in batch["local"][0, image]:
            for query in queries:
                score = torch.stack([query @ key @ patch for patch in crop]) / stages.F**0.5
                seen = sum(a * patch for a, patch in zip(score.softmax(0), crop, strict=True))
                parts.append(seen @ value @ adapter)
        question = batch["question"][0, image]
        for view, tokens in (("both", whole + parts), ("global", whole), ("local", parts)):
            look = torch.stack([4 * (t @ world["key"][0]) @ question for t in tokens]).softmax(0)
            known = sum(a * (t @ world["value"][0]) for a, t in zip(look, tokens, strict=True))
            got = stages.answer(world, w, batch, view)[0, image]
            torch.testing.assert_close(got, known, rtol=1e-4, atol=1e-5)


def test_batch_is_what_it_says():
    world, _, batch = setting(2, 64)
    assert batch["detail"].tolist() == [True, False] * 32
    asked, silent = batch["question"][:, ::2], batch["question"][:, 1::2]
    torch.testing.assert_close(asked.norm(dim=-1), torch.ones(2, 32))  # a key is a unit vector
    assert not silent.any()
    assert set(batch["answer"][:, ::2].flatten().tolist()) == {-1, 1}  # one object's values
    means = set(batch["answer"][:, 1::2].flatten().tolist())
    assert means <= {-1, -0.5, 0, 0.5, 1}  # of four
    # the object that was asked for is in the first crop: one patch's features are those of it
    inside = torch.cat([2 * asked, batch["answer"][:, ::2]], dim=-1)  # [R, B, KEYS + M]
    known = (inside @ world["features"]).relu()[:, :, None]
    distance = (batch["local"][:, ::2, 0] - known).norm(dim=-1)  # [R, B, L]
    assert (distance.min(-1).values < 1e-4).all() and (distance.median(-1).values > 0.5).all()


def test_rates_share_their_data_and_seeds_do_not():
    world, w = stages.make_world(2, 3, 0), stages.make_parameters(2, 3, 0)
    batch = stages.make_batch(world, 4, 3, torch.Generator().manual_seed(0))
    for x in (*world.values(), *w.values(), batch["local"], batch["answer"]):
        assert torch.equal(x[0], x[1]) and torch.equal(x[1], x[2]) and not torch.equal(x[2], x[3])
    assert not torch.equal(world["keys"], stages.make_world(2, 3, 1)["keys"])


def test_runs_in_a_batch_are_independent():
    """Two seeds together have the gradients of the two alone."""
    world, w, batch = setting(2, 6)

    def gradients(world, w, batch):
        miss = stages.answer(world, w, batch, "both") - batch["answer"]
        return torch.autograd.grad(miss.square().mean((1, 2)).sum(), list(w.values()))

    together = gradients(world, w, batch)
    for i in range(2):
        alone = gradients(
            {n: x[i:i + 1] for n, x in world.items()},
            {n: x[i:i + 1].detach().requires_grad_() for n, x in w.items()},
            {n: x if n == "detail" else x[i:i + 1] for n, x in batch.items()})
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i:i + 1], theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimiser", ["SGD", "Adam"])
def test_updates_against_torch(optimiser):
    """Two runs with a rate each, clipped each; a parameter that rests keeps its state."""
    generator = torch.Generator().manual_seed(0)
    w = {name: torch.randn(2, 3, 4, generator=generator) for name in ("a", "b")}
    rates, state = torch.tensor([0.1, 0.02]), {}
    known = [{n: x[i].clone().requires_grad_() for n, x in w.items()} for i in range(2)]
    options = {"momentum": 0.9} if optimiser == "SGD" else {}
    steppers = [getattr(torch.optim, optimiser)(k.values(), lr=float(rate), **options)
                for k, rate in zip(known, rates, strict=True)]
    for t in range(6):
        names = ("a", "b") if t % 3 == 2 else (("a",), ("b",))[t % 2]
        grads = {n: torch.randn(2, 3, 4, generator=generator) * 0.5**t for n in names}
        for i in range(2):
            for n in ("a", "b"):
                known[i][n].grad = grads[n][i].clone() if n in grads else None
            torch.nn.utils.clip_grad_norm_([known[i][n] for n in names], 1.0)
            steppers[i].step()
        stages.update(w, grads, state, rates[:, None, None], optimiser)
    for i in range(2):
        for n in w:
            torch.testing.assert_close(w[n][i], known[i][n].detach(), rtol=1e-4, atol=1e-5)


def test_schedules_spend_the_same_updates():
    adapter, compressor = ("adapter",), stages.COMPRESSOR
    one, two, three = stages_ = (
        ("global", adapter), ("local", compressor), ("both", adapter + compressor))
    assert [stages.schedule("three stages", t, 6) for t in range(6)] == [one] * 2 + [two] * 2 + [
        three] * 2
    assert [stages.schedule("interleaved", t, 99) for t in range(4)] == [*stages_, one]
    assert [stages.schedule("in turns", t, 99) for t in (0, 19, 20, 39, 40)] == [
        ("both", names) for names in (adapter, adapter, compressor, compressor, adapter)]
    assert stages.schedule("end to end", 5, 99) == ("both", adapter + compressor)


def test_interval_and_pairs():
    x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    mean, half = stages.interval(x)
    assert mean == 4.5 and half == pytest.approx(2.3646 * 6**0.5 / 8**0.5, rel=1e-3)  # t, 7 degrees
    rows = [{"optimiser": "SGD", "steps": 1, "recipe": recipe, "loss": loss}
            for recipe, loss in (("end to end", [1.0, 2.0]), ("in turns", [1.5, 2.25]))]
    assert [row["gap"] for row in stages.compare(rows)] == [[0, 0], [0.5, 0.25]]


def test_grids_are_fine_enough():
    for grid in stages.RATES.values():
        assert len(grid) >= 6
        assert all(1.5 <= b / a <= 2 for a, b in zip(grid, grid[1:], strict=False))


@pytest.mark.parametrize("optimiser", ["SGD", "Adam"])
def test_training_learns_and_picks_by_validation(optimiser):
    short, longer = (stages.train("end to end", optimiser, 3, steps) for steps in (1, 80))
    assert sum(longer["loss"]) < 0.9 * sum(short["loss"])
    assert len(longer["loss"]) == len(longer["local"]) == 3
    assert longer["rate"] in stages.RATES[optimiser]
    assert all(share < 1 for view in stages.VIEWS for share in longer[view])


def test_program(tmp_path, monkeypatch, capsys):
    from matplotlib.figure import Figure

    def quick(recipe, optimiser, seeds, steps, seed):
        rank = stages.RECIPES.index(recipe)
        return {"recipe": recipe, "optimiser": optimiser, "steps": steps, "rate": 0.1,
                "edge": rank == 1, "both": [0.9] * seeds, "global": [0.1 * rank] * seeds,
                "local": [1 - 0.1 * rank] * seeds,
                "loss": [0.1 + 0.01 * rank + 0.001 * i * rank for i in range(seeds)]}

    figures, save = [], Figure.savefig
    monkeypatch.setattr(stages, "train", quick)
    monkeypatch.setattr(Figure, "savefig", lambda *call: figures.append(call[0]) or save(*call))
    out = tmp_path / "deep" / "x.png"
    assert stages.main(["--steps", "60", "90", "--seeds", "5", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.stat().st_size > 10_000 and text.count("three stages") == 4
    row = next(line for line in text.splitlines() if "three stages" in line).split("|")
    assert [cell.strip() for cell in row[1:10]] == [
        "SGD", "60", "three stages", "0.1*", "0.1120", "+0.0120 ± 0.0020", "0.90 ± 0.00",
        "0.10 ± 0.00", "0.90 ± 0.00"]
    colours = ["#0072b2", "#222222", "#999999", "#d55e00"]
    shown = ([0, 0.012, 0.024, 0.036], [0, 0.1, 0.2, 0.3], [1, 0.9, 0.8, 0.7])
    for ax, known in zip(figures[0].axes, shown, strict=True):
        points = [bars.lines[0] for bars in ax.containers]
        assert [p.get_xdata()[0] for p in points] == pytest.approx(known * 4)
        assert [p.get_color() for p in points] == colours * 4
    handles, labels = figures[0].axes[0].get_legend_handles_labels()
    assert labels == list(stages.RECIPES)
    assert [handle.lines[0].get_color() for handle in handles] == colours


def test_wrong_values_get_one_line(capsys):
    for arguments in (["--seeds", "4"], ["--steps", "x"], ["--out", "a.doc"], ["--step", "99"]):
        with pytest.raises(SystemExit) as stopped:
            stages.main(arguments)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
