"""Specs: layers, presets, origins, and errors that name the path and the known keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cli.options import build_from_flags
from cli.spec import commented_spec
from safer_engine.api import audit
from safer_engine.errors import SpecError
from safer_engine.spec import AuditSpec, DatasetSpec, LocalSource, merge
from safer_engine.spec_layers import (
    Layer,
    build_spec,
    leaves,
    parse_assignment,
    parse_assignments,
    parse_source,
    preset_departures,
    read_document,
)
from safer_engine.spec_section import Section

BASE = {"model": "m", "dataset": {"source": {"kind": "local", "path": "d"}}}


def test_later_layers_win_and_origins_say_who() -> None:
    built = build_spec([Layer("file", {**BASE, "sae": {"k": 8, "batch": 512}}), Layer("flag", {"sae": {"k": 16}})])
    assert (built.spec.sae.k, built.spec.sae.batch) == (16, 512)
    assert built.origins["sae.k"] == "flag"
    assert built.origins["sae.batch"] == "file"
    assert "sae.lr" not in built.origins


def test_the_paper_preset_lies_under_what_is_given() -> None:
    built = build_spec([Layer("flag", {**BASE, "preset": "paper", "sae": {"k": 7}})])
    assert built.spec.sae.k == 7
    assert built.spec.sae.normalisation == "layernorm"
    assert not built.spec.sae.relu
    assert built.spec.hook.positions == "sentence_ends"
    assert built.spec.suspicion.estimator == "paper"
    assert built.origins["sae.normalisation"] == "preset paper"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"sae": {"kk": 1}}, r"sae\.kk: unknown key; known here: .*\bk\b"),
        ({"saee": {}}, r"saee: unknown key; known here: .*\bsae\b"),
        (
            {"dataset": {"source": {"kind": "local", "paht": "x"}}},
            r"dataset\.source\.paht: unknown key; known here: kind, path, split",
        ),
        ({"sae": {"k": 0}}, r"sae\.k: .*greater than 0"),
        ({"sae": {"kind": "gated"}}, r"topk.*batch_topk"),
        ({"model": {"path": "m", "reward_index": 1, "reward_weights": [1.0]}}, "not both"),
    ],
)
def test_a_wrong_spec_is_explained(document: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_spec([Layer("file", merge(BASE, document))])


def test_missing_sections_are_named() -> None:
    with pytest.raises(SpecError, match=r"model: Field required.*dataset: Field required"):
        build_spec([Layer("flag", {})])


def test_a_source_of_another_kind_replaces_the_first() -> None:
    flag = {"dataset": {"source": {"kind": "hub", "path": "org/name"}}}
    built = build_spec([Layer("file", BASE), Layer("flag", flag), Layer("--set", {"dataset": {"source": {"split": "test"}}})])
    assert built.spec.dataset.source.model_dump() == {
        "kind": "hub", "path": "org/name", "revision": None, "name": None, "split": "test",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", {"kind": "hub", "path": "org/name"}),
        ("org/name@v1.2#test", {"kind": "hub", "path": "org/name", "revision": "v1.2", "split": "test"}),
        ("org/n-a.me#sub/train", {"kind": "hub", "path": "org/n-a.me", "name": "sub", "split": "train"}),
    ],
)
def test_hub_ids_are_read(text: str, expected: dict[str, str]) -> None:
    assert parse_source(text) == expected


def test_a_path_that_exists_is_local_and_a_missing_file_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name").write_text("{}")
    assert parse_source("org/name") == {"kind": "local", "path": "org/name"}
    for wrong in ("data/prefs.jsonl", "nowhere", "a/b/c", "data/x.gz"):
        with pytest.raises(SpecError, match="does not exist"):
            parse_source(wrong)


def test_assignments_are_yaml() -> None:
    assert parse_assignment("sae.k=32") == {"sae": {"k": 32}}
    assert parse_assignment("suspicion.signals={latents: 1}") == {"suspicion": {"signals": {"latents": 1}}}
    for wrong in ("sae.k", "=3", "a..b=1", "a={"):
        with pytest.raises(SpecError, match="--set"):
            parse_assignment(wrong)


def test_unreadable_files_say_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="spec init"):
        read_document(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(SpecError, match="mapping"):
        read_document(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(SpecError, match="not valid YAML"):
        read_document(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_document(tmp_path / "empty.yaml") == {}


def test_the_commented_spec_is_the_default_spec() -> None:
    document = yaml.safe_load(uncommented(commented_spec()))
    spec = build_spec([Layer("file", document)]).spec
    defaults = build_spec([Layer("flag", {"model": document["model"], "dataset": document["dataset"]})]).spec
    assert spec == defaults
    described = [line for line in commented_spec().splitlines() if line.strip().startswith("# ")]
    assert len(described) > len(list(leaves(document))) * 0.9


def uncommented(text: str) -> str:
    return re.sub(r"^( *)#(?! )", r"\1", text, flags=re.MULTILINE)


@pytest.mark.parametrize("shown", ["default", "paper"])
@pytest.mark.parametrize("chosen", ["default", "paper"])
def test_a_written_spec_changes_nothing(tmp_path: Path, shown: str, chosen: str) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text(commented_spec(shown))
    assert read_document(path) == ({} if shown == "default" else {"preset": "paper"})
    flag = Layer("flag", {**BASE, "preset": chosen})
    assert build_spec([Layer("file", read_document(path)), flag]).spec == build_spec([flag]).spec
    all_in = build_spec([Layer("file", {**yaml.safe_load(uncommented(commented_spec(shown))), "preset": shown})]).spec
    assert all_in.sae == build_spec([Layer("flag", {**BASE, "preset": shown})]).spec.sae


def test_one_line_of_a_written_spec_can_be_uncommented(tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text(commented_spec().replace("  #k: 32", "  k: 16").replace("    #path: preferences.jsonl", "    path: x.jsonl"))
    built = build_spec([Layer("file", read_document(path)), Layer("flag", {"model": "m", "preset": "paper"})])
    assert (built.spec.sae.k, built.spec.sae.batch) == (16, 256)
    assert built.spec.dataset.source == LocalSource(path="x.jsonl")


def test_what_a_file_says_against_the_chosen_preset_is_told() -> None:
    file, flag = Layer("file", {**BASE, "sae": {"k": 32, "batch": 256}, "seed": 3}), Layer("flag", {"preset": "paper"})
    built = build_spec([file, flag, Layer("--set", {"contexts": {"window": 64}})])
    assert built.contradictions == ("sae.k is 32 (preset: 64)",)
    assert build_spec([Layer("file", {**file.document, "preset": "paper"})]).contradictions == ()
    assert build_spec([file]).contradictions == ()
    assert list(preset_departures(built.spec.model_dump(mode="json"))) == ["sae.k", "contexts.window"]


def test_mappings_are_given_as_a_whole() -> None:
    file = Layer("file", {**BASE, "suspicion": {"signals": {"latents": 1.0}}})
    built = build_spec([file, Layer("flag", {"suspicion": {"signals": {"knn": 2.0}}})])
    assert built.spec.suspicion.signals == {"knn": 2.0}
    assert "suspicion.signals.latents" not in built.origins
    paper = build_spec([Layer("flag", {**BASE, "preset": "paper", "suspicion": {"signals": {"margin": 1.0}}})]).spec
    assert paper.suspicion.signals == {"margin": 1.0}


@pytest.mark.parametrize("turned", [False, True])
def test_assignments_make_up_one_layer_in_any_order(tmp_path: Path, turned: bool) -> None:
    sets = ["dataset.source.path=X", "dataset.source.kind=local", "suspicion.signals.knn=1", "suspicion.signals.margin=2"]
    names = ("model", "dataset", "eval_dataset", "spec_file", "preset", "sample", "stratify", "device", "seed", "no_text")
    given: dict[str, Any] = dict.fromkeys((*names, "trust_remote_code")) | {
        "model": "m",
        "assignments": sets[::-1] if turned else sets,
    }
    spec = build_from_flags(required=True, **given).spec
    assert spec.dataset.source == LocalSource(path="X")
    assert spec.suspicion.signals == {"knn": 1.0, "margin": 2.0}
    assert parse_assignments(sets[::-1] if turned else sets)["dataset"] == {"source": {"kind": "local", "path": "X"}}


@pytest.mark.parametrize("value", ["report.bootstrap=100001", "sae.passes=.inf", f"sae.passes={10**400}", "sae.expansion=99999"])
def test_knobs_that_would_never_end_are_refused(value: str) -> None:
    with pytest.raises(SpecError, match=r"report\.bootstrap|sae\.passes|sae\.expansion"):
        build_spec([Layer("flag", BASE), Layer("--set", parse_assignment(value))])


def test_a_sample_is_what_is_stratified(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no sample is asked for"):
        build_spec([Layer("flag", {"model": "m", "dataset": {**BASE["dataset"], "stratify": "axis"}})])  # type: ignore[dict-item]


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(SpecError, match=r"rows\.jsonl is a file, and a file has no splits"):
        parse_source(f"{tmp_path}/rows.jsonl#train")


def test_every_knob_has_a_description_and_specs_are_immutable() -> None:
    def sections(kind: type[Section]) -> list[type[Section]]:
        return [kind, *(s for sub in kind.__subclasses__() for s in sections(sub))]

    bare = [
        f"{section.__name__}.{name}"
        for section in sections(Section)
        if section.__module__ == "safer_engine.spec"
        for name, info in section.model_fields.items()
        if not info.description and name != "kind" and section is not AuditSpec
    ]
    assert bare == []
    spec = build_spec([Layer("flag", BASE)]).spec
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 1


documents = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from("abcd"), documents), st.dictionaries(st.sampled_from("abcd"), documents))
def test_merge_keeps_what_the_upper_layer_does_not_say(base: dict[str, object], over: dict[str, object]) -> None:
    merged = merge(base, over)
    upper, result = dict(leaves(over)), dict(leaves(merged))
    assert {path: value for path, value in result.items() if path in upper and upper[path] != {}} == {
        path: value for path, value in upper.items() if value != {}
    }
    assert merge(merged, over) == merged


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"model": {"path": "m", "reward_weights": [0, 0.0]}}, "one must not be 0"),
        ({"model": {"path": "m", "reward_weights": [1, float("nan")]}}, "finite number"),
        ({"model": {"path": "m", "reward_weights": []}}, "one must not be 0"),
        ({"model": "m", "sae": {"k": 33, "d_sae": 32}}, "k is 33, more than the 32 latents"),
    ],
)
def test_values_that_contradict_themselves(document: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        build_spec([Layer("test", {"dataset": "org/data", **document})])


def test_a_split_of_a_local_folder_is_named_after_a_hash(tmp_path: Path) -> None:
    (tmp_path / "d" / "saved").mkdir(parents=True)
    named = f"{tmp_path / 'd' / 'saved'}"
    assert parse_source(f"{named}#train") == {"kind": "local", "path": named, "split": "train"}


def test_rows_given_as_a_dataset_point_to_the_right_argument() -> None:
    with pytest.raises(SpecError) as caught:
        audit(model="m", dataset=[{"chosen": "a", "rejected": "b"}])
    assert "rows=" in caught.value.hint


def test_meanings_of_winners_may_be_numbers_and_truth_values_in_yaml() -> None:
    document = yaml.safe_load("{source: {kind: memory}, winners: {1: a, 2: b, both: tie}}")
    assert DatasetSpec.model_validate(document).winners == {"1": "a", "2": "b", "both": "tie"}
    document = yaml.safe_load("{source: {kind: memory}, winners: {true: a, false: b}}")
    assert DatasetSpec.model_validate(document).winners == {"True": "a", "False": "b"}
    with pytest.raises(ValidationError):
        DatasetSpec.model_validate({**document, "winners": {1: "c"}})
    with pytest.raises(ValidationError):
        DatasetSpec.model_validate({**document, "winners": [1]})
