"""diagnosis says why a site is wrong: it tests named hypotheses against the stored values.

A hypothesis predicts what the target would hold if it were true, from the reference's and the target's recorded values
around the site, small parameters and the config. `diagnose` names a cause only if its prediction explains the error
down to the noise and no rival does as well; else the cause is `unknown`. The laws (norms, rotary, attention, linear,
...) count only where their correct form recomputes the reference.
"""

from .causes import causes
from .examination import diagnose
from .finding import Finding

__all__ = ["Finding", "causes", "diagnose"]
