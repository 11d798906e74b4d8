r"""Answers in LaTeX by their value: are `\frac{1}{\sqrt{6}}` and `\sqrt{6}/6` the same?

`same_value` follows MATH-Vision's own program (mathvision-cuhk/MATH-V evaluation/utils.py,
is_equal), which asks latex2sympy; here a small parser does what the answers that occur need.
"""

import math
import re

TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
    r"|\\(?:[dt]?frac|sqrt|pi|times|cdot|div|%|(?:arc)?(?:sin|cos|tan))(?![a-z])"
    r"|(?P<skip>[\s$]+|\\(?:left|right|displaystyle)(?![a-z]))|.", re.S)
NUMBER = re.compile(r"[\d,]*\.?\d+")
FUNCTIONS = {"\\sin": math.sin, "\\cos": math.cos, "\\tan": math.tan,
             "\\arcsin": math.asin, "\\arccos": math.acos, "\\arctan": math.atan}
CLOSING = {"(": ")", "[": "]", "{": "}"}
TIMES, OVER = ("*", "\\times", "\\cdot"), ("/", ":", "\\div")


def arithmetic(text: str) -> int | float:
    """The value of LaTeX arithmetic; ValueError for anything else.

    Numbers, \\pi, + - * / : ^ !, fractions, roots, sines and their like, brackets and percent. As
    latex2sympy does, it ignores what follows a whole expression from an unpaired closing bracket or
    a period on. (The reference also knows logarithms, binomials and names.)
    """
    parser = _Parser(text)
    try:
        value = parser.total()
    except (ArithmeticError, TypeError, RecursionError) as error:
        raise ValueError(f"no arithmetic: {text}") from error
    if isinstance(value, complex) or parser.next not in ("", ")", "]", "}", "."):
        raise ValueError(f"no arithmetic: {text}")
    return value


class _Parser:
    """Recursive descent: a total of products of signed powers of atoms."""

    def __init__(self, text: str):
        tokens = [match[0] for match in TOKEN.finditer(text) if not match["skip"]]
        self.tokens = [re.sub(r"^\\[dt]frac", r"\\frac", token) for token in tokens] + [""]
        self.place = 0

    @property
    def next(self) -> str:
        return self.tokens[self.place]

    def take(self, *wanted: str) -> str:
        """The next token, stepped over, if it is one of `wanted`; else ""."""
        token = self.next if self.next in wanted else ""
        self.place += bool(token)
        return token

    def check(self, good: object) -> None:
        if not good:
            raise ValueError(f"no arithmetic: {''.join(self.tokens)}")

    def total(self) -> int | float:
        value = self.product()
        while sign := self.take("+", "-"):
            value = value + self.product() if sign == "+" else value - self.product()
        return value

    def product(self) -> int | float:
        value = self.signed()
        while operator := self.take(*TIMES, *OVER):
            value = value * self.signed() if operator in TIMES else value / self.signed()
        return value

    def signed(self) -> int | float:
        if sign := self.take("+", "-"):
            return self.signed() if sign == "+" else -self.signed()
        value = self.power()
        # Factors side by side bind more tightly than a sign between them.
        while self.next in (*CLOSING, "\\frac", "\\sqrt", "\\pi", *FUNCTIONS) or \
                NUMBER.fullmatch(self.next):
            value = value * self.power()
        return value

    def power(self) -> int | float:
        base = self.atom()
        while self.take("!"):
            self.check(base <= 999)
            base = math.factorial(base)
        if self.take("^"):
            exponent = self.atom()
            self.check(abs(exponent) <= 9999 and abs(base) <= 1e9)
            base = base ** exponent
        return base / 100 if self.take("\\%") else base

    def group(self, opening: str = "{") -> int | float:
        self.check(self.take(opening))
        value = self.total()
        self.check(self.take(CLOSING[opening]))
        return value

    def atom(self) -> int | float:
        if self.next in CLOSING:
            return self.group(self.next)
        token = self.take(self.next)
        if token == "\\pi":
            return math.pi
        if token in FUNCTIONS:
            return FUNCTIONS[token](self.power())
        if token == "\\sqrt":
            index = self.group("[") if self.next == "[" else 2
            return self.group() ** (1 / index)
        if token == "\\frac":
            return self.group() / self.group()
        self.check(NUMBER.fullmatch(token))
        value = float(token.replace(",", ""))
        return int(value) if value.is_integer() else value


def tuple_values(text: str) -> str:
    """"(2*3, 1/2)" -> "(6,0.5)": a tuple's or list's elements by value; other text as it is."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    try:
        values = [part if "infty" in part or part in ("a", "-a") else
                  str(round(arithmetic(part), 2)) for part in parts]
    except ValueError:
        return text
    return text[0] + ",".join(values) + text[-1]


def same_value(a: str, b: str) -> bool:
    """Equal as text, as tuples, or to 2 decimals as numbers."""
    a, b = a.lower(), b.lower()
    if not a.replace(" ", "") or not b.replace(" ", ""):
        return False
    if a.strip() == b.strip():
        return True
    a, b = tuple_values(a), tuple_values(b)
    try:
        return a == b or round(arithmetic(a), 2) == round(arithmetic(b), 2)
    except ValueError:
        return False


DECORATION = (
    (" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""),
    ("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""),
    ("{km}", ""), ("km", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
    ("\\$", ""), ("$", ""), ("\\%", ""), ("{.", "{0."))


def plain_math(text: str) -> str:
    """The answer in a box, or all of the text, in lower case without LaTeX decoration, units and
    spaces (MATH-V evaluation/utils.py, find_math_answer)."""
    text = text.lower().replace("{}", "")
    box = re.search(r"oxed{(.*)}", text, re.S)
    text = box[1] if box else text
    if "}" in text and ("{" not in text or text.find("}") < text.find("{")):
        text = text.split("}")[0]
    text = text.split("=")[-1].split("\\approx")[-1]
    for old, new in DECORATION:
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


def braced(text: str, command: str, arguments: int) -> str:
    """\\sqrt3 -> \\sqrt{3}, \\frac12 -> \\frac{1}{2}: a command's bare arguments in braces."""
    head, *tails = text.split(command)
    for tail in tails:
        if arguments == 1 and tail and tail[0] != "{":
            tail = "{" + tail[0] + "}" + tail[1:]
        elif arguments == 2 and not tail.startswith("{"):
            if len(tail) < 2:
                return text
            second = tail[1:] if tail[1] == "{" else "{" + tail[1] + "}" + tail[2:]
            tail = "{" + tail[0] + "}" + second
        head += command + tail
    return head
