"""logits judges next-token distributions, teacher-forced, per prompt and position, from stored traces alone.

`judge_logits` does it all: `source` finds the sites that hold logits and aligns them, `table` measures every position
(`side` and `distributions` hold the formulas, `chance` how many flips rounding explains), `criteria` judges, `greedy`
compares the tokens of free runs.
"""

from .report import LogitReport, judge_logits

__all__ = ["LogitReport", "judge_logits"]
