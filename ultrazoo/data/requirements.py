"""Imported before what needs numpy and pyarrow, so that two versions that do not work together are one clear error."""

from ultrazoo.distributions import require_arrays

require_arrays()
