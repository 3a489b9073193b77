-- The name of a site from its parts, as every other table and command writes it.
--
-- Returns:
--   VARCHAR: module path, `#call` from the second call on, `:port` unless it is the output, `[slot]` if there is one
-- Example:
--   SELECT DISTINCT site_name(module, port, slot, call) AS site FROM tensors WHERE run = 'neuron' ORDER BY site
CREATE MACRO site_name(module, port, slot, call := 0) AS
    concat(
        CASE WHEN module = '' THEN '(root)' ELSE module END,
        CASE WHEN call <> 0 THEN concat('#', call) ELSE '' END,
        CASE WHEN port <> 'output' THEN concat(':', port) ELSE '' END,
        CASE WHEN slot <> '' THEN concat('[', slot, ']') ELSE '' END);
