-- One site through time: its R in every comparison, oldest first, and the change since the one before.
--
-- Arguments:
--   wanted: site of the reference
-- Columns:
--   phase VARCHAR: prefill, decode or forward
--   created_at TIMESTAMP: when the comparison was made, UTC
--   comparison VARCHAR: name of the comparison
--   target VARCHAR: target run
--   r_ratio DOUBLE: R over all prompts, ratio; infinite: only the baseline is exact; NULL: undefined
--   change DOUBLE: R divided by the R of the comparison before, ratio; NULL for the first and where undefined
--   verdict VARCHAR: pass, fail or undecided
-- Example:
--   SELECT phase, comparison, r_ratio, change, verdict FROM drift('model.layers.1.mlp')
CREATE MACRO drift(wanted) AS TABLE
SELECT
    m.phase, c.created_at, m.comparison, c.target, m.r_ratio,
    m.r_ratio
        / nullif(lag(m.r_ratio) OVER (
            PARTITION BY m.phase ORDER BY c.created_at, m.comparison), 0) AS change,
    m.verdict
FROM measurements AS m
JOIN comparisons AS c ON c.comparison = m.comparison
WHERE m.site = wanted AND m.prompt IS NULL
ORDER BY phase_order(m.phase), c.created_at, m.comparison;
