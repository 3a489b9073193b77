-- R from sums of squares, so that token errors can be pooled any way one likes and judged afterwards.
-- R = ||t - r|| / (||b - r|| + 1e-12 ||r||).
--
-- Returns:
--   DOUBLE: ratio; infinite where only the baseline is exact, NULL where both are
-- Example:
--   SELECT position, r_from_squares(sum(reference_sq), sum(baseline_sq), sum(target_sq)) AS r
--   FROM token_errors WHERE comparison = 'port-2' GROUP BY position ORDER BY position
CREATE MACRO r_from_squares(reference_sq, baseline_sq, target_sq) AS
    CASE
        WHEN baseline_sq > 0 THEN sqrt(target_sq) / (sqrt(baseline_sq) + 1e-12 * sqrt(reference_sq))
        WHEN baseline_sq = 0 AND target_sq > 0 THEN 'inf'::DOUBLE
    END;
