"""Policies: what is refused, what is published, and what the built-in ones say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from safer_engine.errors import SpecError
from safer_engine.gate.paths import Condition, Step, parse_path
from safer_engine.gate.policy import Policy, load_policy, parse_policy, policy_names, policy_schema, policy_text
from safer_engine.gate.schema import schema_text

DOCS = Path(__file__).parents[2] / "docs"
RULE = {"name": "r", "fact": "evaluation.n_pairs", "min": 1}


def test_the_published_schema_is_the_models() -> None:
    published = (DOCS / "policy.schema.json").read_text()
    assert published == schema_text(), "stale: python -m safer_engine.gate.schema docs/policy.schema.json"
    Draft202012Validator.check_schema(json.loads(published))


@pytest.mark.parametrize("name", policy_names())
def test_built_in_policies_are_valid_and_explain_every_value(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    Draft202012Validator(policy_schema()).validate(json.loads(policy.model_dump_json()))
    assert all(rule.about for rule in policy.rules)


def test_the_default_policy_explains_every_kind_of_value() -> None:
    text = policy_text("default")
    explained = {
        line.strip().split(":")[0]
        for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False)
        if "#" in before
    }
    assert {
        "false_alarms",
        "misses",
        "fact",
        "min",
        "min_n",
        "max_drop",
        "optional",
        "on_inconclusive",
        "pass_when",
        "waivers",
    } <= explained


def test_a_policy_is_what_it_says_not_how_it_is_written() -> None:
    policy = load_policy("default")
    assert parse_policy(json.dumps(policy.model_dump(mode="json")), "again") == policy
    assert parse_policy(json.dumps(policy.model_dump(mode="json")), "again").digest == policy.digest
    assert load_policy("strict").digest != policy.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rules": []}, "at least 1 item"),
        ({"version": 2}, "version"),
        ({"rulez": []}, "unknown key"),
        ({"rules": [RULE, RULE]}, "the same name: r"),
        ({"rules": [{"name": "r", "fact": "a"}]}, "give one demand"),
        ({"rules": [{**RULE, "max_drop": 0.1}]}, "give one demand"),
        ({"rules": [{**RULE, "max": 0}]}, "min 1 is above max 0"),
        ({"rules": [{**RULE, "fact": "a..b"}]}, "no key at character 3"),
        ({"rules": [{**RULE, "fact": "a[b<c]"}]}, "needs a number"),
        ({"rules": [{**RULE, "min": float("nan")}]}, "finite"),
        ({"rules": [{**RULE, "on_inconclusive": "ignore"}]}, "on_inconclusive"),
        ({"rules": [{**RULE, "name": "No Name"}]}, "pattern"),
        ({"false_alarms": 0}, "false_alarms"),
        ({"waivers": [{"rule": "other", "owner": "o", "reason": "r", "expires": "2030-01-01"}]}, "does not have: other"),
        ({"waivers": [{"rule": "r", "owner": "", "reason": "r", "expires": "2030-01-01"}]}, "owner"),
        ({"waivers": [{"rule": "r", "owner": "o", "reason": "r", "expires": "soon"}]}, "expires"),
    ],
)
def test_wrong_policies_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_policy(yaml.safe_dump({"version": 1, "rules": [RULE], **changes}), "policy p.yaml")


@pytest.mark.parametrize("text", ["", "- a", "a: [", "version: 1\nversion: 1\nrules: []", "a: &a [*a]", "[" * 3000])
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_policy(text, "policy p.yaml")


def test_a_key_given_twice_is_named() -> None:
    with pytest.raises(SpecError, match="min is given twice"):
        parse_policy("version: 1\nrules:\n- {name: r, fact: a, min: 1, min: 0}", "p")


def test_a_policy_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no policy 'lenient'"):
        load_policy("lenient")
    (tmp_path / "big.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(SpecError, match="more than"):
        load_policy(str(tmp_path / "big.yaml"))


@given(
    st.one_of(st.text(max_size=60), st.from_regex(r"[a-z_]{1,5}(\[[a-z=<*,\"0-9]{0,9}\])?(\.[a-z]{1,4}){0,2}", fullmatch=True))
)
def test_paths_are_read_or_refused_with_a_reason(text: str) -> None:
    try:
        steps = parse_path(text)
    except ValueError as refused:
        said = str(refused)
        assert said
    else:
        assert all(step.key for step in steps)


def test_a_path_says_what_it_means() -> None:
    assert parse_path('a.b[c=x*, d!="p, q]", e<=-1.5, f=null, g=true].h') == (
        Step("a", None),
        Step(
            "b",
            (
                Condition("c", "=", "x*"),
                Condition("d", "!=", "p, q]"),
                Condition("e", "<=", -1.5),
                Condition("f", "=", None),
                Condition("g", "=", True),
            ),
        ),
        Step("h", None),
    )


KEYS = st.sampled_from(["name", "fact", "min", "max", "equals", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["version", "name", "rules", "waivers", "misses", "false_alarms"]), JSON, max_size=5))
def test_any_document_is_a_policy_or_is_refused(document: dict[str, Any]) -> None:
    try:
        made = Policy.model_validate(document)
    except ValidationError:
        with pytest.raises(SpecError):
            parse_policy(json.dumps(document), "p")
    else:
        assert parse_policy(made.model_dump_json(), "p") == made
