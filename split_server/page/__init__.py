"""The operator's page in a browser: its session, its routes, and its files in ``assets/``."""
