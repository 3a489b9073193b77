-- What the divergence does to the output: agreement of the next-token distributions, one row per prompt.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   prompt INTEGER: index of the prompt
--   n_positions BIGINT: token positions compared
--   top1_rate DOUBLE: fraction of positions where reference and target choose the same token, 0 to 1
--   top5_overlap DOUBLE: mean share of common tokens among the five most likely, 0 to 1
--   top10_overlap DOUBLE: mean share of common tokens among the ten most likely, 0 to 1
--   first_flip INTEGER: first position where they choose differently; NULL: never
--   kl_mean DOUBLE: mean Kullback-Leibler divergence, nats
--   kl_max DOUBLE: largest Kullback-Leibler divergence, nats
--   worst_position INTEGER: the position of kl_max
--   r_median DOUBLE: median R of the centred logits, ratio
--   cosine_min DOUBLE: smallest cosine of the centred logits, -1 to 1
-- Example:
--   SELECT prompt, n_positions, top1_rate, first_flip, kl_max, worst_position
--   FROM logit_profile WHERE comparison = 'port-2' ORDER BY top1_rate, prompt
CREATE VIEW logit_profile AS
SELECT
    comparison, prompt, count(*) AS n_positions,
    avg(top1::INTEGER) AS top1_rate, avg(top5) AS top5_overlap, avg(top10) AS top10_overlap,
    min(position) FILTER (NOT top1) AS first_flip,
    avg(kl) AS kl_mean, max(kl) AS kl_max, arg_max(position, kl) AS worst_position,
    median(r_ratio) AS r_median, min(cosine) AS cosine_min
FROM logits
GROUP BY comparison, prompt;
