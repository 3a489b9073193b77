-- Tensors of a run with the same bits: a site that passes its input through, or, over several prompts, an input that
-- is ignored or a buffer that is never written.
--
-- Columns:
--   run VARCHAR: name of the run
--   checksum VARCHAR: XXH3-128 of the bytes, hexadecimal
--   dtype VARCHAR: element type
--   n_tensors BIGINT: tensors with these bytes
--   n_sites BIGINT: different sites among them
--   n_prompts BIGINT: different prompts among them
--   sites VARCHAR[]: the sites, in alphabetical order
--   first_id BIGINT: the tensor that was recorded first
--   nbytes BIGINT: size of one of them, bytes
-- Example:
--   SELECT run, sites, n_tensors, n_prompts FROM duplicates WHERE n_prompts > 1 ORDER BY run, first_id
CREATE VIEW duplicates AS
SELECT
    run, checksum, dtype, count(*) AS n_tensors,
    count(DISTINCT site) AS n_sites,
    count(DISTINCT prompt) AS n_prompts,
    list(DISTINCT site ORDER BY site) AS sites,
    min(tensor_id) AS first_id,
    any_value(nbytes) AS nbytes
FROM (SELECT *, site_name(module, port, slot, call) AS site FROM tensors WHERE nbytes > 0)
GROUP BY run, checksum, dtype
HAVING count(*) > 1;
