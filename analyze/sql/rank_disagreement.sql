-- Tensors that every rank should hold alike and does not: a missing all-reduce, or ranks out of step.
-- Replicated means that the dims name the axes and none is sharded `[..]` or a partial sum `{..}`; tensors of
-- unknown dims are left out. Compare two ranks with max_abs_error(tensor_id, other_id).
--
-- Columns:
--   run VARCHAR: name of the run
--   prompt INTEGER: index of the prompt; NULL for parameters
--   phase VARCHAR: prefill, decode, forward or static
--   step INTEGER: 0 for prefill, then the decode step
--   exec_order INTEGER: position in the run's execution order within the step
--   site VARCHAR: the site
--   dims VARCHAR: its axes
--   n_ranks BIGINT: ranks that recorded it
--   n_versions BIGINT: different contents among them
--   odd_ranks INTEGER[]: ranks that differ from the lowest one
--   tensor_id BIGINT: the tensor of the lowest rank
--   other_id BIGINT: the tensor of the first rank that differs
-- Example:
--   SELECT run, phase, step, site, n_ranks, odd_ranks FROM rank_disagreement ORDER BY step, exec_order LIMIT 5
CREATE VIEW rank_disagreement AS
SELECT
    run, prompt, phase, step, exec_order, site_name(module, port, slot, call) AS site, dims, n_ranks, n_versions,
    [other.rank FOR other IN copies IF other.checksum <> copies[1].checksum] AS odd_ranks,
    copies[1].tensor_id AS tensor_id,
    [other.tensor_id FOR other IN copies IF other.checksum <> copies[1].checksum][1] AS other_id
FROM (
    SELECT
        t.run, t.prompt, t.phase, t.step, t.module, t.port, t.slot, t.call, t.dims, min(t.exec_order) AS exec_order,
        count(DISTINCT t.rank) AS n_ranks, count(DISTINCT t.checksum) AS n_versions,
        list({rank: t.rank, checksum: t.checksum, tensor_id: t.tensor_id} ORDER BY t.rank, t.seq) AS copies
    FROM tensors AS t
    JOIN (
        SELECT run, prompt, phase, step, module, port, slot, call, dims, position_start
        FROM tensors
        WHERE dims <> '' AND NOT contains(dims, '[') AND NOT contains(dims, '{')
        GROUP BY ALL
        HAVING min(checksum) <> max(checksum) AND min(rank) <> max(rank)
    ) AS odd
        ON t.run = odd.run AND t.module = odd.module AND t.port = odd.port AND t.slot = odd.slot AND t.call = odd.call
        AND t.phase = odd.phase AND t.step = odd.step AND t.dims = odd.dims
        AND t.prompt IS NOT DISTINCT FROM odd.prompt AND t.position_start IS NOT DISTINCT FROM odd.position_start
    GROUP BY t.run, t.prompt, t.phase, t.step, t.module, t.port, t.slot, t.call, t.dims, t.position_start
);
