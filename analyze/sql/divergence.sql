-- Every compared site in dataflow order, over all prompts: read it from the top until R leaves the noise.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   exec_order INTEGER: position in the reference's execution order
--   site VARCHAR: site of the reference
--   target_site VARCHAR: site of the target it was compared with
--   n BIGINT: elements compared
--   r_ratio DOUBLE: R, ratio of target error to baseline error; infinite: only the baseline is exact; NULL: undefined
--   r_low DOUBLE: lower end of R's 95 % interval, ratio
--   r_high DOUBLE: upper end of R's 95 % interval, ratio
--   relative_l2 DOUBLE: ||t - r|| / ||r||, ratio
--   cosine DOUBLE: <t, r> / (||t|| ||r||), -1 to 1
--   qq_w1 DOUBLE: Wasserstein-1 distance of both error distributions, in standard deviations of the baseline's
--   q_value DOUBLE: false-discovery rate at which the site would be called divergent, 0 to 1
--   state VARCHAR: measured, exact, baseline_exact, nonfinite or shape_mismatch
--   verdict VARCHAR: pass, fail or undecided
-- Example:
--   SELECT phase, site, r_ratio, r_low, r_high, verdict FROM divergence WHERE comparison = 'port-2'
CREATE VIEW divergence AS
SELECT
    comparison, phase, exec_order, site, target_site, n,
    r_ratio, r_low, r_high, relative_l2, cosine, qq_w1, q_value, state, verdict
FROM measurements
WHERE prompt IS NULL
ORDER BY comparison, phase_order(phase), exec_order, measurement;
