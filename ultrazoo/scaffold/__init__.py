"""A new plugin from template files: a distribution that installs, passes its tests and trains."""
