"""Reading rule text: a tokeniser and a small recursive parser. Nothing is ever evaluated as code."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from lib.cli import UserError
from lib.text_and_rules import COMPARISONS, Condition, Conjunction, Rule

MAX_DEPTH = 50
MAX_LITERALS = 1000

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<compare><=|>=|==|!=|<|>)
  | (?P<symbol>&&|\|\||[&|~()])
  | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![A-Za-z0-9_.]))
  | (?P<name>[A-Za-z0-9_.]+)
  | `(?P<quoted>[^`]+)`
)""",
    re.VERBOSE,
)
_CONNECTIVES = {"&": "and", "&&": "and", "and": "and", "|": "or", "||": "or", "or": "or", "~": "not", "not": "not"}
_MIRRORED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "==": "==", "!=": "!="}


class _Token(NamedTuple):
    kind: str  # compare, number, name, and, or, not, (, ), end
    text: str


# A rule while it is read: literals joined by OR.
_Literals = tuple[Conjunction, ...]


def read_rule(text: str) -> Rule:
    """The rule a text stands for; see `lib.text_and_rules.parse_rule`."""
    if text.strip().upper() in ("FALSE", "(FALSE)"):
        return Rule(())
    return _Parser(text).rule()


class _Parser:
    """Recursive descent over `or > and > not > comparison`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokenised()
        self.position = 0
        self.depth = 0

    def rule(self) -> Rule:
        """The whole text as one rule."""
        literals = self._any_of()
        if self._peek().kind != "end":
            self._refuse(f"{self._peek().text!r} is not expected there")
        return Rule(literals)

    def _refuse(self, reason: str) -> NoReturn:
        shown = self.text if len(self.text) <= 120 else self.text[:117] + "..."
        raise UserError(
            f"not a rule: {' '.join(shown.split())!r} ({reason}); "
            "a rule is comparisons like 'a > 0.5' joined by &, OR and NOT(...)"
        )

    def _tokenised(self) -> list[_Token]:
        tokens: list[_Token] = []
        position = 0
        text = self.text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                self._refuse(f"cannot read it from {text[position : position + 20].strip()!r} on")
            position = match.end()
            kind, value = match.lastgroup, match[match.lastgroup]
            if kind == "quoted":
                kind = "name"
            elif kind == "symbol":
                kind = _CONNECTIVES.get(value, value)
            tokens.append(_Token(kind, value))
        tokens.append(_Token("end", "the end"))
        # A word like `and` is a connective unless it is compared with something, then it is a feature's name.
        return [
            _Token(_CONNECTIVES[token.text.lower()], token.text)
            if token.kind == "name" and token.text.lower() in ("and", "or", "not") and following.kind != "compare"
            else token
            for token, following in itertools.pairwise(tokens)
        ] + tokens[-1:]

    def _peek(self) -> _Token:
        return self.tokens[self.position]

    def _take(self) -> _Token:
        token = self.tokens[self.position]
        self.position += 1
        return token

    def _any_of(self) -> _Literals:
        literals = self._all_of()
        while self._peek().kind == "or":
            self._take()
            literals += self._all_of()
        if len(literals) > MAX_LITERALS:
            self._refuse(f"more than {MAX_LITERALS} alternatives")
        return literals

    def _all_of(self) -> _Literals:
        literals = self._negation()
        while self._peek().kind == "and":
            self._take()
            literals = self._product(literals, self._negation())
        return literals

    def _product(self, left: _Literals, right: _Literals) -> _Literals:
        """(a OR b) AND (c OR d), multiplied out."""
        if any(literal.negated for literal in left + right):
            self._refuse("NOT(...) may be an alternative of its own, but not part of a conjunction")
        if len(left) * len(right) > MAX_LITERALS:
            self._refuse(f"more than {MAX_LITERALS} alternatives")
        return tuple(Conjunction(a.conditions + b.conditions) for a in left for b in right)

    def _negation(self) -> _Literals:
        if self._peek().kind != "not":
            return self._group()
        self._take()
        literals = self._nested(self._negation)
        if len(literals) != 1:
            self._refuse("NOT of alternatives")
        return (Conjunction(literals[0].conditions, not literals[0].negated),)

    def _group(self) -> _Literals:
        if self._peek().kind != "(":
            return self._comparison()
        self._take()
        literals = self._nested(self._any_of)
        if self._take().kind != ")":
            self._refuse("a closing parenthesis is missing")
        return literals

    def _nested(self, read: Callable[[], _Literals]) -> _Literals:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH}")
        literals = read()
        self.depth -= 1
        return literals

    def _comparison(self) -> _Literals:
        """`a > 1`, `1 < a` or `1 < a <= 2`."""
        operands = [self._operand()]
        signs: list[str] = []
        while self._peek().kind == "compare" and len(signs) < 2:
            signs.append(self._take().text)
            operands.append(self._operand())
        if len(signs) == 1 and operands[1].kind == "number":
            return (self._condition(operands[0], signs[0], operands[1]),)
        if len(signs) >= 1 and operands[0].kind == "number" and operands[1].kind == "name":
            conjunction = self._condition(operands[1], _MIRRORED[signs[0]], operands[0])
            if len(signs) == 1:
                return (conjunction,)
            if operands[2].kind == "number":
                upper = self._condition(operands[1], signs[1], operands[2])
                return (Conjunction(conjunction.conditions + upper.conditions),)
        self._refuse("a comparison is a feature, a sign and a number")

    def _operand(self) -> _Token:
        token = self._take()
        if token.kind not in ("name", "number"):
            self._refuse(f"a feature or a number is missing before {token.text!r}")
        return token

    def _condition(self, name: _Token, sign: str, number: _Token) -> Conjunction:
        if sign not in COMPARISONS:
            self._refuse(f"{sign!r} is no comparison")
        try:
            return Conjunction((Condition(name.text, sign, float(number.text)),))
        except ValueError as error:
            self._refuse(str(error))
