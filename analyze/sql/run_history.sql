-- Every run, and how the comparisons it took part in ended.
--
-- Columns:
--   run VARCHAR: name of the run
--   created_at TIMESTAMP: when it was recorded, UTC
--   role VARCHAR: reference, baseline or target
--   stack VARCHAR: what ran the model: hf, nxdi, nxdi-cpu, vllm-neuron or import
--   model VARCHAR: name of the model
--   dtype VARCHAR: dtype of the weights
--   device VARCHAR: where it ran
--   tp INTEGER: tensor-parallel ranks
--   status VARCHAR: running, complete, failed or repaired
--   comparison VARCHAR: a comparison that it took part in; NULL: none so far
--   compared_as VARCHAR: reference, baseline or target
--   compared_at TIMESTAMP: when the comparison was made, UTC
--   verdict VARCHAR: verdict of the comparison: pass, fail or undecided
-- Example:
--   SELECT run, dtype, status, comparison, verdict FROM run_history WHERE role = 'target'
CREATE VIEW run_history AS
SELECT
    r.run, r.created_at, r.role, r.stack, r.model, r.dtype, r.device, r.tp, r.status,
    c.comparison, c.compared_as, c.created_at AS compared_at, c.verdict
FROM runs AS r
LEFT JOIN (
    SELECT comparison, created_at, verdict, unnest(['reference', 'baseline', 'target']) AS compared_as,
        unnest([reference, baseline, target]) AS run
    FROM comparisons
) AS c ON c.run = r.run
ORDER BY r.ordinal, c.created_at, c.comparison;
