"""The learning rules: a small file each, and one registry. To add a rule, add its file and its line here."""

from feedback.rules.bp import BP
from feedback.rules.dfa import DFA
from feedback.rules.dkp import DKP
from feedback.rules.drtp import DRTP
from feedback.rules.fa import FA
from feedback.rules.kp import KP
from feedback.rules.las import LAS
from feedback.rules.rule import Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (BP, FA, KP, DFA, DKP, LAS, DRTP)}

__all__ = ["RULES", "Rule"]
