"""Direct feedback: learning signals for every block from the output error alone. Needs torch only."""

from feedback.alignment import alignment
from feedback.checks import UPDATES
from feedback.direct import direct_feedback
from feedback.labels import Labels
from feedback.rules import RULES, Rule, learned_rules
from feedback.wrapper import DirectFeedback

__all__ = ["RULES", "UPDATES", "DirectFeedback", "Labels", "Rule", "alignment", "direct_feedback", "learned_rules"]
