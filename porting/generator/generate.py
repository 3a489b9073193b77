"""Writing a port: the templates filled, imports added, the text formatted."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ...store.errors import InputError
from ..spec.document import to_json
from ..spec.encoder_decoder_facts import AnyArchitecture, EncoderDecoder
from .encoder_decoder_plan import encoder_decoder_plan
from .imports import imports_for
from .plan import plan, release_text, stem_of

#: Folder of the port inside the output folder.
PORT_FOLDER = "neuron_port"
_LINE = 120


@dataclass(frozen=True)
class Port:
    """A generated port.

    Attributes:
        class_name: the port's language model.
        module: file name of the modeling file.
        files: text by path relative to the output folder.
    """

    class_name: str
    module: str
    files: dict[str, str]

    @property
    def reference(self) -> str:
        """The model class relative to the output folder, as FILE:CLASS."""
        return f"{PORT_FOLDER}/{self.module}:{self.class_name}"


def generate(spec: AnyArchitecture, sdk: str | None = None) -> Port:
    """The files of a port; the same spec and release give the same bytes.

    Args:
        spec: the architecture.
        sdk: release of the Neuron SDK it is for; None for a port that all of them run.

    Raises:
        InputError: the architecture needs a block that does not exist.
    """
    name = f"modeling_{spec.model_type.removesuffix('_text')}.py"
    files = {
        f"{PORT_FOLDER}/{name}": modeling_text(spec, sdk),
        f"{PORT_FOLDER}/architecture.json": to_json(spec),
    }
    kind = "ForConditionalGeneration" if isinstance(spec, EncoderDecoder) else "ForCausalLM"
    return Port(f"Neuron{stem_of(spec)}{kind}", name, files)


def write_port(port: Port, folder: Path) -> Path:
    """Write the files; returns the path of the modeling file."""
    for path, text in port.files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return folder / PORT_FOLDER / port.module


def modeling_text(spec: AnyArchitecture, sdk: str | None = None) -> str:
    """The modeling file."""
    if isinstance(spec, EncoderDecoder):
        file, context = "encoder_decoder.py.jinja", encoder_decoder_plan(spec, stem_of(spec), release_text(sdk))
    else:
        file, context = "modeling.py.jinja", plan(spec, sdk)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tensorsleuth.porting.generator"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 (Python source, not HTML)
        keep_trailing_newline=False,
    )
    template = environment.get_template(file)
    body = template.render(**context, imports="")
    imports = imports_for(body, [spec.class_name])
    return formatted(re.sub(r"\n{4,}", "\n\n\n", template.render(**context, imports=imports)))


def formatted(text: str) -> str:
    """Python source in ruff's format, imports sorted.

    Raises:
        InputError: ruff is not installed, or refuses the text.
    """
    options = ["--no-cache", "--quiet", "--isolated", "--line-length", str(_LINE), "-"]
    for command in (["check", "--select", "I,F401", "--fix", *options], ["format", *options]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode:
            why = (done.stderr.strip() or done.stdout.strip()).splitlines()
            missing = "No module named ruff" in done.stderr
            fix = "install it with: pip install 'tensorsleuth[porting]'" if missing else "; ".join(why[:3])
            raise InputError(f"the port cannot be formatted: {fix}")
        text = done.stdout
    return text
