"""``python -m scripts.app``: a page for the browser to generate, watch, edit, and look at orders."""
