-- What the divergence does to the output: agreement of the next-token distributions, one row per prompt.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   prompt INTEGER: index of the prompt
--   n_positions BIGINT: token positions compared
--   n_fail BIGINT: positions beyond what any position of a clean port shows
--   first_fail INTEGER: first of them; NULL: none
--   top1_rate DOUBLE: fraction of positions where reference and target choose the same token, 0 to 1
--   top5_overlap DOUBLE: mean share of common tokens among the five most likely, 0 to 1
--   top10_overlap DOUBLE: mean share of common tokens among the ten most likely, 0 to 1
--   n_flips BIGINT: positions where they choose differently
--   flips_expected DOUBLE: how many of these rounding explains, positions
--   first_flip INTEGER: first position where they choose differently; NULL: never
--   kl_mean DOUBLE: mean Kullback-Leibler divergence, nats
--   kl_max DOUBLE: largest Kullback-Leibler divergence, nats
--   worst_position INTEGER: the position of kl_max
--   r_ratio DOUBLE: R of the centred logits of all positions, ratio; NULL: undefined
--   r_median DOUBLE: median R of the centred logits, ratio
--   cosine_min DOUBLE: smallest cosine of the centred logits, -1 to 1
-- Example:
--   SELECT prompt, n_positions, top1_rate, n_flips, first_flip, kl_max, worst_position, r_ratio
--   FROM logit_profile WHERE comparison = 'port-2' ORDER BY top1_rate, prompt
CREATE VIEW logit_profile AS
SELECT
    comparison, prompt, count(*) AS n_positions,
    count(*) FILTER (verdict = 'fail') AS n_fail, min(position) FILTER (verdict = 'fail') AS first_fail,
    avg(top1::INTEGER) AS top1_rate, avg(top5) AS top5_overlap, avg(top10) AS top10_overlap,
    count(*) FILTER (NOT top1) AS n_flips, sum(flip_expected) AS flips_expected,
    min(position) FILTER (NOT top1) AS first_flip,
    avg(kl) AS kl_mean, max(kl) AS kl_max, arg_max(position, kl) AS worst_position,
    r_from_squares(sum(reference_norm ** 2), sum(baseline_error ** 2), sum(target_error ** 2)) AS r_ratio,
    median(r_ratio) AS r_median, min(cosine) AS cosine_min
FROM logits
GROUP BY comparison, prompt;
