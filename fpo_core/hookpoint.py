"""Where in a model an SAE reads."""

from typing import Literal, NamedTuple

Site = Literal["resid_post", "mlp_out", "final_norm"]


class Hookpoint(NamedTuple):
    """A place in a model: see ``fpo_core/models/hooks.py`` for what each site is."""

    layer: int  # decoder block, from 0
    site: Site = "resid_post"

    def __str__(self) -> str:
        """As errors name it."""
        return f"layer {self.layer} {self.site}"
