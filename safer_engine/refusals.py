"""What an audit refuses that the spec, the model's config and the environment tell: before anything is read or computed."""

from __future__ import annotations

from safer_engine.labellers.endpoint_key import endpoint_key
from safer_engine.pipeline import AuditRequest, plan
from safer_engine.planning import model_size
from safer_engine.science.hook_place import hook_layer
from safer_engine.science.sae_budget import refuse_too_many_active, sae_width
from safer_engine.spec_labels import ChatApiLabeller
from safer_engine.store import ArtifactStore


def refuse_early(request: AuditRequest, store: ArtifactStore) -> None:
    """Refuse what would stop the audit later, as far as it can be told without loading the model.

    What a config does not say is not looked at here: a model that names its width otherwise is refused when it is loaded.

    Raises:
        ModelRefused: the model has no such block.
        SpecError: more active latents than there are, or, where labels are still to be computed, a labeller without a proper
            address or key.
    """
    spec, size = request.spec, model_size(request.sources.model.path)
    if size is not None:
        hook_layer(size.n_blocks, spec.hook.layer, spec.hook.depth)
        refuse_too_many_active(spec.sae, sae_width(spec.sae, size.d_in))
    labeller = spec.labels.labeller
    if isinstance(labeller, ChatApiLabeller) and any(p.name == "labels" and p.state == "compute" for p in plan(request, store)):
        from safer_engine.labellers.chat_api import chat_address

        chat_address(labeller.base_url)
        endpoint_key(labeller)
