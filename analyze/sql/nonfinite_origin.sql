-- Where NaN and infinities come from: the first tensor of every run, prompt and phase that holds any, in order of
-- step and execution, over all ranks. Everything recorded before it is finite. Masks hold infinities by design.
--
-- Columns:
--   run VARCHAR: name of the run
--   prompt INTEGER: index of the prompt; NULL for parameters
--   phase VARCHAR: prefill, decode, forward or static
--   step INTEGER: 0 for prefill, then the decode step
--   exec_order INTEGER: position in the run's execution order within the step
--   site VARCHAR: the site
--   rank INTEGER: the rank that recorded it
--   n_nan BIGINT: its NaN elements
--   n_inf BIGINT: its infinite elements
--   clean_before BIGINT: finite tensors recorded before it; 0: the values were there from the first site on
--   tensor_id BIGINT: the tensor
-- Example:
--   SELECT run, prompt, phase, site, n_nan, n_inf, clean_before FROM nonfinite_origin ORDER BY run, prompt, phase
CREATE VIEW nonfinite_origin AS
SELECT
    origin.run, origin.prompt, origin.phase,
    any_value(origin.first).step AS step,
    any_value(origin.first).exec_order AS exec_order,
    any_value(origin.first).site AS site,
    any_value(origin.first).rank AS rank,
    any_value(origin.first).n_nan AS n_nan,
    any_value(origin.first).n_inf AS n_inf,
    count(before.tensor_id) AS clean_before,
    any_value(origin.first).tensor_id AS tensor_id
FROM (
    SELECT
        run, prompt, phase,
        arg_min(
            {tensor_id: tensor_id, site: site_name(module, port, slot, call), rank: rank, n_nan: n_nan, n_inf: n_inf,
             step: step, exec_order: exec_order},
            (step, exec_order, seq, rank)) AS first
    FROM tensors
    WHERE n_nan + n_inf > 0
    GROUP BY run, prompt, phase
) AS origin
LEFT JOIN tensors AS before
    ON before.run = origin.run AND before.prompt IS NOT DISTINCT FROM origin.prompt AND before.phase = origin.phase
    AND (before.step < origin.first.step
         OR (before.step = origin.first.step AND before.exec_order < origin.first.exec_order))
GROUP BY origin.run, origin.prompt, origin.phase;
