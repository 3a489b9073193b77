-- Sites from worst to best, each with its worst prompt. Values that are not finite and shapes that do not fit come
-- first, since they have no R; add a LIMIT.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   exec_order INTEGER: position in the reference's execution order
--   site VARCHAR: site of the reference
--   r_ratio DOUBLE: R over all prompts, ratio; infinite: only the baseline is exact; NULL: undefined
--   state VARCHAR: measured, exact, baseline_exact, nonfinite or shape_mismatch
--   verdict VARCHAR: pass, fail or undecided
--   worst_prompt INTEGER: the prompt with the largest R; NULL if it is undefined for all
--   worst_prompt_r DOUBLE: R of that prompt, ratio
-- Example:
--   SELECT phase, site, r_ratio, state, worst_prompt, worst_prompt_r FROM worst_sites WHERE comparison = 'port-2' LIMIT 3
CREATE VIEW worst_sites AS
SELECT
    comparison, phase,
    min(exec_order) AS exec_order,
    site,
    max(r_ratio) FILTER (prompt IS NULL) AS r_ratio,
    max(state) FILTER (prompt IS NULL) AS state,
    max(verdict) FILTER (prompt IS NULL) AS verdict,
    arg_max(prompt, r_ratio) FILTER (prompt IS NOT NULL) AS worst_prompt,
    max(r_ratio) FILTER (prompt IS NOT NULL) AS worst_prompt_r
FROM measurements
GROUP BY comparison, phase, site
ORDER BY
    comparison,
    CASE max(state) FILTER (prompt IS NULL) WHEN 'nonfinite' THEN 0 WHEN 'shape_mismatch' THEN 1 ELSE 2 END,
    r_ratio DESC NULLS LAST, phase_order(phase), min(exec_order), site;
