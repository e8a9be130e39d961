"""The version, apart so that building a package does not import torch."""

__version__ = "0.1.0"
