"""The subcommands of ``split-server``, each imported when it is called."""
