-- Both error distributions of a site on one probability grid: plot baseline against target for a Q-Q plot.
--
-- Arguments:
--   wanted: site of the reference
--   comparison: name of the comparison; the newest one that measured the site by default
--   prompt: index of a prompt; all prompts together by default
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   probability DOUBLE: of an error not above the quantile, 0 to 1
--   baseline DOUBLE: quantile of b - r, in the tensor's own unit; NULL without a baseline
--   target DOUBLE: quantile of t - r, in the tensor's own unit
-- Example:
--   SELECT phase, probability, baseline, target FROM qq('model.layers.1.mlp', comparison := 'port-2')
CREATE MACRO qq(wanted, comparison := NULL, prompt := NULL) AS TABLE
SELECT m.comparison, m.phase, e.probability, e.baseline, e.target
FROM measurements AS m
JOIN error_quantiles AS e ON e.comparison = m.comparison AND e.measurement = m.measurement
WHERE m.site = wanted
    AND m.prompt IS NOT DISTINCT FROM prompt::INTEGER
    AND m.comparison = coalesce(comparison::VARCHAR, (
        SELECT arg_max(c.comparison, c.created_at) FROM comparisons AS c
        WHERE c.comparison IN (SELECT s.comparison FROM measurements AS s WHERE s.site = wanted)))
ORDER BY phase_order(m.phase), e.probability;
