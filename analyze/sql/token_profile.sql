-- R of every token: does the error sit in one token (the first, padding, a long position) or in all of them?
-- Rows come in no particular order: filter, then sort by position.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   exec_order INTEGER: position in the reference's execution order
--   site VARCHAR: site of the reference
--   prompt INTEGER: index of the prompt
--   position INTEGER: token position within the prompt, from 0
--   r_ratio DOUBLE: R of this token alone, ratio; infinite: only the baseline is exact; NULL: undefined
--   relative_l2 DOUBLE: ||t - r|| / ||r|| of this token, ratio; NULL where the reference is zero
-- Example:
--   SELECT site, prompt, position, r_ratio FROM token_profile
--   WHERE comparison = 'port-2' AND site = 'model.layers.1.mlp' ORDER BY prompt, position
CREATE VIEW token_profile AS
SELECT
    m.comparison, m.phase, m.exec_order, m.site, m.prompt, t.position,
    r_from_squares(t.reference_sq, t.baseline_sq, t.target_sq) AS r_ratio,
    CASE WHEN t.reference_sq > 0 THEN sqrt(t.target_sq) / sqrt(t.reference_sq) END AS relative_l2
FROM token_errors AS t
JOIN measurements AS m ON m.comparison = t.comparison AND m.measurement = t.measurement
WHERE m.prompt IS NOT NULL;
