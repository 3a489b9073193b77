-- Why sites are wrong: the findings of `sleuth diagnose` with the numbers behind them.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   rank INTEGER: 1 for the likeliest origin
--   phase VARCHAR: prefill, decode or forward
--   site VARCHAR: site of the reference
--   cause VARCHAR: named cause, unknown, or inherited
--   confidence DOUBLE: 0 to 1; 0: unknown
--   explained DOUBLE: share of the target's squared error that the cause explains, up to 1; NULL: nothing was tested
--   residual_ratio DOUBLE: error that it leaves over the noise to expect, ratio; about 1: nothing is left
--   runner_up VARCHAR: the best other cause; NULL if there is none
--   runner_up_explained DOUBLE: share that the best other cause explains, up to 1
--   summary VARCHAR: what is wrong
--   remedy VARCHAR: what to change
-- Example:
--   SELECT rank, phase, site, cause, confidence, explained, residual_ratio, runner_up
--   FROM diagnoses WHERE comparison = 'port-2' ORDER BY rank
CREATE VIEW diagnoses AS
SELECT
    comparison, rank, phase, site, cause, confidence,
    (evidence ->> '$.explained')::DOUBLE AS explained,
    (evidence ->> '$.residual_ratio')::DOUBLE AS residual_ratio,
    evidence ->> '$.runner_up.cause' AS runner_up,
    (evidence ->> '$.runner_up.explained')::DOUBLE AS runner_up_explained,
    summary, remedy
FROM findings
ORDER BY comparison, rank;
