-- The catalog: derived from runs/ at any time (sleuth index --rebuild), except the comparison tables,
-- which compare recomputes.

CREATE TABLE catalog_info (schema_version INTEGER NOT NULL, written_by VARCHAR NOT NULL);

-- One row per run. provenance holds versions, flags, weights fingerprint, plan and observer effect.
CREATE TABLE runs (
    run VARCHAR PRIMARY KEY, ordinal INTEGER NOT NULL UNIQUE, role VARCHAR NOT NULL, stack VARCHAR NOT NULL,
    model VARCHAR NOT NULL, dtype VARCHAR NOT NULL, device VARCHAR NOT NULL, tp INTEGER NOT NULL,
    status VARCHAR NOT NULL, created_at TIMESTAMP NOT NULL, provenance JSON NOT NULL);

CREATE TABLE prompts (
    run VARCHAR NOT NULL, prompt INTEGER NOT NULL, id VARCHAR NOT NULL, text VARCHAR, n_tokens INTEGER NOT NULL);

-- The token at every position; forced: another run dictated it (teacher forcing).
CREATE TABLE tokens (
    run VARCHAR NOT NULL, prompt INTEGER NOT NULL, position INTEGER NOT NULL, token_id INTEGER NOT NULL,
    forced BOOLEAN NOT NULL);

CREATE TABLE modules (
    run VARCHAR NOT NULL, path VARCHAR NOT NULL, class VARCHAR NOT NULL, parent VARCHAR, depth INTEGER NOT NULL,
    exec_order INTEGER NOT NULL, n_parameters BIGINT NOT NULL);

-- state: sealed. checksum: XXH3-128 of the shard's index, which holds the checksum of every tensor.
CREATE TABLE shards (
    run VARCHAR NOT NULL, rank INTEGER NOT NULL, shard VARCHAR NOT NULL, path VARCHAR NOT NULL,
    bytes BIGINT NOT NULL, checksum VARCHAR NOT NULL, n_tensors BIGINT NOT NULL, state VARCHAR NOT NULL);

-- One row per recorded tensor. tensor_id = ordinal of the run * 10^12 + rank * 10^8 + seq.
CREATE TABLE tensors (
    tensor_id BIGINT NOT NULL, run VARCHAR NOT NULL, rank INTEGER NOT NULL, shard VARCHAR NOT NULL,
    seq BIGINT NOT NULL, prompt INTEGER, phase VARCHAR NOT NULL, step INTEGER NOT NULL, call INTEGER NOT NULL,
    exec_order INTEGER NOT NULL, module VARCHAR NOT NULL, port VARCHAR NOT NULL, slot VARCHAR NOT NULL,
    dims VARCHAR NOT NULL, position_start INTEGER, position_count INTEGER, shape BIGINT[] NOT NULL,
    dtype VARCHAR NOT NULL, nbytes BIGINT NOT NULL, dataset VARCHAR NOT NULL, file_offset BIGINT NOT NULL,
    alias BOOLEAN NOT NULL, checksum VARCHAR NOT NULL, mean DOUBLE, std DOUBLE, min DOUBLE, max DOUBLE,
    absmax DOUBLE, n_nan BIGINT NOT NULL, n_inf BIGINT NOT NULL, n_zero BIGINT NOT NULL);

-- origin: auto or a mapping file.
CREATE TABLE mappings (mapping VARCHAR PRIMARY KEY, reference VARCHAR NOT NULL, target VARCHAR NOT NULL,
    origin VARCHAR NOT NULL);

-- transform: identity; slice, when the target site holds more features than the reference site; part, when it holds
-- fewer; reorder, when it holds them in another order (transform_spec: axis, and ranges of target and reference);
-- expert, when it holds what every token's experts computed (transform_spec: the number of the one that is meant).
CREATE TABLE mapping_entries (
    mapping VARCHAR NOT NULL, entry INTEGER NOT NULL, reference_sites VARCHAR[] NOT NULL,
    target_sites VARCHAR[] NOT NULL, transform VARCHAR NOT NULL, transform_spec JSON, score DOUBLE NOT NULL,
    reason VARCHAR NOT NULL);

-- thresholds: the limits, the calibration they come from, the replicates, and the null behind the p-values.
CREATE TABLE comparisons (
    comparison VARCHAR PRIMARY KEY, reference VARCHAR NOT NULL, baseline VARCHAR, target VARCHAR NOT NULL,
    mapping VARCHAR NOT NULL, thresholds JSON NOT NULL, created_at TIMESTAMP NOT NULL, verdict VARCHAR NOT NULL,
    reasons VARCHAR[] NOT NULL, n_matched INTEGER NOT NULL, n_unmatched INTEGER NOT NULL,
    n_skipped INTEGER NOT NULL);

-- One row per site of the reference: status matched, unmatched or skipped.
CREATE TABLE coverage (
    comparison VARCHAR NOT NULL, site VARCHAR NOT NULL, phase VARCHAR NOT NULL, exec_order INTEGER NOT NULL,
    status VARCHAR NOT NULL, reason VARCHAR NOT NULL);

-- One row per pair of sites and phase, over all prompts (prompt NULL) and per prompt. exec_order is the place in
-- dataflow order: of the reference, then of the target. See docs/sql.md for every column.
CREATE TABLE measurements (
    comparison VARCHAR NOT NULL, measurement INTEGER NOT NULL, site VARCHAR NOT NULL, target_site VARCHAR NOT NULL,
    module VARCHAR NOT NULL, port VARCHAR NOT NULL, slot VARCHAR NOT NULL, call INTEGER NOT NULL,
    exec_order INTEGER NOT NULL, phase VARCHAR NOT NULL, prompt INTEGER, n BIGINT NOT NULL,
    reference_norm DOUBLE, baseline_error DOUBLE, target_error DOUBLE, r_ratio DOUBLE, r_low DOUBLE, r_high DOUBLE,
    relative_l2 DOUBLE, relative_l2_baseline DOUBLE, cosine DOUBLE, max_abs_error DOUBLE, linf_ratio DOUBLE,
    sigma_ratio DOUBLE, mean_error DOUBLE, qq_slope DOUBLE, qq_intercept DOUBLE, qq_w1 DOUBLE, ks DOUBLE,
    fit_scale DOUBLE, fit_offset DOUBLE, fit_residual DOUBLE, r_judged DOUBLE, n_rerouted INTEGER, r_limit DOUBLE,
    p_value DOUBLE, q_value DOUBLE, state VARCHAR NOT NULL, verdict VARCHAR NOT NULL);

CREATE TABLE error_quantiles (
    comparison VARCHAR NOT NULL, measurement INTEGER NOT NULL, probability DOUBLE NOT NULL, baseline DOUBLE,
    target DOUBLE);

CREATE TABLE token_errors (
    comparison VARCHAR NOT NULL, measurement INTEGER NOT NULL, position INTEGER NOT NULL, baseline_sq DOUBLE,
    target_sq DOUBLE, reference_sq DOUBLE);

-- One row per prompt and position whose logits the runs share; b and t as in measurements, see docs/sql.md.
CREATE TABLE logits (
    comparison VARCHAR NOT NULL, prompt INTEGER NOT NULL, position INTEGER NOT NULL, phase VARCHAR NOT NULL,
    state VARCHAR NOT NULL, verdict VARCHAR NOT NULL, r_ratio DOUBLE, r_raw DOUBLE, cosine DOUBLE, cosine_raw DOUBLE,
    cosine_baseline DOUBLE, kl DOUBLE, kl_baseline DOUBLE, js DOUBLE, js_baseline DOUBLE, top1 BOOLEAN,
    top1_baseline BOOLEAN, top5 DOUBLE, top5_baseline DOUBLE, top10 DOUBLE, top10_baseline DOUBLE, error_top5 DOUBLE,
    error_top5_baseline DOUBLE, error_top50 DOUBLE, error_top50_baseline DOUBLE, error_top1000 DOUBLE,
    error_top1000_baseline DOUBLE, error_all DOUBLE, error_all_baseline DOUBLE, reference_norm DOUBLE,
    baseline_error DOUBLE, target_error DOUBLE, margin_ulp DOUBLE, flip_expected DOUBLE, flip_sigma DOUBLE,
    p_reference DOUBLE, p_reference_token DOUBLE, rank_reference_token INTEGER, n_tied INTEGER,
    reference_token INTEGER, baseline_token INTEGER, target_token INTEGER, padding_wins BOOLEAN,
    n_nonfinite_reference INTEGER NOT NULL, n_nonfinite_baseline INTEGER NOT NULL,
    n_nonfinite_target INTEGER NOT NULL);

-- One row per criterion and scope (all positions, or one phase); published: one of the Equivalence skill's.
CREATE TABLE logit_criteria (
    comparison VARCHAR NOT NULL, scope VARCHAR NOT NULL, criterion VARCHAR NOT NULL, meaning VARCHAR NOT NULL,
    published BOOLEAN NOT NULL, value DOUBLE, sense VARCHAR NOT NULL, threshold DOUBLE, baseline DOUBLE,
    holds BOOLEAN, verdict VARCHAR NOT NULL, note VARCHAR NOT NULL);

-- Where log R changes along the dataflow; exec_low to exec_high holds the place with 95 % probability, or the drift.
CREATE TABLE change_points (
    comparison VARCHAR NOT NULL, phase VARCHAR NOT NULL, kind VARCHAR NOT NULL, site VARCHAR NOT NULL,
    exec_order INTEGER NOT NULL, site_low VARCHAR NOT NULL, exec_low INTEGER NOT NULL, site_high VARCHAR NOT NULL,
    exec_high INTEGER NOT NULL, log_r_before DOUBLE NOT NULL, log_r_change DOUBLE NOT NULL);

-- Sites that may inject error, by rank; kind: origin, spike, drift or inherited. See docs/localization.md.
CREATE TABLE suspects (
    comparison VARCHAR NOT NULL, rank INTEGER NOT NULL, site VARCHAR NOT NULL, target_site VARCHAR NOT NULL,
    module VARCHAR NOT NULL, phase VARCHAR NOT NULL, exec_order INTEGER NOT NULL, measurement INTEGER NOT NULL,
    r_ratio DOUBLE, r_low DOUBLE, r_high DOUBLE, q_value DOUBLE, injected DOUBLE, kind VARCHAR NOT NULL,
    reason VARCHAR NOT NULL);

CREATE TABLE findings (
    comparison VARCHAR NOT NULL, rank INTEGER NOT NULL, site VARCHAR NOT NULL, target_site VARCHAR NOT NULL,
    phase VARCHAR NOT NULL, cause VARCHAR NOT NULL, confidence DOUBLE NOT NULL, summary VARCHAR NOT NULL,
    evidence JSON NOT NULL, remedy VARCHAR NOT NULL, entry VARCHAR NOT NULL, command VARCHAR NOT NULL);

CREATE TABLE calibrations (
    calibration VARCHAR PRIMARY KEY, thresholds JSON NOT NULL, sources JSON NOT NULL, created_at TIMESTAMP NOT NULL);
