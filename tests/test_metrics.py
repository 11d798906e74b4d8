"""The benchmarks' rules, against recorded scores of the reference programs and published totals of real answers."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from reference import reference_folder
from sliming.evaluation import metrics
from sliming.evaluation.metrics import aggregate, bootstrap, judge_ratio, score


def jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(prediction, references, /, **context) -> dict:
    return {"prediction": prediction, "references": references, "context": context}


# --------------------------------------------------------------------------------------------------------- recorded cases

def parsed(case: dict):
    """What our rule reads out of a case's prediction, in the form in which the reference's was recorded."""
    benchmark, prediction, context = case["benchmark"], case["prediction"], case.get("context", {})
    if benchmark == "mmmu" and "index2ans" in context:
        return metrics.mmmu_letter(prediction, context["index2ans"]) or "RANDOM"
    if benchmark == "mmmu":
        return sorted({str(value) for value in metrics.mmmu_candidates(prediction)})
    if benchmark == "mathvista":
        return metrics.mathvista_value(prediction, context)
    if benchmark == "mathverse":
        return metrics.trunk_response(prediction, context["trunk_length"])
    rules = {"textvqa": metrics.textvqa_words, "mathvision": metrics.mathvision_answer, "mme": metrics.mme_answer,
             "pope": metrics.pope_answer, "scienceqa": metrics.scienceqa_letter, "amber": str.capitalize,
             "gqa": lambda text: text.rstrip(".").lower()}
    return rules[benchmark](prediction)


@pytest.mark.reference
def test_every_recorded_case_scores_exactly_as_recorded():
    cases = json.loads(reference_folder("metric_cases.json").read_text())["cases"]
    wrong = [(case["id"], value) for case in cases
             if (value := score(case["benchmark"], case["prediction"], case["references"],
                                context=case.get("context"))) != case["expected_score"]]
    assert cases and not wrong
    readings = [(case["id"], value) for case in cases if case.get("expected_parsed") is not None
                if (value := parsed(case)) != case["expected_parsed"]]
    assert not readings


@pytest.mark.reference
def test_every_recorded_aggregate():
    met = Counter()
    for case in json.loads(reference_folder("metric_cases.json").read_text())["aggregates"]:
        benchmark, prediction = case["benchmark"], case["prediction"]
        met[benchmark] += 1
        if benchmark in ("mathverse", "mmmu"):
            assert parsed(case) == case["expected_parsed"], case["id"]
        elif benchmark == "mme":
            records = [record(row["pred"], row["gold"], image=row["image"], **case["context"]) for row in prediction]
            categories = aggregate("mme", records)["categories"]
            assert categories == {case["context"]["category"]: case["expected_score"]}
        elif benchmark == "pope":
            result = aggregate("pope", [record(*pair) for pair in zip(prediction, case["references"])])
            assert result["f1"] == case["expected_score"]
            assert {key: result[key] for key in case["expected_parsed"]} == case["expected_parsed"]
        elif benchmark == "scienceqa":
            result = aggregate("scienceqa", [record(row["text"], row["answer"], is_image=row["is_image"])
                                             for row in prediction])
            assert {"acc": round(result["acc"], 2), "img": round(result["img_acc"], 2)} == case["expected_parsed"]
        else:
            pytest.fail(f"no check for {case['id']}")
    assert met


# -------------------------------------------------------------------------------------------------------- published totals

def published(folder, entry: dict) -> tuple[str, list[dict]]:
    """Benchmark and records of one entry of expected.json."""
    name, files = entry["name"].split("_")[0], entry["files"]
    if name == "mme":
        return name, [record(answer, gold, category=path.stem, image=image) for path in sorted(folder.glob(files[0]))
                      for image, _, gold, answer in (line.split("\t") for line in path.read_text().splitlines())]
    rows = jsonl(folder / files[0])
    if name == "pope":
        labels = {(row["image"], row["text"]): row["label"] for row in jsonl(folder / files[1])}
        return name, [record(row["text"], labels[row["image"], row["prompt"].split("\n")[0]]) for row in rows]
    if name == "mathvision":
        questions = {row["id"]: row for row in jsonl(folder / "mathvision" / "test.jsonl")}
        return name, [record(row["response"], questions[row["id"]]["answer"], id=row["id"],
                             options=questions[row["id"]]["options"]) for row in rows]
    answer = {"scienceqa": "text", "mmmu": "response", "mathvista": "extraction", "mmbench": "prediction"}[name]
    return name, [record(row[answer], row["answer"], **row) for row in rows]


@pytest.mark.reference
def test_every_published_total_is_reproduced():
    folder = reference_folder("benchmarks")
    entries = json.loads((folder / "expected.json").read_text())
    for entry in entries:
        expected = dict(entry["expected"])
        name, records = published(folder, entry)
        result = aggregate(name, records)
        if name == "mathvision":  # published with two decimals, and for the 304 questions of testmini
            chosen = set(json.loads((folder / "mathvision" / "testmini_ids.json").read_text()))
            small = aggregate(name, [row for row in records if row["context"]["id"] in chosen])
            assert expected.pop("n_testmini") == small["n"]
            assert expected.pop("testmini_acc") == round(small["acc"], 2), entry["name"]
            assert expected.pop("acc") == round(result["acc"], 2), entry["name"]
            expected.pop("differs_from_published")
        if name == "mmmu":  # where no option can be read the reference guesses with its own generator, and so do we
            guesses = [row for row in records if row["context"].get("index2ans")
                       and metrics.mmmu_letter(row["prediction"], row["context"]["index2ans"]) is None]
            assert {row["context"]["id"] for row in guesses} <= set(expected.pop("possible_random_ids"))
            lucky = sum(score(name, row["prediction"], row["references"], row["context"]) for row in guesses)
            certain = result["correct"] - lucky
            assert certain <= expected.pop("correct") <= certain + len(guesses)
            assert abs(expected.pop("acc") - result["acc"]) <= len(guesses) / result["n"]
        expected.pop("lmms_eval_static", None)  # the same number once more
        for key, value in expected.items():
            assert result[key] == pytest.approx(value, rel=1e-12), (entry["name"], key)
    assert entries


@pytest.mark.reference
def test_published_verdicts_question_by_question():
    """MathVision's and MathVista's files say of every single answer whether it is right, and how it was read."""
    folder = reference_folder("benchmarks")
    for entry in json.loads((folder / "expected.json").read_text()):
        name, records = published(folder, entry)
        rows = jsonl(folder / entry["files"][0]) if name in ("mathvision", "mathvista") else []
        differs = set(entry["expected"].get("differs_from_published", []))
        for row, made in zip(rows, records):
            verdict = row.get("correct", row.get("true_false"))
            if str(row.get("id", row.get("pid"))) not in differs:
                assert score(name, made["prediction"], made["references"], made["context"]) == verdict, row
            if name == "mathvista":
                assert metrics.mathvista_value(row["extraction"], row) == row["prediction"]


# -------------------------------------------------------------------------------------- the rules themselves, without recordings

@pytest.mark.parametrize("benchmark, prediction, references, context, expected", [
    ("textvqa", "The 2 Dogs!", ["two dogs"] * 10, {}, 1.0),
    ("textvqa", "dont", ["don't"] * 3 + ["do"] * 7, {}, pytest.approx(0.9)),
    ("textvqa", "x;-y p-q", ["x y p q"] * 10, {}, 1.0),  # what touches a space is decided before anything is replaced
    ("vqav2", "Yes", ["yes"] * 10, {}, 0.0),
    ("vqav2", "Yes", ["yes"] * 9 + ["no"], {}, 1.0),
    ("gqa", "Left..", "left", {}, 1.0),
    ("chartqa", "10.4", "10", {}, 1.0),
    ("chartqa", "10.6", "10", {}, 0.0),
    ("chartqa", "52%", "0.52", {}, 1.0),
    ("chartqa", "0.01", "0", {}, 0.0),
    ("chartqa", "Brazil", "brazil", {}, 1.0),
    ("chartqa", "nan", "10", {}, 0.0),
    ("tabmwp", "The answer is $56.40.", "56.4", {"choices": None, "unit": "$"}, 1.0),
    ("tabmwp", "1,000", "1000", {}, 1.0),
    ("tabmwp", "3/4", "0.75", {}, 1.0),
    ("tabmwp", "B", "nonlinear", {"choices": ["linear", "nonlinear"]}, 1.0),
    ("tabmwp", "linear", "nonlinear", {"choices": ["linear", "nonlinear"]}, 0.0),
    ("mmbench", "A", "A", {"A": "x", "B": "y"}, 1.0),
    ("mmbench", "(B).", "B", {"A": "x", "B": "y"}, 1.0),
    ("mmbench", "A dog in the park", "B", {"A": "a cat", "B": "a dog"}, 1.0),  # "A" is an article here
    ("mmbench", "A or B", "A", {"A": "cat", "B": "dog"}, 0.0),
    ("mmbench_cn", "选项 B", "B", {"A": "猫", "B": "狗"}, 1.0),
    ("mathvision", "The answer is 3/4", "\\frac{3}{4}", {"options": []}, 1.0),
    ("mathvision", "\\boxed{(2, 3)}", "(2,3)", {"options": []}, 1.0),
    ("mathvision", "(" * 3000 + "1", "1", {"options": []}, 0.0),
    ("mathvision", "9^9999^9999", "1", {"options": []}, 0.0),
    ("mathvision", "(-8)^{1/3}", "2", {"options": []}, 0.0),
    ("mathvista", "inf", "5", {"question_type": "free_form", "answer_type": "integer", "choices": None}, 0.0),
    ("mmmu", "nothing of the kind", "A", {"index2ans": {"A": "x"}, "id": "1"}, 1.0),  # a guess among one
])
def test_rules(benchmark, prediction, references, context, expected):
    assert score(benchmark, prediction, references, context) == expected


def test_arithmetic_of_answers():
    values = {"2+3*4": 14, "\\frac{1}{2}": 0.5, "2\\sqrt{9}": 6, "3!": 6, "2^{3}": 8, "\\frac{360}{8}": 45, "50\\%": 0.5,
              "1,000.5": 1000.5, "-(2-5)": 3, "\\sqrt[3]{8}": 2, "2\\pi": 2 * math.pi, "6:4": 1.5, "\\dfrac{9}{32}": 9 / 32,
              "2\\cos{\\frac{1}{2}}": 2 * math.cos(0.5), "\\arcsin\\frac{4}{5}": math.asin(0.8), "3\\left(2+1\\right)": 9}
    for text, value in values.items():
        assert metrics.arithmetic(text) == pytest.approx(value), text
    for text in ("", "x", "\\frac{1}{0}", "2+", "\\sqrt{-1}", "(1,2)", "1500!"):
        with pytest.raises(ValueError):
            metrics.arithmetic(text)


def test_an_options_text_counts_in_long_answers_only():
    choices = {"A": "falls", "B": "income rises"}
    assert metrics.mmmu_letter("so the net income rises", choices) is None
    assert metrics.mmmu_letter("so then the net income rises", choices) == "B"


def test_mme_adds_accuracy_of_questions_and_of_images():
    records = [record(said, gold, category=category, image=image) for category, image, gold, said in [
        ("count", "a", "Yes", "Yes"), ("count", "a", "No", "No"), ("count", "b", "Yes", "no"), ("count", "b", "No", "No"),
        ("posters", "a", "Yes", "Yes"), ("posters", "a", "No", "No"), ("code_reasoning", "c", "Yes", "?")]]
    result = aggregate("mme", records)
    assert result["categories"] == {"count": 125.0, "posters": 200.0, "code_reasoning": 0.0}
    assert result["table"] == {"MME-P": 325.0, "MME-C": 0.0, "MME-H": 125.0} and result["n"] == 7


def test_mmbench_counts_a_question_only_if_all_rotations_are_right():
    def rotation(index, said):
        return record(said, "A", index=index, A="x", B="y")
    records = [rotation(7, "A"), rotation(1_000_007, "A"), rotation(1_000_008, "B"), rotation(8, "A"), rotation(9, "B")]
    result = aggregate("mmbench", records)
    assert (result["n_rows"], result["n_questions"], result["circular_correct"]) == (5, 3, 1)
    assert result["vanilla_acc"] == pytest.approx(2 / 3) and result["table"] == {"MMB": pytest.approx(100 / 3)}


def test_pope_is_the_mean_f1_of_its_parts():
    def rows(category, pairs):
        return [record(said, gold, category=category) for said, gold in pairs]
    a = rows("adversarial", [("Yes", "yes"), ("Yes", "no"), ("No", "no")])            # F1 2/3
    b = rows("random", [("Yes", "yes"), ("No", "no")])                                # F1 1
    result = aggregate("pope", a + b)
    assert result["table"]["POPE"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert result["parts"]["adversarial"]["precision"] == 0.5 and result["n"] == 5
    assert aggregate("pope", rows("", [("No", "yes")]))["f1"] == 0  # nothing to divide by


def test_amber_calls_no_positive_and_rounds_before_f1():
    kinds = ["discriminative-hallucination"] * 3 + ["discriminative-attribute-state"] * 3 + ["relation"]
    said, gold = ["no", "Yes", "No"] + ["Yes", "No.", "No"] + ["No"], ["no", "no", "no", "yes", "no", "no", "yes"]
    result = aggregate("amber", [record(s, g, type=kind) for s, g, kind in zip(said, gold, kinds)])
    assert result["n"] == 7 and set(result["parts"]) == {"existence", "attribute", "relation"}
    # existence: 2 of 3 found, each "No" right; the small constants are the reference's
    p, r = round(100 * 2 / 2.001, 1) / 100, round(100 * 2 / 3.001, 1) / 100
    assert result["parts"]["existence"]["f1"] == round(100 * 2 * p * r / (p + r + 0.001), 1)
    assert result["parts"]["relation"]["precision"] == 0 and result["accuracy"] == round(100 * 4 / 7.001, 1)


def test_bootstrap_agrees_with_drawing_units_one_by_one():
    generator = np.random.default_rng(3)
    records = [record("A" if right else "B", "A", index=i + 1_000_000 * turn, A="x", B="y")
               for i in range(60) for turn, right in enumerate(generator.random(2) < 0.8)]
    low, high = bootstrap("mmbench", records, draws=4000)["MMB"]
    whole = [all(score("mmbench", r["prediction"], "A", r["context"]) for r in records[2 * i:2 * i + 2]) for i in range(60)]
    means = [100 * np.mean(generator.choice(whole, 60)) for _ in range(4000)]
    assert np.allclose((low, high), np.percentile(means, (2.5, 97.5)), atol=1.7)  # one question of 60
    assert low < aggregate("mmbench", records)["table"]["MMB"] < high
    assert bootstrap("mmbench", records) == bootstrap("mmbench", records)


def test_judge_ratio():
    assert judge_ratio(["8 6\nbecause", "10, 9"]) == pytest.approx(100 * 15 / 18)
    with pytest.raises(ValueError, match="review 1"):
        judge_ratio(["good"])


@pytest.mark.parametrize("arguments, complaint", [
    (("mmbanch", "A", "A"), "unknown benchmark 'mmbanch'; there are textvqa"),
    (("llava_bench", "text", "text"), "decided by GPT-4 as a judge"),
    (("textvqa", "A", "A"), "list of the annotators"),
    (("gqa", None, "A"), "prediction must be text"),
    (("gqa", "A", ["A"]), "gold answer must be text"),
    (("mathvista", "A", "A"), "does not fit the benchmark"),
    (("mathvision", "A", "42", {"options": ["1", "2"]}), "does not fit the benchmark"),
])
def test_bad_input_gets_one_line(arguments, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        score(*arguments)
    assert "\n" not in str(error.value)


def test_bad_aggregates_get_one_line():
    with pytest.raises(ValueError, match="no answers"):
        aggregate("pope", [])
    with pytest.raises(ValueError, match="context lacks 'category'"):
        aggregate("mme", [record("Yes", "Yes")])
