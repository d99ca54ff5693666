"""MeloFormer: long-song symbolic music generation with structured sparse attention."""

__version__ = "0.1.0"
