"""Sets of units, sound and broken ones: every mistake is found, and nothing else."""

from pathlib import Path

import pytest
from units.findings import rules_in

from proxyd.units import check
from proxyd.units.rules_command import knows_settle_time

CORPUS = Path(__file__).parent / "corpus"
SOUND = sorted((CORPUS / "sound").iterdir())
BROKEN = sorted((CORPUS / "broken").iterdir())


def expected(folder):
    rules = set((folder / "expected").read_text().split())
    return rules if knows_settle_time() else rules - {"published-port"}


@pytest.mark.parametrize("folder", SOUND, ids=lambda path: path.name)
def test_nothing_is_found_in_what_is_sound(folder, copy_of):
    copy = copy_of(folder)
    findings, proxies = check.check([str(copy)], check.Scope())
    assert proxies
    assert [(f.rule, f.message) for f in findings] == []


@pytest.mark.parametrize("folder", BROKEN, ids=lambda path: path.name)
def test_every_mistake_is_found_and_nothing_else(folder, copy_of):
    assert rules_in(copy_of(folder)) == expected(folder)


def test_every_rule_has_a_set_that_it_bites():
    bitten = {rule for folder in BROKEN for rule in (folder / "expected").read_text().split()}
    assert bitten >= {rule.name for rule in check.RULES}


def test_half_of_the_sets_are_sound():
    assert len(SOUND) > 40
    assert len(BROKEN) > 60
