"""The package that the scripts share, with one subpackage per stage of the pipeline."""

import toolkit.minimum_python  # noqa: F401  # first: all other modules need a supported Python
