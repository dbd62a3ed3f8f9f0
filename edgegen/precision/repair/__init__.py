"""Repairs without training: what brings a quantized student nearer to the float one at no cost when it runs.

In this order, for each has the next one's ground laid by the one before: `equalise` (before ranges are calibrated and
the plan is made: it changes nothing but where the numbers are large), the plan, `round_weights`, `bias_correction`,
then, on the whole student, `q_sched`.
"""
