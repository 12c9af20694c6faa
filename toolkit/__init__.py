"""The package that the scripts share, with subpackages for data, models and training."""

import toolkit.supported_python  # noqa: F401  # first: all other modules need a supported Python

__version__ = "1.0.0"
