-- Two runs side by side by their stored statistics alone: works for runs captured without values.
-- Tensors pair up by site, rank, prompt, phase and token positions, and must have equally many elements.
--
-- Arguments:
--   run_a: the run to compare with
--   run_b: the run to look at
-- Columns:
--   prompt INTEGER: index of the prompt; NULL for parameters
--   phase VARCHAR: prefill, decode, forward or static
--   step INTEGER: step in run_a: 0 for prefill, then the decode step
--   exec_order INTEGER: position in run_a's execution order within the step
--   site VARCHAR: the site
--   rank INTEGER: the rank
--   identical BOOLEAN: the bytes are equal
--   mean_a DOUBLE: mean of the finite elements in run_a, in the tensor's own unit
--   mean_b DOUBLE: mean of the finite elements in run_b, in the tensor's own unit
--   std_a DOUBLE: standard deviation of the finite elements in run_a, in the tensor's own unit
--   std_b DOUBLE: standard deviation of the finite elements in run_b, in the tensor's own unit
--   mean_shift DOUBLE: (mean_b - mean_a) / std_a, in standard deviations; NULL where run_a is constant
--   std_ratio DOUBLE: std_b / std_a, ratio; NULL where run_a is constant
--   absmax_ratio DOUBLE: largest magnitude in run_b over that in run_a, ratio; NULL where run_a is zero
--   nonfinite_a BIGINT: NaN and infinite elements in run_a
--   nonfinite_b BIGINT: NaN and infinite elements in run_b
-- Example:
--   SELECT phase, site, identical, mean_shift, std_ratio, absmax_ratio, nonfinite_b
--   FROM statistics_diff('fp32', 'neuron') WHERE NOT identical LIMIT 4
CREATE MACRO statistics_diff(run_a, run_b) AS TABLE
SELECT
    a.prompt, a.phase, a.step, a.exec_order, site_name(a.module, a.port, a.slot, a.call) AS site, a.rank,
    a.checksum = b.checksum AND a.dtype = b.dtype AS identical,
    a.mean AS mean_a, b.mean AS mean_b, a.std AS std_a, b.std AS std_b,
    (b.mean - a.mean) / nullif(a.std, 0) AS mean_shift,
    b.std / nullif(a.std, 0) AS std_ratio,
    b.absmax / nullif(a.absmax, 0) AS absmax_ratio,
    a.n_nan + a.n_inf AS nonfinite_a,
    b.n_nan + b.n_inf AS nonfinite_b
FROM (SELECT * FROM tensors AS t WHERE t.run = run_a) AS a
JOIN (SELECT * FROM tensors AS t WHERE t.run = run_b) AS b
    ON a.module = b.module AND a.port = b.port AND a.slot = b.slot AND a.call = b.call AND a.rank = b.rank
    AND a.phase = b.phase AND a.prompt IS NOT DISTINCT FROM b.prompt
    AND coalesce(a.position_start, -1 - a.step) = coalesce(b.position_start, -1 - b.step)
    AND list_product(a.shape) = list_product(b.shape)
ORDER BY phase_order(a.phase), a.prompt, a.step, a.exec_order, a.rank, a.seq;
