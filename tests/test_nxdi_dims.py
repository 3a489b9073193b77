"""Dims of NxD Inference's modules, cutting by them, and values that collectives overwrite."""

from __future__ import annotations

import subprocess
import sys

import torch
from tensorsleuth.capture.layout import Row, StepLayout, cut
from tensorsleuth.capture.nxdi.site_dims import SiteDims
from tensorsleuth.store.dims import parse_dims

PREFILL = StepLayout("prefill", 0, 2, 8, (Row(0, 0, 0, 5, 0), Row(1, 1, 0, 3, 0)))


def test_a_rank_keeps_its_own_part_of_the_positions() -> None:
    tensor = torch.arange(2 * 4 * 1.0).reshape(2, 4, 1)
    first = list(cut(tensor, PREFILL, last_only=False, dims="b s[tp] h", part=0))
    second = list(cut(tensor, PREFILL, last_only=False, dims="b s[tp] h", part=1))
    assert [(c.prompt, c.position_start, c.position_count) for c in first] == [(0, 0, 4), (1, 0, 3)]
    assert [(c.prompt, c.position_start, c.position_count) for c in second] == [(0, 4, 1)]
    assert torch.equal(second[0].values, tensor[:1, :1])


def test_flattened_experts_are_cut_by_token() -> None:
    tensor = torch.arange(3 * 16 * 2.0).reshape(3, 16, 2)
    parts = list(cut(tensor, PREFILL, last_only=False, dims="e (b s) h{tp:sum}"))
    assert torch.equal(parts[1].values, tensor[:, 8:11])
    assert parts[1].dims == "e (b s) h{tp:sum}"


def test_replicated_parts_have_copies() -> None:
    axis = parse_dims("b n[tp/2] s d").axes[1]
    assert (axis.sharded, axis.copies) == ("tp", 2)
    assert parse_dims("b s h[tp]").axes[2].copies == 1


class ColumnParallelLinear(torch.nn.Linear):
    """Named as NxD's: site dims go by class names."""


class RowParallelLinear(torch.nn.Linear):
    """Its output is summed over ranks."""


class GroupQueryAttention_QKV(torch.nn.Module):
    """Two KV heads of the checkpoint, one for each of four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = ColumnParallelLinear(4, 4)
        self._src_num_key_value_heads, self.num_key_value_heads = 2, 4


def test_dims_follow_from_the_classes_of_modules() -> None:
    attention = torch.nn.Module()
    attention.qkv_proj, attention.o_proj = GroupQueryAttention_QKV(), RowParallelLinear(4, 4)
    attention.k_layernorm = torch.nn.LayerNorm(4)
    mlp = torch.nn.Module()
    mlp.gate_proj, mlp.act_fn = ColumnParallelLinear(4, 4), torch.nn.SiLU()
    model = torch.nn.ModuleDict({"self_attn": attention, "mlp": mlp, "norm": torch.nn.LayerNorm(4)})
    dims = SiteDims(model, 4)
    hidden, heads = torch.zeros(2, 8, 4), torch.zeros(2, 1, 8, 4)
    expected = {
        ("mlp.gate_proj", "output", ""): (hidden, "b s h[tp]"),
        ("mlp.gate_proj", "input", ""): (hidden, "b s h"),
        ("mlp.act_fn", "output", ""): (hidden, "b s h[tp]"),
        ("self_attn.o_proj", "input", ""): (hidden, "b s h[tp]"),
        ("self_attn.o_proj", "output", ""): (hidden, "b s h"),
        ("self_attn.o_proj", "output", "sequence parallel"): (torch.zeros(2, 2, 4), "b s[tp] h"),
        ("self_attn.qkv_proj", "output", "0"): (hidden, "b s h[tp]"),
        ("self_attn.qkv_proj", "output", "1"): (hidden, "b s h[tp/2]"),
        ("self_attn.qkv_proj.k_proj", "output", ""): (hidden, "b s h[tp/2]"),
        ("self_attn.k_layernorm", "output", ""): (torch.zeros(2, 8, 1, 4), "b s n[tp/2] d"),
        ("self_attn", "output", "present_key_value.0"): (heads, "b n[tp/2] s d"),
        ("self_attn", "input", "attention_mask"): (torch.zeros(2, 1, 8, 8), ""),
        ("norm", "output", ""): (hidden, "b s h"),
        ("lm_head", "output", ""): (torch.zeros(2, 1, 9), "b s v"),
        ("mlp.router", "output", "2"): (torch.zeros(16, 2), "(b s) k"),
        ("mlp.expert_mlps", "output", ""): (torch.zeros(16, 4), "(b s) h{tp:sum}"),
        ("mlp.expert_mlps", "input", "0"): (torch.zeros(16, 4), "(b s) h"),
        ("mlp.expert_mlps.mlp_op", "output", ""): (torch.zeros(3, 16, 4), "e (b s) h{tp:sum}"),
    }
    assert {site: dims(*site, tensor, PREFILL) for site, (tensor, _) in expected.items()} == {
        site: text for site, (_, text) in expected.items()
    }
    alone = SiteDims(model, 1)
    assert all("[" not in alone(*site, tensor, PREFILL) for site, (tensor, _) in expected.items())


def test_what_a_collective_overwrites_is_kept_as_it_was() -> None:
    code = """
import torch, torch.distributed as dist
from tensorsleuth.capture.nxdi.rank_process import join_alone
from tensorsleuth.capture.pending import WriteGuard
join_alone()
guard, tensor = WriteGuard(), torch.ones(3)
with guard:
    waiting = guard.reference(tensor)
    dist.all_reduce(tensor)
    assert guard.n_snapshots == 1
    gathered = [torch.zeros(3)]
    held = guard.reference(gathered[0])
    dist.all_gather(gathered, tensor)
    with held.values() as values:
        assert not values.any()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
