-- Every position where the target's first token is another than the reference's, and whether rounding explains it.
-- A sigma below about 3 is an ordinary close call; one above 8 is not rounding.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   prompt INTEGER: index of the prompt
--   position INTEGER: token position within the prompt, from 0
--   phase VARCHAR: phase in which the target computed it
--   reference_token INTEGER: token that the reference chooses, id
--   target_token INTEGER: token that the target chooses, id
--   baseline_flips BOOLEAN: the baseline does not choose the reference's token either; NULL without one
--   margin_ulp DOUBLE: the reference's lead over its own runner-up, units in the last place of the target's dtype
--   flip_expected DOUBLE: how likely a flip was at this position, 0 to 1
--   flip_sigma DOUBLE: lead that was overcome, in standard deviations of the baseline's error in it
--   rank_reference_token INTEGER: rank of the reference's token in the target, from 1
--   p_reference_token DOUBLE: probability that the target gives it, 0 to 1
--   kl DOUBLE: Kullback-Leibler divergence, nats
-- Example:
--   SELECT prompt, position, reference_token, target_token, flip_expected, flip_sigma, rank_reference_token
--   FROM logit_flips WHERE comparison = 'port-2' ORDER BY flip_sigma DESC NULLS LAST, prompt, position
CREATE VIEW logit_flips AS
SELECT
    comparison, prompt, position, phase, reference_token, target_token,
    baseline_token <> reference_token AS baseline_flips, margin_ulp, flip_expected, flip_sigma,
    rank_reference_token, p_reference_token, kl
FROM logits
WHERE NOT top1;
