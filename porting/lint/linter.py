"""Running the rules over a port."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store.errors import InputError
from . import (  # noqa: F401 (each registers its rules)
    rule_classes,
    rule_config,
    rule_names,
    rule_numerics,
    rule_traced,
    rule_weights,
)
from .api import load_release
from .diagnostics import RULES, SEVERITIES, Diagnostic, Finding, Rule
from .source import PortClass, PortFile, port_files

_IGNORED = re.compile(r"#\s*sleuth:\s*ignore\[([^\]]*)\]")


#: Rules that need a checkpoint; `coverage`, which checks them, needs torch.
_CHECKPOINT_RULES = tuple(
    Rule(*words)
    for words in (
        ("unfilled-parameter", "error", "a parameter of the port's model is not in the converted checkpoint"),
        ("unconsumed-key", "error", "a checkpoint key ends up in no parameter of the port's model"),
        ("key-used-twice", "warning", "one checkpoint tensor fills several parameters"),
        ("weight-shape", "error", "a converted weight has another shape than the parameter it is for"),
        ("conversion-fails", "error", "the port's model or its conversion raises an exception for this checkpoint"),
        ("conversion-needs-values", "note", "the conversion looks at values: its names cannot be checked without them"),
    )
)


@dataclass(frozen=True)
class LintReport:
    """What was checked, and what was found.

    Attributes:
        release: the release that the port was judged by.
        files: the files that were read.
        diagnostics: what was found, by file and line.
        remarks: what was not checked, and why.
    """

    release: str
    files: tuple[str, ...]
    diagnostics: tuple[Diagnostic, ...]
    remarks: tuple[str, ...] = ()

    def count(self, severity: str) -> int:
        """Number of diagnostics of a severity."""
        return sum(item.severity == severity for item in self.diagnostics)

    @property
    def verdict(self) -> str:
        """`fail` with errors, else `pass`."""
        return "fail" if self.count("error") else "pass"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "sdk": self.release,
            "verdict": self.verdict,
            "files": list(self.files),
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "diagnostics": [item.as_dict() for item in self.diagnostics],
            "remarks": list(self.remarks),
        }


def all_rules() -> dict[str, Rule]:
    """Every rule by id, those that need a checkpoint last."""
    return {**RULES, **{rule.id: rule for rule in _CHECKPOINT_RULES}}


def lint(
    port: str | Path,
    release: str,
    *,
    ignore: Sequence[str] = (),
    checkpoint: Path | None = None,
    config: str = "",
    tp: int = 1,
) -> LintReport:
    """Check a port.

    Args:
        port: its Python file, FILE:CLASS, or a folder of files.
        release: release of the Neuron SDK, for example `2.28`.
        ignore: ids of rules to leave out.
        checkpoint: folder of a checkpoint whose keys the port has to use. The port is run, on shapes alone, with the
            sources of NxD Inference that are found, whatever their release.
        config: the configuration class as FILE:CLASS, where the port names none.
        tp: tensor-parallel degree that the conversion is told.

    Raises:
        InputError: there is nothing to check, the release or a rule to ignore is unknown, or the checkpoint cannot be
            read.
    """
    if unknown := [name for name in ignore if name not in all_rules()]:
        raise InputError(f"there is no rule {unknown[0]!r}; 'sleuth port lint --rules' lists them")
    path, _, name = str(port).rpartition(":") if str(port).rpartition(":")[2].isidentifier() else (str(port), "", "")
    files = port_files(Path(path or str(port)), load_release(release))
    found = [item for file in files for item in lint_file(file, ignore=ignore)]
    if checkpoint is not None:
        found += _coverage(_causal_model(files, name), checkpoint, config, tp, ignore)
    remarks = () if checkpoint is not None else ("checkpoint keys were not checked: give --checkpoint DIR",)
    return LintReport(release, tuple(str(file.path) for file in files), tuple(found), remarks)


def _causal_model(files: Sequence[PortFile], name: str) -> PortClass:
    """The class whose conversion is checked.

    Raises:
        InputError: there is none of the name, or a name is needed.
    """
    found = [
        cls
        for file in files
        for cls in file.classes.values()
        if (cls.name == name if name else cls.derives_from("NeuronBaseForCausalLM") or _joins_stacks(cls))
    ]
    if len(found) != 1:
        known = ", ".join(f"{cls.file.path}:{cls.name}" for cls in found) or "none"
        raise InputError(f"name the causal model whose conversion is to be checked as FILE:CLASS; found {known}")
    return found[0]


def _joins_stacks(cls: PortClass) -> bool:
    """Whether a class is the port of an encoder-decoder: it names the applications of both."""
    from .coverage import STACKS

    assigned = (target for item in cls.node.body if isinstance(item, ast.Assign) for target in item.targets)
    named = {target.id for target in assigned if isinstance(target, ast.Name)}
    return set(STACKS) <= named


def _coverage(cls: PortClass, checkpoint: Path, config: str, tp: int, ignore: Sequence[str]) -> list[Diagnostic]:
    from .coverage import check_coverage

    problems = check_coverage(f"{cls.file.path}:{cls.name}", checkpoint, config=config, tp=tp)
    method = cls.own_method("convert_hf_to_neuron_state_dict")
    file, node = (method[0].file, method[1]) if method is not None else (cls.file, cls.node)
    return [
        item
        for problem in problems
        if problem.rule not in ignore
        for item in diagnostics(file, all_rules()[problem.rule], [Finding(node, problem.message, problem.fix)])
    ]


def lint_file(file: PortFile, *, ignore: Sequence[str] = ()) -> list[Diagnostic]:
    """Check one file by every rule that needs no more than it."""
    found: list[Diagnostic] = []
    for rule in RULES.values():
        if rule.check is not None and rule.id not in ignore:
            found.extend(diagnostics(file, rule, rule.check(file)))
    return sorted(found, key=lambda item: (item.line, item.column, SEVERITIES.index(item.severity), item.rule))


def diagnostics(file: PortFile, rule: Rule, findings: Iterable[Finding]) -> list[Diagnostic]:
    """Findings as diagnostics, without those that a comment on their line says to ignore."""
    made = []
    for finding in findings:
        line, column = getattr(finding.node, "lineno", 1), getattr(finding.node, "col_offset", 0) + 1
        if not _is_ignored(file.lines[line - 1] if line <= len(file.lines) else "", rule.id):
            made.append(Diagnostic(rule.id, rule.severity, str(file.path), line, column, finding.message, finding.fix))
    return list(dict.fromkeys(made))


def _is_ignored(line: str, rule: str) -> bool:
    comment = _IGNORED.search(line)
    return comment is not None and rule in re.split(r"[,\s]+", comment[1])
