"""Direct feedback: learning signals for every block from the output error alone. Needs torch only."""

from feedback.alignment import alignment
from feedback.functional import direct_feedback
from feedback.rules import RULES, Rule
from feedback.wrapper import UPDATES, DirectFeedback, learned_rules

__all__ = ["RULES", "UPDATES", "DirectFeedback", "Rule", "alignment", "direct_feedback", "learned_rules"]
