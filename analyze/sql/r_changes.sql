-- Where R changes along the dataflow, as `sleuth localize` found it: steps persist, spikes return, drifts grow.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   kind VARCHAR: step, spike or drift
--   exec_order INTEGER: place of the first site on the new level; of the first site of a drift
--   site VARCHAR: that site
--   site_low VARCHAR: first site it may be with 95 % probability; first site of a drift
--   site_high VARCHAR: last site it may be with 95 % probability; last site of a drift
--   r_before DOUBLE: R before it, ratio
--   r_after DOUBLE: R after it, or at the end of a drift, ratio
-- Example:
--   SELECT phase, kind, site, site_low, site_high, r_before, r_after FROM r_changes WHERE comparison = 'port-2'
CREATE VIEW r_changes AS
SELECT
    comparison, phase, kind, exec_order, site, site_low, site_high,
    exp(log_r_before) AS r_before,
    exp(log_r_before + log_r_change) AS r_after
FROM change_points
ORDER BY comparison, phase_order(phase), exec_order;
