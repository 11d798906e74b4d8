"""The benchmarks' rules, against recorded scores of the reference programs and published totals."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from reference import reference_folder

from sliming.evaluation import choice, latex, maths, vqa, yesno
from sliming.evaluation.metrics import aggregate, bootstrap, score


def jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(prediction, references, /, **context) -> dict:
    return {"prediction": prediction, "references": references, "context": context}


# ------------------------------------------------------------------------------- recorded cases


def parsed(case: dict):
    """What our rule reads out of a case's prediction, as the reference's reading was recorded."""
    benchmark, prediction, context = case["benchmark"], case["prediction"], case.get("context", {})
    if benchmark == "mmmu" and "index2ans" in context:
        return choice.mmmu_letter(prediction, context["index2ans"]) or "RANDOM"
    rules = {"mmmu": lambda text: sorted({str(value) for value in choice.mmmu_candidates(text)}),
             "mathvista": lambda text: maths.mathvista_value(text, context),
             "tabmwp": lambda text: maths.tabmwp_answer(text, context),
             "textvqa": vqa.textvqa_words, "mathvision": maths.mathvision_answer,
             "mme": yesno.mme_answer, "pope": yesno.pope_answer, "amber": str.capitalize,
             "scienceqa": choice.scienceqa_letter, "gqa": lambda text: text.rstrip(".").lower()}
    return rules[benchmark](prediction)


@pytest.mark.reference
@pytest.mark.parametrize("file, least", [("metric_cases.json", 170), ("metric_cases_2.json", 148)])
def test_every_recorded_case_scores_as_recorded(file, least):
    cases = json.loads(reference_folder(file).read_text())["cases"]
    wrong = [(case["id"], value) for case in cases
             if (value := score(case["benchmark"], case["prediction"], case["references"],
                                context=case.get("context")))
             != pytest.approx(case["expected_score"], abs=1e-9)]
    readings = [(case["id"], value) for case in cases if case.get("expected_parsed") is not None
                if (value := parsed(case)) != case["expected_parsed"]]
    assert len(cases) >= least and not wrong and not readings


@pytest.mark.reference
def test_every_recorded_aggregate():
    met = Counter()
    for case in json.loads(reference_folder("metric_cases.json").read_text())["aggregates"]:
        benchmark, prediction = case["benchmark"], case["prediction"]
        met[benchmark] += 1
        if benchmark == "mmmu":
            assert parsed(case) == case["expected_parsed"], case["id"]
        elif benchmark == "mme":
            records = [record(row["pred"], row["gold"], image=row["image"], **case["context"])
                       for row in prediction]
            (value,) = aggregate("mme", records)["categories"].values()
            assert value == pytest.approx(case["expected_score"], abs=1e-9)
        elif benchmark == "pope":
            pairs = zip(prediction, case["references"], strict=True)
            result = aggregate("pope", [record(*pair) for pair in pairs])
            assert result["f1"] == pytest.approx(case["expected_score"], abs=1e-9)
            assert {key: result[key] for key in case["expected_parsed"]} == \
                pytest.approx(case["expected_parsed"], abs=1e-9)
        elif benchmark == "scienceqa":
            records = [record(row["text"], row["answer"], is_image=row["is_image"])
                       for row in prediction]
            result = aggregate("scienceqa", records)
            assert {"acc": round(result["acc"], 2), "img": round(result["img_acc"], 2)} == \
                case["expected_parsed"]
        else:  # how MathVerse's judge is shown an answer; there is no judge here
            assert case["metric"] == "trunk_response", case["id"]
    assert {"mmmu", "mme", "pope", "scienceqa"} <= set(met)


@pytest.mark.reference
def test_tabmwps_own_solutions_score_as_right_and_so_does_every_other_form():
    problems = json.loads((reference_folder("realdata") / "tabmwp" / "problems_dev1k.json")
                          .read_text())
    for key, row in problems.items():
        context = {"choices": row["choices"], "unit": row["unit"], "id": key}
        answer = row["answer"].rstrip(".")
        if row["choices"]:
            letter = "ABCDEF"[row["choices"].index(row["answer"])]
            said = [f"The answer is ({letter}) {answer}.", f"({letter}) {answer}", letter, answer]
        else:
            said = [f"The answer is {answer}.", answer]
        # The rule reads a first word of two letters as an option.
        said.append(f"Solution: {row['solution']}\n{said[0]}")
        for text in said:
            assert score("tabmwp", text, row["answer"], context) == 1, (key, text)
    assert len(problems) == 300


# ------------------------------------------------------------------------------ published totals


def published(folder, entry: dict) -> tuple[str, list[dict]]:
    """Benchmark and records of one entry of expected.json."""
    name, files = entry["name"].split("_")[0], entry["files"]
    if name == "mme":
        return name, [record(answer, gold, category=path.stem, image=image)
                      for path in sorted(folder.glob(files[0])) for image, _, gold, answer in
                      (line.split("\t") for line in path.read_text().splitlines())]
    rows = jsonl(folder / files[0])
    if name == "pope":
        labels = {(row["image"], row["text"]): row["label"] for row in jsonl(folder / files[1])}
        return name, [record(row["text"], labels[row["image"], row["prompt"].split("\n")[0]])
                      for row in rows]
    if name == "mathvision":
        questions = {row["id"]: row for row in jsonl(folder / "mathvision" / "test.jsonl")}
        return name, [record(row["response"], questions[row["id"]]["answer"],
                             **questions[row["id"]]) for row in rows]
    answer = {"scienceqa": "text", "mmmu": "response", "mathvista": "extraction",
              "mmbench": "prediction"}[name]
    return name, [record(row[answer], row["answer"], **row) for row in rows]


@pytest.mark.reference
def test_every_published_total_is_reproduced():
    """And every verdict: MathVision's and MathVista's files say of each answer if it is right."""
    folder = reference_folder("benchmarks")
    entries = json.loads((folder / "expected.json").read_text())
    for entry in entries:
        expected = dict(entry["expected"])
        name, records = published(folder, entry)
        result = aggregate(name, records)
        rows = jsonl(folder / entry["files"][0]) if name in ("mathvision", "mathvista") else []
        for row, made in zip(rows, records if rows else [], strict=True):
            if row.get("id") not in expected.get("differs_from_published", []):
                verdict = row["correct" if "correct" in row else "true_false"]
                assert score(name, *made.values()) == verdict, row
            if name == "mathvista":
                assert maths.mathvista_value(row["extraction"], row) == row["prediction"]
        if name == "mathvision":  # two decimals, and for the 304 questions of testmini
            chosen = json.loads((folder / "mathvision" / "testmini_ids.json").read_text())
            small = aggregate(name, [row for row in records if row["context"]["id"] in set(chosen)])
            assert expected.pop("n_testmini") == small["n"]
            assert expected.pop("testmini_acc") == round(small["acc"], 2), entry["name"]
            assert expected.pop("acc") == round(result["acc"], 2), entry["name"]
            expected.pop("differs_from_published")
            for groups in result["by"].values():  # subjects and levels add up
                assert sum(group["n"] for group in groups.values()) == result["n"]
            assert [len(result["by"][field]) for field in ("subject", "level")] == [16, 5]
        if name == "mmmu":  # the reference guesses with its own generator where it reads no option
            guesses = [row for row in records if row["context"].get("index2ans") and
                       choice.mmmu_letter(row["prediction"], row["context"]["index2ans"]) is None]
            assert {row["context"]["id"] for row in guesses} <= \
                set(expected.pop("possible_random_ids"))
            lucky = sum(score(name, row["prediction"], row["references"], row["context"])
                        for row in guesses)
            certain = result["correct"] - lucky
            assert certain <= expected.pop("correct") <= certain + len(guesses)
            assert abs(expected.pop("acc") - result["acc"]) <= len(guesses) / result["n"]
        expected.pop("lmms_eval_static", None)  # the same number once more
        for key, value in expected.items():
            assert result[key] == pytest.approx(value, rel=1e-12), (entry["name"], key)
    assert entries


# ------------------------------------------------------- the rules themselves, without recordings

NAMES = {"choices": ["Ada", "Bob", "Luna"]}
RISES = {"A": "falls", "B": "income rises"}
VISTA = {"question_type": "free_form", "answer_type": "integer", "choices": None}


@pytest.mark.parametrize("name, prediction, references, context, expected", [
    ("textvqa", "The 2 Dogs!", ["two dogs"] * 10, {}, 1.0),
    ("textvqa", "dont", ["don't"] * 3 + ["do"] * 7, {}, 0.9),
    # What touches a space is decided before anything is replaced.
    ("textvqa", "x;-y p-q", ["x y p q"] * 10, {}, 1.0),
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
    ("tabmwp", "1/0", "1", {}, 0.0),
    ("tabmwp", "\u22123", "3", {}, 0.0),  # a true minus sign
    ("tabmwp", "\u22123", "-3", {}, 1.0),
    ("tabmwp", "-4 rounds per year", "-4", {"unit": "rounds per year"}, 1.0),
    ("tabmwp", "C. Luna", "Luna", NAMES, 1.0),
    ("tabmwp", "(C) Luna", "Luna", NAMES, 1.0),
    ("tabmwp", "The answer is C.", "Luna", NAMES, 1.0),
    ("tabmwp", "The answer is Luna.", "Luna", NAMES, 1.0),
    ("tabmwp", "The answer is (A) Luna.", "Luna", NAMES, 0.0),
    ("tabmwp", "F", "Luna", {"choices": ["Luna"]}, 1.0),  # no such option: a guess, among one
    ("tabmwp", "linear", "nonlinear", {"choices": ["linear", "nonlinear"]}, 0.0),
    ("mmbench", "A", "A", {"A": "x", "B": "y"}, 1.0),
    ("mmbench", "(B).", "B", {"A": "x", "B": "y"}, 1.0),
    ("mmbench", "A dog in the park", "B", {"A": "a cat", "B": "a dog"}, 1.0),  # an article
    ("mmbench", "A or B", "A", {"A": "cat", "B": "dog"}, 0.0),
    ("mmbench_cn", "选项 B", "B", {"A": "猫", "B": "狗"}, 1.0),
    ("mathvision", "The answer is 3/4", "\\frac{3}{4}", {"options": []}, 1.0),
    ("mathvision", "\\boxed{(2, 3)}", "(2,3)", {"options": []}, 1.0),
    ("mathvision", "(" * 3000 + "1", "1", {"options": []}, 0.0),
    ("mathvision", "9^9999^9999", "1", {"options": []}, 0.0),
    ("mathvision", "(-8)^{1/3}", "2", {"options": []}, 0.0),
    ("mathvista", "inf", "5", VISTA, 0.0),
    # An option's text counts in long answers only; else a guess.
    ("mmmu", "so then the net income rises", "B", {"index2ans": RISES}, 1.0),
    ("mmmu", "so the net income rises", "A", {"index2ans": RISES, "id": "4"}, 1.0),
    ("mmmu", "nothing of the kind", "A", {"index2ans": {"A": "x"}, "id": "1"}, 1.0),  # a guess
])
def test_rules(name, prediction, references, context, expected):
    assert score(name, prediction, references, context) == pytest.approx(expected, abs=1e-9)


def test_arithmetic_of_answers():
    values = {"2+3*4": 14, "\\frac{1}{2}": 0.5, "2\\sqrt{9}": 6, "3!": 6, "2^{3}": 8,
              "\\frac{360}{8}": 45, "50\\%": 0.5, "1,000.5": 1000.5, "-(2-5)": 3,
              "\\sqrt[3]{8}": 2, "2\\pi": 2 * math.pi, "6:4": 1.5, "\\dfrac{9}{32}": 9 / 32,
              "2\\cos{\\frac{1}{2}}": 2 * math.cos(0.5), "\\arcsin\\frac{4}{5}": math.asin(0.8),
              "3\\left(2+1\\right)": 9}
    for text, value in values.items():
        assert latex.arithmetic(text) == pytest.approx(value), text
    for text in ("", "x", "\\frac{1}{0}", "2+", "\\sqrt{-1}", "(1,2)", "1500!"):
        with pytest.raises(ValueError):
            latex.arithmetic(text)


# ----------------------------------------------------------------------------------------- totals


def test_mme_adds_accuracy_of_questions_and_of_images():
    rows = [("count", "a", "Yes", "Yes"), ("count", "a", "No", "No"), ("count", "b", "Yes", "no"),
            ("count", "b", "No", "No"), ("posters", "a", "Yes", "Yes"),
            ("posters", "a", "No", "No"), ("code_reasoning", "c", "Yes", "?")]
    records = [record(said, gold, category=category, image=image)
               for category, image, gold, said in rows]
    result = aggregate("mme", records)
    assert result["categories"] == {"count": 125.0, "posters": 200.0, "code_reasoning": 0.0}
    assert result["table"] == {"MME-P": 325.0, "MME-C": 0.0, "MME-H": 125.0} and result["n"] == 7


def test_mmbench_counts_a_question_only_if_all_rotations_are_right():
    said = {7: "A", 1_000_007: "A", 1_000_008: "B", 8: "A", 9: "B"}
    result = aggregate("mmbench", [record(text, "A", index=index, A="x", B="y")
                                   for index, text in said.items()])
    assert (result["n_rows"], result["n_questions"], result["circular_correct"]) == (5, 3, 1)
    assert result["vanilla_acc"] == pytest.approx(2 / 3)
    assert result["table"] == {"MMB": pytest.approx(100 / 3)}


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
    kinds = ["discriminative-hallucination"] * 3 + ["discriminative-attribute-state"] * 2 + \
        ["discriminative-attribute-number", "relation"]
    said = ["no", "Yes", "No"] + ["Yes", "No.", "No"] + ["No"]
    gold = ["no", "no", "no", "yes", "no", "no", "yes"]
    result = aggregate("amber", [record(s, g, type=kind)
                                 for s, g, kind in zip(said, gold, kinds, strict=True)])
    parts = result["parts"]
    assert {part: values["n"] for part, values in parts.items()} == \
        {"existence": 3, "attribute": 3, "state": 2, "number": 1, "relation": 1}
    # existence: 2 of 3 found, each "No" right; the small constants are the reference's
    p, r = round(100 * 2 / 2.001, 1) / 100, round(100 * 2 / 3.001, 1) / 100
    assert parts["existence"]["f1"] == pytest.approx(round(100 * 2 * p * r / (p + r + 0.001), 1))
    assert parts["state"]["f1"] == 0 and parts["number"]["f1"] > 99
    assert parts["relation"]["precision"] == 0 and result["n"] == 7
    assert result["accuracy"] == pytest.approx(round(100 * 4 / 7.001, 1))


def test_accuracies_by_half_version_subject_and_level():
    halves = aggregate("chartqa", [record("1", "1", half="human"), record("2", "1", half="human"),
                                   record("1", "1", half="machine")])["by"]["half"]
    assert halves == {"human": {"n": 2, "acc": 50.0}, "machine": {"n": 1, "acc": 100.0}}
    verse = [record("A", gold, row={"problem_version": version, "metadata": {"subject": "Solid"}})
             for gold, version in (("A", "Text Lite"), ("B", "Vision Only"))]
    by = aggregate("mathverse", verse)["by"]
    assert by["problem_version"]["Text Lite"]["acc"] == 100 and by["subject"]["Solid"]["acc"] == 50
    vista = [record("5", gold, **VISTA, metadata={"skills": skills, "task": "math"})
             for gold, skills in (("5", ["algebra", "logic"]), ("6", ["logic"]))]
    by = aggregate("mathvista", vista)["by"]
    assert by == {"task": {"math": {"n": 2, "acc": 50.0}},
                  "skills": {"algebra": {"n": 1, "acc": 100.0}, "logic": {"n": 2, "acc": 50.0}}}
    vision = aggregate("mathvision", [record("1", "1", options=[], subject="algebra", level=3)])
    assert set(vision["by"]) == {"subject", "level"}


def test_bootstrap_agrees_with_drawing_units_one_by_one():
    generator = np.random.default_rng(3)
    records = [record("A" if right else "B", "A", index=i + 1_000_000 * turn, A="x", B="y")
               for i in range(60) for turn, right in enumerate(generator.random(2) < 0.8)]
    low, high = bootstrap("mmbench", records, draws=4000)["MMB"]
    whole = [all(score("mmbench", r["prediction"], "A", r["context"])
                 for r in records[2 * i:2 * i + 2]) for i in range(60)]
    means = [100 * np.mean(generator.choice(whole, 60)) for _ in range(4000)]
    assert np.allclose((low, high), np.percentile(means, (2.5, 97.5)), atol=1.7)  # one of 60
    assert low < aggregate("mmbench", records)["table"]["MMB"] < high
    assert bootstrap("mmbench", records) == bootstrap("mmbench", records)


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
    with pytest.raises(ValueError, match="no answers"):
        aggregate("pope", [])
    with pytest.raises(ValueError, match="context lacks 'category'"):
        aggregate("mme", [record("Yes", "Yes")])
