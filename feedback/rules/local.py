"""Local learning (Nokland, Eidnes 2019; Belilovsky, Eickenberg, Oyallon 2019): a block learns by its head's own error.

grad_h_l = J^T e_l    with J the Jacobian of the head's logits z_l at h_l, e_l = dloss/dz_l; the head learns by e_l, too
"""

from feedback.rules.las import readout_error
from feedback.rules.rule import Rule

LOCAL = Rule("LOCAL", sent=readout_error, correlated=readout_error, needs_target=True, head=True)
