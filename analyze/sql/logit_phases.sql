-- Is prefill wrong, or decode? Agreement of the next-token distributions by phase, over all prompts.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: phase in which the target computed the position: prefill or decode
--   n_positions BIGINT: token positions compared
--   n_fail BIGINT: positions beyond what any position of a clean port shows
--   top1_rate DOUBLE: fraction of positions where reference and target choose the same token, 0 to 1
--   top1_rate_baseline DOUBLE: the same of reference and baseline, 0 to 1; NULL without one
--   n_flips BIGINT: positions where reference and target choose differently
--   flips_expected DOUBLE: how many of these rounding explains, positions
--   r_ratio DOUBLE: R of the centred logits of all positions, ratio; NULL: undefined
--   r_p95 DOUBLE: R of single positions, 95th percentile, ratio
--   kl_p95 DOUBLE: Kullback-Leibler divergence, 95th percentile, nats
--   kl_p95_baseline DOUBLE: the same of the baseline, nats
--   kl_max DOUBLE: largest Kullback-Leibler divergence, nats
--   cosine_p5 DOUBLE: cosine of centred logits, 5th percentile, -1 to 1
-- Example:
--   SELECT phase, n_positions, n_fail, top1_rate, r_ratio, kl_max
--   FROM logit_phases WHERE comparison = 'port-2' ORDER BY phase_order(phase)
CREATE VIEW logit_phases AS
SELECT
    comparison, phase, count(*) AS n_positions, count(*) FILTER (verdict = 'fail') AS n_fail,
    avg(top1::INTEGER) AS top1_rate, avg(top1_baseline::INTEGER) AS top1_rate_baseline,
    count(*) FILTER (NOT top1) AS n_flips, sum(flip_expected) AS flips_expected,
    r_from_squares(sum(reference_norm ** 2), sum(baseline_error ** 2), sum(target_error ** 2)) AS r_ratio,
    quantile_cont(r_ratio, 0.95) AS r_p95,
    quantile_cont(kl, 0.95) AS kl_p95, quantile_cont(kl_baseline, 0.95) AS kl_p95_baseline, max(kl) AS kl_max,
    quantile_cont(cosine, 0.05) AS cosine_p5
FROM logits
GROUP BY comparison, phase;
