"""Console scripts. Thin: they check the configuration, then import what runs it."""
