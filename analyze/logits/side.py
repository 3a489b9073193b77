"""One run's rows of logits against the reference's: errors, divergences, ranks and agreement, in float64.

Softmax does not see a constant added to all logits. So errors and the cosine are taken on centred logits (their mean
over the vocabulary removed), with raw ones beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..triples import FloatArray, IntArray

#: Shares of common tokens are taken among this many most likely ones.
OVERLAPS = (5, 10)
#: Errors are taken among this many most likely tokens, as NxD Inference's logit check does; None: among all.
TOP_ERRORS = (5, 50, 1000, None)
#: Largest difference of log-probabilities that is not clipped in the Jensen-Shannon divergence: exp of it is finite.
_LARGEST = 700.0


@dataclass(frozen=True)
class ReferenceRows:
    """Logits of the reference, float64, finite: `[rows, vocabulary]` unless said otherwise.

    Attributes:
        logits: as stored.
        centred: without their mean.
        log_p, p: log-probabilities and probabilities.
        top: `int64[rows, k]`, the k = 1000 most likely tokens, likeliest first; the lower id first where equal.
        norm_sq, norm_raw_sq: `[rows]`, sums of squares of centred and raw logits.
    """

    logits: FloatArray
    centred: FloatArray
    log_p: FloatArray
    p: FloatArray
    top: IntArray
    norm_sq: FloatArray
    norm_raw_sq: FloatArray

    @classmethod
    def of(cls, logits: FloatArray) -> ReferenceRows:
        """From rows of at least one finite logit."""
        centred = logits - logits.mean(axis=1, keepdims=True)
        log_p = log_softmax(logits)
        return cls(
            logits, centred, log_p, np.exp(log_p), most_likely(logits, 1000), _squares(centred), _squares(logits)
        )

    @property
    def token(self) -> IntArray:
        """`int64[rows]`: the most likely token."""
        return self.top[:, 0]

    def at(self, tokens: IntArray) -> FloatArray:
        """Logits of some tokens, `int64[rows, k]`."""
        return np.take_along_axis(self.logits, tokens, axis=1)


@dataclass(frozen=True)
class SideRows:
    """One run against the reference; float64 `[rows]` unless said otherwise.

    Attributes:
        error, error_raw: ||x - r||, centred and raw.
        cosine, cosine_raw: NaN where a norm is 0.
        kl: sum of p log(p / q), nats; p is the reference's.
        js: Jensen-Shannon divergence, nats.
        token: `int64[rows]`, the most likely token; the lowest id where equal.
        overlaps: share of the reference's 5 and 10 likeliest tokens that are among this run's, ties included.
        top_errors: largest centred error among the reference's k likeliest tokens over their largest centred logit.
        p_token: probability of the reference's token.
        rank: its rank, 1 for the likeliest.
        n_tied: tokens that share the largest logit.
        largest: the largest logit.
        errors: `[rows, vocabulary]`, centred.
    """

    error: FloatArray
    error_raw: FloatArray
    cosine: FloatArray
    cosine_raw: FloatArray
    kl: FloatArray
    js: FloatArray
    token: IntArray
    overlaps: tuple[FloatArray, ...]
    top_errors: tuple[FloatArray, ...]
    p_token: FloatArray
    rank: FloatArray
    n_tied: FloatArray
    largest: FloatArray
    errors: FloatArray

    @classmethod
    def of(cls, reference: ReferenceRows, logits: FloatArray) -> SideRows:
        """From finite logits of the same shape."""
        raw = logits - reference.logits
        errors = raw - raw.mean(axis=1, keepdims=True)
        log_q = log_softmax(logits)
        largest = logits.max(axis=1)
        mine = np.take_along_axis(logits, reference.token[:, None], axis=1)
        log_q_token = np.take_along_axis(log_q, reference.token[:, None], axis=1)[:, 0]
        return cls(
            error=np.sqrt(_squares(errors)),
            error_raw=np.sqrt(_squares(raw)),
            cosine=_cosine(reference.centred, reference.norm_sq, reference.centred + errors),
            cosine_raw=_cosine(reference.logits, reference.norm_raw_sq, logits),
            kl=np.maximum(_dot(reference.p, reference.log_p - log_q), 0.0),
            js=jensen_shannon(reference.p, reference.log_p, log_q),
            token=logits.argmax(axis=1),
            overlaps=tuple(_overlap(reference.top[:, :k], logits) for k in OVERLAPS),
            top_errors=tuple(_top_error(reference, errors, k) for k in TOP_ERRORS),
            p_token=np.exp(log_q_token),
            rank=1.0 + (logits > mine).sum(axis=1),
            n_tied=(logits == largest[:, None]).sum(axis=1).astype(np.float64),
            largest=largest,
            errors=errors,
        )


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def jensen_shannon(p: FloatArray, log_p: FloatArray, log_q: FloatArray) -> FloatArray:
    """Half of KL(p || m) + KL(q || m), m = (p + q) / 2, nats.

    With d = log p - log q, log(p / m) = -log1p(expm1(-d) / 2): that keeps every digit of a small d, where the
    textbook form subtracts nearly equal logarithms.
    """
    d = np.clip(log_p - log_q, -_LARGEST, _LARGEST)
    first = p * np.log1p(np.expm1(-d) / 2.0)
    second = np.exp(log_q) * np.log1p(np.expm1(d) / 2.0)
    return np.asarray(np.maximum(-0.5 * (first.sum(axis=1) + second.sum(axis=1)), 0.0))


def most_likely(logits: FloatArray, k: int) -> IntArray:
    """The k largest of every row, largest first; the lower index first where equal."""
    width = logits.shape[1]
    if k >= width:
        return np.argsort(-logits, axis=1, kind="stable")
    found = np.sort(np.argpartition(logits, width - k, axis=1)[:, width - k :], axis=1)
    order = np.argsort(-np.take_along_axis(logits, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def _squares(rows: FloatArray) -> FloatArray:
    return _dot(rows, rows)


def _dot(first: FloatArray, second: FloatArray) -> FloatArray:
    return np.asarray(np.einsum("ij,ij->i", first, second))


def _cosine(reference: FloatArray, norm_sq: FloatArray, other: FloatArray) -> FloatArray:
    """One square root of the product, so that equal rows give exactly 1."""
    scale = np.sqrt(norm_sq * _squares(other))
    with np.errstate(invalid="ignore"):
        return np.where(scale > 0.0, np.clip(_dot(reference, other) / scale, -1.0, 1.0), np.nan)


def _overlap(top: IntArray, logits: FloatArray) -> FloatArray:
    k, width = top.shape[1], logits.shape[1]
    least = np.partition(logits, width - k, axis=1)[:, width - k]
    return np.asarray((np.take_along_axis(logits, top, axis=1) >= least[:, None]).mean(axis=1))


def _top_error(reference: ReferenceRows, errors: FloatArray, k: int | None) -> FloatArray:
    centred = reference.centred
    if k is not None and k < centred.shape[1]:
        chosen = reference.top[:, :k]
        centred, errors = (np.take_along_axis(rows, chosen, axis=1) for rows in (centred, errors))
    scale = np.abs(centred).max(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.abs(errors).max(axis=1) / scale)
