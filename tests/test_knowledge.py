"""The knowledge base: every entry is whole, is found by its words, and recognises its own log line and no other's."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from tensorsleuth.analyze.diagnosis import causes
from tensorsleuth.cli.app import main
from tensorsleuth.references import entries, entry, match_log, search
from tensorsleuth.references.entries import parse
from tensorsleuth.references.logs import matching
from tensorsleuth.store import FormatError, InputError

PAGE = (Path(__file__).parents[1] / "docs" / "knowledge.md").read_text()


def test_every_area_has_entries_and_every_entry_reads_as_sentences() -> None:
    known = entries().values()
    assert len(known) > 100
    assert len({item.area for item in known}) >= 9
    for item in known:
        for text in (item.symptom, item.cause, item.remedy, item.misread):
            assert not text or text.endswith("."), item.id
        assert not item.title.endswith("."), item.id


def test_every_named_cause_has_exactly_one_entry() -> None:
    explained = [cause for item in entries().values() for cause in item.findings]
    assert sorted(explained) == sorted(set(explained))
    assert set(causes()) - set(explained) == set()
    assert set(explained) - set(causes()) == set()
    assert all(entry(cause) for cause in causes())


@pytest.mark.parametrize("item", [item for item in entries().values() if item.logs], ids=lambda item: item.id)
def test_a_pattern_matches_its_own_sample_and_no_other_entrys(item: object) -> None:
    own = entries()[item.id]  # type: ignore[attr-defined]
    assert all(pattern.search(sample) for pattern, sample in zip(own.logs, own.samples, strict=True))
    for other, pattern in product(entries().values(), own.logs):
        assert other is own or not any(pattern.search(sample) for sample in other.samples), other.id


def test_ordinary_log_lines_match_nothing() -> None:
    lines = [
        "INFO: compiled context_encoding_model in 431.2 s",
        "loading checkpoint shards: 100%|##########| 4/4 [00:03<00:00]",
        "tp_degree=8 seq_len=2048 batch_size=1",
        "Loading weights from model-00001-of-00004.safetensors",
        "2026-01-02 03:04:05.006 exit code 0",
    ]
    assert [item.id for line in lines for item in matching(line)] == []


def test_a_planted_log_names_what_is_in_it_with_line_numbers(tmp_path: Path) -> None:
    log = tmp_path / "compile.log"
    wanted = ["neuron-config-missing", "stale-cache-json", "convert-to-mha-warning"]
    lines = ["INFO: starting"] * 9
    for number, name in zip((1, 4, 6), wanted, strict=True):
        lines[number] = f"[rank 3] {entry(name).samples[0]}"
    lines[8] = lines[4]
    log.write_text("\n".join(lines) + "\n\xff\xfe binary \x00\n", encoding="latin-1")
    found = match_log(log)
    assert [(one.entry.id, one.lines) for one in found] == list(zip(wanted, [(2,), (5, 9), (7,)], strict=True))
    assert found[1].text == lines[4]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("epsilon of the rms norm", "norm-epsilon"),
        ("attention scores scaled twice", "attention-scale"),
        ("attention_scale", "attention-scale"),
        ("YaRN rope scaling ignored", "rope-scaling-ignored"),
        ("embedding is wrong with several ranks on device", "embedding-shard"),
        ("missing all-reduce", "missing-all-reduce"),
        ("looping phrases", "positions-not-added"),
        ("captured tensors are silently missing", "captures-missing"),
        ("compiler cache parse error", "stale-cache-json"),
        ("patched twice", "patched-twice"),
        ("R below 1", "over-precision"),
        ("kv heads tiled", "kv-head-order"),
        ("tied embeddings lm_head.weight missing", "tied-embeddings"),
    ],
)
def test_search_finds_what_is_described(question: str, expected: str) -> None:
    hits = search(question, limit=3)
    assert expected in [hit.entry.id for hit in hits]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_every_entry_is_the_first_hit_for_its_own_title() -> None:
    for item in entries().values():
        assert search(f"{item.id} {item.title}")[0].entry.id == item.id


def test_words_that_nobody_uses_find_nothing() -> None:
    assert search("zyzzyva quux") == []


WHOLE = "# X\n\n## an-entry\ntitle: T\nsymptom: S.\ncause: C.\nremedy: R.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE.replace("an-entry", "An Entry"), "words joined by hyphens"),
        (WHOLE.replace("cause: C.\n", ""), "has no cause"),
        (WHOLE + "colour: red\n", "x.md:8: expected 'field: text'"),
        (WHOLE + "and more\n", "x.md:8"),
        (WHOLE + "cause: D.\n", "cause is given twice"),
        (WHOLE + "log: a+\n", "1 log patterns and 0 samples"),
        (WHOLE + "log: (\nsample: (\n", "no regular expression"),
    ],
)
def test_a_malformed_entry_is_refused_with_its_line(text: str, message: str) -> None:
    assert parse("x", WHOLE)[0].title == "T"
    with pytest.raises(FormatError, match=re.escape(message)):
        parse("x", text)


def test_an_unknown_entry_names_close_ones() -> None:
    with pytest.raises(InputError, match="norm-epsilon"):
        entry("norm-epsilom")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "run.log"
    log.write_text(f"fine\n{entry('address-in-use').samples[0]}\n")
    assert main(["kb", "match", str(log)]) == 1
    assert ":2" in capsys.readouterr().out
    log.write_text("fine\n")
    assert main(["kb", "match", str(log), "--json"]) == 0
    assert capsys.readouterr().out.strip() == "[]"
    assert main(["kb", "match", str(tmp_path / "none.log")]) == 2
    assert main(["kb", "show", "norm_epsilon"]) == 0
    assert "rms_norm_eps" in capsys.readouterr().out
    assert main(["kb", "search", "scores", "scaled", "twice"]) == 0
    assert "attention-scale" in capsys.readouterr().out
    assert main(["kb", "list", "--area", "nowhere"]) == 2
    assert main(["kb", "list", "--area", "rotary", "--json"]) == 0


def test_the_page_describes_every_field() -> None:
    for field in ("title", "symptom", "cause", "remedy", "misread", "log", "sample", "finding"):
        assert f"`{field}`" in PAGE
    example = PAGE.split("```")[1].removeprefix("\n")
    assert parse("example", example)
