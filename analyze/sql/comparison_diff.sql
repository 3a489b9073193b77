-- What a change to the port did: the sites of two comparisons side by side, largest change first.
--
-- Arguments:
--   before: name of the earlier comparison
--   after: name of the later comparison
-- Columns:
--   phase VARCHAR: prefill, decode or forward
--   exec_order INTEGER: position in the reference's execution order
--   site VARCHAR: site of the reference
--   r_before DOUBLE: R in the earlier comparison, ratio; NULL: undefined or not measured
--   r_after DOUBLE: R in the later comparison, ratio; NULL: undefined or not measured
--   change DOUBLE: r_after / r_before, ratio; below 1 is better
--   verdict_before VARCHAR: pass, fail or undecided; NULL: not measured
--   verdict_after VARCHAR: pass, fail or undecided; NULL: not measured
-- Example:
--   SELECT phase, site, r_before, r_after, change, verdict_before, verdict_after
--   FROM comparison_diff('port-1', 'port-2') WHERE verdict_before IS DISTINCT FROM verdict_after
CREATE MACRO comparison_diff(before, after) AS TABLE
SELECT
    coalesce(b.phase, a.phase) AS phase,
    coalesce(b.exec_order, a.exec_order) AS exec_order,
    coalesce(b.site, a.site) AS site,
    b.r_ratio AS r_before, a.r_ratio AS r_after, a.r_ratio / nullif(b.r_ratio, 0) AS change,
    b.verdict AS verdict_before, a.verdict AS verdict_after
FROM (SELECT * FROM divergence AS d WHERE d.comparison = before) AS b
FULL JOIN (SELECT * FROM divergence AS d WHERE d.comparison = after) AS a ON a.site = b.site AND a.phase = b.phase
ORDER BY abs(ln(nullif(a.r_ratio / nullif(b.r_ratio, 0), 0))) DESC NULLS LAST, phase_order(coalesce(b.phase, a.phase)), 2, 3;
