"""The learning rules: a small file each, and one registry. To add a rule, add its file and its line here."""

from feedback.rules.bp import BP
from feedback.rules.dfa import DFA
from feedback.rules.dkp import DKP
from feedback.rules.drtp import DRTP
from feedback.rules.fa import FA
from feedback.rules.fdfa import FDFA
from feedback.rules.head import HEAD
from feedback.rules.kp import KP
from feedback.rules.las import LAS
from feedback.rules.local import LOCAL
from feedback.rules.rule import Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (BP, FA, KP, DFA, DKP, LAS, DRTP, FDFA, HEAD, LOCAL)}


def learned_rules() -> tuple[str, ...]:
    """The rules whose B, or head, is learned at the points, by an optimiser of its own or in place."""
    return tuple(name for name, rule in RULES.items() if rule.learns)


__all__ = ["RULES", "Rule", "learned_rules"]
