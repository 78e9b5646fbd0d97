"""What a user writes: the config, its plan, overrides on the command line, strict YAML."""
