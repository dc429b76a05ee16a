"""Configuration: the schema, its checks, and how a run is composed from `conf/`."""
