-- The order of phases in time, to sort by: a model encodes its source, prefills, then decodes.
--
-- Returns:
--   INTEGER: -1 encode, 0 prefill, 1 decode, 2 forward (a model without tokens), 3 anything else (static: parameters)
-- Example:
--   SELECT phase, count(*) AS tensors FROM tensors WHERE run = 'neuron' GROUP BY phase ORDER BY phase_order(phase)
CREATE MACRO phase_order(phase) AS
    CASE phase WHEN 'encode' THEN -1 WHEN 'prefill' THEN 0 WHEN 'decode' THEN 1 WHEN 'forward' THEN 2 ELSE 3 END;
