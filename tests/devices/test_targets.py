"""Targets by their names, and reading a program's text; no compiler is needed."""

import importlib.util

import pytest

import jaxprune
from jaxprune.devices.hlo import read_program
from jaxprune.devices.targets import CHIPS, parse_target, target_mesh, topology_devices

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[4096,4096]) -> bf16[4096,4096] {
  %p.0 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %t = bf16[4096,4096]{0,1:T(8,128)(2,1)} transpose(%p.0), dimensions={1,0}
}

%body (s: (s32[], bf16[8,64,64])) -> (s32[], bf16[8,64,64]) {
  %s = (s32[], bf16[8,64,64]{2,1,0}) parameter(0)
  %x = bf16[8,64,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %c = bf16[8,64,64]{1,2,0:T(8,128)(2,1)} copy(%x), backend_config={"window_config":{"estimated_cycles":"10"}}
  %r = bf16[8,64,64]{1,2,0} all-reduce(%c), replica_groups={{0,1}}, to_apply=%add
  ROOT %o = (s32[], bf16[8,64,64]) tuple(%i, %r)
}

%condition (s.1: (s32[], bf16[8,64,64])) -> pred[] {
  %s.1 = (s32[], bf16[8,64,64]{2,1,0}) parameter(0)
  %n = s32[] constant(3)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: bf16[4096,4096], b: bf16[8,64,64]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %ahead = (bf16[4096,4096]{1,0:S(1)}, bf16[4096,4096]{1,0}, u32[]) copy-start(%a)
  %f = bf16[4096,4096]{0,1:T(8,128)(2,1)} fusion(%a), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"500"}}
  %w = (s32[], bf16[8,64,64]{2,1,0}) while(%t.0), condition=%condition, body=%body
  ROOT %d = bf16[4096,4096]{1,0} dot(%f, %f), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501


def test_a_program_is_read():
    """A fusion by what it ends with, a loop by its rounds; what is fetched ahead is no copy."""
    found = read_program(PROGRAM, least=2**10)
    assert found.cycles == 500 + 3 * 10
    moved = [(one.op, one.shape, one.bytes, one.times) for one in found.moved]
    assert moved == [
        ("transpose", "bf16[4096,4096]", 2 * 4096**2, 1),
        ("copy", "bf16[8,64,64]", 2**16, 3),
    ]
    assert found.collectives == {"all-reduce": (3, 3 * 2**16)}
    assert {one.op for one in found.written} == {"transpose", "copy", "all-reduce", "dot"}
    assert read_program(PROGRAM, least=2**20).moved == found.moved[:1]
    unknown = PROGRAM.replace("constant(3)", "parameter(1)")
    assert [read_program(unknown, least=1, rounds=n).cycles for n in (1, 64)] == [510, 1140]
    assert read_program(PROGRAM, least=1, rounds=64).cycles == found.cycles


def test_names():
    assert [str(parse_target(x)) for x in ("v5e", "V6E:2x2", "v5p:2x2x1", "h100:4", " v4 ")] == [
        "v5e:1x1", "v6e:2x2", "v5p:2x2x1", "h100:4", "v4:1x1x1",
    ]  # fmt: skip
    assert parse_target("v5p:2x2x2").chips == 8
    assert [str(x) for x in parse_target("v5e:2x4").bigger()][:2] == ["v5e:2x4", "v5e:4x4"]
    for name, chip in CHIPS.items():
        assert parse_target(name).usable < chip.memory
        assert 100e12 < chip.flops < 3e15 and 5e11 < chip.bandwidth < 1e13


@pytest.mark.parametrize(
    "text, message",
    [
        ("v9", "The target 'v9' is unknown; expected one of v4, v5e"),
        ("", "The target '' is unknown"),
        (3, "target is 3; expected a text"),
        (None, "target is None"),
        ("v5e:2", "The shape of v5e is '2'; expected two numbers"),
        ("v5p:2x2", "The shape of v5p is '2x2'; expected three"),
        ("h100:2x2", "The shape of h100 is '2x2'; expected a number"),
        ("v5e:axb", "The shape of v5e is 'axb'"),
        ("v5e:-1x2", "The shape of v5e is '-1x2'"),
        ("v5e:0x2", "has 0 chips"),
        ("v5e:99x99", "has 9801 chips"),
        ("v5e:" + "9" * 5000, "The shape of v5e"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(jaxprune.UserError, match=message):
        parse_target(text)


def test_rows_that_do_not_divide():
    with pytest.raises(jaxprune.UserError, match="does not divide the 4 of v5e:2x2"):
        target_mesh(parse_target("v5e:2x2"), data=3)


@pytest.mark.parametrize("target, wheel", [("v5e", "tpu-compile"), ("h100", "jax-cuda12-plugin")])
def test_without_the_compiler_it_is_said_what_to_install(target, wheel, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(jaxprune.UserError, match=f"needs its compiler.*{wheel}"):
        topology_devices(parse_target(target))
