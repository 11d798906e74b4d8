"""How the paper's benchmarks judge an answer (Sec. 3, Tables 1, 2 and 6): `score` for one, `aggregate` for all.

The rules are those of each benchmark's own evaluation program, oddities included, for only then are the numbers
comparable; each function names the program it follows. Where a judge or a server decides (LLaVA-Bench, MM-Vet, the test
sets of VQAv2 and MMBench) nothing is scored here: `evaluate` writes the file to submit. MathVista and MathVerse are in
between: their answers are first extracted by a language model; scored here is what was extracted, or the answer itself
where it is already of the form asked for.

A record is {"prediction": str, "references": gold answer or answers, "context": dict}; what `context` must hold is said at
each rule. Whole-benchmark numbers are functions of sums over units, a unit being what only counts together (a question,
MMBench's rotations of one, MME's two questions about an image); so the bootstrap draws units.

Legend: U units of a part of a benchmark, K what is counted of each, R draws of the bootstrap.
"""

import math
import random
import re

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# ------------------------------------------------------------------------------------------- VQA soft accuracy: TextVQA, VQAv2

PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
NUMBER_WORDS = {word: str(number) for number, word in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])} | {"none": "0"}
CONTRACTED = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
    they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
CONTRACTED_TWICE = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""


def contractions() -> dict[str, str]:
    """{word with one apostrophe missing: the word}, the reference's table with its gaps and its slips."""
    table = {word.replace("'", ""): word for word in CONTRACTED.split()}
    for word in CONTRACTED_TWICE.split():
        first, last = word.index("'"), word.rindex("'")
        table[word[:first] + word[first + 1:]] = table[word[:last] + word[last + 1:]] = word
    return table | {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
                    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}


CONTRACTIONS = contractions()


def strip_punctuation(text: str) -> str:
    """Each mark is deleted if it touches a space or the text has a number like 1,000, else replaced by a space.

    "Touches" and "has" refer to the text before any replacement. Of the periods that no digit follows, the first 32 go: the
    reference passes a flag (re.UNICODE, 32) where re.sub expects a count.
    """
    delete_all = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if delete_all or mark + " " in text or " " + mark in text else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def plain_words(text: str) -> str:
    """Lower case, number words as digits, without articles, contractions with their apostrophe."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def textvqa_words(text: str) -> str:
    """An answer in the form that TextVQA compares (facebookresearch/mmf, EvalAIAnswerProcessor)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(strip_punctuation(one_line(text)))


def agreement(answer: str, references: list[str]) -> float:
    """Mean over the annotators of min(1, how many of the others gave `answer` / 3)."""
    total = 0.0
    for index in range(len(references)):
        others = references[:index] + references[index + 1:]
        total += min(1.0, others.count(answer) / 3)
    return total / len(references)


def score_textvqa(prediction: str, references: list[str], context: dict) -> float:
    """TextVQA's soft accuracy (yfzhang114/SliME llava/eval/m4c_evaluator.py)."""
    return agreement(textvqa_words(prediction), [textvqa_words(reference) for reference in references])


def score_vqav2(prediction: str, references: list[str], context: dict) -> float:
    """VQAv2's soft accuracy (GT-Vision-Lab/VQA vqaEval.py): identical references switch all normalisation off."""
    prediction, references = one_line(prediction), [one_line(reference) for reference in references]
    if len(set(references)) > 1:
        prediction = plain_words(strip_punctuation(prediction))
        references = [plain_words(strip_punctuation(reference)) for reference in references]
    return agreement(prediction, references)


# ---------------------------------------------------------------------------------------------------------- equality of strings

def score_gqa(prediction: str, references: str, context: dict) -> float:
    """GQA: equal after dropping final periods and lower-casing (yfzhang114/SliME scripts/convert_gqa_for_eval.py)."""
    return float(prediction.rstrip(".").lower() == references)


def score_mathverse(prediction: str, references: str, context: dict) -> float:
    """MathVerse without its judge: string equality (ZrrSkywalker/MathVerse score_answer_s2.py, quick_match)."""
    return float(prediction == references)


def trunk_response(response: str, trunk_length: int) -> str:
    """What MathVerse's judge reads: the last `trunk_length` pieces between single spaces, all for 0 (score_answer_s2.py)."""
    return " ".join(response.split(" ")[-trunk_length:]) if trunk_length > 0 else response


def score_chartqa(prediction: str, references: str, context: dict) -> float:
    """ChartQA's relaxed accuracy: numbers within 5 %, all else equal but for case (QwenLM/Qwen-VL evaluate_vqa.py)."""
    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    given, gold = number(prediction), number(references)
    if given is not None and gold:
        return float(abs(given - gold) / abs(gold) <= 0.05)
    return float(prediction.lower() == references.lower())


def score_tabmwp(prediction: str, references: str, context: dict) -> float:
    """TabMWP (not in the paper's tables, one of SMR's sources): equality of normalised numbers, or of the option chosen.

    `context`: "choices" (list or None) and "unit". After lupantech/PromptPG run_gpt3.py: a letter or the text of an option,
    else the last number of the answer; "1,000", "$56.40" and "3/4" are numbers, to 3 decimals.
    """
    choices, unit = context.get("choices"), context.get("unit")
    if choices:
        letter = re.fullmatch(r"\(?([A-Z])\)?\.?", prediction.strip())
        if letter and LETTERS.index(letter[1]) < len(choices):
            prediction = choices[LETTERS.index(letter[1])]
    else:
        found = re.findall(r"[\d$.,/:]+ [AP]\.M\.", prediction) or re.findall(r"[-\d$.,/:]*\d", prediction)
        prediction = found[-1] if found else prediction

    def normal(text: str) -> str:
        text = re.sub(r"[,./]$", "", re.sub(r"^\$", "", text.strip()))
        parts = text.replace(",", "").split("/")
        if re.fullmatch(r"[-+]?[\d,./]+", text) and len(parts) <= 2:
            try:
                value = round(float(parts[0]) / float(parts[1]), 3) if len(parts) == 2 else round(float(parts[0]), 3)
            except (ValueError, ZeroDivisionError):
                return text
            return re.sub(r"\.0$", "", str(value))
        return text.replace(unit, "").strip() if unit else text

    return float(normal(prediction).lower() == normal(references).lower())


# -------------------------------------------------------------------------------------------------- yes or no: MME, POPE, AMBER

def mme_answer(prediction: str) -> str:
    """"yes", "no" or "other": the whole answer, else what its first 4 characters hold (BradyFU, eval_tool/calculation.py)."""
    text = prediction.lower()
    if text in ("yes", "no"):
        return text
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def score_mme(prediction: str, references: str, context: dict) -> float:
    return float(mme_answer(prediction) == references.lower())


def pope_answer(prediction: str) -> str:
    """"no" if No, no or not is a word of the first sentence, else "yes" (AoiDragon/POPE evaluate.py)."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(prediction: str, references: str, context: dict) -> float:
    return float(pope_answer(prediction) == references)


def score_amber(prediction: str, references: str, context: dict) -> float:
    """AMBER, discriminative: only the bare word counts (junyangwang0410/AMBER inference.py, after SliME's .capitalize())."""
    return float(prediction.capitalize() == references.capitalize())


# ------------------------------------------------------------------------------------------ options: ScienceQA, MMBench, MMMU

def scienceqa_letter(prediction: str) -> str:
    """The option's letter, or "FAILED" (yfzhang114/SliME llava/eval/eval_science_qa.py)."""
    if prediction in tuple("ABCDE"):
        return prediction
    if len(prediction) >= 3 and prediction[0] in "ABCDE" and prediction[1:3] == ". ":
        return prediction[0]
    found = re.findall(r"The answer is ([A-Z]).", prediction)
    return found[0] if len(found) == 1 else "FAILED"


def score_scienceqa(prediction: str, references: str, context: dict) -> float:
    return float(scienceqa_letter(prediction) == references)


def mmbench_letter(prediction: str, choices: dict[str, str]) -> str | None:
    """The option's letter, or None (open-compass/VLMEvalKit and lmms-eval, can_infer, without the judge behind it).

    A letter that stands alone, then one with a mark at it, then the only option whose text the answer contains.
    """
    words = prediction.split()
    marks = [("", "")] + [("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
                          (":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")]
    for before, after in marks:
        found = [letter for letter in "ABCDE" if before + letter + after in words]
        quantifier = (before, after) == ("", "") and "A" in words and len(words) > 3  # "A dog in ..." names no option
        if len(found) == 1 and not quantifier:
            return found[0]
    found = [letter for letter, text in choices.items() if str(text).lower() in prediction.lower()]
    return found[0] if len(found) == 1 else None


def score_mmbench(prediction: str, references: str, context: dict) -> float:
    """One rotation of a question, `context`: {"A": text, ...}; `aggregate` asks for all of them."""
    choices = {letter: context[letter] for letter in "ABCD" if context.get(letter) is not None}
    return float(mmbench_letter(prediction, choices) == references)


def mmmu_letter(prediction: str, choices: dict[str, str]) -> str | None:
    """The letter that MMMU reads out of an answer, None for none (MMMU-Benchmark/MMMU eval_utils.py)."""
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    for find in ("({letter})", " {letter} "):
        places = {letter: text.rfind(find.format(letter=letter)) for letter in choices}
        if max(places.values()) >= 0:
            return max(places, key=places.get)
    if len(text.split()) > 5:
        places = {letter: text.lower().rfind(str(option).lower()) for letter, option in choices.items()}
        if max(places.values()) >= 0:
            return max(places, key=places.get)
    return None


NUMBER_FORMS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def mmmu_value(text: str) -> list[str | float]:
    """A number to 2 decimals, or lower-case text; a single character only with a space at it, lest it match everywhere."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_candidates(prediction: str) -> list[str | float]:
    """What an open answer may mean: its key clauses and the numbers in them (MMMU-Benchmark/MMMU eval_utils.py)."""
    text = prediction.strip().strip(".").lower()
    keys = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    lines, clauses = text.split("\n"), []
    for index, line in enumerate(lines):
        if index == len(lines) - 1:
            keys.append("=")
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = None
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            clauses.append(shortest)
    clauses = clauses or [text]
    numbers = [number for clause in clauses for form in NUMBER_FORMS for number in re.findall(form, clause)]
    return [value for piece in clauses + numbers for value in mmmu_value(piece)]


def score_mmmu(prediction: str, references: str | list[str], context: dict) -> float:
    """MMMU. `context` holds "index2ans" {letter: option} for a choice, and "id", which seeds the guess.

    The reference guesses where it finds no option; so does this, always the same for the same question.
    """
    gold = references if isinstance(references, list) else [references]
    if choices := context.get("index2ans"):
        letter = mmmu_letter(prediction, choices)
        return float((letter or random.Random(str(context.get("id"))).choice(sorted(choices))) in gold)
    right = [value for answer in gold for value in mmmu_value(str(answer))]
    words = [value for value in right if isinstance(value, str)]
    return float(any(candidate in right if isinstance(candidate, float) else any(word in candidate for word in words)
                     for candidate in mmmu_candidates(prediction)))


# ------------------------------------------------------------------------------------------------------------------ MathVista

def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def mathvista_value(extraction: str, context: dict) -> str | None:
    """An extracted answer in the form of the gold answer (lupantech/MathVista calculate_score.py).

    `context`: question_type, answer_type, choices, precision. A choice is named by "(letter)", by a bare letter, or is the
    one at the smallest edit distance.
    """
    if context["question_type"] == "multi_choice":
        choices, extraction = context["choices"], extraction.strip()
        if letters := re.findall(r"\(([a-zA-Z])\)", extraction):
            extraction = letters[0].upper()
        if extraction in tuple(LETTERS[:len(choices)]):
            return choices[LETTERS.index(extraction)]
        return min(choices, key=lambda choice: edit_distance(extraction, choice))
    try:
        if context["answer_type"] == "integer":
            return str(int(float(extraction)))
        if context["answer_type"] == "float":
            return str(round(float(extraction), int(context["precision"])))
    except (ValueError, OverflowError):
        return None
    return extraction


def mathvista_offline(response: str, context: dict) -> str | None:
    """What can be extracted from an answer without MathVista's language model: an option or its letter, a number; else None.

    The reference's extract_answer.py takes the same shortcuts (but for the letter) and asks GPT-4 about the rest.
    """
    text = response.strip()
    if context["question_type"] == "multi_choice":
        letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", text)
        return text if text in context["choices"] else letter[1].upper() if letter else None
    numeric = {"integer": int, "float": float}.get(context["answer_type"])
    try:
        return str(numeric(text)) if numeric else None
    except ValueError:
        return None


def score_mathvista(prediction: str, references: str, context: dict) -> float:
    return float(mathvista_value(prediction, context) == references)


# ----------------------------------------------------------------------------------------------------------------- MathVision

TOKEN = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
                   r"|\\(?:[dt]?frac|sqrt|pi|times|cdot|div|%|(?:arc)?(?:sin|cos|tan))(?![a-z])"
                   r"|(?P<skip>[\s$]+|\\(?:left|right|displaystyle)(?![a-z]))|.", re.S)
FUNCTIONS = {"\\sin": math.sin, "\\cos": math.cos, "\\tan": math.tan,
             "\\arcsin": math.asin, "\\arccos": math.acos, "\\arctan": math.atan}
NUMBER = re.compile(r"[\d,]*\.?\d+")


def arithmetic(text: str) -> int | float:
    """The value of LaTeX arithmetic; raises ValueError for anything else.

    Numbers, \\pi, + - * / : ^ !, fractions, roots, sines and their like, brackets and percent: what the reference's latex2sympy
    and Python's math module make of the answers that occur (they know logarithms, binomials and names, too). Its parser
    ignores what follows a whole expression from an unpaired closing bracket or a period on, and so does this.
    """
    tokens, place = [match[0] for match in TOKEN.finditer(text) if not match["skip"]] + [""], 0
    tokens = ["\\frac" if token in ("\\dfrac", "\\tfrac") else token for token in tokens]

    def take(*wanted: str) -> str:
        nonlocal place
        token = tokens[place]
        if wanted and token not in wanted:
            return ""
        place += 1
        return token

    def expect(token: str) -> None:
        if not take(token):
            raise ValueError(f"{token} expected: {text}")

    def total() -> int | float:
        value = product()
        while sign := take("+", "-"):
            value = value + product() if sign == "+" else value - product()
        return value

    def product() -> int | float:
        value = signed()
        while operator := take("*", "\\times", "\\cdot", "/", ":", "\\div"):
            factor = signed()
            if operator in ("*", "\\times", "\\cdot"):
                value = value * factor
            elif factor:
                value = value / factor
            else:
                raise ValueError(f"division by zero: {text}")
        return value

    def signed() -> int | float:
        if sign := take("+", "-"):
            return signed() if sign == "+" else -signed()
        value = power()
        while tokens[place] in ("(", "[", "{", "\\frac", "\\sqrt", "\\pi", *FUNCTIONS) or NUMBER.fullmatch(tokens[place]):
            value = value * power()  # factors side by side bind more tightly than a sign between them
        return value

    def power() -> int | float:
        base = atom()
        while take("!"):
            if not isinstance(base, int) or not 0 <= base <= 999:
                raise ValueError(f"no factorial: {text}")
            base = math.factorial(base)
        if take("^"):
            exponent = atom()
            if abs(exponent) > 9999 or abs(base) > 1e9 or base == 0 > exponent:
                raise ValueError(f"out of range: {text}")
            base = base ** exponent
        return base / 100 if take("\\%") else base

    def group(opening: str = "{") -> int | float:
        expect(opening)
        value = total()
        expect({"(": ")", "[": "]", "{": "}"}[opening])
        return value

    def atom() -> int | float:
        if tokens[place] in ("(", "[", "{"):
            return group(tokens[place])
        token = take()
        if token == "\\pi":
            return math.pi
        if token in FUNCTIONS:
            return FUNCTIONS[token](power())
        if token == "\\sqrt":
            index = group("[") if tokens[place] == "[" else 2
            value = group()
            if value < 0 or not index:
                raise ValueError(f"no real root: {text}")
            return value ** (1 / index)
        if token == "\\frac":
            above, below = group(), group()
            if not below:
                raise ValueError(f"division by zero: {text}")
            return above / below
        if not NUMBER.fullmatch(token):
            raise ValueError(f"number expected: {text}")
        value = float(token.replace(",", ""))
        return int(value) if value.is_integer() else value

    value = total()
    if tokens[place] not in ("", ")", "]", "}", "."):
        raise ValueError(f"no arithmetic: {text}")
    return value


def tuple_values(text: str) -> str:
    """"(2*3, 1/2)" -> "(6,0.5)": the elements of a tuple or list by value; any other text as it is."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    try:
        values = [part if "infty" in part or part in ("a", "-a") else str(round(arithmetic(part), 2)) for part in parts]
    except (ValueError, OverflowError, TypeError, RecursionError):
        return text
    return text[0] + ",".join(values) + text[-1]


def same_value(a: str, b: str) -> bool:
    """Equal as text, as tuples, or to 2 decimals as numbers (mathvision-cuhk/MATH-V evaluation/utils.py, is_equal)."""
    a, b = a.lower(), b.lower()
    if not a.replace(" ", "") or not b.replace(" ", ""):
        return False
    if a.strip() == b.strip():
        return True
    a, b = tuple_values(a), tuple_values(b)
    if a == b:
        return True
    try:
        return round(arithmetic(a), 2) == round(arithmetic(b), 2)
    except (ValueError, OverflowError, TypeError, RecursionError):  # no arithmetic, too large, complex, nested too deeply
        return False


def braced(text: str, command: str, arguments: int) -> str:
    """\\sqrt3 -> \\sqrt{3}, \\frac12 -> \\frac{1}{2}: one-character arguments of a LaTeX command in braces."""
    head, *tails = text.split(command)
    for tail in tails:
        if arguments == 1 and tail and tail[0] != "{":
            tail = "{" + tail[0] + "}" + tail[1:]
        elif arguments == 2 and not tail.startswith("{"):
            if len(tail) < 2:
                return text
            tail = "{" + tail[0] + "}" + (tail[1:] if tail[1] == "{" else "{" + tail[1] + "}" + tail[2:])
        head += command + tail
    return head


def plain_math(text: str) -> str:
    """The answer in a box, or all of the text, without LaTeX decoration, units and spaces (MATH-V find_math_answer)."""
    text = text.lower().replace("{}", "")
    box = re.search(r"oxed{(.*)}", text, re.S)
    text = box[1] if box else text
    if "}" in text and ("{" not in text or text.find("}") < text.find("{")):
        text = text.split("}")[0]
    text = text.split("=")[-1].split("\\approx")[-1]
    for old, new in ((" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""),
                     ("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""),
                     ("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""),
                     ("{km}", ""), ("km", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
                     ("\\$", ""), ("$", ""), ("\\%", ""), ("{.", "{0.")):
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    if "sqrt" in text:
        text = braced(braced(text, "\\sqrt", 1), "\\frac", 2)
    if text == "0.5":
        return "\\frac{1}{2}"
    if fraction := re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text):
        return f"\\frac{{{fraction[1]}}}{{{fraction[2]}}}"
    return text


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def mathvision_answer(prediction: str) -> str:
    """What is compared: a final letter, a number after "is", what follows "the answer is", or the last box."""
    text = prediction.strip()
    for letter in "ABCDE":
        if text.endswith((f" {letter}.", f" ({letter}).")) or text.startswith((f"{letter}\n", f"({letter})\n",
                                                                             f"({letter}) {letter}\n")):
            text = letter
    tail = text.split("is ")[-1].rstrip(".")
    if is_number(tail):
        text = tail
    if "oxed{" not in text:
        for phrase in ("the final answer is", "the answer is", "the correct answer is", "the answer should be"):
            for flag in (phrase, phrase.replace("the", "The")):
                if flag in text:
                    text = text.split(flag)[-1].strip().split("\n")[0].split(". ")[0]
                else:
                    text = text.strip()
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = plain_math(text)
    for letter in "abcde":
        text = text.replace(f"({letter})", letter).replace("{" + letter + "}", letter)
    return text.rstrip(".").lstrip(":").strip()


def score_mathvision(prediction: str, references: str, context: dict) -> float:
    """MathVision: the option's letter, its value or the gold value (mathvision-cuhk/MATH-V evaluation/evaluate.py)."""
    answer, options = mathvision_answer(prediction), context.get("options")
    value = options[LETTERS.index(references)] if options else ""
    return float(same_value(references, answer) or same_value(value, answer))


# ---------------------------------------------------------------------------------------------------- one answer, any benchmark

SCORES = {
    "textvqa": score_textvqa, "gqa": score_gqa, "vqav2": score_vqav2, "mmbench": score_mmbench, "mmbench_cn": score_mmbench,
    "mmmu": score_mmmu, "mme": score_mme, "mathverse": score_mathverse, "mathvista": score_mathvista,
    "mathvision": score_mathvision, "scienceqa": score_scienceqa, "pope": score_pope, "amber": score_amber,
    "chartqa": score_chartqa, "tabmwp": score_tabmwp,
}
JUDGED = {  # benchmark: who decides
    "llava_bench": "GPT-4 as a judge (haotian-liu/LLaVA llava/eval/eval_gpt_review_bench.py reads the answers file)",
    "mm_vet": "MM-Vet's GPT-4 judge (yuweihao/MM-Vet mm-vet_evaluator.ipynb reads the answers file)",
}


def check_benchmark(benchmark: str) -> None:
    """ValueError, in one line, for a benchmark that is not known or that is not scored here."""
    if benchmark in JUDGED:
        raise ValueError(f"{benchmark} is not scored offline; it is decided by {JUDGED[benchmark]}")
    if benchmark not in SCORES:
        raise ValueError(f"unknown benchmark {benchmark!r}; there are {', '.join([*SCORES, *JUDGED])}")


def score(benchmark: str, prediction: str, references: str | list[str], context: dict | None = None) -> float:
    """How right one answer is, 0 .. 1, by the benchmark's own rule; `context` as at that rule.

    Raises ValueError for an unknown benchmark, one that a judge decides, and a record that lacks what the rule needs.
    """
    check_benchmark(benchmark)
    if not isinstance(prediction, str):
        raise ValueError(f"{benchmark}: a prediction must be text, not {type(prediction).__name__}")
    several = benchmark in ("textvqa", "vqav2")
    if several and (not isinstance(references, list) or not references):
        raise ValueError(f"{benchmark}: references must be the list of the annotators' answers, not {references!r}")
    if not several and not isinstance(references, (str, list) if benchmark == "mmmu" else str):
        raise ValueError(f"{benchmark}: the gold answer must be text, not {references!r}")
    try:
        return SCORES[benchmark](prediction, references, context or {})
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{benchmark}: the record does not fit the benchmark ({type(error).__name__}: {error})") from error


# ------------------------------------------------------------------------------------------------------ the whole benchmark

MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_HALLUCINATION = MME_PERCEPTION[:4]
AMBER_PARTS = {"discriminative-hallucination": "existence", "discriminative-attribute-state": "attribute",
               "discriminative-attribute-number": "attribute", "discriminative-attribute-action": "attribute"}
COLUMNS = {"textvqa": "VQA-T", "gqa": "GQA", "vqav2": "VQAv2", "mmbench": "MMB", "mmbench_cn": "MMB-C", "mmmu": "MMMU-v",
           "mathverse": "MathVerse", "mathvista": "MathVista", "mathvision": "MathVision", "scienceqa": "ScienceQA",
           "pope": "POPE", "amber": "AMBER", "chartqa": "ChartQA", "tabmwp": "TabMWP"}  # of Tables 1 and 2, last two ours


def unit_of(benchmark: str, place: int, context: dict) -> tuple[str, object]:
    """(part of the benchmark, unit of that part) which the record at `place` belongs to."""
    if benchmark == "mme":
        return context["category"], context["image"]
    if benchmark in ("mmbench", "mmbench_cn"):
        return "", int(context["index"]) % 1_000_000
    if benchmark == "pope":
        return context.get("category", ""), place
    if benchmark == "amber":
        return AMBER_PARTS.get(context.get("type"), "relation"), place
    if benchmark == "scienceqa":
        return "image" if context.get("is_image") else "text", place
    if benchmark == "mmmu":
        return "choice" if context.get("index2ans") else "open", place
    return "", place


def counts_of(benchmark: str, members: list[dict], scores: list[float]) -> tuple[float, ...]:
    """What the totals need of one unit; the places are those that `totals` reads."""
    if benchmark == "mme":       # right, questions, all right, images
        return sum(scores), len(scores), all(scores), 1
    if benchmark in ("mmbench", "mmbench_cn"):  # all rotations right, the first right, rotations, questions
        first = min(range(len(members)), key=lambda place: int(members[place]["context"]["index"]))
        return all(scores), scores[first], len(scores), 1
    said = members[0]["prediction"]
    if benchmark == "pope":      # true and false positives, true and false negatives
        yes, right = pope_answer(said) == "yes", bool(scores[0])
        return yes and right, yes and not right, not yes and right, not yes and not right
    if benchmark == "amber":     # right, questions, "No" said, "No" true, both
        no, truly = said.capitalize() == "No", members[0]["references"].capitalize() == "No"
        return scores[0], 1, no, truly, no and truly
    return scores[0], 1


def tally(benchmark: str, records: list[dict]) -> dict[str, np.ndarray]:
    """{part: float64 [U, K]}, one row per unit. Raises ValueError for what cannot be scored and for no record at all."""
    check_benchmark(benchmark)
    if not records:
        raise ValueError(f"{benchmark}: no answers to score")
    units: dict[tuple, tuple[list, list]] = {}
    for place, record in enumerate(records):
        context = record.get("context") or {}
        try:
            members, scores = units.setdefault(unit_of(benchmark, place, context), ([], []))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{benchmark}: a record's context lacks {error}") from error
        members.append(record)
        scores.append(score(benchmark, record["prediction"], record["references"], context))
    parts: dict[str, list] = {}
    for (part, _), (members, scores) in units.items():
        parts.setdefault(part, []).append(counts_of(benchmark, members, scores))
    return {part: np.array(rows, dtype=np.float64) for part, rows in parts.items()}


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def totals(benchmark: str, sums: dict[str, np.ndarray]) -> dict:
    """The benchmark's numbers from the sums [..., K] of its parts; keys and units as the reference programs print them.

    "table" holds the columns of the paper's tables, in percent or, for MME, points.
    """
    overall = sum(sums.values())
    at = {part: [values[..., k] for k in range(values.shape[-1])] for part, values in sums.items()}
    if benchmark == "mme":
        categories = {part: 100 * ratio(right, asked) + 100 * ratio(both, images)
                      for part, (right, asked, both, images) in at.items()}
        add = {name: sum((categories[part] for part in group if part in categories), start=np.zeros_like(overall[..., 0]))
               for name, group in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION),
                                   ("hallucination", MME_HALLUCINATION))}
        return {**add, "categories": categories, "n": overall[..., 1],
                "table": {"MME-P": add["perception"], "MME-C": add["cognition"], "MME-H": add["hallucination"]}}
    if benchmark == "pope":      # AoiDragon/POPE evaluate.py; the paper's number is the mean F1 of the parts
        parts = {}
        for part, (true_yes, false_yes, true_no, false_no) in at.items():
            n = true_yes + false_yes + true_no + false_no
            precision, recall = ratio(true_yes, true_yes + false_yes), ratio(true_yes, true_yes + false_no)
            parts[part] = {"n": n, "f1": ratio(2 * precision * recall, precision + recall),
                           "accuracy": ratio(true_yes + true_no, n), "precision": precision, "recall": recall,
                           "yes_ratio": ratio(true_yes + false_yes, n)}
        means = {key: sum(part[key] for part in parts.values()) / len(parts) for key in next(iter(parts.values()))}
        return {**means, "n": sum(part["n"] for part in parts.values()), "parts": parts,
                "table": {"POPE": 100 * means["f1"]}}
    if benchmark == "amber":     # junyangwang0410/AMBER inference.py; the paper's column is F1
        def rates(values: list[np.ndarray], small: float) -> dict:
            right, asked, said, truly, both = values
            accuracy, precision, recall = (np.round(100 * above / (below + 0.001), 1)
                                           for above, below in ((right, asked), (both, said), (both, truly)))
            p, r = precision / 100, recall / 100
            return {"accuracy": accuracy, "precision": precision, "recall": recall,
                    "f1": np.round(100 * 2 * p * r / (p + r + small), 1)}
        parts = {part: rates(values, 0.001 if part == "existence" else 0.0001) for part, values in at.items()}
        whole = rates([overall[..., k] for k in range(5)], 0.0001)
        return {**whole, "n": overall[..., 1], "parts": parts, "table": {"AMBER": whole["f1"]}}
    if benchmark in ("mmbench", "mmbench_cn"):
        circular, vanilla, rows, questions = at[""]
        return {"n_rows": rows, "n_questions": questions, "circular_correct": circular,
                "circular_acc": ratio(circular, questions), "vanilla_acc": ratio(vanilla, questions),
                "table": {COLUMNS[benchmark]: 100 * ratio(circular, questions)}}
    right, n = overall[..., 0], overall[..., 1]
    if benchmark == "scienceqa":
        images = at.get("image", [np.zeros_like(n), np.zeros_like(n)])
        return {"n": n, "acc": 100 * ratio(right, n), "n_img": images[1], "img_acc": 100 * ratio(*images),
                "table": {"ScienceQA": 100 * ratio(*images)}}
    if benchmark == "mmmu":
        opened = at.get("open", [np.zeros_like(n), np.zeros_like(n)])
        return {"n": n, "correct": right, "acc": ratio(right, n), "open_correct": opened[0], "n_open": opened[1],
                "table": {"MMMU-v": 100 * ratio(right, n)}}
    return {"n": n, "correct": right, "acc": 100 * ratio(right, n), "table": {COLUMNS[benchmark]: 100 * ratio(right, n)}}


COUNTS = {"n", "n_img", "n_open", "n_rows", "n_questions", "correct", "open_correct", "circular_correct"}


def plain(key: str, value: dict | np.ndarray) -> dict | int | float:
    """The same without numpy; counts are int where they are whole (VQA's soft sums are not)."""
    if isinstance(value, dict):
        return {inner: plain(inner, content) for inner, content in value.items()}
    return int(value) if key in COUNTS and float(value).is_integer() else float(value)


def aggregate(benchmark: str, records: list[dict]) -> dict:
    """The numbers of a whole benchmark (see `totals`); under "table" the columns of the paper's tables."""
    return plain("", totals(benchmark, {part: units.sum(0) for part, units in tally(benchmark, records).items()}))


def bootstrap(benchmark: str, records: list[dict], draws: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """{column: 95 % confidence interval} from `draws` resamplings of the units, within each part of the benchmark.

    Drawing U units with repetition is drawing how often each kind of row occurs, so equal rows are drawn as one.
    """
    generator, sums = np.random.default_rng(seed), {}
    for part, units in tally(benchmark, records).items():
        rows, counts = np.unique(units, axis=0, return_counts=True)               # [kinds, K], [kinds]
        sums[part] = generator.multinomial(len(units), counts / len(units), size=draws) @ rows  # [R, K]
    return {column: tuple(np.percentile(values, (2.5, 97.5)).tolist())
            for column, values in totals(benchmark, sums)["table"].items()}


def judge_ratio(reviews: list[str]) -> float:
    """LLaVA-Bench's number from the judge's reviews: 100 x the model's points / the reference's.

    As in haotian-liu/LLaVA llava/eval/summarize_gpt_review.py.
    A review begins with a line of two numbers, those of the reference's answer and of the model's. Raises ValueError.
    """
    points = []
    for place, review in enumerate(reviews, 1):
        try:
            first, second = map(float, review.split("\n")[0].replace(",", " ").split())
        except ValueError as error:
            raise ValueError(f"review {place} does not begin with a line of two numbers") from error
        points.append((first, second))
    return 100 * sum(second for _, second in points) / sum(first for first, _ in points)
