"""Units found and merged as systemd does: precedence, drop-ins, aliases, templates, masks."""

import os

import pytest

from proxyd.units.library import Library


def library(*folders, root=""):
    return Library([str(folder) for folder in folders], str(root))


def values(unit, key="K"):
    return [setting.value for setting in unit.entries("Service", key)]


def test_the_first_folder_wins_and_the_drop_ins_of_all_apply(units):
    etc = units(
        {"a.service": "[Service]\nK=etc\n", "a.service.d/20-x.conf": "[Service]\nK=20\n"}, "etc"
    )
    usr = units(
        {
            "a.service": "[Service]\nK=usr\n",
            "a.service.d/10-x.conf": "[Service]\nK=10\n",
            "a.service.d/20-x.conf": "[Service]\nK=hidden\n",
        },
        "usr",
    )
    assert values(library(etc, usr).get("a.service")) == ["etc", "10", "20"]


def test_drop_ins_of_prefixes_and_of_the_type(units):
    folder = units(
        {
            "a-b-c.service": "[Service]\nK=file\n",
            "a-b-c.service.d/x.conf": "[Service]\nK=own\n",
            "a-b-.service.d/x.conf": "[Service]\nK=hidden\n",
            "a-b-.service.d/y.conf": "[Service]\nK=prefix\n",
            "a-.service.d/z.conf": "[Service]\nK=shorter\n",
            "service.d/w.conf": "[Service]\nK=type\n",
            "service.d/y.conf": "[Service]\nK=hidden\n",
        }
    )
    assert values(library(folder).get("a-b-c.service")) == [
        "file",
        "type",
        "own",
        "prefix",
        "shorter",
    ]


def test_a_template_and_its_instances(units):
    folder = units(
        {
            "a@.service": "[Service]\nK=%i\n",
            "a@.service.d/x.conf": "[Service]\nK=all\n",
            "a@one.service.d/y.conf": "[Service]\nK=one\n",
            "a@two.service": "[Service]\nK=own\n",
            "b-c@.service": "[Service]\nK=file\n",
            "b-.service.d/x.conf": "[Service]\nK=prefix\n",
        }
    )
    found = library(folder)
    assert values(found.get("b-c@one.service")) == ["file", "prefix"]
    assert values(found.get("a@one.service")) == ["%i", "all", "one"]
    assert found.get("a@one.service").value("Service", "K") == "one"
    assert values(found.get("a@two.service")) == ["own", "all"]


@pytest.mark.parametrize("mask", ["", "-> /dev/null"])
def test_what_is_masked_is_not_there(units, mask):
    etc = units({"a.service": mask, "b.service": "[Service]\n", "b.service.d/x.conf": mask}, "etc")
    usr = units({"a.service": "[Service]\n", "b.service.d/x.conf": "[Service]\nK=hidden\n"}, "usr")
    found = library(etc, usr)
    assert found.get("a.service") is None
    assert values(found.get("b.service")) == []


def test_an_alias_has_one_unit_and_the_drop_ins_of_both_names(units):
    folder = units(
        {
            "a.service": "[Service]\nK=file\n",
            "b.service": "-> a.service",
            "a.service.d/1.conf": "[Service]\nK=a\n",
            "b.service.d/2.conf": "[Service]\nK=b\n",
        }
    )
    found = library(folder)
    assert found.get("a.service") is found.get("b.service")
    assert found.get("b.service").aliases == {"a.service", "b.service"}
    assert values(found.get("a.service")) == ["file", "a", "b"]


def test_a_link_to_a_file_elsewhere_is_no_alias(units, tmp_path):
    (tmp_path / "other.service").write_text("[Service]\nK=linked\n")
    folder = units({"a.service": f"-> {tmp_path}/other.service"})
    unit = library(folder).get("a.service")
    assert (unit.text, values(unit)) == ("a.service", ["linked"])


def test_links_stay_inside_the_root(units):
    root = units(
        {"etc/a.service": "-> /usr/b.service", "usr/b.service": "[Service]\nK=in\n"}, "root"
    )
    assert values(library(root / "etc", root / "usr", root=root).get("a.service")) == ["in"]


def test_a_list_is_reset_and_dependencies_are_not(units):
    folder = units(
        {
            "a.service": "[Unit]\nRequires=b.service\n[Service]\nK=1\nK=\nK=2\n",
            "a.service.d/x.conf": "[Unit]\nRequires=\nWants=c.service\n",
            "a.service.wants/d.service": "-> /dev/null",
            "a.service.requires/e.service": "-> ../e.service",
            "a.service.requires/f.service": "no symlink, which systemd ignores\n",
        }
    )
    unit = library(folder).get("a.service")
    assert values(unit) == ["2"]
    assert set(unit.dependencies("Requires")) == {"b.service", "e.service"}
    assert set(unit.dependencies("Wants")) == {"c.service", "d.service"}


def test_booleans_and_spans_that_are_none_are_ignored(units):
    text = "[Service]\nB=yes\nB=\nB=maybe\nS=5\nS=soon\nRestart=always\nRestart=ever\n"
    unit = library(units({"a.service": text})).get("a.service")
    assert unit.flag("Service", "B")
    assert unit.choice("Service", "Restart") == "always"
    assert unit.span("Service", "S", "1") == 5_000_000


def test_a_template_in_a_dependency_gets_the_instance(units):
    folder = units({"a@.service": "[Unit]\nWants=b@.service c@%i-x.service\n"})
    unit = library(folder).get("a@1.service")
    assert set(unit.dependencies("Wants")) == {"b@1.service", "c@1-x.service"}


def test_bad_symlinks_are_told_once(units):
    folder = units(
        {
            "a.service": "-> b.service",
            "b.service": "-> a.service",
            "c.service": "-> nowhere.service",
            "d@.service": "-> d@.service",
        }
    )
    found = library(folder)
    assert [found.get(name) for name in ("a.service", "c.service", "d@1.service")] == [None] * 3
    told = {os.path.basename(problem.path): problem.message for problem in found.problems}
    assert set(told) == {"a.service", "b.service", "c.service", "d@.service"}
    assert "too many levels" in told["a.service"]
    assert "No such file" in told["c.service"]
