"""The tests are about what is built in: plugins that happen to be installed stay out, unless a test wants them."""

import os

os.environ.setdefault("ULTRAZOO_DISABLE_PLUGINS", "all")
