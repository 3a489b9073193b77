-- Where it starts: the earliest failing site of every phase of a comparison, and the last good site before it.
-- The culprit sits between the two. A comparison without a failing site has no row.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   overall BOOLEAN: true for the first of the comparison's failing phases (prefill, decode, forward)
--   exec_order INTEGER: position of the failing site in the reference's execution order
--   site VARCHAR: the failing site, as the reference names it
--   target_site VARCHAR: the same, as the target names it
--   r_ratio DOUBLE: its R, ratio; infinite: only the baseline is exact; NULL: undefined, see state
--   r_low DOUBLE: lower end of R's 95 % interval, ratio
--   r_high DOUBLE: upper end of R's 95 % interval, ratio
--   state VARCHAR: measured, baseline_exact, nonfinite or shape_mismatch
--   n_failing BIGINT: failing sites of the phase, this one included
--   last_good_site VARCHAR: last site before it, in the same phase, that passed; NULL if there is none
--   last_good_r DOUBLE: its R, ratio
-- Example:
--   SELECT phase, overall, site, r_ratio, last_good_site, last_good_r
--   FROM first_divergence WHERE comparison = 'port-2' ORDER BY phase_order(phase)
CREATE VIEW first_divergence AS
SELECT
    failing.comparison,
    failing.phase,
    phase_order(failing.phase) = min(phase_order(failing.phase)) OVER (PARTITION BY failing.comparison) AS overall,
    any_value(failing.first).exec_order AS exec_order,
    any_value(failing.first).site AS site,
    any_value(failing.first).target_site AS target_site,
    any_value(failing.first).r_ratio AS r_ratio,
    any_value(failing.first).r_low AS r_low,
    any_value(failing.first).r_high AS r_high,
    any_value(failing.first).state AS state,
    any_value(failing.n_failing) AS n_failing,
    arg_max(good.site, good.exec_order * 4294967296 + good.measurement) AS last_good_site,
    arg_max_null(good.r_ratio, good.exec_order * 4294967296 + good.measurement) AS last_good_r
FROM (
    SELECT
        comparison, phase, count(*) AS n_failing,
        min(exec_order * 4294967296 + measurement) AS place,
        arg_min(
            {site: site, target_site: target_site, exec_order: exec_order, r_ratio: r_ratio, r_low: r_low, r_high: r_high, state: state},
            exec_order * 4294967296 + measurement) AS first
    FROM measurements
    WHERE prompt IS NULL AND verdict = 'fail'
    GROUP BY comparison, phase
) AS failing
LEFT JOIN measurements AS good
    ON good.comparison = failing.comparison AND good.phase = failing.phase AND good.prompt IS NULL
    AND good.verdict = 'pass' AND good.exec_order * 4294967296 + good.measurement < failing.place
GROUP BY failing.comparison, failing.phase;
