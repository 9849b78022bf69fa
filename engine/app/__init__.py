"""A page for the browser: generate, watch, edit, look at orders."""
