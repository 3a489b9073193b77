-- What was not compared, and why. A comparison with unmatched sites never passes.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: phases it covers, separated by commas; empty: all
--   exec_order INTEGER: position in the reference's execution order
--   site VARCHAR: site of the reference
--   status VARCHAR: unmatched (a hole: no counterpart was found) or skipped (accounted for)
--   reason VARCHAR: why
-- Example:
--   SELECT site, phase, status, reason FROM coverage_holes WHERE comparison = 'port-2'
CREATE VIEW coverage_holes AS
SELECT comparison, phase, exec_order, site, status, reason
FROM coverage
WHERE status <> 'matched'
ORDER BY comparison, exec_order, site;
