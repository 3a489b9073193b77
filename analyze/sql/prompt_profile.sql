-- How every prompt fared: does the port fail on all of them, or on one (the longest, the one with odd tokens)?
--
-- Columns:
--   comparison VARCHAR: name of the comparison
--   phase VARCHAR: prefill, decode or forward
--   prompt INTEGER: index of the prompt
--   id VARCHAR: the prompt's name in the reference run
--   n_tokens INTEGER: its length before anything was generated, tokens
--   n_sites BIGINT: sites measured
--   n_failing BIGINT: sites that failed on this prompt
--   r_median DOUBLE: median R over sites, ratio; NULL: undefined everywhere
--   r_max DOUBLE: largest R, ratio; infinite: only the baseline is exact
--   worst_site VARCHAR: the site with the largest R
-- Example:
--   SELECT phase, id, n_tokens, n_failing, r_max, worst_site
--   FROM prompt_profile WHERE comparison = 'port-2' ORDER BY phase_order(phase), prompt
CREATE VIEW prompt_profile AS
SELECT
    m.comparison, m.phase, m.prompt, p.id, p.n_tokens, m.n_sites, m.n_failing, m.r_median, m.r_max, m.worst_site
FROM (
    SELECT
        comparison, phase, prompt, count(*) AS n_sites, count(*) FILTER (verdict = 'fail') AS n_failing,
        median(r_ratio) AS r_median,
        max(r_ratio) AS r_max,
        arg_max(site, r_ratio) AS worst_site
    FROM measurements
    WHERE prompt IS NOT NULL
    GROUP BY comparison, phase, prompt
) AS m
JOIN comparisons AS c ON c.comparison = m.comparison
LEFT JOIN prompts AS p ON p.run = c.reference AND p.prompt = m.prompt;
