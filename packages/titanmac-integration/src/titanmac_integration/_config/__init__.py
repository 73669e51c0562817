"""The configuration of a model: the dataclass, its rules and its named shapes."""
