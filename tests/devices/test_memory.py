"""How much memory there is, and what a device without any says."""

import jax
import pytest

import jaxprune
from jaxprune.devices import memory


def test_a_device_out_of_memory_is_told():
    with (
        pytest.raises(jaxprune.UserError, match=r"out of memory \(RESOURCE_EXHAUSTED: 5 GiB\)"),
        memory.told_if_exhausted(),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GiB\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError), memory.told_if_exhausted():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_containers_limit_counts(tmp_path):
    groups = tmp_path / "sys/fs/cgroup"
    assert memory._left_by_container(tmp_path) is None
    write(tmp_path / "proc/self", cgroup="0::/user/job\n")
    write(groups / "user/job", memory__max="max", memory__current="900", memory__stat="anon 1\n")
    assert memory._left_by_container(tmp_path) is None
    stat = "anon 100\nactive_file 300\ninactive_file 200\n"
    for name, text in {"memory.max": "5000", "memory.current": "4000", "memory.stat": stat}.items():
        (groups / "user" / name).write_text(text)
    assert memory._left_by_container(tmp_path) == 1500
    # Version 1, as older hosts have it.
    write(groups / "memory", memory__stat=stat, **{"memory.limit_in_bytes": "2000"},
          **{"memory.usage_in_bytes": "1600"})  # fmt: skip
    assert memory._left_by_container(tmp_path) == 900


def test_a_full_container_has_nothing_left(monkeypatch):
    monkeypatch.setattr(memory, "_left_by_container", lambda root: 0)
    assert memory.free_bytes() == 0


def test_memory_is_known_here():
    assert memory.peak_bytes() > 1 << 20
    assert memory.free_bytes() is None or memory.free_bytes() > 1 << 20
