"""What SAEs say of where they read, as places of this project: the one map of their names.

- TransformerLens' names, which sae-lens writes: ``blocks.L.hook_resid_post``, since version 3
  ``blocks.L.hook_out``;
- module paths of the Hugging Face model: sparsify's folders (``layers.L``, ``layers.L.mlp``), the
  ``hf_hook_name`` that sae-lens has for some releases (``model.layers.L.output``);
- ``blocks.L`` where a path of Gemma Scope says the layer alone.
"""

import re
from typing import NamedTuple

from fpo_core.hookpoint import Site
from fpo_core.models.architectures import Architecture

# What the same tensor is called; TransformerLens' hook_mlp_out is after Gemma's second norm too.
_SITES: dict[str, Site] = {
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_out": "resid_post",
}
# The modules of version 3, whose hook_out is a tensor of the block, as ours are called.
_MODULES = {"mlp.hook_out": "mlp", "ln2_post.hook_out": "post_feedforward_layernorm"}

_BLOCK = re.compile(r"blocks\.(\d+)(?:\.(.+))?")
# Around the list of blocks: as a base model, a causal LM, and the two layouts of a multimodal one.
_MODULE = re.compile(
    r"(?:model\.|transformer\.|language_model\.|model\.language_model\.|language_model\.model\.)?"
    r"(layers|h)\.(\d+)(?:\.(?!input$|output$)(\w[\w.]*?))?(?:\.(input|output))?"
)


class Declared(NamedTuple):
    """A place as an SAE names it."""

    layer: int
    site: Site | None  # None: it names the layer alone


def declared_place(name: str, architecture: Architecture) -> Declared | None:
    """The place that a hook's name means in an architecture.

    Args:
        name: as the SAE declares it.
        architecture: of the model; module paths mean what they are there.

    Returns:
        None for a tensor that is no site here: attention heads, embeddings, a branch's input.
    """
    if block := _BLOCK.fullmatch(name):
        layer, hook = int(block[1]), block[2]
        if hook in (
            "hook_resid_pre",
            "hook_in",
        ):  # the stream before a block is that after the one before it
            return Declared(layer - 1, "resid_post") if layer else None
        if hook in _MODULES:
            return Declared(layer, "mlp_out") if _MODULES[hook] == architecture.mlp_out else None
        if hook is None or hook in _SITES:
            return Declared(layer, _SITES[hook] if hook else None)
        return None
    module = _MODULE.fullmatch(name)
    if not module or module[1] != architecture.blocks or module[4] == "input":
        return None
    sites: dict[str | None, Site] = {None: "resid_post", architecture.mlp_out: "mlp_out"}
    site = sites.get(module[3])
    return Declared(int(module[2]), site) if site else None
