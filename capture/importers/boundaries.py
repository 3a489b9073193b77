"""Which forward passes of a dump belong to which prompt, and which positions they computed.

The hook counts forward passes over all prompts. A pass over more than one position is a prefill and begins new prompts,
whatever its file names say; the passes after it, of one position each, continue them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...store.errors import InputError
from .dump import Report
from .evidence import EmbeddingRows, Lookup, TokenEvidence, assign
from .tokens import KnownPrompt

FOREIGN = (
    "the tokens do not belong to this dump: its embedding rows do not repeat as the tokens do, or differ from those of "
    "the run; give the tokens that it was made with"
)


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        step: the dump's counter, from 1.
        label: phase in the file names: `cte`, `tkg` or `tg`.
        batch, length: lengths of the batch and the token axis.
        embedding: rows of the token embedding by batch row, empty when it was not captured.
    """

    step: int
    label: str
    batch: int
    length: int
    embedding: tuple[EmbeddingRows, ...] = ()


@dataclass(frozen=True)
class Group:
    """A prefill and the decode steps that follow it; `first_step` is the (perhaps unsaved) prefill's."""

    first_step: int
    prefill: Pass | None
    decodes: tuple[Pass, ...]

    @property
    def batch(self) -> int:
        """Number of batch rows."""
        return (self.prefill or self.decodes[0]).batch

    @property
    def n_decodes(self) -> int:
        """Decode steps up to the last one saved."""
        return (self.decodes[-1].step - self.first_step) if self.decodes else 0


@dataclass(frozen=True)
class Placed:
    """What one batch row of a group computes.

    Attributes:
        prompt: index of the prompt, None for a row that only pads the batch.
        n_prompt: number of prompt tokens, None when unknown.
        known: its tokens, cut where the dump is known to have gone on with others; None without tokens.
    """

    prompt: int | None
    n_prompt: int | None
    known: KnownPrompt | None = None


def group_passes(passes: Sequence[Pass], known: Sequence[KnownPrompt], report: Report) -> list[Group]:
    """Find the prompt boundaries among forward passes sorted by step."""
    groups: list[Group] = []
    for item in passes:
        if item.length > 1 or item.label == "cte" or _one_token_prompt(groups, known):
            groups.append(Group(item.step, item, ()))
            if item.label != "cte":
                report.assume(
                    f"step {item.step} is labelled {item.label} but computes {item.length} positions: "
                    f"it is the prefill of a new prompt (the step counter does not restart)"
                )
        elif not groups:
            report.assume(
                f"the dump begins at step {item.step} with a single position: steps 1 to {item.step - 1} were not "
                "saved, step 1 is taken as the prefill"
            )
            groups.append(Group(1, None, (item,)))
        else:
            groups[-1] = replace(groups[-1], decodes=(*groups[-1].decodes, item))
    steps = [item.step for item in passes]
    if steps and len(steps) <= steps[-1] - steps[0]:
        report.assume("some steps were not saved: they are taken as decode steps of the prompt before them")
    return groups


def _one_token_prompt(groups: Sequence[Group], known: Sequence[KnownPrompt]) -> bool:
    """Whether the next pass must begin a one-token prompt: the last prompt's tokens are all computed."""
    if not groups or len(known) <= len(groups) or groups[-1].batch != 1:
        return False
    done, coming = known[len(groups) - 1], known[len(groups)]
    computed = (done.n_prompt or 0) + groups[-1].n_decodes
    return coming.n_prompt == 1 and done.n_prompt is not None and computed >= len(done.token_ids)


def place(
    groups: Sequence[Group], known: Sequence[KnownPrompt], evidence: TokenEvidence, report: Report
) -> list[list[Placed]]:
    """Say which prompt every batch row computes, and how long it is.

    Raises:
        InputError: the tokens do not fit the dump.
    """
    if not known:
        return _without_tokens(groups, report)
    rows = [(group, row) for group in groups for row in range(group.batch)]
    spare = len(rows) - len(known)
    if spare < 0 and not evidence.by_value:
        raise InputError(
            f"the tokens hold {len(known)} prompts, the dump {len(rows)} (prefills at steps {_steps(groups)}); "
            "give the tokens of exactly these prompts"
        )
    if spare >= groups[-1].batch:
        raise InputError(
            f"the tokens hold {len(known)} prompts, the dump {len(rows)} (prefills at steps {_steps(groups)}); "
            "give the tokens of all of them"
        )
    if spare > 0:
        report.assume(f"the last {spare} rows of the batch hold no prompt: there are no tokens for them")
        rows = rows[:-spare]
    chosen = _choose(rows, known, evidence, report)
    lookup = Lookup()
    for (group, row), (_, prompt) in chosen:
        if group.prefill and group.prefill.embedding:
            lookup.extend(group.prefill.embedding[row], prompt.token_ids[: prompt.n_prompt])
    placed = [_follow(group, row, prompt, lookup, evidence, report) for (group, row), prompt in chosen]
    return [[placed.pop(0) if placed else Placed(None, None) for _ in range(group.batch)] for group in groups]


RowOf = tuple[Group, int]
Chosen = list[tuple[RowOf, tuple[int, KnownPrompt]]]


def _choose(rows: Sequence[RowOf], known: Sequence[KnownPrompt], evidence: TokenEvidence, report: Report) -> Chosen:
    """Pair batch rows with prompts: in order if that fits, else by content."""
    embedded = [group.prefill.embedding[row] for group, row in rows if group.prefill and group.prefill.embedding]
    complete = len(embedded) == len(rows)
    if len(known) == len(rows):
        in_order = [_with_length(prompt, *row, evidence, report) for row, prompt in zip(rows, known, strict=True)]
        if not embedded:
            report.assume("prompts are taken in the order of the tokens; the dump holds no embedding to confirm it")
            return list(zip(rows, enumerate(in_order), strict=True))
        if _fits(rows, in_order, evidence):
            report.assume("prompts are taken in the order of the tokens; the embedding rows agree")
            return list(zip(rows, enumerate(in_order), strict=True))
    order = assign(embedded, known, evidence) if complete and all(p.n_prompt for p in known) else None
    if order is None:
        raise InputError(FOREIGN)
    report.assume("prompts were matched by their embedding rows; the tokens list them in another order")
    return [(row, (index, known[p])) for index, (row, p) in enumerate(zip(rows, order, strict=True))]


def _fits(rows: Sequence[RowOf], prompts: Sequence[KnownPrompt], evidence: TokenEvidence) -> bool:
    pairs = [
        (group.prefill.embedding[row], prompt.token_ids[: prompt.n_prompt])
        for (group, row), prompt in zip(rows, prompts, strict=True)
        if group.prefill and group.prefill.embedding
    ]
    lookup = Lookup()
    return all(lookup.extend(*pair) and evidence.fits(*pair) for pair in pairs)


def _with_length(prompt: KnownPrompt, group: Group, row: int, evidence: TokenEvidence, report: Report) -> KnownPrompt:
    """The prompt with its length: as given, or the one that the dump allows."""
    length = group.prefill.length if group.prefill else len(prompt.token_ids)
    if prompt.n_prompt is not None:
        if prompt.n_prompt > length:
            raise InputError(
                f"prompt {prompt.id!r} has {prompt.n_prompt} tokens, but the prefill at step {group.first_step} has "
                f"only {length} positions; give the tokens that the dump was made with"
            )
        return prompt
    total, decodes = len(prompt.token_ids), group.n_decodes
    # A generation returns one token more than it computes with; a list of computed tokens has none to spare.
    candidates = [n for n in dict.fromkeys((total - decodes - 1, total - decodes, total)) if 1 <= n <= length]
    if group.prefill and group.prefill.embedding:
        embedding = group.prefill.embedding[row]
        candidates = [n for n in candidates if evidence.fits(embedding, prompt.token_ids[:n])][:1]
        if not candidates:
            raise InputError(FOREIGN)
    elif decodes == 0:
        candidates = [total] if total <= length else []
    if len(candidates) != 1:
        raise InputError(
            f"the length of prompt {prompt.id!r} cannot be told from the dump ({total} token ids, {length} positions, "
            f'{decodes} decode steps); add "n_prompt" to its line'
        )
    report.assume(
        f'prompt {prompt.id!r} gives no "n_prompt": its first {candidates[0]} of {total} tokens are the prompt'
    )
    return replace(prompt, n_prompt=candidates[0])


def _follow(
    group: Group,
    row: int,
    prompt: tuple[int, KnownPrompt],
    lookup: Lookup,
    evidence: TokenEvidence,
    report: Report,
) -> Placed:
    """Check the decode steps against the tokens; they end where the dump went on with another token."""
    index, known = prompt
    n_prompt = known.n_prompt or 0
    for item in group.decodes:
        position = n_prompt + item.step - group.first_step - 1
        if not item.embedding or position >= len(known.token_ids):
            continue
        pair = (item.embedding[row], known.token_ids[position : position + 1])
        if not lookup.extend(*pair) or not evidence.fits(*pair):
            report.assume(
                f"prompt {known.id!r}: step {item.step} computed another token than given for position {position} "
                "(its embedding row differs); the run's tokens end there"
            )
            return Placed(index, n_prompt, replace(known, token_ids=known.token_ids[:position]))
    return Placed(index, n_prompt, known)


def _without_tokens(groups: Sequence[Group], report: Report) -> list[list[Placed]]:
    """Lengths from the padding that the embedding repeats; all of them or none."""
    lengths: list[list[int | None]] = []
    for group in groups:
        rows = group.prefill.embedding if group.prefill else ()
        lengths.append([item.n_distinct_end for item in rows] or [None] * group.batch)
    sure = all(length is not None and length > 0 for row in lengths for length in row)
    if sure:
        listed = ", ".join(str(length) for row in lengths for length in row)
        report.assume(
            "no tokens were given: prompts end where the embedding begins to repeat one row (padding on the right); "
            f"their lengths are {listed}"
        )
    else:
        report.assume(
            "no tokens were given and the embedding shows no padding: tensors are stored without positions; "
            "give --tokens FILE or --tokens-from RUN to align them"
        )
    numbers = iter(range(sum(map(len, lengths))))
    return [[Placed(next(numbers), length if sure else None) for length in row] for row in lengths]


def _steps(groups: Sequence[Group]) -> str:
    return ", ".join(str(group.first_step) for group in groups)
