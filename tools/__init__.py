"""Programs that write the generated parts of `docs/`; no package imports them."""
