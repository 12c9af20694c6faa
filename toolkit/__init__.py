"""The package that the scripts share, with subpackages for data, models and training."""

# First: all other modules need a supported Python and its packages.
import toolkit.startup
import toolkit.supported_python  # noqa: F401

__version__ = "1.0.0"
