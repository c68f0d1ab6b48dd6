from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_engine.spec import AuditSpec
from safer_engine.train_spec import TrainSpec
from service.errors import SourceNotAllowed
from service.infra.settings import Settings, load_settings
from service.source_policy import check_audit, check_training, upload_digests

DIGEST = "a" * 64
UPLOAD = f"upload:{DIGEST}"
MINE = load_settings(allowed_sources=("upload:", "hub:good/", "hub:whole", "hub:one/family", "s3://bucket/models", "/data/open/"))


def audit(**sections: Any) -> AuditSpec:
    document = {"model": {"path": UPLOAD}, "dataset": {"source": {"kind": "local", "path": UPLOAD}}, **sections}
    return AuditSpec.model_validate(document)


def named(path: str) -> AuditSpec:
    return audit(model={"path": path})


def refused(spec: AuditSpec, settings: Settings = MINE) -> str:
    with pytest.raises(SourceNotAllowed) as found:
        check_audit(spec, settings)
    return found.value.message


@pytest.mark.parametrize(
    "path",
    [
        UPLOAD,
        "whole/model",
        "whole/model@main",
        "one/family",
        "one/family@main",
        "good/model",
        "good/model@main",
        "s3://bucket/models",
        "s3://bucket/models/a/b",
        "/data/open",
        "/data/open/a/b.jsonl",
    ],
)
def test_what_the_operator_allows_passes(path: str) -> None:
    check_audit(named(path), MINE)


@pytest.mark.parametrize(
    "path",
    [
        "evil/model", "goods/model", "whole-evil/x", "wholesale/x", "one/family-evil", "one/fam", "one/other",
        "gpt2", "good/../evil", "good/model@../../x", "upload:", "upload:abc", f"upload:{'A' * 64}",
        f"{UPLOAD}/../x", "s3://bucket", "s3://bucket/modelsx/a", "s3://bucket/models/../secret", "s3://bucket/models//a",
        "s3://bucket/models/a?versionId=1", "s3://other/models", "/data/openx", "/data/open/../secret", "/etc/passwd", "/", "",
        ".", "./model", "../model", "~/model", "file:///data/open/a", "http://h/x", "https://hub/x", "S3://bucket/models/a",
        "models\\a", "/data/open/a\x00b", "good/model\n",
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_its_field_named(path: str) -> None:
    assert refused(named(path)).startswith("model.path: ")


PIECES = st.sampled_from(
    ["upload:", DIGEST, "hub:", "s3://", "/", "..", ".", "~", "@", "%2e", "\\", "\0", "\n", "org", "rm-1.5", "_", "é", "file:"]
)


@given(st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=60))
def test_no_name_leads_to_a_path_of_the_worker(path: str) -> None:
    """By default only uploads and ids of the hub are taken: neither is ever opened as a path."""
    try:
        check_audit(named(path), load_settings())
    except SourceNotAllowed:
        return
    assert path == UPLOAD or path[:1].isalnum(), path
    assert path == UPLOAD or (path.partition("@")[0].count("/") <= 1 and not set(path) & set(":~\\%\0\n")), path
    assert ".." not in path


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"model": {"path": UPLOAD, "adapter": "/etc"}}, "model.adapter"),
        ({"dataset": {"source": {"kind": "memory"}}}, "dataset.source"),
        ({"dataset": {"source": {"kind": "hub", "path": "/etc"}}}, "dataset.source.path"),
        ({"dataset": {"source": {"kind": "hub", "path": "evil/set"}}}, "dataset.source.path"),
        ({"dataset": {"source": {"kind": "local", "path": UPLOAD, "split": "../../x"}}}, "dataset.source.split"),
        ({"evaluation": {"source": {"kind": "local", "path": "/etc/passwd"}}}, "evaluation.source.path"),
        (
            {"sae": {"kind": "topk", "pretrain": {"corpus": {"kind": "local", "path": "/etc/passwd"}}}},
            "sae.pretrain.corpus.path",
        ),
        ({"labels": {"rubric": "/etc/passwd"}}, "labels.rubric"),
        ({"labels": {"rubric": "rubric.yaml"}}, "labels.rubric"),
        ({"runtime": {"trust_remote_code": True}}, "runtime.trust_remote_code"),
        ({"runtime": {"device_map": "disk"}}, "runtime.device_map"),
    ],
)
def test_every_place_of_a_spec_is_looked_at(sections: dict[str, Any], field: str) -> None:
    assert refused(audit(**sections)).startswith(field + ":")


def labelled(url: str, **more: Any) -> AuditSpec:
    return audit(labels={"labeller": {"kind": "chat_api", "base_url": url, "model": "m", **more}})


def test_a_labeller_is_one_of_the_operators_and_its_key_no_other_variable() -> None:
    settings = load_settings(labeller_urls=("https://models.example/v1",))
    check_audit(labelled("https://models.example/v1/"), settings)
    check_audit(labelled("https://models.example/v1", api_key_env=None), settings)
    for url in ("https://models.example/v1/other", "https://models.example.evil/v1", "http://169.254.169.254/v1"):
        assert "base_url" in refused(labelled(url), settings)
    assert "api_key_env" in refused(labelled("https://models.example/v1", api_key_env="SAFER_S3_SECRET_KEY"), settings)


def test_remote_code_is_the_operators_choice() -> None:
    check_audit(audit(runtime={"trust_remote_code": True}), load_settings(trust_remote_code=True))


def test_a_training_is_held_to_the_same() -> None:
    good = {"base": UPLOAD, "dataset": {"source": {"kind": "local", "path": UPLOAD}}}
    check_training(TrainSpec.model_validate(good), MINE)
    with pytest.raises(SourceNotAllowed, match="^base: "):
        check_training(TrainSpec.model_validate({**good, "base": "/etc"}), MINE)
    with pytest.raises(SourceNotAllowed, match=r"^evaluation\.source\.path: "):
        evaluation = {"source": {"kind": "local", "path": "/etc"}}
        check_training(TrainSpec.model_validate({**good, "evaluation": evaluation}), MINE)


def test_uploads_that_a_spec_names_are_told_apart_from_contents() -> None:
    spec = audit(
        evaluation={"source": {"kind": "hub", "path": "good/set"}}, model={"path": UPLOAD, "adapter": f"upload:{'b' * 64}"}
    )
    assert upload_digests(spec) == {"u:model": DIGEST, "u:adapter": "b" * 64, "u:dataset": DIGEST}


def test_the_model_of_a_local_labeller_is_a_source_like_others() -> None:
    def labelled_by(path: str) -> AuditSpec:
        return audit(labels={"labeller": {"kind": "local_lm", "path": path}})

    check_audit(labelled_by("good/judge@main"), MINE)
    check_audit(labelled_by(UPLOAD), MINE)
    assert upload_digests(labelled_by(UPLOAD))["u:labeller"] == DIGEST
    assert refused(labelled_by("evil/judge")).startswith("labels.labeller.path")
    assert refused(labelled_by("/etc")).startswith("labels.labeller.path")


def test_the_base_of_a_retraining_is_a_source_like_others() -> None:
    def retrained_from(path: str) -> AuditSpec:
        return audit(retraining={"base": path})

    for path in ("good/base@main", UPLOAD, "/data/open/base", "s3://bucket/models/base"):
        check_audit(retrained_from(path), MINE)
    assert upload_digests(retrained_from(UPLOAD))["u:base"] == DIGEST
    for path in ("evil/base", "/etc", "/data/open/../secret", "../base"):
        assert refused(retrained_from(path)).startswith("retraining.base: ")


def test_corrections_come_as_entries_and_not_as_a_path() -> None:
    entry = {"sae": DIGEST, "latent_id": 3, "rating": 1, "explanation": "Commas.", "by": "Ana"}
    check_audit(audit(labels={"corrections": [entry]}), MINE)
    assert refused(audit(labels={"corrections": "/data/open/corrections.yaml"})).startswith("labels.corrections")


def test_a_given_sae_is_no_path_of_a_worker() -> None:
    assert "sae.given" in refused(audit(sae={"kind": "topk", "given": "/data/open/sae"}))
    check_audit(audit(sae={"kind": "topk", "k": 8}), MINE)
