"""The subcommands of ``titanmac``, one module each."""
