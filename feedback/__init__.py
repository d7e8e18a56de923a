"""Direct feedback: learning signals for every block from the output error alone. Needs torch only."""

from feedback.alignment import alignment
from feedback.functional import direct_feedback
from feedback.wrapper import LEARNED, RULES, UPDATES, DirectFeedback

__all__ = ["LEARNED", "RULES", "UPDATES", "DirectFeedback", "alignment", "direct_feedback"]
