"""Everything that has weights. Importing it fills the registries of dcris.config."""

from dcris.models import adapters, encoders

__all__ = ["adapters", "encoders"]
