"""DFA whose B is a small net: the network's error goes to each block through a head of the block's own.

grad_h_l = J^T e             with J the Jacobian of the head's logits z_l at h_l; LAS is the linear case
the head learns the labels:  its parameters get the gradient of its own loss, e_l = dloss/dz_l
"""

from feedback.rules.las import readout_error
from feedback.rules.rule import Rule, output_error

HEAD = Rule("HEAD", sent=output_error, correlated=readout_error, needs_target=True, head=True)
