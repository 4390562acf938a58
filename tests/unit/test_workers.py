"""How much CPU time further threads may use, according to cgroups and the affinity."""

import os

import pytest
from kit.fake_relay import FakeRelay

from proxyd import workers


@pytest.fixture
def machine(tmp_path):
    """Make a /proc/self/cgroup and files below /sys/fs/cgroup; return the root of both."""

    def make(cgroup, files):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/a/b\n", {}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 150),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 50),
        ("0::/a/b\n", {"a/b/cpu.max": "5000 10000\n", "a/cpu.max": "9000 10000\n"}, 50),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 200),  # the root of a container
        ("0::/docker/x\n", {"cpu.max": "200000 100000\n"}, 200),  # … with its name outside
        ("0::/a\n", {"a/cpu.max": "1 1000000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "nonsense\n"}, 0),
        ("0::/a\n", {"a/cpu.max": "5 0\n"}, 0),
        ("", {"cpu.max": "50000 100000\n"}, 0),
        (
            "9:name=systemd:/a\n4:cpu,cpuacct:/a\n0::/a\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "70000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            70,
        ),
        ("0::/a:b\n", {"unified/a:b/cpu.max": "50000 100000\n"}, 50),
    ],
)
def test_quota(machine, cgroup, files, quota):
    assert workers.cpu_quota(machine(cgroup, files)) == quota


def test_quota_without_proc(tmp_path):
    assert workers.cpu_quota(str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("usable", "online", "quota", "stat", "cpus", "limit"),
    [
        ({0, 1}, 2, 0, "/proc/stat", None, 0),
        ({0, 1}, 2, 150, "/proc/stat", None, 150),
        ({1}, 2, 0, "/proc/stat", {1}, 100),  # a cpuset, or an affinity
        ({1, 2}, 64, 150, "/proc/stat", {1, 2}, 150),
        ({1, 2}, 64, 250, "/proc/stat", {1, 2}, 200),
        (set(range(64)), 64, 0, "/proc/uptime", None, 0),
    ],
)
def test_which_cpus_count(monkeypatch, usable, online, quota, stat, cpus, limit):
    monkeypatch.setattr(workers.posix, "sched_getaffinity", lambda pid: usable)
    monkeypatch.setattr(workers.posix, "sysconf", lambda name: online)
    monkeypatch.setattr(workers, "cpu_quota", lambda: quota)
    relay = FakeRelay()
    workers.offload_when_busy(relay)
    (fd,) = relay.stats
    assert os.readlink(f"/proc/self/fd/{fd}") == stat
    os.close(fd)
    assert relay.rules == {"cpus": cpus, "quota": limit, "wait_max": workers.WAIT_MAX}
