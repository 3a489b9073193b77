-- What a run recorded: one row per site, over prompts, steps and ranks.
--
-- Columns:
--   run VARCHAR: name of the run
--   site VARCHAR: the site
--   exec_order INTEGER: first position in the run's execution order
--   phases VARCHAR[]: phases in which it appeared
--   dims VARCHAR: axes of one of its tensors
--   shape BIGINT[]: shape of one of its tensors, axis lengths
--   dtype VARCHAR: element type
--   n_tensors BIGINT: tensors recorded
--   n_prompts BIGINT: prompts covered
--   n_ranks BIGINT: ranks that recorded it
--   nbytes HUGEINT: size of all its tensors before aliases are shared, bytes
--   absmax DOUBLE: largest finite magnitude, in the tensor's own unit
--   n_nonfinite HUGEINT: NaN and infinite elements
-- Example:
--   SELECT site, phases, shape, dtype, n_tensors, n_ranks FROM sites WHERE run = 'fp32' ORDER BY exec_order
CREATE VIEW sites AS
SELECT
    run,
    site_name(module, port, slot, call) AS site,
    min(exec_order) AS exec_order,
    list(DISTINCT phase ORDER BY phase) AS phases,
    arg_min(dims, tensor_id) AS dims,
    arg_min(shape, tensor_id) AS shape,
    arg_min(dtype, tensor_id) AS dtype,
    count(*) AS n_tensors,
    count(DISTINCT prompt) AS n_prompts,
    count(DISTINCT rank) AS n_ranks,
    sum(nbytes) AS nbytes,
    max(absmax) AS absmax,
    sum(n_nan + n_inf) AS n_nonfinite
FROM tensors
GROUP BY run, module, port, slot, call;
