-- One line per comparison: how it ended, how much was judged, and where it first failed.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   created_at TIMESTAMP: when it was made, UTC
--   reference VARCHAR: reference run
--   baseline VARCHAR: baseline run; NULL for a comparison of two runs
--   target VARCHAR: target run
--   verdict VARCHAR: pass, fail or undecided
--   n_pass BIGINT: measurements over all prompts (site and phase) that passed
--   n_fail BIGINT: measurements over all prompts that failed
--   n_undecided BIGINT: measurements over all prompts that could not be judged
--   n_unmatched INTEGER: expected sites without a counterpart in the target
--   n_skipped INTEGER: expected sites left out for a reason
--   first_phase VARCHAR: phase of the earliest failing site; NULL if nothing failed
--   first_site VARCHAR: the earliest failing site; NULL if nothing failed
--   first_r DOUBLE: its R, ratio
-- Example:
--   SELECT comparison, verdict, n_pass, n_fail, n_unmatched, first_phase, first_site FROM comparison_summary
CREATE VIEW comparison_summary AS
SELECT
    c.comparison, c.created_at, c.reference, c.baseline, c.target, c.verdict,
    coalesce(counted.n_pass, 0) AS n_pass,
    coalesce(counted.n_fail, 0) AS n_fail,
    coalesce(counted.n_undecided, 0) AS n_undecided,
    c.n_unmatched, c.n_skipped,
    earliest.phase AS first_phase, earliest.site AS first_site, earliest.r_ratio AS first_r
FROM comparisons AS c
LEFT JOIN (
    SELECT
        comparison,
        count(*) FILTER (verdict = 'pass') AS n_pass,
        count(*) FILTER (verdict = 'fail') AS n_fail,
        count(*) FILTER (verdict = 'undecided') AS n_undecided
    FROM measurements
    WHERE prompt IS NULL
    GROUP BY comparison
) AS counted ON counted.comparison = c.comparison
LEFT JOIN first_divergence AS earliest ON earliest.comparison = c.comparison AND earliest.overall
ORDER BY c.created_at, c.comparison;
