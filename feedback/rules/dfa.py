"""Direct feedback alignment (Nokland 2016): the output error goes to each block through a fixed B.

grad_h_l = e @ B_l
"""

from feedback.rules.rule import Rule, output_error

DFA = Rule("DFA", sent=output_error)
