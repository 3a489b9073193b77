-- What each module does to the error of its inputs, where inputs were captured (`--io both`): input good and output bad
-- is where error enters. The worst input counts, and the worst output.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   exec_order INTEGER: place of the module's first output in dataflow order
--   module VARCHAR: path of the module
--   call INTEGER: how often it had been called before within a step
--   r_in DOUBLE: largest R of its inputs, ratio
--   r_out DOUBLE: largest R of its outputs, ratio
--   amplification_baseline DOUBLE: relative L2 error of outputs over inputs in the baseline, ratio
--   amplification_target DOUBLE: the same in the target, ratio
--   good_in BOOLEAN: no input fails
--   good_out BOOLEAN: no output fails
-- Example:
--   SELECT phase, module, r_in, r_out FROM amplification
--   WHERE comparison = 'port-3' AND good_in AND NOT good_out ORDER BY phase_order(phase), exec_order
CREATE VIEW amplification AS
SELECT
    comparison, phase,
    min(exec_order) FILTER (port = 'output') AS exec_order,
    module, call,
    max(r_ratio) FILTER (port = 'input') AS r_in,
    max(r_ratio) FILTER (port = 'output') AS r_out,
    max(relative_l2_baseline) FILTER (port = 'output')
        / nullif(max(relative_l2_baseline) FILTER (port = 'input'), 0) AS amplification_baseline,
    max(relative_l2) FILTER (port = 'output')
        / nullif(max(relative_l2) FILTER (port = 'input'), 0) AS amplification_target,
    bool_and(verdict <> 'fail') FILTER (port = 'input') AS good_in,
    bool_and(verdict <> 'fail') FILTER (port = 'output') AS good_out
FROM measurements
WHERE prompt IS NULL
GROUP BY comparison, phase, module, call
HAVING count(*) FILTER (port = 'input') > 0 AND count(*) FILTER (port = 'output') > 0
ORDER BY comparison, phase_order(phase), exec_order;
