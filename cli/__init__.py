"""The ``fpo`` command."""

import fpo_core as fpo_core  # claims our packages' names before one of them is imported
