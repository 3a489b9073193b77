-- R by layer and component: a fault of one component shows as one column, a fault of one layer as one row.
-- The layer is the first number in the module path, the component what follows it.
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   container VARCHAR: path before the layer number (model.layers); NULL outside numbered layers
--   layer INTEGER: layer number, from 0; NULL outside numbered layers
--   component VARCHAR: path after the layer number, (layer) for the layer itself; the whole path outside layers
--   exec_order INTEGER: first position in the reference's execution order
--   n_sites BIGINT: sites pooled (ports, slots and calls of the component)
--   n_failing BIGINT: those that failed
--   r_median DOUBLE: median of their R, ratio; NULL: undefined everywhere
--   r_max DOUBLE: largest R, ratio; infinite: only the baseline is exact
--   worst_site VARCHAR: the site with the largest R
-- Example:
--   SELECT layer, component, n_failing, r_max FROM layer_profile
--   WHERE comparison = 'port-2' AND phase = 'prefill' AND layer IS NOT NULL ORDER BY layer, exec_order
CREATE VIEW layer_profile AS
SELECT
    comparison, phase,
    CASE WHEN place.layer <> '' THEN rtrim(place.container, '.') END AS container,
    CASE WHEN place.layer <> '' THEN place.layer::INTEGER END AS layer,
    CASE
        WHEN place.layer = '' THEN CASE WHEN module = '' THEN '(root)' ELSE module END
        WHEN place.component = '' THEN '(layer)'
        ELSE place.component
    END AS component,
    min(exec_order) AS exec_order,
    count(*) AS n_sites,
    count(*) FILTER (verdict = 'fail') AS n_failing,
    median(r) AS r_median,
    max(r) AS r_max,
    arg_max(site, r) AS worst_site
FROM (
    SELECT
        comparison, phase, module, site, exec_order, verdict, r_ratio AS r,
        regexp_extract(
            module, '^((?:.*?\.)??)(\d{1,9})(?:\.(.*))?$', ['container', 'layer', 'component']) AS place
    FROM measurements
    WHERE prompt IS NULL
)
GROUP BY ALL;
