"""Arms differ in what they say and in nothing else; rows survive; the report adds up the rows."""

import json
import runpy
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import in_process

from sliming.config import PRESETS, STAGES
from sliming.guard import InputError
from sliming.inputs import Batch
from sliming.lab import arms, report, run
from sliming.lab.arms import ARMS, END_TO_END, JOINED, THREE_STAGES
from sliming.lab.run import Job, Pictures, Plan, Records, Setting
from sliming.records import resume
from sliming.slicer import Slices
from sliming.tiny.pictures import TrainingSet, render

ROOT = Path(__file__).resolve().parents[2]
SMALL = Setting(steps=(2, 2, 2), pictures=(6, 6, 6), batch=3, rates=(0.5, 1.0), validation=4,
                test=6)


@pytest.fixture
def stages():
    """The paper's stages are there again when a training in this process is over."""
    before = dict(STAGES)
    yield
    STAGES.clear()
    STAGES.update(before)
    PRESETS.pop("lab", None)


def command(*words):
    return in_process(partial(runpy.run_module, "sliming.lab", run_name="__main__"), *words)


# --------------------------------------------------------------------------------------------- arms


def test_compressions_against_loops():
    x = torch.arange(2 * 64 * 3).reshape(2, 64, 3).float()
    for crop, pooled, square in zip(x, arms.Pool()(x), arms.squares(x), strict=True):
        for place in range(16):
            row, column = divmod(place, 4)
            four = [crop[8 * y + x] for y in (2 * row, 2 * row + 1)
                    for x in (2 * column, 2 * column + 1)]
            assert torch.equal(square[place], torch.stack(four))
            assert torch.allclose(pooled[place], sum(four) / 4)
    assert arms.Shuffle(3)(x[:0]).shape == (0, 16, 3)


def test_merging_against_a_loop():
    torch.manual_seed(0)
    tokens, keep = torch.randn(9, 4, dtype=torch.float64), torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 0])
    keep = keep.bool()
    groups = {int(i): [tokens[i]] for i in keep.nonzero()}
    for dropped in (~keep).nonzero()[:, 0]:
        like = {i: torch.cosine_similarity(tokens[i], tokens[dropped], dim=0) for i in groups}
        groups[max(like, key=like.get)].append(tokens[dropped])
    merged = arms.merge(tokens, keep)
    for place, group in groups.items():
        assert torch.allclose(merged[place], sum(group) / len(group))
    assert torch.equal(arms.merge(tokens, torch.ones(9).bool()), tokens)


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_shows_as_many_tokens_as_it_says(name):
    """And every schedule's turns train something."""
    arm = ARMS[name]
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"].model, **arm.settings)
    model = arm.kind.from_backbones(config)
    batch = Batch.pack([model.processor.ask(TrainingSet(3)[i]["image"], "How many?")
                        for i in range(2)])
    crops = sum(columns * rows for columns, rows in batch.grids)
    visual = model.eval().see(batch)
    assert visual.whole.shape[1] == (16 if name == "compressed" else 64)
    assert sum(map(len, visual.local)) == crops * config.num_queries
    shown = sum(int(keep.sum()) for keep in visual.keep)
    assert shown == pytest.approx(crops * config.num_queries * config.gamma, rel=0.1)
    for turn in arm.turns:
        assert sum(p.numel() for part in turn.trained for p in getattr(model, part).parameters())
    kept = torch.cat([tokens[keep] for tokens, keep in zip(visual.local, visual.keep, strict=True)])
    plain = arms.SliME.see(model, batch)
    same = [torch.equal(a, b) for a, b in zip(plain.keep, visual.keep, strict=True)]
    assert all(same) != (arm.kind is arms.AtRandom)
    if arm.kind is arms.Merging:
        before = torch.cat([t[keep] for t, keep in zip(plain.local, plain.keep, strict=True)])
        assert not torch.allclose(kept, before)


def test_soft_turns_damp_one_view_and_change_no_number(model):
    soft = arms.SoftTurns.from_backbones(PRESETS["tiny"].model)
    soft.load_state_dict(model.state_dict())
    soft.steps = 100
    records = [TrainingSet(3)[i] for i in range(2)]
    batch = Batch.pack([run.load_sample(r, None, "chat", model.processor) for r in records])
    batch = replace(batch, gate_noise=torch.zeros(2, 64, 2), router_noise=torch.zeros(
        16 * sum(c * r for c, r in batch.grids)))

    def gradients(model, seen):
        model.train().zero_grad()
        model.vision.eval()
        model.seen = seen
        output = model(batch)
        output.loss.backward()
        return output.loss.item(), [part.query.grad.norm() for part in
                                    (model.adapter.query_former, model.compression)]

    loss, plain = gradients(model, 0)
    for seen, shares in ((0, (0, 1)), (20, (1, 0.2)), (40, (0.4, 1)), (100, (1, 1))):
        same, damped = gradients(soft, seen)
        assert same == pytest.approx(loss, abs=1e-5)
        for got, whole, share in zip(damped, plain, shares, strict=True):
            assert float(got) == pytest.approx(share * float(whole), rel=1e-3, abs=1e-7)


def test_the_balanced_loss_adds_the_worse_view(model):
    balanced = arms.Balanced.from_backbones(PRESETS["tiny"].model).train()
    records = [TrainingSet(3)[i] for i in range(2)]
    batch = Batch.pack([run.load_sample(r, None, "chat", model.processor) for r in records])
    batch = replace(batch, gate_noise=torch.zeros(2, 64, 2))
    visual = balanced.see(batch)
    plain = [arms.SliME.forward(balanced, batch, visual=one).loss.item() for one in
             (visual, replace(visual, local=[], keep=[]), replace(visual, whole=visual.whole[:0]))]
    assert balanced(batch, visual=visual).loss.item() == pytest.approx(
        plain[0] + 0.5 * max(plain[1:]), rel=1e-5)
    assert balanced.eval()(batch, visual=visual).loss.item() == pytest.approx(plain[0], rel=1e-5)


# ------------------------------------------------------------------------------------------ records


def slices(self, index):
    """A picture's pixels in the place of its features."""
    return run.untrained().processor.slice(render(*self.scene(index)))


def test_every_schedule_learns_from_the_same_records(monkeypatch, tmp_path):
    monkeypatch.setattr(Pictures, "__getitem__", slices)

    def seen(turns, seed):
        records = [Records(tmp_path, SMALL, ARMS["default"], turn, seed) for turn in turns]
        return [json.dumps(one[place]["conversations"]) for one in records
                for place in range(len(one.order))]

    three, joined, whole = (seen(turns, 0) for turns in (THREE_STAGES, JOINED, END_TO_END))
    assert len(three) == 18 and sorted(three) == sorted(joined) == sorted(whole)
    assert three != joined != whole
    assert sorted(seen(THREE_STAGES, 1)) != sorted(three)


def test_features_and_pixels_give_the_same_row(stages, tmp_path, monkeypatch):
    job = Job("default", 0, 1.0)
    (tmp_path / "work").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "__getitem__", slices)
        from_pixels = run.train_and_ask(tmp_path, SMALL, job)
    row = run.train_and_ask(tmp_path, SMALL, job)
    assert isinstance(Pictures(tmp_path, SMALL, "test")[0], Slices)
    assert row["right"] == from_pixels["right"] and row["tokens"] == from_pixels["tokens"]
    assert row["loss"] == pytest.approx(from_pixels["loss"], abs=1e-3)
    assert len(row["loss"]) == 6 and len(row["curve"]) == 6


def test_stages_in_common_come_out_the_same(stages, tmp_path):
    """An arm that takes over two stages of the default ends as one that trains them itself."""
    def row(folder, name):
        (folder / "work").mkdir(parents=True, exist_ok=True)
        if not (folder / "features").exists():
            (folder / "features").symlink_to(tmp_path / "features")
        row = run.train_and_ask(folder, SMALL, Job(name, 1, 1.0))
        return {key: value for key, value in row.items() if key not in ("ms_per_step", "memory_gb")}

    (tmp_path / "features").mkdir()
    default = row(tmp_path / "shared", "default")
    assert (tmp_path / "shared" / "work" / "begun-1-1.0").is_dir()
    for name in ("gamma25", "random50", "merge25", "default-rare"):
        assert ARMS[name].late
        assert row(tmp_path / "shared", name) == row(tmp_path / name, name)
    assert row(tmp_path / "gamma25", "default") == default  # of another gamma's beginning
    for arm in ARMS.values():  # that may take over
        assert not arm.late or arm.turns == THREE_STAGES and arm.settings.keys() <= {"gamma"}


# --------------------------------------------------------------------------------------- the queue


def test_a_killed_run_goes_on_and_comes_out_the_same(tmp_path):
    names = ["default", "merge25"]
    run.run(tmp_path / "whole", SMALL, names, 2, 2)
    whole = (tmp_path / "whole" / "results.jsonl").read_text().splitlines()
    assert len(whole) == 2 * 2 + 2 and not list((tmp_path / "whole" / "work").glob("[!b]*-*/"))
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "setting.json").write_text((tmp_path / "whole" / "setting.json").read_text())
    (cut / "results.jsonl").write_text("\n".join(whole[:4]) + "\n" + whole[4][:40])
    run.run(cut, SMALL, names, 2, 1)
    rows = (cut / "results.jsonl").read_text().splitlines()
    assert rows[:4] == whole[:4] and len(rows) == 6

    def results(lines):
        rows = [json.loads(line) for line in lines]
        return {(r["arm"], r["seed"], r["rate"]): (r["right"], r["loss"]) for r in rows}

    assert results(rows) == results(whole)
    # What is there makes tables and charts.
    report.report(cut)
    assert {path.name for path in cut.glob("*.png")} == {"table3.png", "table4.png", "frontier.png",
                                                         "schedules.png"}
    with pytest.raises(InputError, match="another setting"):
        run.run(cut, replace(SMALL, batch=4), names, 2, 1)
    other = json.loads((cut / "setting.json").read_text()) | {"preset": "another"}
    (cut / "setting.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="another tiny preset"):
        run.run(cut, SMALL, names, 2, 1)
    (cut / "setting.json").unlink()
    with pytest.raises(InputError, match="no setting.json"):
        run.run(cut, SMALL, names, 2, 1)
    assert (cut / "results.jsonl").read_text().splitlines() == rows


def ends_late():
    Finalize(None, time.sleep, (0.5,), exitpriority=0)
    return "done"


def test_a_process_that_is_done_ends_by_itself(tmp_path):
    """Ended by its watch instead, as it is when the parent dies, it left semaphores behind, of
    which Python warns when the program ends."""
    context = get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=run.in_child, args=(there, tmp_path / "log", ends_late, ()))
    process.start()
    there.close()
    assert here.recv() == "done"
    here.close()
    process.join()
    assert process.exitcode == 0


def test_seed_0_chooses_the_rate_of_the_others():
    rows = []
    plan = Plan(SMALL, ["default", "e2e"], 3, rows)
    first = [plan.following() for _ in range(5)]
    assert first == [Job("default", 0, 0.5), Job("default", 0, 1.0), Job("e2e", 0, 0.5),
                     Job("e2e", 0, 1.0), None]  # no rate is known yet
    for job, loss in zip(first, (1.2, 0.8, 0.8, 1.2), strict=False):
        rows.append({"arm": job.arm, "seed": 0, "rate": job.rate, "validation_loss": loss})
    assert [plan.following() for _ in range(5)] == [
        Job("default", 1, 1.0), Job("e2e", 1, 0.5), Job("default", 2, 1.0), Job("e2e", 2, 0.5),
        None]


def test_wrong_words_get_one_line(tmp_path):
    for words, said in ((["run", "--arms", "nobody", "default", "--out", tmp_path / "a"], "nobody"),
                        (["report", "--out", tmp_path / "a"], "no results yet"),
                        (["run", "--seeds", "0"], "--seeds")):
        done = command(*words)
        assert done.returncode and said in done.stderr
        assert "\n" not in done.stderr.strip(), done.stderr
    assert not (tmp_path / "a").exists()
    listed = command().stdout
    assert all(f"{name} " in listed for name in ARMS)


# ----------------------------------------------------------------------------------------- evidence


def test_the_interval_by_hand():
    table = np.array([[1, 0, 1, 1], [0, 0, 1, 0]])
    # Seeds .75 and .25: variance .125, over 2. Pictures .5, 0, 1, .5: variance .5 / 3, over 4.
    expected = 12.706 * (0.125 / 2 + 0.5 / 3 / 4) ** 0.5
    assert report.interval(table) == pytest.approx([0.5, expected], abs=1e-4)
    assert report.interval(table[:1]) == [0.75, None]


def test_intervals_cover_the_truth():
    """Draws of seeds and of pictures, each with an effect of its own."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        chance = 0.5 + rng.normal(0, 0.1, (5, 1)) + rng.normal(0, 0.15, (1, 80))
        mean, half = report.interval((rng.random((5, 80)) < chance).astype(float))
        hits += abs(mean - 0.5) <= half
    assert hits >= 0.93 * 300


def test_verdicts():
    for found, said in (([[0.05, 0.04]], "holds"), ([[0.05, 0.06]], "cannot"),
                        ([[-0.05, 0.04]], "does not"), ([[0.0, 0.009]], "does not"),
                        ([[0.05, 0.04], [0.02, 0.03]], "cannot"), ([[0.05, None]], "cannot"),
                        ([[0.05, 0.04], [-0.02, 0.01]], "does not"), ([None], "cannot")):
        assert report.verdict(found).startswith(said), found


def test_claims_name_arms_and_questions():
    for claim in report.CLAIMS:
        for arm, other, asked in claim.above:
            view = asked.split("/")[1]
            assert view in ARMS[arm].asked and view in ARMS[other].asked
    assert {arm.against for arm in ARMS.values()} <= set(ARMS)


def test_the_readme_says_what_the_results_say():
    folder = ROOT / "sliming" / "lab"
    text, results = (folder / "README.md").read_text(), {}
    for name in ("rows", "earlier", "again"):
        setting = json.loads((folder / name / "setting.json").read_text())
        results[name] = report.summary(resume(folder / name / "results.jsonl"), setting)
    assert json.loads(json.dumps(results["rows"])) == json.loads(
        (folder / "results.json").read_text())
    assert report.tables(results["rows"]) in text
    for name in ("earlier", "again"):
        assert report.verdicts(results[name]) in text
