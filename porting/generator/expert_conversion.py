"""How a checkpoint's experts become the library's: one weight for all, gate before up."""

from __future__ import annotations

from ..spec.architecture import Architecture, Experts, MixtureOfExperts
from .mixture_plan import target_of


def expert_lines(mixture: MixtureOfExperts | None, spec: Architecture) -> tuple[list[str], list[str]]:
    """Statements inside the loop over layers, and functions they call.

    Router weights have their new names already.
    """
    assert mixture is not None
    experts, router = mixture.experts, mixture.router
    block, target = f"layers.{{layer}}.{mixture.module}", f"layers.{{layer}}.{target_of(mixture)}"
    call = f'stack_experts(state_dict, f"{block}", f"{target}.expert_mlps.mlp_op"'
    call += f", {router.n_experts.expression})" if experts.stored == "modules" else ")"
    lines = [call]
    if router.correction:
        new = f"{target}.router.{router.correction}"
        old = f"{block}.{router.correction_module}" if router.correction_module else f"{target}.router.linear_router"
        flat = ".flatten()" if router.correction_module else ""
        lines.append(f'state_dict[f"{new}"] = state_dict.pop(f"{old}.{router.correction}"){flat}')
    if len(spec.feed_forward) > 1:
        lines = [f'if f"{target}.router.linear_router.weight" in state_dict:', *(f"    {line}" for line in lines)]
    return lines, [_of_modules(experts) if experts.stored == "modules" else _of_tensors(experts)]


def _of_modules(experts: Experts) -> str:
    return f'''def stack_experts(state_dict, block, target, n_experts):
    """One weight for all experts: (experts, input, output), the gate's outputs before the others."""

    def stacked(name):
        names = [f"{{block}}.{experts.module}.{{expert}}.{{name}}.weight" for expert in range(n_experts)]
        return torch.stack([state_dict.pop(name).t() for name in names])

    gate_up = torch.cat((stacked("{experts.gate}"), stacked("{experts.up}")), dim=-1)
    state_dict[f"{{target}}.gate_up_proj.weight"] = gate_up
    state_dict[f"{{target}}.down_proj.weight"] = stacked("{experts.down}").contiguous()'''


def _of_tensors(experts: Experts) -> str:
    inside = f"{{block}}.{experts.module}" if experts.module else "{block}"
    turned = ".transpose(1, 2).contiguous()" if experts.stored == "rows" else ""
    lines = [
        "def stack_experts(state_dict, block, target):",
        '    """All experts\' weights as (experts, input, output), the gate\'s outputs before the others."""',
    ]
    kinds = (("weight", ""), ("bias", experts.bias)) if experts.bias else (("weight", ""),)
    for kind, suffix in kinds:
        turn = turned if kind == "weight" else ""
        lines += [
            f'    gate_up = state_dict.pop(f"{inside}.{experts.gate}{suffix}"){turn}',
            f'    state_dict[f"{{target}}.gate_up_proj.{kind}"] = {_gate_before_up(experts.layout)}',
            f'    down = state_dict.pop(f"{inside}.{experts.down}{suffix}"){turn}',
            f'    state_dict[f"{{target}}.down_proj.{kind}"] = down',
        ]
    return "\n".join(lines)


def _gate_before_up(layout: str) -> str:
    if layout == "interleaved":
        return "torch.cat((gate_up[..., ::2], gate_up[..., 1::2]), dim=-1)"
    if layout == "up_first":
        return "torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1)"
    return "gate_up"
